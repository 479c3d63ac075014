//! The machines of these tests: memory and disks, a thread that writes to them as a guest would,
//! and a dirty log like KVM's with manual protection.

use std::io::{Cursor, Read, Write};
use std::sync::atomic::{AtomicBool, AtomicU8, Ordering};
use std::sync::{Arc, Condvar, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;

use migration::bitmap::{PageBitmap, PageRun};
use migration::clock::{Clock, MonotonicClock};
use migration::disk::{DestinationDisk, Disk, SourceDisk};
use migration::layout::{GuestRam, Layout, PAGE_SIZE};
use migration::section::{Section, Sections};
use migration::throttle::Throttle;
use migration::vm::{Blob, DestinationVm, Offer, Pause, SourceVm, Start, VmError};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use crate::disks::{FakeDisk, Target};

/// Below 4 GiB and above, so that page numbers and addresses differ.
pub(crate) fn ram(low_pages: u64, high_pages: u64) -> GuestRam {
    let mut ranges = vec![(GuestAddress(0), (low_pages * PAGE_SIZE) as usize)];
    if high_pages > 0 {
        ranges.push((GuestAddress(1 << 32), (high_pages * PAGE_SIZE) as usize));
    }
    GuestMemoryMmap::from_ranges(&ranges).unwrap()
}

/// The address of a page.
pub(crate) fn address(layout: &Layout, mut page: u64) -> GuestAddress {
    for region in layout.regions() {
        if page < region.pages() {
            return GuestAddress(region.start + page * PAGE_SIZE);
        }
        page -= region.pages();
    }
    panic!("no such page");
}

pub(crate) fn page(ram: &GuestRam, layout: &Layout, number: u64) -> Vec<u8> {
    let mut bytes = vec![0; PAGE_SIZE as usize];
    ram.read_slice(&mut bytes, address(layout, number)).unwrap();
    bytes
}

/// Fails, naming the page, if two memories differ.
pub(crate) fn assert_same(a: &GuestRam, b: &GuestRam) {
    let layout = Layout::of(a).unwrap();
    assert_eq!(layout, Layout::of(b).unwrap());
    for number in 0..layout.pages() {
        assert!(
            page(a, &layout, number) == page(b, &layout, number),
            "page {number} differs"
        );
    }
}

/// Bytes that look random, the same for the same seed.
pub(crate) fn noise(seed: u64, len: usize) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut bytes = Vec::with_capacity(len + 8);
    while bytes.len() < len {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        bytes.extend(state.to_le_bytes());
    }
    bytes.truncate(len);
    bytes
}

/// What the guest does while it runs.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Writes {
    /// The pages that it writes to, from 0.
    pub(crate) pages: u64,
    /// How many writes at a time.
    pub(crate) batch: u64,
    /// How many writes to disks, if there are any, after that.
    pub(crate) blocks: u64,
    /// The rest in between.
    pub(crate) rest: Duration,
}

/// Up to 20 KiB, in sectors: data, zeroes, or a discard.
fn write_to_disk(disk: &FakeDisk, random: u64) {
    let sectors = disk.capacity / 512;
    let first = (random >> 20) % sectors;
    let count = (1 + (random >> 50) % 40).min(sectors - first);
    match random >> 61 {
        0 => disk.guest_zero(first * 512, count * 512),
        _ => disk.guest_write(first * 512, &noise(random, count as usize * 512)),
    }
}

/// Told which call the engine makes; its error becomes that of the call.
pub(crate) type Hook = Box<dyn FnMut(&str) -> Result<(), VmError> + Send>;

pub(crate) type FreePages = Box<dyn FnMut() -> Vec<PageRun> + Send>;

#[derive(Default)]
struct Guest {
    running: bool,
    ended: bool,
    log: Option<PageBitmap>,
}

struct Shared {
    guest: Mutex<Guest>,
    wake: Condvar,
    /// The share of time in percent that the guest doesn't run.
    throttled: AtomicU8,
}

