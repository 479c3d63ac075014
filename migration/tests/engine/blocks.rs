//! Migrations with disks in which nothing goes wrong.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use migration::bitmap::BlockBitmap;
use migration::disk::{BLOCK_SIZE, SourceDisk};
use migration::frame::Kind;
use migration::source::{self, Outcome, Peer};

use crate::disks::{CLUSTER, FakeDisk};
use crate::machine::{Destination, Source, Writes, noise};
use crate::proxy::{Fate, Frame, proxied};
use crate::whole::{
    BUSY_SMALL, arrive, assert_moved, destination_job, migrate, source_job, tcp_pair, unix_pair,
};

const MIB: u64 = 1 << 20;

fn two_disks() -> Vec<Arc<FakeDisk>> {
    vec![
        FakeDisk::sparse("vda", 9 * MIB + 512),
        FakeDisk::overlay("vdb", 5 * MIB),
    ]
}

#[test]
fn disks_that_nobody_writes_to() {
    for pair in [unix_pair(), tcp_pair()] {
        let mut vm = Source::with_disks(300, two_disks());
        let (outcome, destination, arrival) = migrate(&mut vm, pair);
        assert_moved(&vm, &outcome, &destination, &arrival);
        // What was a hole is a hole, and nothing was written twice.
        for (here, there) in destination.disks.iter().zip(&vm.disks) {
            assert_eq!(here.data_bytes(), there.data_bytes());
            assert_eq!(*here.written.lock().unwrap(), there.data_bytes());
        }
    }
}

#[test]
fn disks_that_are_written_all_along() {
    for pair in [unix_pair(), tcp_pair()] {
        let mut vm = Source::with_disks(400, two_disks());
        vm.run(BUSY_SMALL);
        let (outcome, destination, arrival) = migrate(&mut vm, pair);
        assert_moved(&vm, &outcome, &destination, &arrival);
        assert!(destination.started.unwrap().run);
        for disk in &destination.disks {
            assert!(disk.data_bytes() < disk.capacity, "the holes are gone");
        }
    }
}

#[test]
fn disks_of_odd_sizes() {
    for capacity in [512, 4096, BLOCK_SIZE, BLOCK_SIZE + 512, 3 * MIB - 512] {
        for new in [FakeDisk::sparse, FakeDisk::overlay, FakeDisk::empty] {
            let mut vm = Source::with_disks(300, vec![new("vda", capacity)]);
            vm.run(BUSY_SMALL);
            let (outcome, destination, arrival) = migrate(&mut vm, unix_pair());
            assert_moved(&vm, &outcome, &destination, &arrival);
        }
    }
}

#[test]
fn a_full_disk_and_many_small_ones() {
    let full = FakeDisk::empty("full", 20 * MIB);
    full.guest_write(0, &noise(3, 20 << 20));
    let mut disks = vec![full];
    for number in 1..64 {
        disks.push(FakeDisk::sparse(&format!("d{number}"), 100 * 512));
    }
    let mut vm = Source::with_disks(300, disks);
    vm.run(BUSY_SMALL);
    let (outcome, destination, arrival) = migrate(&mut vm, unix_pair());
    assert_moved(&vm, &outcome, &destination, &arrival);
}

/// As many pieces as there can be, and more than fit in a frame.
#[test]
fn a_disk_of_many_small_pieces() {
    let disk = FakeDisk::empty("vda", 12 * MIB);
    for cluster in (0..12 * MIB).step_by(2 * CLUSTER as usize) {
        disk.guest_write(cluster + 512, &noise(cluster, 512));
    }
    let mut vm = Source::with_disks(300, vec![disk]);
    let (outcome, destination, arrival) = migrate(&mut vm, unix_pair());
    assert_moved(&vm, &outcome, &destination, &arrival);
    assert_eq!(*destination.disks[0].written.lock().unwrap(), 6 * MIB);
}

