//! How fast a guest's disk is, as its driver sees it.

use std::fmt;
use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::Command;

use guest_tests::Size;
use guest_tests::disk::{Bench, Options, Report};
use guest_tests::mmio::Wait;
use serde::Serialize;
use serde_json::Value;

use crate::error::Error;
use crate::figure::{Figure, Measured, Unit};
use crate::vmm::{Drive, DriveFormat, Guest, Role, Running, Vmm};

/// Bytes of the guest's RAM.
const MEMORY: u64 = 128 << 20;

/// What a guest does to its disk.
#[derive(Clone, Copy, Debug)]
pub struct Work {
    /// What.
    pub op: Bench,
    /// Bytes of a request.
    pub bs: u64,
    /// Requests in flight.
    pub depth: u64,
}

impl Work {
    /// All that is measured: sequential in large requests, random in small ones, alone and many.
    pub fn all() -> impl Iterator<Item = Self> {
        [
            (Bench::SeqRead, 64 << 10),
            (Bench::SeqWrite, 64 << 10),
            (Bench::RandRead, 4 << 10),
            (Bench::RandWrite, 4 << 10),
        ]
        .into_iter()
        .flat_map(|(op, bs)| [1, 32].map(|depth| Self { op, bs, depth }))
    }
}

impl fmt::Display for Work {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { op, bs, depth } = self;
        write!(f, "{op} {} depth {depth}", Size(*bs))
    }
}

/// What one guest measured.
#[derive(Clone, Debug, Serialize)]
pub struct Outcome {
    /// Requests a second.
    pub iops: f64,
    /// The median of the latency, in µs.
    pub p50: f64,
    /// What 99 of 100 requests don't exceed, in µs.
    pub p99: f64,
    /// Times that the guest told the device of requests: each is an exit.
    pub notifications: u64,
}

impl Measured for Outcome {
    const FIGURES: &'static [Figure<Self>] = &[
        Figure {
            name: "requests",
            unit: Unit::PerSecond,
            digits: 0,
            of: |o| Some(o.iops),
        },
        Figure {
            name: "median latency",
            unit: Unit::Microseconds,
            digits: 1,
            of: |o| Some(o.p50),
        },
        Figure {
            name: "99 % of requests within",
            unit: Unit::Microseconds,
            digits: 1,
            of: |o| Some(o.p99),
        },
    ];

    const HEADLINES: &'static [&'static str] = &["requests"];
}

/// Makes an image of `size` bytes, all of them written, in `dir`.
pub fn image(dir: &Path, format: DriveFormat, size: u64) -> Result<PathBuf, Error> {
    let raw = dir.join("disk.raw");
    let failed = || format!("writing {}", raw.display());
    let mut file = File::create(&raw).map_err(Error::io(failed()))?;
    // Not zeros, which a file system might keep as a hole.
    let chunk = [0x5a; 1 << 16];
    for _ in 0..size / chunk.len() as u64 {
        file.write_all(&chunk).map_err(Error::io(failed()))?;
    }
    file.sync_all().map_err(Error::io(failed()))?;
    if format == DriveFormat::Raw {
        return Ok(raw);
    }
    let qcow2 = dir.join("disk.qcow2");
    let converted = Command::new("qemu-img")
        .args(["convert", "-f", "raw", "-O", "qcow2"])
        .args([&raw, &qcow2])
        .output()
        .map_err(Error::io("qemu-img, which makes the qcow2 image"))?;
    if converted.status.success() {
        Ok(qcow2)
    } else {
        let said = String::from_utf8_lossy(&converted.stderr);
        Err(Error::Wrong(format!("qemu-img: {said}")))
    }
}

/// Has the guest work for so many seconds on all of the drive.
pub fn run(
    vmm: &dyn Vmm,
    work: Work,
    wait: Wait,
    seconds: u64,
    drive: &Drive,
    dir: &Path,
) -> Result<Outcome, Error> {
    let kernel = dir.join("disk.elf");
    std::fs::write(&kernel, guest_tests::DISK).map_err(Error::io("the guest's image"))?;
    let options = Options {
        area: Size(drive.size),
        bench: work.op,
        bs: Size(work.bs),
        depth: work.depth,
        seconds,
        wait,
        ..Options::default()
    };
    let guest = Guest {
        kernel,
        append: options.to_string(),
        memory: MEMORY,
        vcpus: 1,
        prealloc: false,
        drives: vec![drive.clone()],
    };
    let mut running = Running::start(vmm, &guest, Role::Source, dir)?;
    running.execute("cont", Value::Null)?;
    let report = running.wait_for(|line| Report::parse(line).filter(is_bench))?;
    let Report::Bench {
        iops,
        p50_ns,
        p99_ns,
        notifications,
        io_errors: 0,
        ..
    } = report
    else {
        return Err(Error::Wrong(format!("{}: {report}", vmm.name())));
    };
    Ok(Outcome {
        iops: iops as f64,
        p50: p50_ns as f64 / 1e3,
        p99: p99_ns as f64 / 1e3,
        notifications,
    })
}

fn is_bench(report: &Report) -> bool {
    matches!(report, Report::Bench { .. })
}
