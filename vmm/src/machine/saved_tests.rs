//! The saved state of every device that a machine can have, on one machine that has them all.

use std::collections::BTreeSet;
use std::path::Path;

use devices::image::{Cache, Format, Image};
use devices::virtio::blk::errors::{ErrorSink, IoError};
use devices::virtio::net::{MacAddress, NetConfig};
use devices::virtio::transport::{MMIO_LEN, QUEUE_NOTIFY};
use guest_tests::driver::skip;
use tempfile::TempDir;
use vm_memory::{Bytes, GuestAddress};

use super::*;
use crate::boot::VirtioMmioSlot;
use crate::kvm::tests::kvm_or_skip;
use crate::machine::config::{BalloonOptions, BlockConfig, DiskOptions, Given, GivenNet};
use crate::memory;

const MEMORY: u64 = 16 << 20;
/// The size of the disk that the saved block device has.
const CAPACITY: u64 = 1 << 20;
/// Where the drivers' rings are.
const RINGS: u64 = 1 << 20;
const RING_LEN: u64 = 1 << 16;
const QUEUES: u64 = 5;

/// The saved states of the first release and all later ones: they must load for ever.
const GOLDEN: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../devices/golden");

/// xorshift64*: Vigna, "An experimental exploration of Marsaglia's xorshift generators".
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }
}

struct Ignore;

impl ErrorSink for Ignore {
    fn io_error(&self, _: IoError) {}
}

/// A machine's devices, without vCPUs.
struct Everything {
    devices: Devices,
    vm: Arc<Vm>,
    slots: u64,
    _dir: TempDir,
}

/// A device that is not here does not compile: it belongs into [`Everything::new`], too.
fn assert_is_in_everything(config: &VirtioConfig) {
    match config {
        VirtioConfig::Rng
        | VirtioConfig::Block(_)
        | VirtioConfig::Balloon(_)
        | VirtioConfig::Console
        | VirtioConfig::Net(_) => {}
    }
}

impl Everything {
    fn new() -> Option<Self> {
        let kvm = kvm_or_skip()?;
        let layout = memory::layout(MEMORY).unwrap();
        let vm =
            Arc::new(Vm::new(&kvm, memory::map(&layout, &Default::default()).unwrap()).unwrap());
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("disk");
        Image::create(&file, Format::Raw, CAPACITY, None, Cache::Writeback).unwrap();
        let mut given = Given {
            disks: vec![DiskOptions {
                file,
                format: Some(Format::Raw),
                ..DiskOptions::default()
            }],
            net: vec![GivenNet {
                ifname: "ferry%d".to_owned(),
                mac: None,
                id: None,
            }],
            ..Given::default()
        };
        let mut virtio = vec![
            VirtioConfig::Block(BlockConfig {
                id: "disk0".to_owned(),
                capacity: CAPACITY,
                readonly: false,
                serial: String::new(),
            }),
            VirtioConfig::Rng,
            VirtioConfig::Balloon(BalloonOptions {
                free_page_reporting: true,
                free_page_hint: true,
                deflate_on_oom: true,
            }),
            VirtioConfig::Console,
        ];
        let backends = Backends::open(&given, Arc::new(Ignore)).or_else(|err| {
            skip(&format!("the network card: {err}"));
            given.net.clear();
            Backends::open(&given, Arc::new(Ignore))
        });
        let backends = backends.unwrap();
        if !given.net.is_empty() {
            virtio.push(VirtioConfig::Net(NetConfig {
                mac: MacAddress([0x52, 0x54, 0, 1, 2, 3]),
                mtu: None,
            }));
        }
        virtio.iter().for_each(assert_is_in_everything);
        let output = Box::new(io::sink());
        let devices = Devices::new(&vm, output, Arc::new(|| ()), &virtio, &backends).unwrap();
        Some(Self {
            devices,
            vm,
            slots: virtio.len() as u64,
            _dir: dir,
        })
    }

    /// Replaces one body of `sections` and loads them all into devices as after power-on.
    fn load(&self, sections: &[Section], name: &str, body: &[u8]) -> Result<(), DeviceStateError> {
        self.devices.reset();
        let mut sections = sections.to_vec();
        for section in sections.iter_mut().filter(|section| section.name == name) {
            section.body = body.to_vec();
        }
        let mut sections = Sections::new(sections).unwrap();
        let loaded = self.devices.load(&mut sections);
        if loaded.is_ok() {
            sections.finish().unwrap();
        }
        loaded
    }

