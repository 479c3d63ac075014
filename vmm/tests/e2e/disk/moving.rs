//! Guests that move while their disks are busy.

use devices::image::{Cache, Error, Format, Image};
use guest_tests::Size;
use guest_tests::disk::{Holds, Mode, Options, Report};
use guest_tests::driver::skip;
use guest_tests::mmio::Wait;
use serde_json::Value;

use super::{
    CAPACITY, DiskGuest, busy, drive, finish, hop, new_image, run, wait_progress, wait_report,
};
use crate::harness::{require_kvm, scratch};

fn there_and_verified(format: Format, wait: Wait, more: &str) {
    let guest = DiskGuest::on(&[(format, more)]);
    let options = Options {
        wait,
        holds: Holds::Zero,
        discarded: Holds::Zero,
        ..busy()
    };
    let source = guest.run("src", options);
    wait_progress(&source, 500);
    guest.last_hop(source, 500);
}

#[test]
fn a_raw_image_loses_nothing_polled() {
    require_kvm!();
    there_and_verified(Format::Raw, Wait::Poll, ",format=raw");
}

#[test]
fn a_raw_image_loses_nothing_with_interrupts() {
    require_kvm!();
    there_and_verified(Format::Raw, Wait::Irq, ",format=raw");
}

#[test]
fn a_qcow2_image_loses_nothing_polled() {
    require_kvm!();
    there_and_verified(Format::Qcow2, Wait::Poll, "");
}

#[test]
fn a_qcow2_image_loses_nothing_with_interrupts() {
    require_kvm!();
    there_and_verified(Format::Qcow2, Wait::Irq, ",format=qcow2");
}

#[test]
fn without_the_page_cache_too() {
    require_kvm!();
    let dir = scratch();
    let path = dir.path().join("probe");
    match Image::create(&path, Format::Raw, CAPACITY, None, Cache::None) {
        Err(Error::Direct { .. }) => skip("the temporary directory has no O_DIRECT; set TMPDIR"),
        image => {
            drop(image.unwrap());
            there_and_verified(Format::Raw, Wait::Irq, ",format=raw,cache=none");
            there_and_verified(Format::Qcow2, Wait::Poll, ",cache=none");
        }
    }
}

#[test]
fn two_disks_of_which_each_keeps_its_own() {
    require_kvm!();
    let guest = DiskGuest::on(&[
        (Format::Raw, ",format=raw,id=root"),
        (Format::Qcow2, ",id=data"),
    ]);
    let source = guest.run("src", busy());
    wait_progress(&source, 500);
    // In another order: they are found by name.
    let turned = [guest.drives[1].clone(), guest.drives[0].clone()];
    let destination = hop(source, guest.dir.path(), "dst", &turned);
    wait_progress(&destination, 500);
    guest.finish(destination);
}

#[test]
fn a_disk_that_is_only_read() {
    require_kvm!();
    let dir = scratch();
    let path = new_image(dir.path(), "disk", Format::Raw);
    let drives = [drive(&path, ",format=raw")];
    let fill = Options {
        mode: Mode::Fill,
        ..busy()
    };
    let writer = run(dir.path(), "fill", fill, &drives);
    wait_report(&writer, |report| {
        matches!(report, Report::Filled { .. }).then_some(())
    });
    finish(writer, &[&path]);

    let drives = [drive(&path, ",format=raw,readonly=on")];
    let read = Options {
        mode: Mode::Read,
        ..busy()
    };
    let source = run(dir.path(), "src", read, &drives);
    // Others may read it, too, at the same time.
    let other = run(dir.path(), "other", read, &drives);
    wait_progress(&source, 200);
    let destination = hop(source, dir.path(), "dst", &drives);
    wait_progress(&destination, 200);
    for ferry in [destination, other] {
        finish(ferry, &[&path]);
    }
}

#[test]
fn to_and_fro_twenty_times() {
    require_kvm!();
    let guest = DiskGuest::on(&[(Format::Raw, ",format=raw"), (Format::Qcow2, "")]);
    let options = Options {
        wait: Wait::Irq,
        area: Size(16 << 20),
        ..busy()
    };
    let mut here = guest.run("m0", options);
    for number in 1..=20 {
        wait_progress(&here, 50);
        here = guest.hop(here, &format!("m{number}"));
    }
    wait_progress(&here, 200);
    guest.finish(here);
}

#[test]
fn stopped_before_it_moves_and_continued_there() {
    require_kvm!();
    let guest = DiskGuest::on(&[(Format::Qcow2, "")]);
    let mut source = guest.run("src", busy());
    for _ in 0..50 {
        wait_report(&source, super::done);
        source.execute("stop", Value::Null);
        source.execute("cont", Value::Null);
    }
    wait_progress(&source, 100);
    source.execute("stop", Value::Null);
    let mut destination = guest.hop(source, "dst");
    destination.wait_status("paused");
    destination.execute("cont", Value::Null);
    wait_progress(&destination, 200);
    guest.finish(destination);
}