/// Zeroes that the image doesn't know of are found by reading, and are not sent.
#[test]
fn zeroes_that_are_stored_do_not_travel() {
    let disk = FakeDisk::empty("vda", 8 * MIB);
    disk.guest_write(0, &vec![0; 8 << 20]);
    disk.guest_write(3 * MIB, &noise(1, 100));
    let mut vm = Source::with_disks(300, vec![disk]);
    let (outcome, destination, arrival) = migrate(&mut vm, unix_pair());
    assert_moved(&vm, &outcome, &destination, &arrival);
    assert_eq!(*destination.disks[0].written.lock().unwrap(), BLOCK_SIZE);
}

#[test]
fn a_disk_of_many_terabytes_with_nothing_on_it() {
    // Nothing at the destination grows with what the source says.
    struct Huge;
    impl SourceDisk for Huge {
        fn start_log(&self) -> Result<(), migration::vm::VmError> {
            Ok(())
        }
        fn harvest_dirty(&self, _: &mut BlockBitmap) {}
        fn stop_log(&self) {}
        fn extent(&self, offset: u64) -> Result<migration::disk::Extent, migration::vm::VmError> {
            Ok(migration::disk::Extent {
                kind: migration::disk::ExtentKind::Zero,
                len: (100 << 40) - offset,
            })
        }
        fn read(&self, _: u64, _: &mut [u8]) -> Result<(), migration::vm::VmError> {
            panic!("zeroes are read")
        }
    }
    struct Nothing;
    impl migration::disk::DestinationDisk for Nothing {
        fn write(&mut self, _: u64, _: &[u8]) -> Result<(), migration::vm::VmError> {
            panic!("zeroes are written")
        }
        fn zero(&mut self, offset: u64, len: u64) -> Result<(), migration::vm::VmError> {
            assert_eq!((offset, len), (0, 100 << 40));
            Ok(())
        }
        fn flush(&mut self) -> Result<(), migration::vm::VmError> {
            Ok(())
        }
    }
    let mut vm = Source::with_disks(30, vec![]);
    vm.other_disks = vec![(100 << 40, Arc::new(Huge))];
    let mut destination = Destination::default();
    destination.other_disks = vec![Some(Box::new(Nothing))];
    let (a, b) = unix_pair();
    let arriving = arrive(destination, b, destination_job());
    let outcome = source::migrate(&mut vm, Peer::Connected(a), &source_job());
    assert!(matches!(outcome, Outcome::Completed(_)), "{outcome:?}");
    arriving.join().unwrap().1.unwrap();
}

/// What is written while the block itself is being read comes again.
#[test]
fn a_write_that_meets_the_read_of_its_block_is_not_lost() {
    let disk = FakeDisk::empty("vda", 4 * MIB);
    disk.guest_write(0, &noise(9, 4 << 20));
    let writer = Arc::downgrade(&disk);
    let stopped = Arc::new(AtomicBool::new(false));
    let stopping = Arc::clone(&stopped);
    let mut reads = 0u64;
    disk.set_hook(Box::new(move |call, offset| {
        if call == "read" {
            reads += 1;
            // Before each of the first reads, of the bulk pass and of the first rounds, something
            // changes there; so does the block before, which was read already.
            if reads < 30 && !stopped.load(Ordering::SeqCst) {
                let disk = writer.upgrade().unwrap();
                disk.guest_write(offset, &noise(reads, 512));
                disk.guest_write(offset.saturating_sub(BLOCK_SIZE), &noise(reads, 512));
            }
        }
        Ok(())
    }));
    let mut vm = Source::with_disks(300, vec![disk]);
    vm.hook = Box::new(move |call| {
        if call == "pause" {
            stopping.store(true, Ordering::SeqCst);
        }
        Ok(())
    });
    let (outcome, destination, arrival) = migrate(&mut vm, unix_pair());
    assert_moved(&vm, &outcome, &destination, &arrival);
}

