//! Drivers that mean harm: whatever they do, no device panics, hangs, saves what can't be loaded, or
//! stays broken after a reset. The sequence of each driver is fixed; how they meet is not.

use std::os::fd::OwnedFd;
use std::sync::atomic::Ordering;
use std::thread;

use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};
use vm_memory::{Bytes, GuestAddress};

use super::balloon::{self, Balloon};
use super::blk::Block;
use super::blk::errors::{ErrorSink, IoError};
use super::console::{Console, Output};
use super::net::tap::Tap;
use super::net::{MacAddress, Net, NetConfig};
use super::rng::Rng;
use super::test_driver::{MEMORY, TestDriver};
use super::*;
use crate::disk::Disk;
use crate::image::{Cache, Format, Image, ImageConfig};

const SEED: u64 = 0x5eed_d00d_0bad_f00d;

/// Rounds for each device; after each the machine stops, saves, loads and resets.
const ROUNDS: u64 = 12;
/// Steps that each of the vCPUs takes in a round.
const STEPS: u64 = 60;
const VCPUS: u64 = 2;

const RINGS: u64 = 1 << 20;
const RING_LEN: u64 = 1 << 16;
const AVAILABLE: u64 = 0x4000;
const USED: u64 = 0x8000;
/// Headers that a block device may understand lie here.
const HEADERS: u64 = 2 << 20;

/// xorshift64*: Vigna, "An experimental exploration of Marsaglia's xorshift generators".
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    fn below(&mut self, bound: u64) -> u64 {
        (self.next() >> 16) % bound
    }

    fn one_in(&mut self, bound: u64) -> bool {
        self.below(bound) == 0
    }

    fn of<T: Copy>(&mut self, values: &[T]) -> T {
        values[self.below(values.len() as u64) as usize]
    }
}

struct Swallow;

impl Output for Swallow {
    fn try_write(&self, bytes: &[u8]) -> usize {
        bytes.len()
    }
}

struct Ignore;

impl ErrorSink for Ignore {
    fn io_error(&self, _: IoError) {}
}

/// What the host does to a device meanwhile.
type Poke = Box<dyn Fn(&mut Random) + Send>;
/// Whether the device works for a good driver.
type Works = fn(&TestDriver);

struct Victim {
    device: Arc<dyn VirtioDevice>,
    poke: Poke,
    works: Works,
}

fn rng() -> Victim {
    Victim {
        device: Arc::new(Rng::new().unwrap()),
        poke: Box::new(|_| ()),
        works: |driver| assert_eq!(driver.request(0, &[], &[16]).written, 16),
    }
}

fn console() -> Victim {
    let console = Arc::new(Console::new(Box::new(Swallow), Box::new(|| ())).unwrap());
    Victim {
        device: console.clone(),
        poke: Box::new(move |random| {
            let len = console.room().min(random.below(300) as usize);
            console.receive(&vec![b'x'; len]);
            console.output_has_room();
        }),
        works: |driver| assert_eq!(driver.request(1, &[b"x"], &[]).written, 0),
    }
}

fn balloon() -> Victim {
    let options = balloon::Options {
        free_page_reporting: true,
        free_page_hint: true,
        deflate_on_oom: true,
    };
    let balloon = Arc::new(Balloon::new(options, MEMORY as u64).unwrap());
    Victim {
        device: balloon.clone(),
        poke: Box::new(move |random| {
            balloon.set_target(random.below(MEMORY as u64) + 1);
        }),
        // A page behind everything of the driver's.
        works: |driver| {
            let page = (MEMORY as u32 >> 12) - 1;
            driver.request(0, &[&page.to_le_bytes()], &[]);
        },
    }
}

