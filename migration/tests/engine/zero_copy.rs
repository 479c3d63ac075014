//! Whole migrations in which pages are sent without a copy into the kernel.

use migration::source::{self, Peer};
use migration::zero_copy::Sends;

use crate::machine::{Destination, Source};
use crate::whole::{BUSY, arrive, assert_moved, destination_job, source_job, tcp_pair, unix_pair};

/// Migrates a guest that writes, and says what became of the sends.
fn migrate(pair: (migration::link::Stream, migration::link::Stream)) -> Option<Sends> {
    let mut vm = Source::new(20_000, 300);
    vm.run(BUSY);
    let job = source_job();
    job.parameters.set_zero_copy_send(true);
    let arriving = arrive(Destination::of(&vm), pair.1, destination_job());
    let outcome = source::migrate(&mut vm, Peer::Connected(pair.0), &job);
    let (destination, arrival) = arriving.join().unwrap();
    assert_moved(&vm, &outcome, &destination, &arrival);
    job.progress.snapshot().zero_copy
}

#[test]
fn a_busy_guest_arrives_whole() {
    let sends = migrate(tcp_pair()).unwrap();
    assert!(sends.tried > 0 && sends.done <= sends.tried, "{sends:?}");
    // Over loopback the kernel copies, and the engine notices.
    assert_eq!(sends.copied, sends.done);
}

#[test]
fn a_connection_that_knows_nothing_of_it_is_used_as_it_is() {
    assert_eq!(migrate(unix_pair()), None);
}