/// The machine that a guest leaves, again and again if need be.
pub(crate) struct Source {
    pub(crate) ram: GuestRam,
    pub(crate) layout: Layout,
    pub(crate) configuration: Vec<Section>,
    pub(crate) blobs: Vec<(String, Vec<u8>)>,
    pub(crate) state: Vec<Section>,
    pub(crate) disks: Vec<Arc<FakeDisk>>,
    /// In their place, disks of another kind, with their capacity.
    pub(crate) other_disks: Vec<(u64, Arc<dyn SourceDisk>)>,
    /// What the engine asked for, apart from the harvests.
    pub(crate) calls: Arc<Mutex<Vec<String>>>,
    /// Called at the start of each of the engine's calls, by its name.
    pub(crate) hook: Hook,
    /// What the guest names as free, each time it is asked; then all is armed from the start.
    pub(crate) free: Option<FreePages>,
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

impl Source {
    /// A paused guest with data in every third page.
    pub(crate) fn new(low_pages: u64, high_pages: u64) -> Self {
        let ram = ram(low_pages, high_pages);
        let layout = Layout::of(&ram).unwrap();
        for number in (0..layout.pages()).step_by(3) {
            let bytes = noise(number, PAGE_SIZE as usize);
            ram.write_slice(&bytes, address(&layout, number)).unwrap();
        }
        let section = |name: &str, len| Section {
            name: name.to_owned(),
            version: 1,
            body: noise(7, len),
        };
        Self {
            ram,
            layout,
            configuration: vec![section("machine", 100)],
            blobs: vec![
                ("kernel".to_owned(), noise(1, 3_000_000)),
                ("empty".to_owned(), vec![]),
            ],
            state: vec![section("vcpu.0", 20_000), section("serial", 30)],
            disks: vec![],
            other_disks: vec![],
            calls: Arc::default(),
            hook: Box::new(|_| Ok(())),
            free: None,
            shared: Arc::new(Shared {
                guest: Mutex::default(),
                wake: Condvar::new(),
                throttled: AtomicU8::new(0),
            }),
            thread: None,
        }
    }

    /// The same with disks that travel.
    pub(crate) fn with_disks(pages: u64, disks: Vec<Arc<FakeDisk>>) -> Self {
        let mut vm = Self::new(pages, 0);
        vm.blobs.clear();
        vm.disks = disks;
        vm
    }

    /// Lets the guest run: a thread that writes, logged.
    pub(crate) fn run(&mut self, writes: Writes) {
        let shared = Arc::clone(&self.shared);
        let (ram, layout) = (self.ram.clone(), self.layout.clone());
        let disks = self.disks.clone();
        shared.guest.lock().unwrap().running = true;
        self.thread = Some(std::thread::spawn(move || {
            let mut random = 1u64;
            loop {
                let mut guest = shared.guest.lock().unwrap();
                while !guest.running && !guest.ended {
                    guest = shared.wake.wait(guest).unwrap();
                }
                if guest.ended {
                    return;
                }
                for _ in 0..writes.batch {
                    random = random.wrapping_mul(6364136223846793005).wrapping_add(99);
                    let number = (random >> 33) % writes.pages;
                    if let Some(log) = &mut guest.log {
                        log.set(number);
                    }
                    let at = address(&layout, number).0 + (random >> 20) % 512 * 8;
                    // Now and then a page becomes zero.
                    if random >> 60 == 0 {
                        let zeroes = [0; PAGE_SIZE as usize];
                        ram.write_slice(&zeroes, address(&layout, number)).unwrap();
                    } else {
                        ram.write_obj(random, GuestAddress(at)).unwrap();
                    }
                }
                for _ in 0..writes.blocks {
                    random = random.wrapping_mul(6364136223846793005).wrapping_add(99);
                    if let Some(disk) = disks.get((random >> 33) as usize % disks.len().max(1)) {
                        write_to_disk(disk, random);
                    }
                }
                drop(guest);
                let runs = 100 - u32::from(shared.throttled.load(Ordering::SeqCst));
                std::thread::sleep(writes.rest * 100 / runs);
            }
        }));
    }

    pub(crate) fn is_running(&self) -> bool {
        self.shared.guest.lock().unwrap().running
    }

    /// Writes to a page as the guest would, from anywhere.
    pub(crate) fn writer(&self) -> impl Fn(u64) + Send + 'static {
        let shared = Arc::clone(&self.shared);
        let (ram, layout) = (self.ram.clone(), self.layout.clone());
        move |number| {
            let mut guest = shared.guest.lock().unwrap();
            guest.log.as_mut().expect("no log").set(number);
            ram.write_obj(!0u64, address(&layout, number)).unwrap();
        }
    }

    pub(crate) fn calls(&self) -> Vec<String> {
        self.calls.lock().unwrap().clone()
    }

    fn called(&mut self, name: &str) -> Result<(), VmError> {
        self.calls.lock().unwrap().push(name.to_owned());
        (self.hook)(name)
    }
}