#[test]
fn memory_is_logged_only_after_the_bulk_pass_and_disks_before_it() {
    let disk = FakeDisk::sparse("vda", 4 * MIB);
    let mut vm = Source::with_disks(300, vec![disk]);
    let calls = Arc::clone(&vm.calls);
    let logged = Arc::clone(&calls);
    vm.disks[0].set_hook(Box::new(move |call, _| {
        let mut calls = logged.lock().unwrap();
        if calls.last().is_none_or(|last| last != call) {
            calls.push(call.to_owned());
        }
        Ok(())
    }));
    let (outcome, destination, arrival) = migrate(&mut vm, unix_pair());
    assert_moved(&vm, &outcome, &destination, &arrival);
    let calls = vm.calls();
    let at = |name: &str| calls.iter().position(|call| call == name);
    assert!(at("start_log") < at("extent"), "{calls:?}");
    assert!(calls.iter().rposition(|call| call == "read") < at("start_dirty_log"));
    assert_eq!(calls.iter().filter(|call| *call == "start_log").count(), 1);
}

#[test]
fn both_sides_tell_how_far_the_disks_are() {
    let mut vm = Source::with_disks(300, two_disks());
    vm.run(BUSY_SMALL);
    let (job, peer) = (source_job(), destination_job());
    let received = Arc::clone(&peer.progress);
    let (halfway, seen) = (Arc::clone(&job.progress), Arc::clone(&peer.progress));
    let mut frames = 0;
    let pair = proxied(move |frame: &mut Frame| {
        if frame.kind == Some(Kind::Blocks) {
            frames += 1;
            if frames == 3 {
                for side in [&halfway, &seen] {
                    let disk = side.snapshot().disk.unwrap();
                    assert_eq!(disk.total, 14 * MIB + 512);
                    assert!(disk.remaining > 0, "{disk:?}");
                }
            }
        }
        Fate::Pass
    });
    let arriving = arrive(Destination::of(&vm), pair.1, peer);
    let outcome = source::migrate(&mut vm, Peer::Connected(pair.0), &job);
    let (destination, arrival) = arriving.join().unwrap();
    assert_moved(&vm, &outcome, &destination, &arrival);

    let (sent, received) = (job.progress.snapshot(), received.snapshot());
    let (out, back) = (sent.disk.unwrap(), received.disk.unwrap());
    assert_eq!((out.remaining, back.remaining), (0, 0));
    assert_eq!(out.transferred, back.transferred);
    assert_eq!(out.normal, back.normal);
    assert_eq!(out.normal_bytes, back.normal_bytes);
    assert_eq!(out.zero_bytes, back.zero_bytes);
    assert_eq!(out.absent_bytes, back.absent_bytes);
    let written = destination.disks.iter().map(|d| *d.written.lock().unwrap());
    assert_eq!(out.normal_bytes, written.sum::<u64>());
    assert!(out.normal_bytes + out.zero_bytes + out.absent_bytes >= out.total);
    assert!(out.transferred > out.normal_bytes && out.absent_bytes > 0);
    assert!(out.mbps > 0.0, "{out:?}");
    assert_eq!(out.dirty_sync_count, sent.round);
    // Memory's numbers are memory's.
    assert_eq!(
        sent.bytes.pages + sent.bytes.zero + sent.bytes.state + sent.bytes.control,
        sent.ram.transferred
    );
    assert_eq!(
        sent.ram.transferred,
        sent.ram.precopy_bytes + sent.ram.downtime_bytes
    );
    assert!(sent.ram.transferred < sent.ram.normal_bytes + 2_000_000);
    // A round is blocks and pages: between the passes blocks came again.
    let blocks: u64 = sent.rounds.iter().map(|round| round.block_bytes).sum();
    assert_eq!(
        blocks,
        out.normal_bytes + out.zero_bytes + out.absent_bytes - out.total
    );

    // Without disks there is nothing to tell.
    let mut vm = Source::new(30, 0);
    let (a, b) = unix_pair();
    let job = source_job();
    let arriving = arrive(Destination::default(), b, destination_job());
    source::migrate(&mut vm, Peer::Connected(a), &job);
    arriving.join().unwrap().1.unwrap();
    assert_eq!(job.progress.snapshot().disk, None);
}

