use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::sync::mpsc::{Receiver, Sender, channel};

use super::errors::{Action, IoError, Operation};
use super::saved::SavedBlock;
use super::*;
use crate::image::tests::space::Small;
use crate::image::{Cache, Format, Image, ImageConfig};
use crate::state::{decode, encode};
use crate::virtio::F_EVENT_IDX;
use crate::virtio::test_driver::{TestDriver, Used};

const CAPACITY: u64 = 1 << 20;

const OK: u8 = 0;
const IO_ERROR: u8 = 1;
const UNSUPPORTED: u8 = 2;

struct Errors(Mutex<Sender<IoError>>);

impl ErrorSink for Errors {
    fn io_error(&self, error: IoError) {
        let _ = self.0.lock().unwrap().send(error);
    }
}

struct TestDisk {
    driver: TestDriver,
    errors: Receiver<IoError>,
    disk: Arc<Disk>,
    path: PathBuf,
}

fn device(path: &Path, readonly: bool) -> (Arc<Block>, Arc<Disk>, Receiver<IoError>) {
    let image = Image::open(&ImageConfig {
        path: path.to_owned(),
        format: Some(Format::Raw),
        readonly,
        cache: Cache::Writeback,
    })
    .unwrap();
    image.lock().unwrap();
    let disk = Arc::new(Disk::new("d0".to_owned(), image));
    let (tell, errors) = channel();
    let sink = Arc::new(Errors(Mutex::new(tell)));
    let block = Block::new(Arc::clone(&disk), "S-1", sink).unwrap();
    (Arc::new(block), disk, errors)
}

fn at(path: &Path, capacity: u64, readonly: bool) -> TestDisk {
    let file = std::fs::File::create(path).unwrap();
    file.set_len(capacity).unwrap();
    let (block, disk, errors) = device(path, readonly);
    TestDisk {
        driver: TestDriver::new(block),
        errors,
        disk,
        path: path.to_owned(),
    }
}

fn scratch() -> (tempfile::TempDir, TestDisk) {
    let dir = tempfile::tempdir().unwrap();
    let disk = at(&dir.path().join("disk"), CAPACITY, false);
    (dir, disk)
}

fn header(kind: u32, sector: u64) -> [u8; 16] {
    let mut header = [0; 16];
    header[..4].copy_from_slice(&kind.to_le_bytes());
    header[8..].copy_from_slice(&sector.to_le_bytes());
    header
}

fn status(used: &Used) -> u8 {
    *used.data.last().unwrap()
}

impl TestDisk {
    fn start(&self, features: u64) {
        self.driver.start(features);
        self.driver.run();
    }

    fn read(&self, sector: u64, lens: &[u32]) -> Used {
        let mut writable = lens.to_vec();
        writable.push(1);
        self.driver.request(QUEUE, &[&header(0, sector)], &writable)
    }

    fn write(&self, sector: u64, data: &[&[u8]]) -> Used {
        let header = header(1, sector);
        let mut readable: Vec<&[u8]> = vec![&header];
        readable.extend(data);
        self.driver.request(QUEUE, &readable, &[1])
    }

    fn ranges(&self, kind: u32, ranges: &[(u64, u32, u32)]) -> u8 {
        let mut body = Vec::new();
        for (sector, sectors, flags) in ranges {
            body.extend(sector.to_le_bytes());
            body.extend(sectors.to_le_bytes());
            body.extend(flags.to_le_bytes());
        }
        status(&self.driver.request(QUEUE, &[&header(kind, 0), &body], &[1]))
    }

    fn contents(&self) -> Vec<u8> {
        std::fs::read(&self.path).unwrap()
    }
}

#[test]
fn what_is_written_is_on_the_disk_and_read_back() {
    let (_dir, disk) = scratch();
    disk.start(F_EVENT_IDX | F_FLUSH);
    let (a, b) = ([0xaa; 512], [0xbb; 1024]);
    assert_eq!(status(&disk.write(3, &[&a, &b])), OK);
    let used = disk.read(3, &[512, 700, 324]);
    assert_eq!((status(&used), used.written), (OK, 1537));
    assert_eq!(used.data[..512], a);
    assert_eq!(used.data[512..1536], b);
    assert_eq!(disk.contents()[1536..3072], [&a[..], &b].concat());
    let used = disk.driver.request(QUEUE, &[&header(4, 0)], &[1]);
    assert_eq!(status(&used), OK);
}

