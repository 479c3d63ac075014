//! What a machine is made of: as its user chose it, and as it travels with its guest.

use std::path::PathBuf;

use devices::image::{Cache, Format};
pub use devices::virtio::balloon::Options as BalloonOptions;
use devices::virtio::net::{MacAddress, NetConfig};
use serde::{Deserialize, Serialize};

use super::backends::Backends;
use crate::memory::Backing;

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
    /// A disk.
    Block(BlockConfig),
    /// A memory balloon.
    Balloon(BalloonOptions),
    /// A console.
    Console,
    /// A network card.
    Net(NetConfig),
}

/// A disk, as its guest sees it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct BlockConfig {
    /// Its name in commands; unique.
    pub id: String,
    /// Its size in bytes.
    pub capacity: u64,
    /// Whether the guest can't write it.
    pub readonly: bool,
    /// Its serial number, of at most [`SERIAL_LEN`](devices::virtio::blk::SERIAL_LEN) bytes.
    pub serial: String,
}

/// `--disk`: an image on this host, and how the guest sees it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct DiskOptions {
    /// The image.
    pub file: PathBuf,
    /// Its format; otherwise it is guessed from its contents.
    pub format: Option<Format>,
    /// Never write to it.
    pub readonly: bool,
    /// How the host's page cache is used.
    pub cache: Cache,
    /// The disk's name; otherwise `disk` and its number, from 0.
    pub id: Option<String>,
    /// The serial number that the guest reads.
    pub serial: Option<String>,
    /// When its contents arrive with a guest: room for what they take is enough, though the guest
    /// may write more later.
    pub overcommit: bool,
}

impl DiskOptions {
    /// The name of the disk, which is that of this number on the command line.
    pub fn id(&self, index: usize) -> String {
        self.id.clone().unwrap_or_else(|| format!("disk{index}"))
    }
}

impl VirtioConfig {
    /// The kind of device, as messages call it.
    pub fn kind_name(&self) -> &'static str {
        match self {
            Self::Rng => "virtio-rng",
            Self::Block(_) => "virtio-blk",
            Self::Balloon(_) => "virtio-balloon",
            Self::Console => "virtio-console",
            Self::Net(_) => "virtio-net",
        }
    }
}

/// A network card, as given with `--net`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GivenNet {
    /// `ifname`: the host's tap interface; `%d` in it stands for a number.
    pub ifname: String,
    /// `mac`.
    pub mac: Option<MacAddress>,
    /// `id`: how commands call it.
    pub id: Option<String>,
}

impl GivenNet {
    /// How commands call the network card of that index.
    pub fn id_at(&self, index: usize) -> String {
        let id = self.id.clone();
        id.unwrap_or_else(|| format!("net{index}"))
    }
}

/// What was given on the command line. What was not is `None`: a machine that is started gets the
/// default, one that arrives gets what its source has.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Given {
    /// `--memory`: its size in bytes.
    pub memory: Option<u64>,
    /// What else `--memory` says. It is the host's own matter: nothing of it is compared.
    pub backing: Backing,
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
    /// `--disk`.
    pub disks: Vec<DiskOptions>,
    /// `--rng`.
    pub rng: bool,
    /// `--balloon`.
    pub balloon: Option<BalloonOptions>,
    /// Whether `--console` was given. What it is connected to is the host's matter.
    pub console: bool,
    /// `--net`, each time.
    pub net: Vec<GivenNet>,
}

impl Given {
    /// The configuration of a machine that is started here on `backends`.
    pub fn configuration(&self, backends: &Backends) -> MachineConfig {
        MachineConfig {
            memory: self.memory.unwrap_or(DEFAULT_MEMORY),
            vcpus: self.vcpus.unwrap_or(1),
            cpu: self.cpu.clone().unwrap_or_else(|| DEFAULT_CPU.to_owned()),
            command_line: self.command_line.clone().unwrap_or_default(),
            virtio: self.virtio(backends),
        }
    }

    /// The virtio devices of a machine that is started here.
    fn virtio(&self, backends: &Backends) -> Vec<VirtioConfig> {
        let disks = self.disks.iter().zip(backends.disks());
        let mut virtio: Vec<_> = disks
            .map(|(options, disk)| {
                VirtioConfig::Block(BlockConfig {
                    id: disk.id().to_owned(),
                    capacity: disk.image().capacity(),
                    readonly: options.readonly,
                    serial: options.serial.clone().unwrap_or_default(),
                })
            })
            .collect();
        if self.rng {
            virtio.push(VirtioConfig::Rng);
        }
        virtio.extend(self.balloon.map(VirtioConfig::Balloon));
        if self.console {
            virtio.push(VirtioConfig::Console);
        }
        virtio.extend(backends.net_configs());
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
        differences.extend(self.disk_differences(virtio));
        differences.extend(self.net_differences(virtio));
        differences
    }