    fn save(&self) -> Vec<Section> {
        self.devices.save().unwrap()
    }

    fn set(&self, slot: u64, offset: u64, value: u32) {
        let base = VirtioMmioSlot::of(0).unwrap().addr;
        let (slot, offset) = self
            .devices
            .virtio
            .at(base + slot * MMIO_LEN + offset)
            .unwrap();
        slot.write(offset, &value.to_le_bytes());
    }

    fn get(&self, slot: u64, offset: u64) -> u32 {
        let base = VirtioMmioSlot::of(0).unwrap().addr;
        let (slot, offset) = self
            .devices
            .virtio
            .at(base + slot * MMIO_LEN + offset)
            .unwrap();
        let mut data = [0; 4];
        slot.read(offset, &mut data);
        u32::from_le_bytes(data)
    }

    /// A driver on every virtio device, with all queues and features, and something at the others.
    fn start_drivers(&self) {
        for slot in 0..self.slots {
            self.set(slot, 0x70, 3);
            for sel in [0, 1] {
                self.set(slot, 0x14, sel);
                let offered = self.get(slot, 0x10);
                self.set(slot, 0x24, sel);
                self.set(slot, 0x20, offered);
            }
            self.set(slot, 0x70, 11);
            for queue in 0..QUEUES {
                self.set(slot, 0x30, queue as u32);
                let size = self.get(slot, 0x34);
                let rings = RINGS + (slot * QUEUES + queue) * RING_LEN;
                self.set(slot, 0x38, size);
                for (register, address) in [
                    (0x80, rings),
                    (0x90, rings + 0x4000),
                    (0xa0, rings + 0x8000),
                ] {
                    self.set(slot, register, address as u32);
                }
                self.set(slot, 0x44, u32::from(size > 0));
            }
            self.set(slot, 0x70, 15);
            assert_eq!(self.get(slot, 0x70), 15, "slot {slot}");
        }
        self.devices.serial.receive(b"input");
        self.devices.console_input().unwrap().push(b"more");
        self.devices
            .balloon()
            .unwrap()
            .set_target(MEMORY - (5 << 12));
        self.devices.press_power_button();
    }

    /// RAM that nobody has set up.
    fn garble(&self, random: &mut Random) {
        for at in (RINGS..MEMORY / 2).step_by(8) {
            let value = random.next();
            // Small numbers often, so that some of it makes sense.
            let value = if value & 3 == 0 {
                value
            } else {
                value & 0x0001_0001_0000_0fff
            };
            self.vm.ram().write_obj(value, GuestAddress(at)).unwrap();
        }
    }

    /// Has the devices work with what they have loaded.
    fn run_for_a_moment(&self) {
        self.devices.run();
        for slot in 0..self.slots {
            for queue in 0..QUEUES {
                self.set(slot, QUEUE_NOTIFY, queue as u32);
            }
        }
        for _ in 0..8 {
            std::thread::yield_now();
        }
        self.devices.pause();
        self.save();
    }
}

/// Of what kind the device is: its name without what tells it from others of the kind.
fn kind(name: &str) -> &str {
    name.split_once('.').map_or(name, |(kind, _)| kind)
}

fn golden() -> Vec<(String, u32, Vec<u8>)> {
    let mut all = Vec::new();
    for file in std::fs::read_dir(Path::new(GOLDEN)).unwrap() {
        let path = file.unwrap().path();
        let name = path.file_stem().unwrap().to_str().unwrap();
        let (name, version) = name.rsplit_once('-').unwrap();
        let body = std::fs::read(&path).unwrap();
        all.push((name.to_owned(), version.parse().unwrap(), body));
    }
    all
}