/// What was written is on the destination's disk by then, but for what the last round sends.
#[test]
fn flushes_come_before_the_guest_is_stopped() {
    let mut vm = Source::with_disks(300, vec![FakeDisk::sparse("vda", 8 * MIB)]);
    vm.run(Writes {
        blocks: 0,
        ..BUSY_SMALL
    });
    let destination = Destination::of(&vm);
    let written = vm.disks[0].data_bytes();
    let here = Arc::clone(&destination.disks[0]);
    vm.hook = Box::new(move |call| {
        if call == "pause" {
            assert_eq!(*here.written.lock().unwrap(), written);
            assert!(*here.flushed.lock().unwrap());
            // Nothing is left to flush, so that it is not done once more.
            here.set_hook(Box::new(|call, _| match call {
                "flush" => Err("flushed in the downtime".into()),
                _ => Ok(()),
            }));
        }
        Ok(())
    });
    let (a, b) = unix_pair();
    let arriving = arrive(destination, b, destination_job());
    let outcome = source::migrate(&mut vm, Peer::Connected(a), &source_job());
    let (destination, arrival) = arriving.join().unwrap();
    assert_moved(&vm, &outcome, &destination, &arrival);
}

/// The pace holds for blocks, and it may change.
#[test]
fn blocks_keep_to_the_bandwidth_limit() {
    let disk = FakeDisk::empty("vda", 8 * MIB);
    disk.guest_write(0, &noise(5, 8 << 20));
    let mut vm = Source::with_disks(30, vec![disk]);
    let job = source_job();
    job.parameters.set_max_bandwidth(700_000);
    let parameters = Arc::clone(&job.parameters);
    let mut frames = 0;
    let (a, b) = proxied(move |frame: &mut Frame| {
        if frame.kind == Some(Kind::Blocks) {
            frames += 1;
            if frames <= 3 {
                // A tenth of a second at that pace, and at least a block.
                assert_eq!((frame.bytes.len() - frame.payload) as u64, BLOCK_SIZE);
            }
            if frames == 3 {
                parameters.set_max_bandwidth(0);
            }
        }
        Fate::Pass
    });
    let arriving = arrive(Destination::of(&vm), b, destination_job());
    let outcome = source::migrate(&mut vm, Peer::Connected(a), &job);
    let (destination, arrival) = arriving.join().unwrap();
    assert_moved(&vm, &outcome, &destination, &arrival);
}

/// While the network is slow, the disk is read ahead, but only so far.
#[test]
fn reading_goes_on_while_the_network_waits_but_not_without_end() {
    let disk = FakeDisk::empty("vda", 32 * MIB);
    disk.guest_write(0, &noise(5, 32 << 20));
    let (sender, reads) = std::sync::mpsc::channel();
    disk.set_hook(Box::new(move |call, offset| {
        if call == "read" {
            let _ = sender.send(offset);
        }
        Ok(())
    }));
    let mut vm = Source::with_disks(30, vec![disk]);
    let mut first = true;
    let pair = proxied(move |frame: &mut Frame| {
        if frame.kind == Some(Kind::Blocks) && std::mem::take(&mut first) {
            // This frame waits until more has been read than it holds.
            let ahead = reads.iter().find(|&offset| offset >= 3 * MIB);
            assert!(ahead.is_some());
            while let Ok(offset) = reads.recv_timeout(Duration::from_millis(100)) {
                assert!(offset < 16 * MIB, "{offset} bytes were read ahead");
            }
        }
        Fate::Pass
    });
    let arriving = arrive(Destination::of(&vm), pair.1, destination_job());
    let outcome = source::migrate(&mut vm, Peer::Connected(pair.0), &source_job());
    let (destination, arrival) = arriving.join().unwrap();
    assert_moved(&vm, &outcome, &destination, &arrival);
}