    /// Taps are the host's own, so that each side must say which.
    fn net_differences(&self, arriving: &[VirtioConfig]) -> Vec<String> {
        let arriving: Vec<_> = arriving
            .iter()
            .filter_map(|config| match config {
                VirtioConfig::Net(net) => Some(net),
                _ => None,
            })
            .collect();
        let mut differences = Vec::new();
        if self.net.len() != arriving.len() {
            differences.push(format!(
                "the guest's network devices are {} in number, but --net is given {} times at the \
                 destination: give it once for each, in their order (--net tap,ifname=NAME)",
                arriving.len(),
                self.net.len()
            ));
        }
        for (index, (here, there)) in self.net.iter().zip(arriving).enumerate() {
            if let Some(mac) = here.mac
                && mac != there.mac
            {
                differences.push(format!(
                    "the MAC address of network device {index} is {mac} at the destination, but \
                     {} at the source",
                    there.mac
                ));
            }
        }
        differences
    }

    /// The same for the disks: every disk of the guest needs an image here.
    fn disk_differences(&self, arriving: &[VirtioConfig]) -> Vec<String> {
        let there: Vec<_> = arriving
            .iter()
            .filter_map(|device| match device {
                VirtioConfig::Block(config) => Some(config),
                _ => None,
            })
            .collect();
        let here = self.disks.iter().enumerate();
        let here: Vec<_> = here.map(|(index, disk)| (disk.id(index), disk)).collect();
        let mut differences = Vec::new();
        for disk in &there {
            let id = &disk.id;
            let Some((_, options)) = here.iter().find(|(other, _)| other == id) else {
                differences.push(format!(
                    "the guest has the disk {id:?} of {} bytes, but the destination has none of \
                     that name: give it --disk file=PATH,id=NAME with the image",
                    disk.capacity
                ));
                continue;
            };
            if options.readonly != disk.readonly {
                differences.push(format!(
                    "disk {id:?} is {} at the destination, but {} at the source",
                    access(options.readonly),
                    access(disk.readonly)
                ));
            }
            if let Some(serial) = &options.serial
                && *serial != disk.serial
            {
                differences.push(format!(
                    "disk {id:?} has the serial number {serial:?} at the destination, but {:?} at \
                     the source",
                    disk.serial
                ));
            }
        }
        for (id, _) in &here {
            if !there.iter().any(|disk| disk.id == *id) {
                differences.push(format!(
                    "--disk {id:?} is given at the destination, but the guest has no such disk"
                ));
            }
        }
        differences
    }
}

fn access(readonly: bool) -> &'static str {
    if readonly { "read-only" } else { "writable" }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn taps_are_given_for_all_cards_and_addresses_are_the_guests() {
        let mac = |last| MacAddress([0x52, 0x54, 0, 0, 0, last]);
        let card = |last| {
            VirtioConfig::Net(NetConfig {
                mac: mac(last),
                mtu: None,
            })
        };
        let arriving = MachineConfig {
            memory: 1 << 30,
            vcpus: 1,
            cpu: "host".to_owned(),
            command_line: String::new(),
            virtio: vec![card(1), VirtioConfig::Rng, card(2)],
        };
        let tap = |mac| GivenNet {
            ifname: "tap0".to_owned(),
            mac,
            id: None,
        };
        let differences = |net: Vec<GivenNet>| {
            let given = Given {
                net,
                ..Given::default()
            };
            given.differences(&arriving)
        };
        assert!(differences(vec![tap(None), tap(Some(mac(2)))]).is_empty());
        assert_eq!(
            differences(vec![tap(None)]),
            [
                "the guest's network devices are 2 in number, but --net is given 1 times at the \
                 destination: give it once for each, in their order (--net tap,ifname=NAME)"
            ]
        );
        assert_eq!(
            differences(vec![tap(Some(mac(9))), tap(None)]),
            [
                "the MAC address of network device 0 is 52:54:00:00:00:09 at the destination, but \
                 52:54:00:00:00:01 at the source"
            ]
        );
    }

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
