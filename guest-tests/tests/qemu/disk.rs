//! The guest that verifies disks.

use std::fs::File;
use std::io::{Seek, SeekFrom, Write};
use std::os::unix::fs::FileExt;
use std::path::Path;

use guest_tests::dirtier::Rate;
use guest_tests::disk::{Bench, Held, Holds, Kind, Mode, Op, Options, Place, Report, command};
use guest_tests::mmio::Wait;
use guest_tests::{DISK, Maybe, Size, image};
use serde_json::json;

use crate::machine::{Qemu, require_qemu, scratch, start};

const AREA: u64 = 16 << 20;

fn options() -> Options {
    Options {
        holds: Holds::Zero,
        discarded: Holds::Zero,
        area: Size(AREA),
        interval: 20,
        ..Options::default()
    }
}

fn disk(number: usize, path: &Path, more: &str) -> [String; 4] {
    let path = path.display();
    [
        "-drive".to_owned(),
        format!("if=none,id=d{number},format=raw,file={path},discard=unmap,file.locking=off{more}"),
        "-device".to_owned(),
        format!("virtio-blk-device,drive=d{number}"),
    ]
}

fn new_image(path: &Path) {
    File::create(path).unwrap().set_len(AREA + 4096).unwrap();
}

/// Lets the guest work until it has done something of everything.
fn work(machine: &Qemu) {
    work_until(machine, 200);
}

/// Lets it work until it has also written as often.
fn work_until(machine: &Qemu, enough: u64) {
    machine.wait_for(|line| match Report::parse(line)? {
        Report::Status {
            reads,
            writes,
            flushes,
            discards,
            zeroes,
            kept,
            errors,
            io_errors,
            lost_interrupts,
            ..
        } => {
            assert_eq!((errors, io_errors, lost_interrupts), (0, 0, 0), "{line}");
            let all = [flushes, discards, zeroes].iter().all(|&count| count > 0);
            (reads > 200 && writes > enough && kept > 0 && all).then_some(())
        }
        Report::Error { .. } | Report::IoError { .. } | Report::Length { .. } => panic!("{line}"),
        _ => None,
    });
}

/// Has everything verified, and compares the image with it.
fn finish(machine: &mut Qemu, image: &Path) -> Report {
    machine.serial.send(&[command::FINISH]).unwrap();
    let verified = machine.wait_for(|line| {
        Report::parse(line).filter(|report| matches!(report, Report::Verified { .. }))
    });
    assert!(
        matches!(
            verified,
            Report::Verified {
                errors: 0,
                io_errors: 0,
                unknown: 0,
                ..
            }
        ),
        "{verified}"
    );
    let found = image::read_reported(&mut File::open(image).unwrap(), &verified).unwrap();
    assert!(found.agrees_with(&verified), "{found:?}; {verified}");
    verified
}

#[test]
fn a_disk_holds_what_the_guest_wrote() {
    let qemu = require_qemu!();
    for (wait, indirect, event_idx) in [
        (Wait::Poll, true, true),
        (Wait::Irq, true, true),
        (Wait::Irq, false, false),
        (Wait::Poll, false, false),
    ] {
        let dir = scratch();
        let image = dir.path().join("image");
        new_image(&image);
        let options = Options {
            wait,
            indirect,
            event_idx,
            ..options()
        };
        let append = options.to_string();
        let mut machine = start(&qemu, dir.path(), "a", DISK, &append, &disk(0, &image, ""));
        machine.cont();
        work(&machine);
        finish(&mut machine, &image);
        assert!(machine.serial.heartbeats().count > 0);
    }
}

#[test]
fn the_work_goes_on_after_a_migration() {
    let qemu = require_qemu!();
    for wait in [Wait::Poll, Wait::Irq] {
        let dir = scratch();
        let image = dir.path().join("image");
        new_image(&image);
        let append = Options { wait, ..options() }.to_string();
        let uri = format!("unix:{}", dir.path().join("migration").display());
        let drive = disk(0, &image, "");
        let mut machine = start(&qemu, dir.path(), "a", DISK, &append, &drive);
        machine.cont();
        work(&machine);
        let mut incoming = drive.to_vec();
        incoming.extend(["-incoming".to_owned(), uri.clone()]);
        let mut destination = start(&qemu, dir.path(), "b", DISK, &append, &incoming);
        let migrate = json!({ "uri": uri });
        machine.qmp.execute("migrate", migrate).unwrap();
        let patience = crate::machine::PATIENCE;
        machine.qmp.wait_event("STOP", patience).unwrap();
        destination.cont();
        work(&destination);
        finish(&mut destination, &image);
    }
}

