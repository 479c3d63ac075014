//! What the command line can say.

mod migration;

use std::path::PathBuf;

use clap::{Args, Subcommand};
use guest_tests::Size;
use guest_tests::mmio::Wait;

use crate::scenario::Scenario;
use crate::vmm::{DriveCache, DriveFormat};

pub(super) use migration::{Best, Migration, OtherHost, Work};

/// Measures Ferry, and QEMU beside it, on this machine.
#[derive(Args, Clone, Debug, PartialEq)]
pub struct Options {
    #[command(flatten)]
    pub(super) common: Common,
    #[command(subcommand)]
    pub(super) what: What,
}

#[derive(Args, Clone, Debug, PartialEq)]
pub(super) struct Common {
    /// How often each VMM is measured
    #[arg(long, global = true, default_value_t = 5, value_parser = clap::value_parser!(u16).range(1..))]
    pub(super) runs: u16,
    /// The build of Ferry to measure, if it is not this one
    #[arg(long, global = true)]
    pub(super) ferry: Option<PathBuf>,
    /// Another build of Ferry to compare with
    #[arg(long, global = true, value_name = "FERRY")]
    pub(super) before: Option<PathBuf>,
    /// Leave QEMU out
    #[arg(long, global = true)]
    pub(super) without_qemu: bool,
    /// Forbid huge pages to every VMM: where the machine itself is virtual, they can be slow
    #[arg(long, global = true)]
    pub(super) no_huge_pages: bool,
    /// Write every figure of every run to this file
    #[arg(long, global = true, value_name = "FILE")]
    pub(super) json: Option<PathBuf>,
    /// Write a page with tables and plots to this file
    #[arg(long, global = true, value_name = "FILE")]
    pub(super) html: Option<PathBuf>,
}

#[derive(Clone, Debug, PartialEq, Subcommand)]
pub(super) enum What {
    /// All known scenarios of a migration, one after the other
    Suite {
        /// Only this one; can be given several times
        #[arg(long, value_name = "NAME", value_parser = known_scenario)]
        scenario: Vec<Scenario>,
        #[command(flatten)]
        best: Best,
        #[command(flatten)]
        other: OtherHost,
    },
    /// A running guest moves to a second process on this machine
    Migration(Box<Migration>),
    /// From the start of the process to the guest's first instruction; resident memory
    Start(Box<Work>),
    /// From `stop` to its answer, whatever the guest does
    Pause {
        /// How often each guest is paused
        #[arg(long, default_value_t = 100)]
        times: usize,
    },
    /// How fast the guest's driver finds its disk
    Disk(Disk),
    /// Runs destinations for a benchmark on another host, until it is ended
    Agent {
        /// Where to listen; port 0 is any that is free
        #[arg(long, value_name = "HOST:PORT")]
        listen: String,
        /// A file with the secret that the other host must know: 16 bytes or more
        #[arg(long, value_name = "FILE")]
        token_file: PathBuf,
    },
}

#[derive(Args, Clone, Debug, PartialEq)]
pub(super) struct Disk {
    /// The image's format
    #[arg(long, value_enum, default_value = "raw")]
    pub(super) format: DriveFormat,
    /// How the host's page cache is used
    #[arg(long, value_enum, default_value = "writeback")]
    pub(super) cache: DriveCache,
    /// How the guest waits for its disk: irq, poll
    #[arg(long, default_value = "irq", value_parser = word::<Wait>)]
    pub(super) wait: Wait,
    /// The disk's size
    #[arg(long, default_value = "256M", value_parser = word::<Size>)]
    pub(super) size: Size,
    /// How long each measurement lasts
    #[arg(long, default_value_t = 1)]
    pub(super) seconds: u64,
    /// Only work whose description contains this, such as `randread` or `depth 32`
    #[arg(long, default_value = "")]
    pub(super) only: String,
    /// The directory for the image, on the file system to be measured
    #[arg(long, default_value = ".")]
    pub(super) dir: PathBuf,
}

fn known_scenario(name: &str) -> Result<Scenario, String> {
    Scenario::named(name).ok_or_else(|| {
        let names: Vec<String> = Scenario::all()
            .into_iter()
            .map(|known| known.name)
            .collect();
        format!("the known ones are {}", names.join(", "))
    })
}

fn word<T: std::str::FromStr>(text: &str) -> Result<T, String> {
    text.parse()
        .map_err(|_| "neither a known word nor a number with a unit (K, M, G)".to_owned())
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use clap::Parser;
    use guest_tests::dirtier::Rate;

    use super::*;
    use crate::scenario::Link;

    #[derive(Debug, Parser)]
    struct Cli {
        #[command(flatten)]
        options: Options,
    }

    fn migration(arguments: &[&str]) -> Result<Scenario, clap::Error> {
        let all = ["bench", "migration"].iter().chain(arguments);
        match Cli::try_parse_from(all)?.options.what {
            What::Migration(migration) => Ok(migration.scenario()),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn a_scenario_differs_where_it_is_told_to() {
        assert_eq!(
            migration(&["text-1g"]).unwrap(),
            Scenario::named("text-1g").unwrap()
        );
        let scenario = migration(&[
            "text-1g",
            "--link=0",
            "--rate=max",
            "--downtime-limit=100",
            "--vcpus=4",
            "--qemu-with=multifd=on,multifd-channels=4",
        ])
        .unwrap();
        assert_eq!(scenario.link, Link::Loopback);
        assert_eq!(scenario.vcpus, 4);
        assert_eq!(scenario.work.rate, Rate::Max);
        assert_eq!(scenario.downtime_limit, Duration::from_millis(100));
        assert_eq!(
            scenario.settings.qemu,
            ["multifd=on", "multifd-channels=4"].map(|text| text.parse().unwrap())
        );
        assert!(!scenario.settings.ferry.is_empty());
    }

    #[test]
    fn memory_is_there_before_where_it_is_asked_for() {
        let prealloc = |arguments: &[&str]| migration(arguments).unwrap().prealloc;
        assert!(prealloc(&["idle"]) && !prealloc(&["idle", "--without-prealloc"]));
        assert!(!prealloc(&["sparse"]) && prealloc(&["sparse", "--prealloc"]));
        assert!(migration(&["idle", "--prealloc", "--without-prealloc"]).is_err());
        assert!(migration(&["text", "--tune-qemu", "--qemu-with=multifd=on"]).is_err());
    }

    #[test]
    fn what_is_wrong_is_told() {
        let error = migration(&["fast"]).unwrap_err().to_string();
        assert!(error.contains("idle, busy, heavy"), "{error}");
        assert!(migration(&["--qemu-with=multifd"]).is_err());
        assert!(migration(&["--vcpus=0"]).is_err());
        assert!(migration(&["--destination=host:7000"]).is_err());
        assert!(Cli::try_parse_from(["bench", "agent", "--listen=127.0.0.1:0"]).is_err());
        assert!(Cli::try_parse_from(["bench", "suite", "--runs=0"]).is_err());
    }
}
