//! What the guest is and does while it is measured.

use guest_tests::Size;
use guest_tests::dirtier::{Data, Options, Rate};
use serde::Serialize;

/// The way that the guest takes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Link {
    /// TCP on 127.0.0.1.
    #[default]
    Loopback,
    /// TCP between two network namespaces, over a link of that rate.
    Shaped {
        /// Megabits (10^6) a second, each way.
        mbit: u32,
    },
}

/// A guest, its work and its way.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Scenario {
    /// For tables.
    pub name: String,
    /// The guest's memory in bytes.
    pub memory: u64,
    /// How much of it the guest fills, how fast it rewrites how much of that, and how often its
    /// heart beats.
    pub work: Options,
    /// Where it moves along.
    pub link: Link,
}

impl Scenario {
    /// 1 GiB, of which 512 MiB hold random data and 64 MiB are rewritten at 20,000 pages/s.
    pub fn busy() -> Self {
        Self::new("busy", 1 << 30, Options::default())
    }

    /// The same guest, which only reads.
    pub fn idle() -> Self {
        Self::new(
            "idle",
            1 << 30,
            Options {
                rate: Rate::PerSecond(0),
                ..Options::default()
            },
        )
    }

    /// 4 GiB, of which 64 MiB were ever touched, idle.
    pub fn sparse() -> Self {
        let work = Options {
            fill: Size(64 << 20),
            data: Data::Random,
            rate: Rate::PerSecond(0),
            ..Options::default()
        };
        Self::new("sparse", 4 << 30, work)
    }

    /// The one with that name.
    pub fn named(name: &str) -> Option<Self> {
        [Self::busy(), Self::idle(), Self::sparse()]
            .into_iter()
            .find(|known| known.name == name)
    }

    fn new(name: &str, memory: u64, work: Options) -> Self {
        Self {
            name: name.to_owned(),
            memory,
            work,
            link: Link::Loopback,
        }
    }
}

/// All that matters, defaults included.
impl std::fmt::Display for Scenario {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self {
            name,
            memory,
            work,
            link,
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
        write!(
            f,
            "{name}: guest of {memory} MiB, {fill} of it {data}, rewrites "
        )?;
        match rate {
            Rate::PerSecond(0) => write!(f, "nothing")?,
            rate => write!(f, "{rate} pages/s in {ws}, {pattern}")?,
        }
        match link {
            Link::Loopback => write!(f, "; heartbeat every {heartbeat} µs; over loopback"),
            Link::Shaped { mbit } => {
                write!(f, "; heartbeat every {heartbeat} µs; over {mbit} Mbit/s")
            }
        }
    }
}

impl Serialize for Scenario {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        use serde::ser::SerializeStruct;
        let mut fields = serializer.serialize_struct("Scenario", 4)?;
        fields.serialize_field("name", &self.name)?;
        fields.serialize_field("memory", &self.memory)?;
        fields.serialize_field("guest", &self.work.to_string())?;
        fields.serialize_field("link", &self.link)?;
        fields.end()
    }
}