#[test]
fn every_version_of_every_device_has_a_golden_file_that_loads() {
    let Some(everything) = Everything::new() else {
        return;
    };
    let inventory = everything.devices.inventory();
    let golden = golden();
    let there: BTreeSet<_> = golden
        .iter()
        .map(|(name, version, _)| (&**name, *version))
        .collect();
    for (name, newest) in &inventory {
        for version in 1..=*newest {
            let file = (kind(name), version);
            assert!(there.contains(&file), "{file:?} has no file in {GOLDEN}");
        }
    }
    let sections = everything.save();
    for (of, version, body) in &golden {
        let instances: Vec<_> = inventory
            .iter()
            .filter(|(name, _)| kind(name) == of)
            .collect();
        // Without a tap there is no network card here, which was said.
        if instances.is_empty() && of == "virtio-net" {
            continue;
        }
        let mut errors = Vec::new();
        let mut loaded = 0;
        for (name, newest) in instances {
            let mut sections = sections.clone();
            for section in sections.iter_mut().filter(|section| section.name == *name) {
                section.version = *version;
            }
            match everything.load(&sections, name, body) {
                Err(err) => errors.push(err.to_string()),
                Ok(()) => {
                    loaded += 1;
                    let saved = everything.save();
                    let saved = saved.iter().find(|section| section.name == *name).unwrap();
                    assert_eq!(saved.version, *newest);
                    assert!(
                        version != newest || saved.body == *body,
                        "{name} saves another"
                    );
                }
            }
        }
        // A transport's is that of one kind of device.
        assert!(loaded > 0, "{of} version {version}: {errors:?}");
    }
}

#[test]
fn what_is_saved_and_loaded_is_saved_the_same_again() {
    let Some(everything) = Everything::new() else {
        return;
    };
    let fresh = everything.save();
    everything.start_drivers();
    let saved = everything.save();
    let stateful = everything.devices.inventory();
    let stateful = stateful.iter().filter(|(_, version)| *version > 0).count();
    assert_eq!(saved.len(), stateful, "all devices are in it");
    everything.load(&saved, "", &[]).unwrap();
    assert!(everything.save() == saved);
    everything.load(&fresh, "", &[]).unwrap();
    assert!(everything.save() == fresh);
    // One that is missing is named.
    for section in &saved {
        let others = saved
            .iter()
            .filter(|other| other.name != section.name)
            .cloned();
        everything.devices.reset();
        let mut others = Sections::new(others.collect()).unwrap();
        let error = everything
            .devices
            .load(&mut others)
            .unwrap_err()
            .to_string();
        assert!(error.contains(&section.name), "{error}");
    }
}

/// Everything that can be made of a body with one change, and some that have nothing to do with it.
fn mutants(body: &[u8], random: &mut Random) -> Vec<Vec<u8>> {
    let mut all = Vec::new();
    for at in 0..body.len() {
        for value in [
            0,
            0xff,
            body[at] ^ 1 << (random.next() >> 61),
            random.next() as u8,
        ] {
            let mut mutant = body.to_vec();
            mutant[at] = value;
            all.push(mutant);
        }
        all.push(body[..at].to_vec());
        let mut mutant = body.to_vec();
        let word = random.next().to_le_bytes();
        mutant
            .iter_mut()
            .skip(at)
            .zip(word)
            .for_each(|(to, from)| *to = from);
        all.push(mutant);
    }
    for extra in 1..20 {
        let random = std::iter::repeat_with(|| random.next() as u8);
        all.push(body.iter().copied().chain(random.take(extra)).collect());
    }
    for _ in 0..40 {
        let len = random.next() as usize % 300;
        all.push((0..len).map(|_| random.next() as u8).collect());
    }
    all
}

#[test]
fn a_state_with_anything_changed_is_refused_by_name_or_as_good_as_any() {
    let Some(everything) = Everything::new() else {
        return;
    };
    let mut random = Random(0x5eed_0000_57a7_e000);
    everything.start_drivers();
    let saved = everything.save();
    let golden = golden();
    let (mut refused, mut taken) = (0, 0);
    for section in &saved {
        let name = &section.name;
        let mut bodies = vec![section.body.clone()];
        let files = golden
            .iter()
            .filter(|(of, ..)| of == kind(name) && of != "virtio-mmio");
        bodies.extend(files.map(|(.., body)| body.clone()));
        for body in bodies {
            everything.garble(&mut random);
            for mutant in mutants(&body, &mut random) {
                match everything.load(&saved, name, &mutant) {
                    Err(err) => {
                        let err = err.to_string();
                        assert!(err.contains(name), "{name}: {err}");
                        refused += 1;
                    }
                    Ok(()) => {
                        let again = everything.save();
                        let again = again.iter().find(|again| again.name == *name).unwrap();
                        assert_eq!(again.body, mutant, "{name} saves another, from {body:?}");
                        everything.run_for_a_moment();
                        taken += 1;
                    }
                }
            }
        }
    }
    everything.load(&saved, "", &[]).unwrap();
    assert!(
        refused > 1000 && taken > 100,
        "{refused} refused, {taken} taken"
    );
}
