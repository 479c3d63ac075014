//! Pages that the guest names as free in the first round.

use std::sync::Arc;

use migration::bitmap::PageRun;
use migration::source::{self, Outcome, Peer};

use crate::machine::{Destination, Source, page};
use crate::whole::{arrive, destination_job, source_job, unix_pair};

#[test]
fn free_pages_are_left_out_unless_they_are_used_again() {
    const FREE: [PageRun; 3] = [
        PageRun {
            first: 3000,
            count: 600,
        },
        // Across the end of a region.
        PageRun {
            first: 5900,
            count: 200,
        },
        PageRun {
            first: 6099,
            count: 2,
        },
    ];
    const USED_AGAIN: [u64; 3] = [3000, 3450, 6000];
    let mut vm = Source::new(6000, 3000);
    let write = vm.writer();
    let mut asked = 0;
    vm.free = Some(Box::new(move || {
        asked += 1;
        match asked {
            // Nothing has been sent yet.
            1 => {
                for page in USED_AGAIN {
                    write(page);
                }
                FREE.to_vec()
            }
            // These have.
            2 => vec![PageRun {
                first: 0,
                count: 64,
            }],
            _ => vec![],
        }
    }));
    let job = source_job();
    let pair = unix_pair();
    let arriving = arrive(Destination::default(), pair.1, destination_job());
    let outcome = source::migrate(&mut vm, Peer::Connected(pair.0), &job);
    let (destination, arrival) = arriving.join().unwrap();
    assert!(matches!(outcome, Outcome::Completed(_)), "{outcome:?}");
    assert!(arrival.is_ok(), "{arrival:?}");
    let there = destination.ram.as_ref().unwrap();
    let mut left_out = 0;
    for number in 0..vm.layout.pages() {
        let free = FREE
            .iter()
            .any(|run| (run.first..run.end()).contains(&number));
        let arrived = page(there, &vm.layout, number);
        if free && !USED_AGAIN.contains(&number) {
            assert!(arrived.iter().all(|byte| *byte == 0), "page {number}");
            left_out += 1;
        } else {
            assert!(
                arrived == page(&vm.ram, &vm.layout, number),
                "page {number}"
            );
        }
    }
    assert_eq!(left_out, 801 - 3);
    assert!(Arc::clone(&job.progress).snapshot().skipped >= left_out);
}
