//! How long a VMM takes to a guest's first instruction, and what memory it needs besides the
//! guest's.

use std::io::{ErrorKind, Read};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

use serde::Serialize;

use crate::error::{Error, PATIENCE};
use crate::figure::{Figure, Measured, Unit};
use crate::migration::ms;
use crate::proc::{self, Resident};
use crate::scenario::Scenario;
use crate::vmm::{Guest, Role, Running, Vmm};
use crate::{tiny, vmm};

/// How long a guest works before its VMM's memory is looked at.
const SETTLE: Duration = Duration::from_millis(500);

/// One start.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Outcome {
    /// From before the process is made to the guest's first byte on the serial port, in ms.
    pub first_byte: f64,
    /// Resident memory while the guest of [`crate::scenario`] works.
    pub resident: Resident,
}

const MIB: f64 = (1 << 20) as f64;

impl Measured for Outcome {
    const FIGURES: &'static [Figure<Self>] = &[
        Figure {
            name: "start to the guest's first byte",
            unit: Unit::Milliseconds,
            digits: 1,
            of: |o| Some(o.first_byte),
        },
        Figure {
            name: "resident besides the guest's",
            unit: Unit::Mebibytes,
            digits: 1,
            of: |o| Some(o.resident.own as f64 / MIB),
        },
        Figure {
            name: "the guest's",
            unit: Unit::Mebibytes,
            digits: 1,
            of: |o| Some(o.resident.guest as f64 / MIB),
        },
    ];

    const HEADLINES: &'static [&'static str] = &[
        "start to the guest's first byte",
        "resident besides the guest's",
    ];
}

/// Starts the VMM once with a guest that writes at once, and once with one that works.
pub fn run(vmm: &dyn Vmm, scenario: &Scenario, dir: &Path) -> Result<Outcome, Error> {
    Ok(Outcome {
        first_byte: first_byte(vmm, scenario.memory, dir)?,
        resident: resident(vmm, scenario, dir)?,
    })
}

fn first_byte(vmm: &dyn Vmm, memory: u64, dir: &Path) -> Result<f64, Error> {
    let kernel = dir.join("tiny.elf");
    std::fs::write(&kernel, tiny::image()).map_err(Error::io("the guest's image"))?;
    let guest = Guest {
        kernel,
        append: String::new(),
        memory,
        vcpus: 1,
        prealloc: false,
        drives: vec![],
    };
    let log = std::fs::File::create(dir.join("start.log")).map_err(Error::io("a log"))?;
    let begin = Instant::now();
    let child = Command::new(vmm.program())
        .args(vmm.direct_arguments(&guest))
        // Not empty: its end would be one of the things that a VMM looks at.
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(log)
        .spawn()
        .map_err(Error::io(format!("starting {}", vmm.program().display())))?;
    let mut child = Killed(child);
    let mut out = child
        .0
        .stdout
        .take()
        .ok_or_else(|| Error::Wrong("no pipe".to_owned()))?;
    // A VMM may print of its own what a terminal needs; the guest's byte is none of it.
    let mut byte = [0];
    loop {
        match out.read(&mut byte) {
            Ok(0) => {
                let log = std::fs::read_to_string(dir.join("start.log")).unwrap_or_default();
                let name = vmm.name();
                return Err(Error::Wrong(format!(
                    "{name}: the guest said nothing\n{log}"
                )));
            }
            Ok(_) if byte == [tiny::BYTE] => return Ok(ms(begin.elapsed())),
            Ok(_) => {}
            Err(err) if err.kind() == ErrorKind::Interrupted => {}
            Err(err) => return Err(Error::io("the guest's output")(err)),
        }
        if begin.elapsed() > PATIENCE {
            return Err(Error::Wrong(format!(
                "{}: the guest does not run",
                vmm.name()
            )));
        }
    }
}

fn resident(vmm: &dyn Vmm, scenario: &Scenario, dir: &Path) -> Result<Resident, Error> {
    let kernel = dir.join("dirtier.elf");
    std::fs::write(&kernel, guest_tests::DIRTIER).map_err(Error::io("the guest's image"))?;
    let guest = vmm::Guest {
        kernel,
        append: scenario.work.to_string(),
        memory: scenario.memory,
        vcpus: 1,
        prealloc: false,
        drives: vec![],
    };
    let mut running = Running::start(vmm, &guest, Role::Source, dir)?;
    running.execute("cont", serde_json::Value::Null)?;
    running.wait_for(|line| line.starts_with("ready").then_some(()))?;
    sleep(SETTLE);
    proc::resident(running.process.id(), scenario.memory)
}

/// A child that is killed when it is no longer needed.
struct Killed(Child);

impl Drop for Killed {
    fn drop(&mut self) {
        // Both fail only for a process that has been reaped already.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}