impl Drop for Source {
    fn drop(&mut self) {
        self.shared.guest.lock().unwrap().ended = true;
        self.shared.wake.notify_all();
        if let Some(thread) = self.thread.take() {
            thread.join().unwrap();
        }
    }
}

impl SourceVm for Source {
    fn offer(&mut self) -> Result<Offer, VmError> {
        self.called("offer")?;
        Ok(Offer {
            layout: self.layout.clone(),
            configuration: self.configuration.clone(),
            blobs: self
                .blobs
                .iter()
                .map(|(name, data)| Blob {
                    name: name.clone(),
                    len: data.len() as u64,
                })
                .collect(),
            disks: self
                .disks
                .iter()
                .map(|disk| Disk {
                    name: disk.name.clone(),
                    capacity: disk.capacity,
                })
                .chain(self.other_disks.iter().map(|(capacity, _)| Disk {
                    name: "other".to_owned(),
                    capacity: *capacity,
                }))
                .collect(),
        })
    }

    fn open_blob(&mut self, index: usize) -> Result<Box<dyn Read + Send>, VmError> {
        Ok(Box::new(Cursor::new(self.blobs[index].1.clone())))
    }

    fn open_disk(&mut self, index: usize) -> Result<Arc<dyn SourceDisk>, VmError> {
        (self.hook)("open_disk")?;
        if let Some((_, other)) = self.other_disks.get(index) {
            return Ok(Arc::clone(other));
        }
        Ok(Arc::clone(&self.disks[index]) as Arc<dyn SourceDisk>)
    }

    fn ram(&self) -> GuestRam {
        self.ram.clone()
    }

    fn start_dirty_log(&mut self) -> Result<(), VmError> {
        self.called("start_dirty_log")?;
        let mut guest = self.shared.guest.lock().unwrap();
        assert!(guest.log.is_none(), "logging already");
        guest.log = Some(match self.free {
            Some(_) => PageBitmap::new(self.layout.pages()),
            None => PageBitmap::full(self.layout.pages()),
        });
        Ok(())
    }

    fn free_pages(&mut self) -> Vec<PageRun> {
        self.free.as_mut().map_or_else(Vec::new, |free| free())
    }

    fn harvest_dirty(&mut self, dirty: &mut PageBitmap) -> Result<(), VmError> {
        (self.hook)("harvest")?;
        let guest = self.shared.guest.lock().unwrap();
        dirty.or(guest.log.as_ref().expect("no log"));
        Ok(())
    }

    fn protect(&mut self, dirty: &PageBitmap, first: u64, count: u64) -> Result<(), VmError> {
        (self.hook)("protect")?;
        assert!(first.is_multiple_of(64));
        assert!(count.is_multiple_of(64) || first + count == self.layout.pages());
        let mut guest = self.shared.guest.lock().unwrap();
        let log = guest.log.as_mut().expect("no log");
        for run in dirty.runs(first, count, u64::MAX) {
            log.clear_range(run.first, run.count);
        }
        Ok(())
    }

    fn throttle(&mut self, throttle: Throttle) -> Result<(), VmError> {
        self.called(&format!("throttle {throttle:?}"))?;
        let share = throttle.share().unwrap_or(0);
        self.shared.throttled.store(share, Ordering::SeqCst);
        Ok(())
    }

    fn pause(&mut self, _: bool) -> Result<Pause, VmError> {
        self.called("pause")?;
        let mut guest = self.shared.guest.lock().unwrap();
        let was_running = std::mem::take(&mut guest.running);
        Ok(Pause {
            was_running,
            last_instruction: MonotonicClock.now(),
        })
    }

    fn save(&mut self) -> Result<Vec<Section>, VmError> {
        self.called("save")?;
        Ok(self.state.clone())
    }

    fn release(&mut self) -> Result<(), VmError> {
        self.called("release")
    }

    fn resume(&mut self, pause: Pause) -> Result<(), VmError> {
        self.called("resume")?;
        self.shared.guest.lock().unwrap().running = pause.was_running;
        self.shared.wake.notify_all();
        Ok(())
    }

    fn handed_over(&mut self) {
        let _ = (self.hook)("handed_over");
    }

    fn stop_dirty_log(&mut self) {
        self.called("stop_dirty_log").unwrap();
        let log = self.shared.guest.lock().unwrap().log.take();
        assert!(log.is_some(), "no log");
    }
}