#[test]
fn data_and_header_may_share_a_buffer() {
    let (_dir, disk) = scratch();
    disk.start(0);
    let mut all = header(1, 0).to_vec();
    all.extend([7; 512]);
    let used = disk.driver.request(QUEUE, &[&all], &[1]);
    assert_eq!(status(&used), OK);
    let used = disk.driver.request(QUEUE, &[&header(0, 0)], &[513]);
    assert_eq!((status(&used), &used.data[..512]), (OK, &[7; 512][..]));
}

#[test]
fn what_a_guest_is_given_is_seen_as_dirty() {
    use vm_memory::bitmap::Bitmap;
    use vm_memory::{GuestMemoryBackend, GuestMemoryRegion};
    let (_dir, disk) = scratch();
    disk.start(0);
    let dirty = |address| {
        let region = disk.driver.memory.iter().next().unwrap();
        region.bitmap().dirty_at(address)
    };
    let pending = disk.driver.add(QUEUE, &[&header(0, 0)], &[3 * 4096, 1]);
    let middle = (pending.writable[0].0 + 4096) as usize;
    assert!(!dirty(middle));
    disk.driver.notify(QUEUE);
    disk.driver.wait_for(QUEUE, &pending);
    assert!(dirty(middle));
}

#[test]
fn what_is_not_on_the_disk_is_an_error() {
    let (_dir, disk) = scratch();
    disk.start(0);
    let end = CAPACITY / 512;
    for (sector, len) in [(end, 512), (end - 1, 1024), (u64::MAX, 512), (0, 100)] {
        assert_eq!(
            status(&disk.read(sector, &[len])),
            IO_ERROR,
            "{sector} {len}"
        );
        let data = vec![1; len as usize];
        assert_eq!(status(&disk.write(sector, &[&data])), IO_ERROR);
    }
    let used = disk.driver.request(QUEUE, &[&header(77, 0)], &[1]);
    assert_eq!(status(&used), UNSUPPORTED);
    assert!(disk.contents().iter().all(|byte| *byte == 0));
}

#[test]
fn ranges_are_discarded_and_zeroed() {
    let (_dir, disk) = scratch();
    disk.start(F_DISCARD | F_WRITE_ZEROES);
    disk.write(0, &[&[1; 128 << 10]]);
    assert_eq!(disk.ranges(13, &[(0, 8, 0), (16, 8, 1)]), OK);
    let contents = disk.contents();
    assert!(contents[..4096].iter().all(|byte| *byte == 0));
    assert!(contents[4096..8192].iter().all(|byte| *byte == 1));
    assert!(contents[8192..12288].iter().all(|byte| *byte == 0));
    assert_eq!(disk.ranges(11, &[(128, 128, 0)]), OK);
    let end = (CAPACITY / 512) as u32;
    assert_eq!(disk.ranges(13, &[(0, 8, 2)]), UNSUPPORTED);
    assert_eq!(disk.ranges(11, &[(0, 8, 1)]), UNSUPPORTED);
    assert_eq!(disk.ranges(13, &[(0, 8, 0), (0, end + 1, 0)]), IO_ERROR);
    assert_eq!(disk.ranges(13, &[]), IO_ERROR);
    assert!(disk.contents()[4096..8192].iter().all(|byte| *byte == 1));
}

#[test]
fn the_driver_reads_what_disk_it_is() {
    let (_dir, disk) = scratch();
    assert_eq!(
        u64::from_le_bytes(disk.driver.config(0)),
        CAPACITY / 512,
        "in sectors"
    );
    assert_eq!(u32::from_le_bytes(disk.driver.config(20)), 512);
    assert_eq!(disk.driver.config::<1>(32), [1], "writes are cached");
    assert_eq!(disk.driver.config::<4>(60), [0; 4]);
    disk.start(F_CONFIG_WCE);
    disk.driver.transport.write(0x100 + 32, &[0]);
    assert_eq!(disk.driver.config::<1>(32), [0]);
    let used = disk.driver.request(QUEUE, &[&header(8, 0)], &[20, 1]);
    assert_eq!((status(&used), &used.data[..4]), (OK, &b"S-1\0"[..]));
    // A reset undoes it.
    disk.driver.transport.reset();
    assert_eq!(disk.driver.config::<1>(32), [1]);
    // A driver that can't flush gets durable writes.
    disk.start(0);
    assert_eq!(disk.driver.config::<1>(32), [0]);
}