fn block(dir: &std::path::Path) -> Victim {
    let path = dir.join("disk");
    std::fs::File::create(&path)
        .unwrap()
        .set_len(1 << 20)
        .unwrap();
    let image = Image::open(&ImageConfig {
        path,
        format: Some(Format::Raw),
        readonly: false,
        cache: Cache::Writeback,
    })
    .unwrap();
    image.lock().unwrap();
    let disk = Arc::new(Disk::new("d0".to_owned(), image));
    Victim {
        device: Arc::new(Block::new(disk, "S-1", Arc::new(Ignore)).unwrap()),
        poke: Box::new(|_| ()),
        works: |driver| {
            let used = driver.request(0, &[&[0; 16]], &[512, 1]);
            assert_eq!((used.written, used.data[512]), (513, 0));
        },
    }
}

fn net() -> (Victim, OwnedFd) {
    let (near, far) = socketpair(
        AddressFamily::UNIX,
        SocketType::SEQPACKET,
        SocketFlags::NONBLOCK,
        None,
    )
    .unwrap();
    let config = NetConfig {
        mac: MacAddress([0x52, 0x54, 0, 1, 2, 3]),
        mtu: None,
    };
    // It can do VIRTIO_NET_F_CSUM.
    let tap = Arc::new(Tap::of_socket(near, 1500, 1));
    let net = Arc::new(Net::new(0, config, tap).unwrap());
    let device = net.clone();
    let other = far.try_clone().unwrap();
    let poke = move |random: &mut Random| {
        let _ = rustix::io::write(&other, &vec![0; random.below(3000) as usize + 12]);
        while rustix::io::read(&other, &mut [0; 65536]).is_ok() {}
        device.set_link(random.one_in(2));
    };
    let victim = Victim {
        device: net,
        poke: Box::new(poke),
        works: |driver| {
            driver.request(1, &[&[0; 12 + 60]], &[]);
        },
    };
    (victim, far)
}

/// A vCPU of a guest that means harm.
struct Vcpu<'a> {
    driver: &'a TestDriver,
    queues: u64,
    sizes: Vec<u16>,
    random: Random,
}