/// The machine that a guest arrives in.
pub(crate) struct Destination {
    pub(crate) ram: Option<GuestRam>,
    pub(crate) offer: Option<Offer>,
    pub(crate) blobs: Vec<Arc<Mutex<Vec<u8>>>>,
    /// To be filled.
    pub(crate) disks: Vec<Arc<FakeDisk>>,
    /// In their place, disks of another kind.
    pub(crate) other_disks: Vec<Option<Box<dyn DestinationDisk>>>,
    pub(crate) sections: Vec<Section>,
    pub(crate) started: Option<Start>,
    /// When its first vCPU is said to have been entered.
    pub(crate) entered: Option<Duration>,
    /// Whether the guest was let go, visible from outside.
    pub(crate) ran: Arc<AtomicBool>,
    /// Called at the start of each of the engine's calls, by its name.
    pub(crate) hook: Hook,
    /// Called with the memory when it has been made.
    pub(crate) on_prepare: Option<OnStart>,
    /// Called with the memory when the guest is let go.
    pub(crate) on_start: Option<OnStart>,
    /// Called with the memory while the state is loaded.
    pub(crate) on_load: Option<OnStart>,
}

pub(crate) type OnStart = Box<dyn FnOnce(&GuestRam) + Send>;

impl Default for Destination {
    fn default() -> Self {
        Self {
            ram: None,
            offer: None,
            blobs: vec![],
            disks: vec![],
            other_disks: vec![],
            sections: vec![],
            started: None,
            entered: None,
            ran: Arc::default(),
            hook: Box::new(|_| Ok(())),
            on_prepare: None,
            on_start: None,
            on_load: None,
        }
    }
}

impl Destination {
    /// With an empty disk for each of the source's.
    pub(crate) fn of(vm: &Source) -> Self {
        Self {
            disks: vm.disks.iter().map(|disk| disk.fresh()).collect(),
            ..Self::default()
        }
    }
}

struct BlobWriter(Arc<Mutex<Vec<u8>>>);

impl Write for BlobWriter {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0.lock().unwrap().extend(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

impl DestinationVm for Destination {
    fn prepare(&mut self, offer: &Offer) -> Result<GuestRam, VmError> {
        (self.hook)("prepare")?;
        if offer.layout.bytes() > 1 << 30 {
            return Err("too large for this test".into());
        }
        let ranges: Vec<_> = offer
            .layout
            .regions()
            .iter()
            .map(|region| (GuestAddress(region.start), region.len as usize))
            .collect();
        let ram: GuestRam = GuestMemoryMmap::from_ranges(&ranges)?;
        if let Some(on_prepare) = self.on_prepare.take() {
            on_prepare(&ram);
        }
        self.ram = Some(ram.clone());
        self.offer = Some(offer.clone());
        self.blobs = offer.blobs.iter().map(|_| Arc::default()).collect();
        Ok(ram)
    }

    fn create_blob(&mut self, index: usize) -> Result<Box<dyn Write + Send>, VmError> {
        Ok(Box::new(BlobWriter(Arc::clone(&self.blobs[index]))))
    }

    fn open_disk(&mut self, index: usize) -> Result<Box<dyn DestinationDisk>, VmError> {
        (self.hook)("open_disk")?;
        if let Some(other) = self.other_disks.get_mut(index) {
            return Ok(other.take().unwrap());
        }
        let disk = self.disks.get(index).ok_or("no such disk here")?;
        Ok(Box::new(Target(Arc::clone(disk))))
    }

    fn load(&mut self, sections: Vec<Section>) -> Result<(), VmError> {
        (self.hook)("load")?;
        if let (Some(on_load), Some(ram)) = (self.on_load.take(), &self.ram) {
            on_load(ram);
        }
        for disk in &self.disks {
            assert!(*disk.flushed.lock().unwrap());
        }
        self.sections = sections.clone();
        let mut sections = Sections::new(sections)?;
        sections.take("vcpu.0", 1, 1)?;
        sections.take("serial", 1, 1)?;
        Ok(sections.finish()?)
    }

    fn start(&mut self, start: Start) -> Result<Option<Duration>, VmError> {
        (self.hook)("start")?;
        self.started = Some(start);
        self.ran.store(true, Ordering::SeqCst);
        if let (Some(on_start), Some(ram)) = (self.on_start.take(), &self.ram) {
            on_start(ram);
        }
        Ok(self.entered)
    }

    fn abandon(&mut self) {
        assert!(!self.ran.load(Ordering::SeqCst), "it runs already");
        self.ram = None;
    }
}