#[test]
fn a_readonly_disk_is_not_written() {
    let dir = tempfile::tempdir().unwrap();
    let disk = at(&dir.path().join("disk"), CAPACITY, true);
    assert_eq!(disk.driver.offered() & (F_RO | F_DISCARD), F_RO);
    disk.start(F_RO);
    assert_eq!(status(&disk.write(0, &[&[1; 512]])), IO_ERROR);
    assert_eq!(disk.ranges(13, &[(0, 8, 0)]), IO_ERROR);
    assert_eq!(status(&disk.read(0, &[512])), OK);
    assert!(disk.contents().iter().all(|byte| *byte == 0));
}

#[test]
fn requests_without_a_header_or_room_for_a_status_break_the_device() {
    for (readable, writable) in [(&[0u8; 8][..], &[1][..]), (&header(0, 0), &[])] {
        let (_dir, disk) = scratch();
        disk.start(0);
        disk.driver.add(QUEUE, &[readable], writable);
        disk.driver.notify(QUEUE);
        assert_eq!(disk.driver.wait_interrupt(), 2);
        assert_eq!(disk.driver.get(0x70) & 64, 64);
    }
}

/// With the disk slow the requests are done by several threads, in any order: each once.
#[test]
fn many_requests_at_once_are_each_done_once() {
    for slow in [false, true] {
        let (_dir, disk) = scratch();
        let (block, disk_again, _errors) = device_unlocked(&disk);
        let driver = TestDriver::new(Arc::clone(&block) as Arc<dyn VirtioDevice>);
        driver.start(F_EVENT_IDX);
        driver.run();
        for round in 0..8u8 {
            if slow {
                block.engine.pretend_slow();
            }
            let mut heads: Vec<u16> = (0..60u64)
                .map(|number| {
                    let data = [round + number as u8; 512];
                    driver.add(QUEUE, &[&header(1, number), &data], &[1]).head
                })
                .collect();
            driver.notify(QUEUE);
            let mut used = Vec::new();
            while used.len() < heads.len() {
                used.extend(driver.take_used(QUEUE).into_iter().map(|(head, _)| head));
                if used.len() < heads.len() {
                    driver.wait_interrupt();
                }
            }
            used.sort_unstable();
            heads.sort_unstable();
            assert_eq!(used, heads);
            let contents = disk.contents();
            for number in 0..60 {
                assert_eq!(contents[number * 512], round + number as u8);
            }
        }
        drop(disk_again);
    }
}

/// A second device on the disk of `disk`, which gives its locks away for it.
fn device_unlocked(disk: &TestDisk) -> (Arc<Block>, Arc<Disk>, Receiver<IoError>) {
    disk.disk.image().unlock().unwrap();
    device(&disk.path, false)
}

/// Requests that nobody has begun when the machine stops go with the state.
#[test]
fn held_requests_are_done_after_a_migration() {
    let (_dir, disk) = scratch();
    disk.start(F_EVENT_IDX);
    disk.read(0, &[512]);
    disk.driver.pause();
    let pending = [1u8, 2].map(|number| {
        let data = [number; 512];
        let sector = u64::from(number);
        disk.driver.add(QUEUE, &[&header(1, sector), &data], &[1])
    });
    // As if they had been taken by the device.
    let mut saved: SavedBlock = decode(
        "d0",
        &disk
            .driver
            .transport
            .device()
            .saved_state()
            .unwrap()
            .save()
            .unwrap(),
    )
    .unwrap();
    saved.held = vec![pending[0].head];
    disk.driver
        .transport
        .device()
        .saved_state()
        .unwrap()
        .restore(1, &encode("d0", &saved).unwrap())
        .unwrap();
    disk.driver.skip_available(QUEUE);
    let (block, there, _errors) = device_unlocked(&disk);
    let moved = disk.driver.migrate_to(block);
    assert_eq!(
        moved
            .transport
            .device()
            .saved_state()
            .unwrap()
            .save()
            .unwrap(),
        encode("d0", &saved).unwrap(),
        "save, restore, save is the same"
    );
    moved.run();
    let mut used = Vec::new();
    while used.len() < 2 {
        used.extend(moved.take_used(QUEUE));
        if used.len() < 2 {
            moved.wait_interrupt();
        }
    }
    assert_eq!(used, [(pending[0].head, 1), (pending[1].head, 1)]);
    let contents = std::fs::read(there.image().path()).unwrap();
    assert_eq!((contents[512], contents[1024]), (1, 2));
}