impl Vcpu<'_> {
    fn step(&mut self) {
        match self.random.below(16) {
            0 => self.read(),
            1 => self.write(),
            2 => {
                let status = self
                    .random
                    .of(&[0, 1, 3, 4, 7, 11, 15, 64, 128, 143, u32::MAX]);
                self.driver.set(0x70, status);
            }
            3 | 4 => self.set_up(),
            5 => {
                let queue = self.random.below(self.queues + 2) as u32;
                self.driver.set(0x50, queue);
            }
            6 => {
                let at = self.random.below(RING_LEN * self.queues - 8);
                let value = self.random.next();
                self.store(RINGS + at, &value.to_le_bytes());
            }
            7 => {
                let status = self.driver.get(0x60);
                self.driver.set(0x64, status);
            }
            _ => self.request(),
        }
    }

    fn store(&self, address: u64, bytes: &[u8]) {
        self.driver
            .memory
            .write_slice(bytes, GuestAddress(address))
            .unwrap();
    }

    fn offset(&mut self) -> u64 {
        match self.random.below(4) {
            0 => self.random.below(0x1000),
            1 => 0x100 + self.random.below(0x48),
            _ => self.random.below(0x40) * 4,
        }
    }

    fn read(&mut self) {
        let (offset, len) = (self.offset(), self.random.of(&[0, 1, 2, 3, 4, 4, 4, 8]));
        self.driver.transport.read(offset, &mut vec![0; len]);
    }

    fn write(&mut self) {
        let (offset, len) = (self.offset(), self.random.of(&[0, 1, 2, 3, 4, 4, 4, 8]));
        let value = match self.random.below(3) {
            0 => self.random.below(256),
            1 => u64::MAX,
            _ => self.random.next(),
        };
        self.driver
            .transport
            .write(offset, &value.to_le_bytes()[..len]);
    }

    /// Negotiates, more or less as one should.
    fn set_up(&mut self) {
        let driver = self.driver;
        driver.set(0x70, 0);
        driver.set(0x70, 3);
        let mask = if self.random.one_in(3) {
            u64::MAX
        } else {
            self.random.next()
        };
        let features = driver.offered() & mask | F_VERSION_1;
        for sel in [0, 1] {
            driver.set(0x24, sel);
            driver.set(0x20, (features >> (32 * sel)) as u32);
        }
        driver.set(0x70, 11);
        for queue in 0..self.queues {
            driver.set(0x30, queue as u32);
            let max = driver.get(0x34) as u16;
            let size = match self.random.below(4) {
                0 => self.random.next() as u16,
                1 => 1 << self.random.below(16),
                _ => max,
            };
            driver.set(0x38, size.into());
            let rings = RINGS + queue * RING_LEN;
            for (register, address) in [
                (0x80, rings),
                (0x90, rings + AVAILABLE),
                (0xa0, rings + USED),
            ] {
                let address = match self.random.below(24) {
                    0 => self.random.next(),
                    1 => self.random.below(MEMORY as u64),
                    2 => MEMORY as u64 - 16,
                    3 => self.random.of(&[0, 1 << 20, (1 << 20) + 1]),
                    _ => address,
                };
                driver.set(register, address as u32);
                driver.set(register + 4, (address >> 32) as u32);
            }
            if self.random.one_in(2) {
                self.store(rings, &[0; RING_LEN as usize]);
            }
            driver.set(0x44, (!self.random.one_in(8)).into());
            if let Some(known) = self.sizes.get_mut(queue as usize) {
                *known = size.max(1);
            }
        }
        driver.set(0x70, 15);
    }

    /// Puts a chain of descriptors in, good or bad.
    fn request(&mut self) {
        let queue = self.random.below(self.queues);
        let size = u64::from(self.sizes[queue as usize]);
        let rings = RINGS + queue * RING_LEN;
        let good = !self.random.one_in(3);
        let first = self.random.below(size);
        let count = self.random.below(6) + 1;
        let readable = self.random.below(count + 1);
        // Sometimes a table of its own.
        let indirect = self.random.one_in(4);
        let table = if indirect { HEADERS - 0x1000 } else { rings };
        for number in 0..count {
            let at = if indirect {
                number
            } else {
                (first + number) % size
            };
            let more = number + 1 < count;
            let write = number >= readable;
            let address = if number == 0 {
                HEADERS + self.random.below(4096) * 16
            } else {
                self.random.below(MEMORY as u64 - (4 << 20)) + (3 << 20)
            };
            let len = match self.random.below(8) {
                0 => 0,
                1 => 1,
                2 => self.random.below(1 << 17) as u32,
                3 => 4096,
                _ => self.random.of(&[16, 512]),
            };
            let flags = u16::from(more) | u16::from(write) << 1;
            let next = if indirect {
                number + 1
            } else {
                (at + 1) % size
            };
            let (address, len, flags, next) = if good {
                (address, len, flags, next as u16)
            } else {
                match self.random.below(5) {
                    0 => (self.random.next(), len, flags, next as u16),
                    1 => (address, self.random.next() as u32, flags, next as u16),
                    2 => (address, len, self.random.next() as u16 & 7, next as u16),
                    3 => (address, len, flags | 1, self.random.below(size) as u16),
                    _ => (address, 8 << 20, flags, next as u16),
                }
            };
            self.store(table + 16 * at, &descriptor(address, len, flags, next));
        }
        if indirect {
            let len = if good {
                16 * count as u32
            } else {
                self.random.below(1 << 20) as u32
            };
            self.store(rings + 16 * first, &descriptor(table, len, 4, 0));
        }
        let available = rings + AVAILABLE;
        let memory = &self.driver.memory;
        let index: u16 = memory
            .load(GuestAddress(available + 2), Ordering::SeqCst)
            .unwrap();
        let slot = available + 4 + 2 * (u64::from(index) % size);
        self.store(slot, &(first as u16).to_le_bytes());
        let more = match self.random.below(16) {
            0 => self.random.next() as u16,
            1 => 7,
            _ => 1,
        };
        let index = index.wrapping_add(more);
        let _ = memory.store(index, GuestAddress(available + 2), Ordering::SeqCst);
        self.driver.notify(queue as usize);
    }
}

