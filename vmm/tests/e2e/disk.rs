//! Disks, with the guest that verifies all it writes, and two processes on one image.

pub mod copying;
mod errors;
mod failure;
mod killed;
mod locks;
mod moving;
mod options;
mod snapshots;
pub mod space;

use std::io::{self, IoSliceMut, Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};

use devices::image::{Cache, Format, Image, ImageConfig};
use guest_tests::disk::{Options, Report, command};
use guest_tests::driver::process::Process;
use guest_tests::{Size, image};
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::harness::{Ferry, Guest, PATIENCE, ferry, scratch};

/// Bytes of the disks here.
pub const CAPACITY: u64 = 32 << 20;

/// A new image.
pub fn new_image(dir: &Path, name: &str, format: Format) -> PathBuf {
    let path = dir.join(name);
    Image::create(&path, format, CAPACITY, None, Cache::Writeback).unwrap();
    path
}

/// The option for it.
pub fn drive(path: &Path, more: &str) -> String {
    format!("file={}{more}", path.display())
}

/// Everything at once, on all of a disk, as fast as it goes.
pub fn busy() -> Options {
    Options {
        area: Size(CAPACITY),
        max: Size(64 << 10),
        writes: 45,
        discards: 4,
        zeroes: 4,
        flush: 16,
        interval: 100,
        ..Options::default()
    }
}

/// `--disk` for each.
fn arguments(drives: &[String]) -> Vec<&str> {
    let each = drives.iter().flat_map(|drive| ["--disk", drive]);
    each.collect()
}

fn guest(options: Options) -> Guest<'static> {
    Guest::new(guest_tests::DISK, "64M", options)
}

/// The guest of these tests, with images of its own: disk0, disk1, …
struct DiskGuest {
    dir: TempDir,
    paths: Vec<PathBuf>,
    drives: Vec<String>,
}

impl DiskGuest {
    /// With a new image for each format and more of its option.
    fn on(disks: &[(Format, &str)]) -> Self {
        let dir = scratch();
        let (paths, drives) = disks
            .iter()
            .enumerate()
            .map(|(index, &(format, more))| {
                let path = new_image(dir.path(), &format!("disk{index}"), format);
                let drive = drive(&path, more);
                (path, drive)
            })
            .unzip();
        Self { dir, paths, drives }
    }

    fn run(&self, name: &str, options: Options) -> Ferry {
        run(self.dir.path(), name, options, &self.drives)
    }

    fn incoming(&self, name: &str) -> (Ferry, String) {
        incoming(self.dir.path(), name, &self.drives)
    }

    fn refused_start(&self, name: &str) -> String {
        refused_start(self.dir.path(), name, &self.drives)
    }

    fn hop(&self, source: Ferry, name: &str) -> Ferry {
        hop(source, self.dir.path(), name, &self.drives)
    }

    fn finish(&self, ferry: Ferry) {
        let paths: Vec<_> = self.paths.iter().map(PathBuf::as_path).collect();
        finish(ferry, &paths);
    }

    /// Moves the guest once more, has it do that many requests there, and finishes it.
    fn last_hop(&self, source: Ferry, more: u64) {
        let destination = self.hop(source, "last");
        wait_progress(&destination, more);
        self.finish(destination);
    }
}

/// Starts the guest on these disks, and waits until it works.
pub fn run(dir: &Path, name: &str, options: Options, drives: &[String]) -> Ferry {
    let mut ferry = Ferry::run(dir, name, &guest(options), &arguments(drives));
    allow_slow_flush(&mut ferry);
    wait_report(&ferry, |report| {
        matches!(report, Report::Ready { .. }).then_some(())
    });
    ferry
}

/// These guests write all the time, and a hand-over flushes: on a busy host's disk that may take
/// longer than the usual limit, and the guest would not be stopped for it.
fn allow_slow_flush(source: &mut Ferry) {
    source.execute("migrate-set-parameters", json!({ "downtime-limit": 5000 }));
}

/// Starts a destination with these disks; returns its address too.
pub fn incoming(dir: &Path, name: &str, drives: &[String]) -> (Ferry, String) {
    Ferry::incoming_with(dir, name, &arguments(drives))
}

/// Waits for a report that `pick` takes; anything wrong that comes first fails the test.
fn wait_report<T>(ferry: &Ferry, mut pick: impl FnMut(&Report) -> Option<T>) -> T {
    ferry.wait_line(|line| {
        let report = Report::parse(line)?;
        if let Report::Error { .. }
        | Report::IoError { .. }
        | Report::Length { .. }
        | Report::LostInterrupt { .. } = report
        {
            panic!("the guest says: {line}\n{}", ferry.process.output());
        }
        pick(&report)
    })
}