#[test]
fn a_sector_that_changes_behind_the_guest_is_found() {
    let qemu = require_qemu!();
    let dir = scratch();
    let image = dir.path().join("image");
    new_image(&image);
    let options = Options {
        mode: Mode::Fill,
        ..options()
    };
    let mut machine = start(
        &qemu,
        dir.path(),
        "a",
        DISK,
        &options.to_string(),
        &disk(0, &image, ""),
    );
    machine.cont();
    machine.wait_for(|line| {
        Report::parse(line).filter(|report| matches!(report, Report::Filled { .. }))
    });
    let mut file = File::options().write(true).open(&image).unwrap();
    file.seek(SeekFrom::Start(777 * 512)).unwrap();
    file.write_all(&[0; 512]).unwrap();
    let error = machine.wait_for(|line| {
        Report::parse(line).filter(|report| matches!(report, Report::Error { .. }))
    });
    assert!(
        matches!(
            error,
            Report::Error {
                sector: 777,
                kind: Kind::Zero,
                place: Place::Disk,
                wrong_sectors: 1,
                expected: Held::Generation(1),
                found: Held::Zero,
                ..
            }
        ),
        "{error}"
    );
}

#[test]
fn writes_that_are_undone_behind_the_guest_are_found() {
    let qemu = require_qemu!();
    let dir = scratch();
    let image = dir.path().join("image");
    new_image(&image);
    let append = options().to_string();
    let drive = disk(0, &image, "");
    let mut machine = start(&qemu, dir.path(), "a", DISK, &append, &drive);
    machine.cont();
    work(&machine);
    let old = std::fs::read(&image).unwrap();
    work_until(&machine, 3000);
    let mut file = File::options().write(true).open(&image).unwrap();
    file.write_all(&old).unwrap();
    machine.wait_for(|line| match Report::parse(line)? {
        Report::Error {
            kind: Kind::Stale,
            place: Place::Disk,
            expected: Held::Generation(expected),
            found: Held::Generation(found),
            ..
        } => {
            assert!(found < expected, "{line}");
            Some(())
        }
        _ => None,
    });
}

#[test]
fn a_buffer_that_changes_after_it_was_right_is_found() {
    let qemu = require_qemu!();
    let dir = scratch();
    let image = dir.path().join("image");
    new_image(&image);
    let ram = dir.path().join("ram");
    let mut more = disk(0, &image, "").to_vec();
    more.extend([
        "-object".to_owned(),
        format!(
            "memory-backend-file,id=m,size=128M,share=on,mem-path={}",
            ram.display()
        ),
        "-machine".to_owned(),
        "memory-backend=m".to_owned(),
    ]);
    // So slow and with so many that most buffers lie idle for seconds.
    let options = Options {
        rate: Rate::PerSecond(50),
        keep: 256,
        ..options()
    };
    let mut machine = start(&qemu, dir.path(), "a", DISK, &options.to_string(), &more);
    machine.cont();
    machine.wait_for(|line| match Report::parse(line)? {
        Report::Status { reads, writes, .. } => (reads + writes > 30).then_some(()),
        _ => None,
    });
    let file = File::options().read(true).write(true).open(&ram).unwrap();
    let mut memory = vec![0; 128 << 20];
    file.read_exact_at(&mut memory, 0).unwrap();
    for (index, sector) in memory.as_chunks::<512>().0.iter().enumerate() {
        if sector.starts_with(b"FerrySec") {
            file.write_all_at(b"lost", index as u64 * 512 + 300)
                .unwrap();
        }
    }
    machine.wait_for(|line| match Report::parse(line)? {
        Report::Error {
            kind,
            place: Place::Memory,
            ..
        } => {
            assert_eq!(kind, Kind::Damaged, "{line}");
            Some(())
        }
        _ => None,
    });
}

#[test]
fn what_one_guest_filled_another_can_read_on_a_disk_that_is_read_only() {
    let qemu = require_qemu!();
    let dir = scratch();
    let image = dir.path().join("image");
    new_image(&image);
    let fill = Options {
        mode: Mode::Fill,
        seed: 9,
        ..options()
    };
    let mut machine = start(
        &qemu,
        dir.path(),
        "a",
        DISK,
        &fill.to_string(),
        &disk(0, &image, ""),
    );
    machine.cont();
    finish_after(&mut machine, &image, |report| {
        matches!(report, Report::Filled { .. })
    });
    drop(machine);
    let read = Options {
        mode: Mode::Read,
        ..fill
    };
    let drive = disk(0, &image, ",readonly=on");
    let mut machine = start(&qemu, dir.path(), "b", DISK, &read.to_string(), &drive);
    machine.cont();
    finish_after(
        &mut machine,
        &image,
        |report| matches!(report, Report::Status { verified, errors: 0, .. } if *verified > 0),
    );
}

fn finish_after(machine: &mut Qemu, image: &Path, reached: impl Fn(&Report) -> bool) {
    machine.wait_for(|line| Report::parse(line).filter(&reached));
    let verified = finish(machine, image);
    assert!(
        matches!(verified, Report::Verified { written, .. } if written == AREA / 512),
        "{verified}"
    );
}

