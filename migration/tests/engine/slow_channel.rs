//! One of several connections is slow: it gets less to do, and most pages go over the others.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};

use migration::compression::Method;
use migration::frame::Kind;
use migration::source;

use crate::machine::Source;
use crate::multifd::{Ended, TCP, carries_pages, channel_index, migrate};
use crate::proxy::Fate;

/// The one that takes work before any other does.
const SLOW: usize = 0;
const CHANNELS: usize = 4;

/// Migrates over four connections; returns how many bytes each has carried, too. `all`: they are
/// to be in use from the start.
fn migrate_with_slow_one(all: bool, method: Option<Method>) -> (Ended, Vec<usize>) {
    // A third of it is data: 120 MB.
    let mut vm = Source::new(90_000, 0);
    let carried = Arc::new(Mutex::new(vec![0; CHANNELS]));
    let carries = Arc::clone(&carried);
    let set = |job: &source::Job| {
        job.parameters.set_multifd_all(all);
        job.parameters.set_compression(method);
    };
    let mut indices = BTreeMap::new();
    let ended = migrate(&mut vm, CHANNELS as u8, TCP, set, move |frame| {
        if frame.kind == Some(Kind::Channel) {
            indices.insert(frame.connection, channel_index(frame));
        }
        match indices.get(&frame.connection) {
            Some(&index) if carries_pages(frame.kind) => {
                carries.lock().unwrap()[index] += frame.bytes.len();
                match index {
                    SLOW => Fate::PassSlowly(4_000_000),
                    _ => Fate::Pass,
                }
            }
            _ => Fate::Pass,
        }
    });
    let carried = carried.lock().unwrap().clone();
    (ended, carried)
}

#[test]
fn most_pages_go_over_the_fast_ones() {
    for method in [None, Some(Method::Lz4)] {
        let (ended, carried) = migrate_with_slow_one(true, method);
        assert_eq!(ended.error, "");
        // All of them took work.
        assert!(carried.iter().all(|bytes| *bytes > 0), "{carried:?}");
        assert_eq!(ended.left.multifd.unwrap().in_use, CHANNELS as u64);
        // A quarter would be an even share. Much of this is what the sockets took at once.
        let all: usize = carried.iter().sum();
        assert!(carried[SLOW] < all / 6, "{carried:?}");
    }
}

/// It is the only one at first, and soon not any more.
#[test]
fn others_are_found_to_be_worth_it() {
    let (ended, carried) = migrate_with_slow_one(false, None);
    assert_eq!(ended.error, "");
    let all: usize = carried.iter().sum();
    assert!(carried[SLOW] < all / 2, "{carried:?}");
}
