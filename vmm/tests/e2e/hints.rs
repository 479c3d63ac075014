//! Free page hints: what the guest has free is left out of a migration, and what it uses again is not.

use guest_tests::virtio::{Options, Report, command};
use guest_tests::{Size, VIRTIO};
use serde_json::{Value, json};

use crate::harness::{Ferry, Guest, require_kvm, scratch};

const HOLD: u64 = 128 << 20;
/// In pages: of what the guest holds three quarters are free when it is asked.
const FREE: u64 = HOLD / 4096 / 4 * 3;
/// And of these, three of 32 are soon used again.
const REUSED: u64 = FREE / 32 * 3;

/// Bytes a second: the first round over what is not free takes a second, in which the guest says what
/// is, and begins to use it again.
const BANDWIDTH: u64 = 32 << 20;

fn run(dir: &std::path::Path, balloon: &[&str]) -> Ferry {
    let options = Options {
        hold: Size(HOLD),
        interval: 20,
        ..Options::default()
    };
    let guest = Guest {
        image: VIRTIO,
        append: options.to_string(),
        memory: "192M",
        smp: 1,
    };
    let ferry = Ferry::run(dir, "src", &guest, balloon);
    ferry.wait_line(|line| matches!(Report::parse(line), Some(Report::Ready { .. })).then_some(()));
    ferry
}

/// What the guest has told of and used again, in pages, after so many requests for hints. All that it
/// has not free must be as it was written last.
fn verify(ferry: &mut Ferry, requests: u64) {
    loop {
        ferry.serial.send(&[command::VERIFY]).unwrap();
        let (pages, hinted, rewritten) = ferry.wait_line(|line| match Report::parse(line)? {
            Report::Verified {
                pages,
                hinted,
                rewritten,
                errors: 0,
            } => Some((pages, hinted, rewritten)),
            Report::Verified { .. } | Report::Error { .. } => panic!("the guest says: {line}"),
            _ => None,
        });
        // It looks only now and then whether the device still listens.
        if rewritten == requests * REUSED {
            assert_eq!(hinted, requests * FREE);
            let free = if requests > 0 { FREE - REUSED } else { 0 };
            assert_eq!(pages, HOLD / 4096 - free);
            return;
        }
        assert!(rewritten < requests * REUSED, "{rewritten}");
    }
}

fn limit(ferry: &mut Ferry, bandwidth: u64) {
    let arguments = json!({ "max-bandwidth": bandwidth });
    ferry.execute("migrate-set-parameters", arguments);
}

/// Moves the guest slowly; returns how many bytes were sent.
fn move_slowly(mut source: Ferry, dir: &std::path::Path, name: &str) -> (Ferry, u64) {
    limit(&mut source, BANDWIDTH);
    let (destination, info) = source.move_on(dir, name);
    (destination, info["ram"]["transferred"].as_u64().unwrap())
}

#[test]
fn what_is_free_is_left_out_and_what_is_used_again_is_not() {
    require_kvm!();
    let dir = scratch();
    let mut here = run(dir.path(), &["--balloon"]);
    verify(&mut here, 0);
    for hop in 1..=3 {
        let bytes;
        (here, bytes) = move_slowly(here, dir.path(), &format!("d{hop}"));
        eprintln!("hop {hop}: {bytes}");
        assert!(bytes < HOLD / 2, "{bytes} bytes were sent");
        verify(&mut here, hop);
    }
}

#[test]
fn without_hints_everything_is_sent() {
    require_kvm!();
    let dir = scratch();
    let source = run(dir.path(), &["--balloon", "free-page-hint=off"]);
    let (mut there, bytes) = move_slowly(source, dir.path(), "dst");
    eprintln!("without: {bytes}");
    assert!(bytes > HOLD, "{bytes} bytes were sent");
    verify(&mut there, 0);
}

/// As fast as it goes the guest names its pages while they are sent, or after that.
#[test]
fn hints_that_come_during_and_after_the_first_round() {
    require_kvm!();
    let dir = scratch();
    let mut here = run(dir.path(), &["--balloon"]);
    for hop in 0..8 {
        limit(&mut here, if hop % 2 == 0 { 0 } else { 256 << 20 });
        (here, _) = here.move_on(dir.path(), &format!("d{hop}"));
        here.serial.send(&[command::VERIFY]).unwrap();
        here.wait_line(|line| match Report::parse(line)? {
            Report::Verified { errors: 0, .. } => Some(()),
            Report::Verified { .. } | Report::Error { .. } => panic!("the guest says: {line}"),
            _ => None,
        });
    }
}

#[test]
fn a_guest_that_does_not_leave_after_all_has_all_of_its_memory() {
    require_kvm!();
    let dir = scratch();
    let mut source = run(dir.path(), &["--balloon"]);
    let (mut destination, uri) = Ferry::incoming(dir.path(), "never");
    limit(&mut source, 4 << 20);
    source.migrate(&uri);
    // It is told that nobody listens any longer.
    let hinted = |ferry: &mut Ferry| {
        ferry.serial.send(&[command::VERIFY]).unwrap();
        ferry.wait_line(|line| match Report::parse(line)? {
            Report::Verified { hinted, .. } => Some(hinted),
            _ => None,
        })
    };
    while hinted(&mut source) < FREE {}
    source.execute("migrate_cancel", Value::Null);
    source.wait_migrated("cancelled");
    destination.wait_exit();
    verify(&mut source, 1);
    let (mut there, bytes) = move_slowly(source, dir.path(), "dst");
    assert!(bytes < HOLD / 2, "{bytes} bytes were sent");
    verify(&mut there, 2);
}
