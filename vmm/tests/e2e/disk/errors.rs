//! Errors that the guest is told of, and resets under load.

use std::fs::OpenOptions;

use devices::image::Format;
use guest_tests::disk::{Mode, Options, Report, command};
use serde_json::Value;

use super::{CAPACITY, DiskGuest, busy, wait_error_event, wait_progress, wait_report};
use crate::harness::{PATIENCE, require_kvm};

#[test]
fn reads_beyond_a_truncated_file_fail_and_the_rest_goes_on() {
    require_kvm!();
    let guest = DiskGuest::on(&[(Format::Raw, ",format=raw")]);
    let options = Options {
        mode: Mode::Fill,
        ..busy()
    };
    let mut ferry = guest.run("a", options);
    wait_report(&ferry, |report| {
        matches!(report, Report::Filled { .. }).then_some(())
    });
    let file = OpenOptions::new()
        .write(true)
        .open(&guest.paths[0])
        .unwrap();
    file.set_len(CAPACITY / 2).unwrap();
    let sector = ferry.wait_line(|line| match Report::parse(line) {
        Some(Report::IoError { sector, status, .. }) => {
            assert_eq!(status, 1, "{line}");
            Some(sector)
        }
        Some(report @ Report::Error { .. }) => panic!("{report}"),
        _ => None,
    });
    assert!(sector >= CAPACITY / 2 / 512 - 128, "sector {sector}");
    let error = wait_error_event(&mut ferry);
    assert_eq!(error["action"], "report", "{error}");
    assert_eq!(error["nospace"], false, "{error}");
    assert_eq!(error["operation"], "read", "{error}");
    assert!(!error["reason"].as_str().unwrap().is_empty());
    assert_eq!(ferry.status(), "running");
    ferry.wait_heartbeats(50);
}

#[test]
fn resets_under_load_leave_a_disk_that_works() {
    require_kvm!();
    let guest = DiskGuest::on(&[(Format::Raw, ",format=raw"), (Format::Qcow2, "")]);
    let mut ferry = guest.run("a", busy());
    for round in 0..6 {
        wait_progress(&ferry, 100);
        if round % 2 == 0 {
            ferry.serial.send(&[command::RESET]).unwrap();
        } else {
            ferry.execute("system_reset", Value::Null);
        }
        ferry.qmp.wait_event("RESET", PATIENCE).unwrap();
        wait_report(&ferry, |report| {
            matches!(report, Report::Ready { .. }).then_some(())
        });
    }
    // Also where it has arrived.
    let mut there = guest.hop(ferry, "b");
    wait_progress(&there, 100);
    there.execute("system_reset", Value::Null);
    wait_report(&there, |report| {
        matches!(report, Report::Ready { .. }).then_some(())
    });
    wait_progress(&there, 100);
    guest.finish(there);
}
