//! What can be said of migrations: the scenario, where it differs, where the guest goes.

use std::path::PathBuf;
use std::time::Duration;

use clap::Args;
use guest_tests::Size;
use guest_tests::dirtier::{Data, Pattern, Rate};

use super::{known_scenario, word};
use crate::error::Error;
use crate::remote::Connection;
use crate::remote::token::Token;
use crate::scenario::{Link, Scenario};
use crate::setting::Setting;

#[derive(Args, Clone, Debug, PartialEq)]
pub(in crate::command) struct Migration {
    #[command(flatten)]
    work: Work,
    #[command(flatten)]
    pub(in crate::command) best: Best,
    #[command(flatten)]
    pub(in crate::command) other: OtherHost,
    /// The destination takes all of its memory from the host before the guest comes
    #[arg(long, conflicts_with = "without_prealloc")]
    prealloc: bool,
    /// The downtime limit
    #[arg(long, value_name = "MS")]
    downtime_limit: Option<u64>,
    /// Over a link of so many Mbit/s between two network namespaces (needs root), or on loopback if
    /// it is 0
    #[arg(long, value_name = "MBIT")]
    link: Option<u32>,
    /// Switch to post-copy so many ms after the start
    #[arg(long, value_name = "MS")]
    postcopy_after: Option<u64>,
    /// Capabilities and parameters for Ferry, instead of the scenario's
    #[arg(long, value_name = "NAME=VALUE,…", value_delimiter = ',')]
    ferry_with: Option<Vec<Setting>>,
    /// Capabilities and parameters for QEMU, instead of the scenario's
    #[arg(
        long,
        value_name = "NAME=VALUE,…",
        value_delimiter = ',',
        conflicts_with = "tune_qemu"
    )]
    qemu_with: Option<Vec<Setting>>,
}

/// Where the guest goes, if not to this host.
#[derive(Args, Clone, Debug, PartialEq)]
pub(in crate::command) struct OtherHost {
    /// The guest goes to the host of this agent (`ferry bench agent`)
    #[arg(long, value_name = "HOST:PORT", requires = "token_file")]
    destination: Option<String>,
    /// A file with the agent's secret
    #[arg(long, value_name = "FILE", requires = "destination")]
    token_file: Option<PathBuf>,
}

impl OtherHost {
    /// Connects to the agent, if there is to be one.
    pub(in crate::command) fn connect(&self) -> Result<Option<Connection>, Error> {
        match (&self.destination, &self.token_file) {
            (Some(address), Some(file)) => {
                Ok(Some(Connection::connect(address, &Token::read(file)?)?))
            }
            _ => Ok(None),
        }
    }
}

/// Whether VMMs get what is best for them.
#[derive(Args, Clone, Copy, Debug, PartialEq)]
pub(in crate::command) struct Best {
    /// The destination takes memory from the host as pages arrive, in every scenario
    #[arg(long)]
    pub(in crate::command) without_prealloc: bool,
    /// Measure twice with each of the settings that may be best for QEMU in the scenario, and then
    /// use those with the least total time
    #[arg(long)]
    pub(in crate::command) tune_qemu: bool,
}

impl Best {
    /// The scenario, without what is not wanted.
    pub(in crate::command) fn of(self, scenario: Scenario) -> Scenario {
        Scenario {
            prealloc: scenario.prealloc && !self.without_prealloc,
            ..scenario
        }
    }
}

/// A known scenario, and where it is to differ.
#[derive(Args, Clone, Debug, PartialEq)]
pub(in crate::command) struct Work {
    /// idle (1 GiB, 512 MiB random, rewriting nothing), busy (20,000 pages/s in 64 MiB), heavy
    /// (150,000 pages/s in 256 MiB), sparse (4 GiB, 64 MiB touched, idle), text (as idle, text-like
    /// data), idle-1g, busy-1g or text-1g (over 1 Gbit/s; text-1g is busy)
    #[arg(default_value = "busy", value_parser = known_scenario)]
    scenario: Scenario,
    /// The guest's memory
    #[arg(long, value_parser = word::<Size>)]
    memory: Option<Size>,
    /// The guest's vCPUs; the first does all of its work
    #[arg(long, value_parser = clap::value_parser!(u8).range(1..))]
    vcpus: Option<u8>,
    /// How much of it is filled
    #[arg(long, value_parser = word::<Size>)]
    fill: Option<Size>,
    /// With what: random, text, zero
    #[arg(long, value_parser = word::<Data>)]
    data: Option<Data>,
    /// How much is rewritten
    #[arg(long, value_parser = word::<Size>)]
    working_set: Option<Size>,
    /// At so many pages a second, or `max`
    #[arg(long, value_parser = word::<Rate>)]
    rate: Option<Rate>,
    /// In which order: sequential, random, hot
    #[arg(long, value_parser = word::<Pattern>)]
    pattern: Option<Pattern>,
    /// µs between heartbeats
    #[arg(long)]
    heartbeat: Option<u64>,
}

impl Work {
    pub(in crate::command) fn scenario(&self) -> Scenario {
        let mut scenario = self.scenario.clone();
        let work = &mut scenario.work;
        scenario.memory = self.memory.map_or(scenario.memory, |Size(bytes)| bytes);
        scenario.vcpus = self.vcpus.unwrap_or(scenario.vcpus);
        work.fill = self.fill.unwrap_or(work.fill);
        work.data = self.data.unwrap_or(work.data);
        work.ws = self.working_set.unwrap_or(work.ws);
        work.rate = self.rate.unwrap_or(work.rate);
        work.pattern = self.pattern.unwrap_or(work.pattern);
        work.heartbeat = self.heartbeat.unwrap_or(work.heartbeat);
        scenario
    }
}

impl Migration {
    pub(in crate::command) fn scenario(&self) -> Scenario {
        let mut scenario = self.best.of(self.work.scenario());
        scenario.prealloc |= self.prealloc;
        match self.link {
            None => {}
            Some(0) => scenario.link = Link::Loopback,
            Some(mbit) => scenario.link = Link::Shaped { mbit },
        }
        if let Some(limit) = self.downtime_limit {
            scenario.downtime_limit = Duration::from_millis(limit);
        }
        scenario.postcopy_after = self.postcopy_after.map(Duration::from_millis);
        let settings = &mut scenario.settings;
        if let Some(given) = &self.ferry_with {
            settings.ferry.clone_from(given);
        }
        if let Some(given) = &self.qemu_with {
            settings.qemu.clone_from(given);
        }
        scenario
    }
}