/// How many requests were done, by a `status` of the first disk.
fn done(report: &Report) -> Option<u64> {
    match report {
        Report::Status {
            device: 0,
            reads,
            writes,
            flushes,
            ..
        } => Some(reads + writes + flushes),
        _ => None,
    }
}

/// Waits until the guest's first disk has done that many requests more than it says now.
pub fn wait_progress(ferry: &Ferry, more: u64) {
    let now = wait_report(ferry, done);
    wait_report(ferry, |report| done(report).filter(|n| *n >= now + more));
}

/// Has the guest verify its disks and power off; then each image must hold what it says.
pub fn finish(mut ferry: Ferry, paths: &[&Path]) {
    ferry.serial.send(&[command::FINISH]).unwrap();
    // In the order in which they are done.
    let mut reports = Vec::new();
    for _ in paths {
        let report = wait_report(&ferry, |report| {
            matches!(report, Report::Verified { .. }).then(|| *report)
        });
        let Report::Verified {
            device,
            errors,
            io_errors,
            ..
        } = report
        else {
            unreachable!()
        };
        assert_eq!((errors, io_errors), (0, 0), "{report}");
        reports.push((paths[device as usize], report));
    }
    let (success, output) = ferry.wait_exit();
    assert!(success, "{output}");
    // Not before it has ended: what it knows of a qcow2 image and has not flushed is not in the
    // file.
    for (path, report) in reports {
        check(path, &report);
    }
}

/// The image itself holds what the guest said, as far as it knows.
fn check(path: &Path, report: &Report) {
    let image = Image::open(&ImageConfig {
        path: path.to_owned(),
        format: None,
        readonly: true,
        cache: Cache::Writeback,
    });
    let mut reader = Reader {
        image: image.unwrap(),
        position: 0,
    };
    let found = image::read_reported(&mut reader, report).unwrap();
    let Report::Verified { unknown, .. } = report else {
        unreachable!()
    };
    if *unknown == 0 {
        assert!(found.agrees_with(report), "{found:?}, {report}");
    }
    assert_eq!(found.wrong, 0, "{found:?}, {report}");
    assert!(found.written > 0, "{found:?}");
}

/// An image as a file.
struct Reader {
    image: Image,
    position: u64,
}

impl Read for Reader {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let len = buffer.len();
        let mut slices = [IoSliceMut::new(buffer)];
        self.image
            .read_at(&mut slices, self.position)
            .map_err(io::Error::other)?;
        self.position += len as u64;
        Ok(len)
    }
}

impl Seek for Reader {
    fn seek(&mut self, to: SeekFrom) -> io::Result<u64> {
        let SeekFrom::Start(position) = to else {
            return Err(io::ErrorKind::Unsupported.into());
        };
        self.position = position;
        Ok(position)
    }
}

/// A `ferry` that can't have the disks: what it says.
fn refused_start(dir: &Path, name: &str, drives: &[String]) -> String {
    let kernel = dir.join(format!("{name}.elf"));
    std::fs::write(&kernel, guest_tests::DISK).unwrap();
    let kernel = kernel.display().to_string();
    let mut all = vec!["run", "--monitor", "none", "--serial", "none"];
    all.extend(["--kernel", &kernel, "--memory", "64M"]);
    all.extend(arguments(drives));
    let mut process = Process::spawn(ferry(), all, &dir.join(format!("{name}.log"))).unwrap();
    let status = process.wait(PATIENCE).unwrap();
    let output = process.output();
    assert!(status.is_some_and(|status| !status.success()), "{output}");
    output
}

/// Moves the guest to a new process with the same disks, and ends this one.
fn hop(mut source: Ferry, dir: &Path, name: &str, drives: &[String]) -> Ferry {
    let (destination, uri) = incoming(dir, name, drives);
    allow_slow_flush(&mut source);
    source.migrate(&uri);
    source.wait_migrated("completed");
    source.quit();
    destination
}

/// What the next event of a disk's error says.
fn wait_error_event(ferry: &mut Ferry) -> Value {
    let event = ferry.qmp.wait_event("BLOCK_IO_ERROR", PATIENCE);
    event
        .unwrap_or_else(|err| panic!("{err}\n{}", ferry.process.output()))
        .data
}

/// Has the guest move pages for as long as a test needs: the link is slow.
fn slowly(source: &mut Ferry) {
    source.execute(
        "migrate-set-parameters",
        json!({ "max-bandwidth": 100 << 20, "downtime-limit": 2000 }),
    );
}