#[test]
fn a_request_that_fails_is_reported_and_the_rest_goes_on() {
    let qemu = require_qemu!();
    let dir = scratch();
    let image = dir.path().join("image");
    new_image(&image);
    let drive = [
        "-drive".to_owned(),
        format!(
            "if=none,id=d0,driver=raw,file.driver=blkdebug,file.image.driver=file,\
             file.image.filename={},file.inject-error.0.event=write_aio,\
             file.inject-error.0.errno=5,file.inject-error.0.iotype=write,file.inject-error.0.once=on,rerror=report,werror=report",
            image.display()
        ),
        "-device".to_owned(),
        "virtio-blk-device,drive=d0".to_owned(),
    ];
    // This drive ignores discards.
    let options = Options {
        discarded: Holds::Unknown,
        ..options()
    };
    let append = options.to_string();
    let mut machine = start(&qemu, dir.path(), "a", DISK, &append, &drive);
    machine.cont();
    let failed = machine.wait_for(|line| {
        Report::parse(line).filter(|report| matches!(report, Report::IoError { .. }))
    });
    assert!(
        matches!(
            failed,
            Report::IoError {
                device: 0,
                op: Op::Write,
                status: 1,
                ..
            }
        ),
        "{failed}"
    );
    machine.wait_for(|line| match Report::parse(line)? {
        Report::Status {
            writes,
            errors,
            io_errors,
            ..
        } => {
            assert_eq!((errors, io_errors), (0, 1));
            (writes > 100).then_some(())
        }
        _ => None,
    });
}

#[test]
fn two_disks_are_verified_at_once_and_one_wrong_bit_in_memory_is_found() {
    let qemu = require_qemu!();
    let dir = scratch();
    let images = ["one", "two"].map(|name| dir.path().join(name));
    images.iter().for_each(|image| new_image(image));
    let drives = [disk(0, &images[0], ""), disk(1, &images[1], "")].concat();
    let options = Options {
        corrupt: Maybe(Some(500)),
        ..options()
    };
    let mut machine = start(&qemu, dir.path(), "a", DISK, &options.to_string(), &drives);
    machine.cont();
    let mut found = [0; 2];
    machine.wait_for(|line| match Report::parse(line)? {
        Report::Error {
            device,
            kind,
            wrong_sectors,
            ..
        } => {
            assert!(matches!(kind, Kind::Damaged | Kind::Foreign), "{line}");
            found[device as usize] += wrong_sectors;
            None
        }
        Report::Status { verified, .. } => (verified > 10_000 && found == [1, 1]).then_some(()),
        _ => None,
    });
}

#[test]
fn a_disk_can_be_measured() {
    let qemu = require_qemu!();
    let dir = scratch();
    let image = dir.path().join("image");
    new_image(&image);
    for bench in [
        Bench::SeqRead,
        Bench::SeqWrite,
        Bench::RandRead,
        Bench::RandWrite,
    ] {
        let options = Options {
            bench,
            bs: Size(16 << 10),
            seconds: 1,
            ..options()
        };
        let append = options.to_string();
        let name = bench.to_string();
        let mut machine = start(
            &qemu,
            dir.path(),
            &name,
            DISK,
            &append,
            &disk(0, &image, ""),
        );
        machine.cont();
        let report = machine.wait_for(|line| {
            Report::parse(line).filter(|report| matches!(report, Report::Bench { .. }))
        });
        let Report::Bench {
            op,
            bs,
            requests,
            took_ms,
            iops,
            kib_s,
            p50_ns,
            p99_ns,
            max_ns,
            io_errors,
            ..
        } = report
        else {
            unreachable!()
        };
        assert_eq!((op, bs, io_errors), (bench, Size(16 << 10), 0));
        assert!(
            requests > 0 && took_ms >= 1000 && p50_ns <= p99_ns && p99_ns <= max_ns,
            "{report}"
        );
        assert!((iops * 15..=(iops + 1) * 16).contains(&kib_s), "{report}");
    }
}

#[test]
fn devices_that_are_none_are_told_and_left_alone() {
    let qemu = require_qemu!();
    let dir = scratch();
    let append = "virtio_mmio.device=4K@0x1000:5 virtio_mmio.device=nonsense \
                  virtio_mmio.device=4K@0xd0000000:5 virtio_mmio.device=4K@0x100000000000:5 \
                  virtio_mmio.device=512@0xfeb00200:255";
    let mut machine = start(&qemu, dir.path(), "a", DISK, append, &[]);
    machine.cont();
    let mut ignored = Vec::new();
    let last = machine.wait_for(|line| {
        let rest = line.strip_prefix(guest_tests::mmio::IGNORED);
        ignored.extend(rest.map(str::to_owned));
        line.strip_prefix(guest_tests::fault::PANIC)
            .map(str::to_owned)
    });
    assert_eq!(last, "the command line names no virtio-blk device");
    assert_eq!(ignored.len(), 5, "{ignored:?}");
}