#[test]
fn without_space_the_machine_is_stopped_and_the_request_made_again() {
    let Some(small) = Small::mount("256k") else {
        return;
    };
    let disk = at(&small.0.path().join("disk"), CAPACITY, false);
    let filler = small.0.path().join("filler");
    std::fs::write(&filler, vec![1; 192 << 10]).unwrap();
    disk.start(F_EVENT_IDX);
    let pending = disk
        .driver
        .add(QUEUE, &[&header(1, 0), &[9; 128 << 10]], &[1]);
    disk.driver.notify(QUEUE);
    let error = disk.errors.recv().unwrap();
    assert_eq!(error.disk, "d0");
    assert_eq!(
        (error.operation, error.action, error.no_space),
        (Operation::Write, Action::Stop, true)
    );
    disk.driver.pause();
    assert!(disk.driver.take_used(QUEUE).is_empty());
    std::fs::remove_file(filler).unwrap();
    disk.driver.run();
    let used = disk.driver.wait_for(QUEUE, &pending);
    assert_eq!(status(&used), OK);
    assert_eq!(disk.contents()[..128 << 10], vec![9; 128 << 10]);
}

#[test]
fn writes_are_logged_for_a_migration() {
    let (_dir, disk) = scratch();
    disk.start(0);
    disk.write(0, &[&[1; 512]]);
    let log = disk.disk.start_log();
    let harvest = || {
        let mut found = Vec::new();
        log.harvest(|block| found.push(block));
        found
    };
    assert_eq!(harvest(), [0u64; 0], "what was written before is not in it");
    disk.write(127, &[&[1; 1024]]);
    disk.read(512, &[512]);
    assert_eq!(harvest(), [0, 1]);
    disk.ranges(11, &[(512, 1, 0)]);
    disk.ranges(13, &[(1024, 1, 0)]);
    assert_eq!(harvest(), [4, 8]);
    disk.disk.stop_log();
    disk.write(0, &[&[1; 512]]);
    assert_eq!(harvest(), [0u64; 0]);
}

#[test]
fn version_1_still_loads() {
    let golden = include_bytes!("../../../golden/virtio-blk-1.bin");
    let (_dir, disk) = scratch();
    let state = disk.driver.transport.device().saved_state().unwrap();
    state.restore(1, golden).unwrap();
    assert_eq!(state.save().unwrap(), golden);
    let saved: SavedBlock = decode("d0", golden).unwrap();
    assert_eq!(saved.held, [3, 255, 0]);
    assert!(!saved.writeback);
}

#[test]
fn every_field_is_checked() {
    let (_dir, disk) = scratch();
    let state = disk.driver.transport.device().saved_state().unwrap();
    let before = state.save().unwrap();
    let good: SavedBlock = decode("d0", &before).unwrap();
    type Corrupt = fn(&mut SavedBlock);
    let ways: [(&str, Corrupt); 4] = [
        ("capacity", |s| s.capacity += 512),
        ("held", |s| s.held = vec![256]),
        ("held", |s| s.held = vec![1, 2, 1]),
        ("held", |s| s.held = (0..=256).collect()),
    ];
    for (field, corrupt) in ways {
        let mut bad = good.clone();
        corrupt(&mut bad);
        let error = state.restore(1, &encode("d0", &bad).unwrap()).unwrap_err();
        let expected = format!("virtio-blk.d0: saved field '{field}' is ");
        assert!(error.to_string().starts_with(&expected), "{error}");
        assert_eq!(state.save().unwrap(), before);
    }
    let mut flag = before.clone();
    flag[8] = 2;
    assert!(state.restore(1, &flag).is_err(), "a flag is 0 or 1");
    assert!(state.restore(1, &before[1..]).is_err());
}
