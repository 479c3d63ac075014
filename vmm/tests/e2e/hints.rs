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

fn run(dir: &std::path::Path, balloon: &[&str]) -> Ferry {
    let options = Options {
        hold: Size(HOLD),
        interval: 20,
        ..Options::default()
    };
    let guest = Guest::new(VIRTIO, "192M", options);
    let ferry = Ferry::run(dir, "src", &guest, balloon);
    ferry.wait_line(|line| matches!(Report::parse(line), Some(Report::Ready { .. })).then_some(()));
    ferry
}

/// What the guest says of its memory, all of which that is not free must be as it was written last.
struct Verified {
    pages: u64,
    hinted: u64,
    rewritten: u64,
}

fn verify(ferry: &mut Ferry) -> Verified {
    ferry.serial.send(&[command::VERIFY]).unwrap();
    ferry.wait_line(|line| match Report::parse(line)? {
        Report::Verified {
            pages,
            hinted,
            rewritten,
            errors: 0,
        } => Some(Verified {
            pages,
            hinted,
            rewritten,
        }),
        Report::Verified { .. } | Report::Error { .. } => panic!("the guest says: {line}"),
        _ => None,
    })
}

/// Waits until the guest knows of so many requests that they are over, and has used again what it
/// wants to.
fn wait_over(ferry: &mut Ferry, requests: u64) {
    loop {
        let now = verify(ferry);
        assert!(now.hinted <= requests * FREE && now.rewritten <= requests * REUSED);
        if now.rewritten == requests * REUSED {
            assert_eq!(now.hinted, requests * FREE);
            let free = if requests > 0 { FREE - REUSED } else { 0 };
            assert_eq!(now.pages, HOLD / 4096 - free);
            return;
        }
    }
}

fn limit(ferry: &mut Ferry, bandwidth: u64) {
    let arguments = json!({ "max-bandwidth": bandwidth });
    ferry.execute("migrate-set-parameters", arguments);
}

/// Begins a migration which waits, more or less, until the guest has named what is free, for the
/// `request`th time.
fn begin(source: &mut Ferry, uri: &str, request: u64) {
    limit(source, 1 << 20);
    source.migrate(uri);
    while verify(source).hinted < request * FREE {}
}

fn transferred(info: &Value) -> u64 {
    info["ram"]["transferred"].as_u64().unwrap()
}

#[test]
fn what_is_free_is_left_out_and_what_is_used_again_is_not() {
    require_kvm!();
    let dir = scratch();
    let mut here = run(dir.path(), &["--balloon"]);
    wait_over(&mut here, 0);
    for hop in 1..=3 {
        let (mut there, uri) = Ferry::incoming(dir.path(), &format!("d{hop}"));
        begin(&mut here, &uri, hop);
        // For a second it uses pages again while others are sent.
        limit(&mut here, 32 << 20);
        let info = here.wait_migrated("completed");
        here.quit();
        let bytes = transferred(&info);
        assert!(bytes < HOLD / 2, "{bytes} bytes were sent");
        wait_over(&mut there, hop);
        here = there;
    }
}

#[test]
fn without_hints_everything_is_sent() {
    require_kvm!();
    let dir = scratch();
    let source = run(dir.path(), &["--balloon", "free-page-hint=off"]);
    let (mut there, info) = source.move_on(dir.path(), "dst");
    let bytes = transferred(&info);
    assert!(bytes > HOLD, "{bytes} bytes were sent");
    wait_over(&mut there, 0);
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
        verify(&mut here);
    }
}

#[test]
fn a_guest_that_does_not_leave_after_all_has_all_of_its_memory() {
    require_kvm!();
    let dir = scratch();
    let mut source = run(dir.path(), &["--balloon"]);
    let (mut destination, uri) = Ferry::incoming(dir.path(), "never");
    begin(&mut source, &uri, 1);
    source.execute("migrate_cancel", Value::Null);
    source.wait_migrated("cancelled");
    destination.wait_exit();
    // It is told that nobody listens any longer.
    wait_over(&mut source, 1);

    let (mut there, uri) = Ferry::incoming(dir.path(), "dst");
    begin(&mut source, &uri, 2);
    limit(&mut source, 0);
    source.wait_migrated("completed");
    wait_over(&mut there, 2);
}
