//! What the guest is and does while it is measured, and how it moves.

use std::fmt;
use std::time::Duration;

use guest_tests::Size;
use guest_tests::dirtier::{Data, Options, Rate};
use serde::{Serialize, Serializer};

use crate::setting::{Setting, Settings};

/// The way that the guest takes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Link {
    /// TCP on 127.0.0.1.
    #[default]
    Loopback,
    /// TCP between this host and that of an agent, as it is.
    Between,
    /// TCP between two network namespaces, over a link of that rate.
    Shaped {
        /// Megabits (10^6) a second, each way.
        mbit: u32,
    },
}

/// A guest, its work, its way, and how it is to go.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Scenario {
    /// For tables.
    pub name: String,
    /// The guest's memory in bytes.
    pub memory: u64,
    /// Its vCPUs; the first does all of its work.
    pub vcpus: u8,
    /// How much of it the guest fills with what, how fast it rewrites how much of that in which
    /// order, and how often its heart beats.
    #[serde(rename = "guest", serialize_with = "as_text")]
    pub work: Options,
    /// Where it moves along.
    pub link: Link,
    /// How long it may be stopped.
    #[serde(rename = "downtime-limit-ms", serialize_with = "as_ms")]
    pub downtime_limit: Duration,
    /// When it goes over into post-copy, from the start on; `None` is pre-copy to the end.
    #[serde(rename = "postcopy-after-ms", serialize_with = "as_ms_if_any")]
    pub postcopy_after: Option<Duration>,
    /// Whether the destination takes all of its RAM from the host before the guest comes. Where
    /// the machine is itself virtual, the first touch of a page can take longer than all the rest.
    pub prealloc: bool,
    /// Capabilities and parameters of each VMM.
    pub settings: Settings,
    /// What else may be best for QEMU; its [`settings`](Self::settings) are one of them.
    #[serde(skip)]
    pub qemu_candidates: Vec<Vec<Setting>>,
}

/// What may be best for QEMU.
const PLAIN: &[&str] = &[];
const MULTIFD: &[&str] = &["multifd=on"];
const ZSTD: &[&str] = &["multifd=on", "multifd-compression=zstd"];
const XBZRLE: &[&str] = &["xbzrle=on"];
const XBZRLE_LARGE: &[&str] = &["xbzrle=on", "xbzrle-cache-size=536870912"];
const COMPRESS: &[&str] = &["compress=on", "compress-threads=2", "decompress-threads=2"];

impl Scenario {
    /// All that have a name, those of the suite in its order.
    pub fn all() -> Vec<Self> {
        let idle = Options {
            rate: Rate::PerSecond(0),
            ..Options::default()
        };
        let busy = Options::default();
        let heavy = Options {
            rate: Rate::PerSecond(150_000),
            ws: Size(256 << 20),
            ..Options::default()
        };
        let sparse = Options {
            fill: Size(64 << 20),
            ..idle
        };
        let text = |work| Options {
            data: Data::Text,
            ..work
        };
        let gigabit = Link::Shaped { mbit: 1000 };
        // The first is what QEMU gets unless it is tuned.
        let bulk: &[&[&str]] = &[PLAIN, MULTIFD];
        let dirty: &[&[&str]] = &[PLAIN, XBZRLE, MULTIFD];
        let words: &[&[&str]] = &[PLAIN, ZSTD, MULTIFD];
        let narrow: &[&[&str]] = &[XBZRLE, XBZRLE_LARGE, ZSTD, COMPRESS];
        [
            ("idle", 1, idle, Link::Loopback, bulk),
            ("busy", 1, busy, Link::Loopback, bulk),
            ("heavy", 1, heavy, Link::Loopback, bulk),
            ("sparse", 4, sparse, Link::Loopback, bulk),
            ("text", 1, text(idle), Link::Loopback, words),
            ("idle-1g", 1, idle, gigabit, bulk),
            ("busy-1g", 1, busy, gigabit, dirty),
            ("text-1g", 1, text(busy), gigabit, narrow),
        ]
        .into_iter()
        .map(|(name, gib, work, link, qemu)| Self {
            name: name.to_owned(),
            memory: gib << 30,
            vcpus: 1,
            work,
            link,
            downtime_limit: Duration::from_millis(30),
            postcopy_after: None,
            // Memory that is never used is the point of "sparse".
            prealloc: name != "sparse",
            settings: Settings {
                ferry: match work.data {
                    Data::Text => optional(&["multifd=on", "multifd-compression=zstd"]),
                    _ => vec![],
                },
                qemu: qemu.first().map(|best| optional(best)).unwrap_or_default(),
            },
            qemu_candidates: qemu.iter().map(|settings| optional(settings)).collect(),
        })
        .collect()
    }