fn descriptor(address: u64, len: u32, flags: u16, next: u16) -> [u8; 16] {
    let mut bytes = [0; 16];
    bytes[..8].copy_from_slice(&address.to_le_bytes());
    bytes[8..12].copy_from_slice(&len.to_le_bytes());
    bytes[12..14].copy_from_slice(&flags.to_le_bytes());
    bytes[14..].copy_from_slice(&next.to_le_bytes());
    bytes
}

/// The device's own state, if it has one, and its transport's.
fn save(driver: &TestDriver) -> (Option<Vec<u8>>, Vec<u8>) {
    let own = driver.transport.device().saved_state();
    (
        own.map(|state| state.save().unwrap()),
        driver.transport.save().unwrap(),
    )
}

/// Whatever a guest has done, it can be moved.
fn saves_and_loads(driver: &TestDriver, what: &str) {
    driver.pause();
    let (own, transport) = save(driver);
    driver.transport.reset();
    if let (Some(state), Some(body)) = (driver.transport.device().saved_state(), &own) {
        let restored = state.restore(state.version(), body);
        restored.unwrap_or_else(|err| panic!("{what}: {err}"));
    }
    let restored = driver
        .transport
        .restore(driver.transport.version(), &transport);
    restored.unwrap_or_else(|err| panic!("{what}: {err}"));
    assert!(
        save(driver) == (own, transport),
        "{what}: saved as it was loaded"
    );
    driver.run();
}

fn headers(driver: &TestDriver, random: &mut Random) {
    for place in 0..4096 {
        let mut header = [0; 16];
        header[0] = random.of(&[0, 1, 4, 8, 11, 13, 77]);
        header[8..10].copy_from_slice(&(random.below(2100) as u16).to_le_bytes());
        let at = GuestAddress(HEADERS + 16 * place);
        driver.memory.write_slice(&header, at).unwrap();
    }
}

fn survives(victim: Victim, seed: u64, rounds: u64) {
    let Victim {
        device,
        poke,
        works,
    } = victim;
    let name = device.name().to_owned();
    let sizes = device.queue_sizes();
    let driver = TestDriver::new(device);
    let mut random = Random(seed);
    driver.run();
    for round in 0..rounds {
        headers(&driver, &mut random);
        thread::scope(|scope| {
            for _ in 0..VCPUS {
                let mut vcpu = Vcpu {
                    driver: &driver,
                    queues: sizes.len() as u64,
                    sizes: sizes.clone(),
                    random: Random(random.next() | 1),
                };
                scope.spawn(move || (0..STEPS).for_each(|_| vcpu.step()));
            }
            for _ in 0..STEPS / 4 {
                match random.below(4) {
                    0 => driver.pause(),
                    1 => driver.run(),
                    2 => poke(&mut random),
                    _ => thread::yield_now(),
                }
            }
            driver.run();
        });
        saves_and_loads(&driver, &format!("{name}, round {round} of {seed:#x}"));
        driver.transport.reset();
        poke(&mut random);
        if round % 4 == 3 {
            driver.start(0);
            works(&driver);
            driver.transport.reset();
        }
    }
}

/// `FERRY_HOSTILE_ROUNDS` has the tests go on for longer.
fn all_rounds() -> u64 {
    let given = std::env::var("FERRY_HOSTILE_ROUNDS").ok();
    given
        .and_then(|rounds| rounds.parse().ok())
        .unwrap_or(ROUNDS)
}

#[test]
fn rng_survives() {
    survives(rng(), SEED, all_rounds());
}

#[test]
fn console_survives() {
    survives(console(), SEED, all_rounds());
}

#[test]
fn balloon_survives() {
    survives(balloon(), SEED, all_rounds());
}

#[test]
fn block_survives() {
    let dir = tempfile::tempdir().unwrap();
    survives(block(dir.path()), SEED, all_rounds());
}

#[test]
fn net_survives() {
    let (victim, _far) = net();
    survives(victim, SEED, all_rounds());
}
