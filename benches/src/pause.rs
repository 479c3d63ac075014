//! How long a pause takes, whatever the guest does.

use std::path::Path;
use std::thread::sleep;
use std::time::{Duration, Instant};

use serde_json::Value;

use crate::error::Error;
use crate::migration::ms;
use crate::vmm::{Guest, Role, Running, Vmm};

/// How long the guest runs between two pauses: long enough to be amid its work.
const RUN: Duration = Duration::from_millis(7);

/// What a guest is about when it is paused.
#[derive(Clone, Debug)]
pub struct Activity {
    /// For tables.
    pub name: &'static str,
    /// The guest's image.
    pub image: &'static [u8],
    /// Its command line.
    pub append: &'static str,
    /// How the line begins with which it starts the work.
    pub ready: &'static str,
}

/// What guests can be about: writing memory, computing, waiting, port accesses without end, the
/// last two of these at either privilege level.
pub const ACTIVITIES: [Activity; 6] = [
    Activity {
        name: "rewrites memory",
        image: guest_tests::DIRTIER,
        append: "fill=256M ws=256M rate=max",
        ready: "ready",
    },
    boot("spins, CPL 3", "then=spin"),
    boot("spins, CPL 0", "then=spin0"),
    boot("port accesses, CPL 3", "then=ports"),
    boot("port accesses, CPL 0", "then=ports0"),
    boot("halted", "then=halt"),
];

const fn boot(name: &'static str, append: &'static str) -> Activity {
    Activity {
        name,
        image: guest_tests::BOOT,
        append,
        ready: "done",
    }
}

/// Pauses such a guest so many times; from `stop` to its answer, in milliseconds, each.
pub fn run(
    vmm: &dyn Vmm,
    activity: &Activity,
    times: usize,
    dir: &Path,
) -> Result<Vec<f64>, Error> {
    let kernel = dir.join("pause.elf");
    std::fs::write(&kernel, activity.image).map_err(Error::io("the guest's image"))?;
    let guest = Guest {
        kernel,
        append: activity.append.to_owned(),
        memory: 512 << 20,
        vcpus: 1,
        prealloc: false,
        drives: vec![],
    };
    let mut running = Running::start(vmm, &guest, Role::Source, dir)?;
    running.execute("cont", Value::Null)?;
    running.wait_for(|line| line.starts_with(activity.ready).then_some(()))?;
    let mut pauses = Vec::with_capacity(times);
    for _ in 0..times {
        sleep(RUN);
        let begin = Instant::now();
        running.execute("stop", Value::Null)?;
        pauses.push(ms(begin.elapsed()));
        running.execute("cont", Value::Null)?;
    }
    Ok(pauses)
}