    /// The one with that name.
    pub fn named(name: &str) -> Option<Self> {
        Self::all().into_iter().find(|known| known.name == name)
    }
}

/// Settings that a VMM is measured without if it doesn't know them.
fn optional(settings: &[&str]) -> Vec<Setting> {
    let known = settings.iter().filter_map(|text| text.parse().ok());
    known
        .map(|setting| Setting {
            required: false,
            ..setting
        })
        .collect()
}

/// All that matters, defaults included, but the name.
impl fmt::Display for Scenario {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            name: _,
            memory,
            vcpus,
            work,
            link,
            downtime_limit,
            postcopy_after,
            prealloc,
            settings,
            qemu_candidates: _,
        } = self;
        let Options {
            fill,
            ws,
            data,
            rate,
            pattern,
            heartbeat,
            ..
        } = work;
        let memory = memory >> 20;
        write!(f, "guest of {memory} MiB")?;
        if *vcpus > 1 {
            write!(f, " and {vcpus} vCPUs")?;
        }
        write!(f, ", {fill} of it {data}, rewrites ")?;
        match rate {
            Rate::PerSecond(0) => write!(f, "nothing")?,
            rate => write!(f, "{rate} pages/s in {ws}, {pattern}")?,
        }
        write!(f, "; heartbeat every {heartbeat} µs; ")?;
        match link {
            Link::Loopback => write!(f, "over loopback")?,
            Link::Between => write!(f, "to another host")?,
            Link::Shaped { mbit } => write!(f, "over {mbit} Mbit/s")?,
        }
        match postcopy_after {
            None => write!(f, ", downtime limit {} ms", downtime_limit.as_millis())?,
            Some(after) => write!(f, ", post-copy after {} ms", after.as_millis())?,
        }
        if *prealloc {
            write!(f, ", the destination's memory preallocated")?;
        }
        for (name, settings) in [("Ferry", &settings.ferry), ("QEMU", &settings.qemu)] {
            if !settings.is_empty() {
                let settings: Vec<String> = settings.iter().map(Setting::to_string).collect();
                write!(f, "; {name}: {}", settings.join(" "))?;
            }
        }
        Ok(())
    }
}

fn as_text<S: Serializer>(work: &Options, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_str(work)
}

fn as_ms<S: Serializer>(time: &Duration, serializer: S) -> Result<S::Ok, S::Error> {
    as_ms_if_any(&Some(*time), serializer)
}

fn as_ms_if_any<S: Serializer>(time: &Option<Duration>, serializer: S) -> Result<S::Ok, S::Error> {
    time.map(|time| time.as_millis() as u64)
        .serialize(serializer)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_unique_and_lead_to_their_scenarios() {
        let all = Scenario::all();
        for scenario in &all {
            assert_eq!(Scenario::named(&scenario.name).as_ref(), Some(scenario));
        }
        assert_eq!(Scenario::named("fast"), None);
    }

    #[test]
    fn qemu_gets_one_of_its_candidates() {
        for scenario in Scenario::all() {
            let (settings, candidates) = (&scenario.settings.qemu, &scenario.qemu_candidates);
            assert!(candidates.contains(settings), "{}", scenario.name);
        }
        let preallocated = Scenario::all().into_iter().filter(|all| all.prealloc);
        let names: Vec<String> = preallocated.map(|scenario| scenario.name).collect();
        assert!(
            names.len() == 7 && !names.contains(&"sparse".to_owned()),
            "{names:?}"
        );
    }

    #[test]
    fn a_description_has_all_that_matters() {
        let described = |name: &str| Scenario::named(name).unwrap().to_string();
        assert_eq!(
            described("heavy"),
            "guest of 1024 MiB, 512M of it random, rewrites 150000 pages/s in 256M, sequential; \
             heartbeat every 200 µs; over loopback, downtime limit 30 ms, \
             the destination's memory preallocated"
        );
        assert_eq!(
            described("text-1g"),
            "guest of 1024 MiB, 512M of it text, rewrites 20000 pages/s in 64M, sequential; \
             heartbeat every 200 µs; over 1000 Mbit/s, downtime limit 30 ms, \
             the destination's memory preallocated; \
             Ferry: multifd=on multifd-compression=zstd; QEMU: xbzrle=on"
        );
    }
}
