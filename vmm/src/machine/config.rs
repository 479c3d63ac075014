//! What a machine is made of: as its user chose it, and as it travels with its guest.

use std::path::PathBuf;

pub use devices::virtio::balloon::Options as BalloonOptions;
use serde::{Deserialize, Serialize};

/// The RAM of a machine whose user didn't say, in bytes: 128 MiB, as in QEMU.
pub const DEFAULT_MEMORY: u64 = 128 << 20;

/// The CPU model of a machine whose user didn't say.
pub const DEFAULT_CPU: &str = "host";

/// A machine's configuration: all that a destination must have alike.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MachineConfig {
    /// Bytes of RAM.
    pub memory: u64,
    /// The number of vCPUs.
    pub vcpus: u32,
    /// The CPU model with its flags, as on the command line.
    pub cpu: String,
    /// The kernel's command line.
    pub command_line: String,
    /// The virtio devices, in the order of their slots.
    pub virtio: Vec<VirtioConfig>,
}

/// A virtio device, as its guest sees it. It travels by the number of the variant: new ones come
/// last.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum VirtioConfig {
    /// An entropy source.
    Rng,
    /// A memory balloon.
    Balloon(BalloonOptions),
    /// A console.
    Console,
}

impl VirtioConfig {
    /// The kind of device, as messages call it.
    pub fn kind_name(&self) -> &'static str {
        match self {
            Self::Rng => "virtio-rng",
            Self::Balloon(_) => "virtio-balloon",
            Self::Console => "virtio-console",
        }
    }
}

/// What was given on the command line. What was not is `None`: a machine that is started gets the
/// default, one that arrives gets what its source has.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Given {
    /// `--memory`, in bytes.
    pub memory: Option<u64>,
    /// `--smp`.
    pub vcpus: Option<u32>,
    /// `--cpu`.
    pub cpu: Option<String>,
    /// `--append`.
    pub command_line: Option<String>,
    /// `--kernel`.
    pub kernel: Option<PathBuf>,
    /// `--initrd`.
    pub initrd: Option<PathBuf>,
    /// `--rng`.
    pub rng: bool,
    /// `--balloon`.
    pub balloon: Option<BalloonOptions>,
    /// Whether `--console` was given. What it is connected to is the host's matter.
    pub console: bool,
}

impl Given {
    /// The configuration of a machine that is started here.
    pub fn configuration(&self) -> MachineConfig {
        MachineConfig {
            memory: self.memory.unwrap_or(DEFAULT_MEMORY),
            vcpus: self.vcpus.unwrap_or(1),
            cpu: self.cpu.clone().unwrap_or_else(|| DEFAULT_CPU.to_owned()),
            command_line: self.command_line.clone().unwrap_or_default(),
            virtio: self.virtio(),
        }
    }

    /// The virtio devices of a machine that is started here.
    fn virtio(&self) -> Vec<VirtioConfig> {
        let mut virtio = Vec::new();
        if self.rng {
            virtio.push(VirtioConfig::Rng);
        }
        virtio.extend(self.balloon.map(VirtioConfig::Balloon));
        if self.console {
            virtio.push(VirtioConfig::Console);
        }
        virtio
    }

    /// What was given here and differs from the machine that arrives: a sentence each.
    pub fn differences(&self, arriving: &MachineConfig) -> Vec<String> {
        let MachineConfig {
            memory,
            vcpus,
            cpu,
            command_line,
            virtio,
        } = arriving;
        let mut differences = Vec::new();
        // Quoted with escapes: the source's are a peer's words.
        let mut compare = |option: &str, here: Option<String>, there: String| {
            if let Some(here) = here
                && here != there
            {
                differences.push(format!(
                    "{option} is {here:?} at the destination, but {there:?} at the source"
                ));
            }
        };
        let bytes = |bytes: u64| format!("{bytes} bytes");
        compare("--memory", self.memory.map(bytes), bytes(*memory));
        compare(
            "--smp",
            self.vcpus.map(|n| n.to_string()),
            vcpus.to_string(),
        );
        compare("--cpu", self.cpu.clone(), cpu.clone());
        compare("--append", self.command_line.clone(), command_line.clone());
        if self.rng && !virtio.contains(&VirtioConfig::Rng) {
            differences.push("--rng is given at the destination, but not at the source".to_owned());
        }
        if self.console && !virtio.contains(&VirtioConfig::Console) {
            differences
                .push("--console is given at the destination, but not at the source".to_owned());
        }
        if let Some(here) = self.balloon {
            let there = virtio.iter().find_map(|device| match device {
                VirtioConfig::Balloon(there) => Some(*there),
                _ => None,
            });
            match there {
                None => differences.push(
                    "--balloon is given at the destination, but not at the source".to_owned(),
                ),
                Some(there) if there != here => differences.push(format!(
                    "--balloon is \"{here}\" at the destination, but \"{there}\" at the source"
                )),
                Some(_) => {}
            }
        }
        differences
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_was_given_is_compared() {
        let arriving = MachineConfig {
            memory: 1 << 30,
            vcpus: 2,
            cpu: "host".to_owned(),
            command_line: "rate=5".to_owned(),
            virtio: vec![VirtioConfig::Balloon(BalloonOptions {
                deflate_on_oom: true,
                ..BalloonOptions::default()
            })],
        };
        assert!(Given::default().differences(&arriving).is_empty());
        let given = Given {
            memory: Some(1 << 30),
            vcpus: Some(4),
            command_line: Some(String::new()),
            rng: true,
            console: true,
            balloon: Some(BalloonOptions::default()),
            ..Given::default()
        };
        assert_eq!(
            given.differences(&arriving),
            [
                "--smp is \"4\" at the destination, but \"2\" at the source",
                "--append is \"\" at the destination, but \"rate=5\" at the source",
                "--rng is given at the destination, but not at the source",
                "--console is given at the destination, but not at the source",
                "--balloon is \"free-page-reporting=off,free-page-hint=off,deflate-on-oom=off\" at \
                 the destination, but \
                 \"free-page-reporting=off,free-page-hint=off,deflate-on-oom=on\" at the source",
            ]
        );
    }
}
