//! `max-bandwidth` is kept: what is sent takes the time that it asks for. How long things take at
//! most is never asked here, as the machine may be busy.

use std::time::Duration;

use migration::layout::PAGE_SIZE;
use migration::source::{self, Peer};

use crate::disks::FakeDisk;
use crate::machine::{Destination, Source, noise};
use crate::multifd::{TCP, migrate, pass};
use crate::whole::{arrive, assert_moved, destination_job, source_job, unix_pair};

/// In bytes a second: what is sent takes a second.
const BANDWIDTH: u64 = 4 << 20;
/// The last frame goes without a wait behind it, and the waits before may be made up for: a tenth of
/// a second each.
const LEAST: Duration = Duration::from_millis(700);

/// A third of its pages is data: 4 MiB.
fn guest() -> Source {
    let mut vm = Source::new(3072, 0);
    vm.blobs.clear();
    vm
}

#[test]
fn of_pages_on_one_connection() {
    let mut vm = guest();
    let job = source_job();
    job.parameters.set_max_bandwidth(BANDWIDTH);
    let (a, b) = unix_pair();
    let arriving = arrive(Destination::of(&vm), b, destination_job());
    let outcome = source::migrate(&mut vm, Peer::Connected(a), &job);
    let (destination, arrival) = arriving.join().unwrap();
    assert_moved(&vm, &outcome, &destination, &arrival);
    let first = job.progress.snapshot().rounds[0];
    assert_eq!(first.pages * PAGE_SIZE, BANDWIDTH);
    assert!(first.time >= LEAST, "{first:?}");
}

#[test]
fn of_pages_on_several_connections_together() {
    let mut vm = guest();
    let set = |job: &source::Job| job.parameters.set_max_bandwidth(BANDWIDTH);
    let ended = migrate(&mut vm, 4, TCP, set, pass);
    assert_eq!(ended.error, "");
    let first = ended.left.rounds[0];
    assert_eq!(first.pages * PAGE_SIZE, BANDWIDTH);
    assert!(first.time >= LEAST, "{first:?}");
}

#[test]
fn of_blocks() {
    let disk = FakeDisk::empty("vda", BANDWIDTH);
    disk.guest_write(0, &noise(5, BANDWIDTH as usize));
    let mut vm = Source::with_disks(30, vec![disk]);
    let job = source_job();
    job.parameters.set_max_bandwidth(BANDWIDTH);
    let (a, b) = unix_pair();
    let arriving = arrive(Destination::of(&vm), b, destination_job());
    let outcome = source::migrate(&mut vm, Peer::Connected(a), &job);
    let (destination, arrival) = arriving.join().unwrap();
    assert_moved(&vm, &outcome, &destination, &arrival);
    // Before the rounds, and then whatever was written meanwhile.
    let snapshot = job.progress.snapshot();
    assert!(snapshot.total_time >= LEAST, "{snapshot:?}");
}
