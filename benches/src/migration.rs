//! One migration on this machine, measured from outside.

use std::path::Path;
use std::thread::sleep;
use std::time::{Duration, Instant};

use guest_tests::dirtier::{Report, command};
use serde::Serialize;
use serde_json::{Value, json};

use crate::error::{Error, PATIENCE};
use crate::network::Network;
use crate::proc;
use crate::scenario::Scenario;
use crate::vmm::{Guest, Reported, Role, Running, Vmm};

/// What both VMMs are told, so that neither is held back.
const MAX_BANDWIDTH: u64 = 10_000_000_000;

/// How long the guest is watched before and after.
const WATCH: Duration = Duration::from_millis(700);

/// How long to wait between two looks.
const LOOK: Duration = Duration::from_millis(1);

/// How a guest is to move.
#[derive(Clone, Copy, Debug)]
pub struct How {
    /// How long it may be stopped.
    pub downtime_limit: Duration,
    /// When it goes over into post-copy, from the start on.
    pub postcopy_after: Option<Duration>,
}

/// What one migration was like. Times are in milliseconds.
#[derive(Clone, Debug, Serialize)]
pub struct Outcome {
    /// From the command to the event that it is completed.
    pub total: f64,
    /// The same as the source says.
    pub total_reported: f64,
    /// From the last heartbeat at the source to the first at the destination, as they were read:
    /// on a busy machine the reading may be late, and this negative.
    pub felt: f64,
    /// The downtime as the source says.
    pub reported: Reported,
    /// The longest time between heartbeats before the migration: what the machine itself does.
    pub gap_quiet: f64,
    /// The same from the command on, at the source.
    pub gap_before: f64,
    /// The same at the destination.
    pub gap_after: f64,
    /// What the source says that it sent.
    pub bytes: u64,
    /// How often the source has gone over the guest's memory.
    pub rounds: u64,
    /// CPU time of both processes from the command to the event, the guest's included.
    pub cpu_seconds: f64,
    /// CPU time that other virtual machines of the same host have taken from this one meanwhile:
    /// a run in which it is much says little.
    pub stolen: f64,
    /// Of the guest's RAM at the source, in bytes, before.
    pub resident_source: u64,
    /// Of the guest's RAM at the destination, right after.
    pub resident_destination: u64,
    /// Post-copy, where the VMM tells of it.
    pub postcopy: Option<Postcopy>,
    /// Pages that the guest has verified at the destination; none was wrong.
    pub verified_pages: u64,
}

/// Post-copy as the destination says. Times are in milliseconds.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Postcopy {
    /// From the guest's move to its last page.
    pub time: f64,
    /// Pages that were asked for.
    pub requests: u64,
    /// How long one was waited for.
    pub average: f64,
    /// Half of them were not waited for any longer than this, a power of two.
    pub median_below: f64,
    /// The longest wait.
    pub longest: f64,
    /// How long all vCPUs waited at once.
    pub blocked: f64,
}

/// Runs the scenario's guest, migrates it, has it verify its memory.
pub fn run(vmm: &dyn Vmm, scenario: &Scenario, how: How, dir: &Path) -> Result<Outcome, Error> {
    let kernel = dir.join("dirtier.elf");
    std::fs::write(&kernel, guest_tests::DIRTIER).map_err(Error::io("the guest's image"))?;
    let append = scenario.work.to_string();
    let guest = Guest {
        kernel,
        append,
        memory: scenario.memory,
        drives: vec![],
    };
    let network = Network::new(scenario.link)?;
    let mut source = Running::start_in(&network, vmm, &guest, Role::Source, dir)?;
    let mut destination = Running::start_in(&network, vmm, &guest, Role::Destination, dir)?;
    for process in [&mut source, &mut destination] {
        let events = json!({ "capabilities": [{ "capability": "events", "state": true }] });
        process.execute("migrate-set-capabilities", events)?;
    }
    if how.postcopy_after.is_some() {
        for process in [&mut source, &mut destination] {
            let on = json!({ "capabilities": [{ "capability": "postcopy-ram", "state": true }] });
            process.execute("migrate-set-capabilities", on)?;
        }
    }
    let limit = u64::try_from(how.downtime_limit.as_millis()).unwrap_or(u64::MAX);
    let parameters = json!({ "max-bandwidth": MAX_BANDWIDTH, "downtime-limit": limit });
    source.execute("migrate-set-parameters", parameters)?;
    let uri = destination.listen(network.address())?;

    source.execute("cont", Value::Null)?;
    source
        .wait_for(|line| matches!(Report::parse(line), Some(Report::Ready { .. })).then_some(()))?;
    source.serial.forget_gaps();
    sleep(WATCH);
    let gap_quiet = source.serial.heartbeats().longest_gap;
    let resident_source = proc::resident(source.process.id(), scenario.memory)?.guest;
    source.serial.forget_gaps();

    let pids = [source.process.id(), destination.process.id()];
    let cpu = || {
        pids.iter()
            .map(|pid| proc::cpu_seconds(*pid))
            .sum::<Result<f64, Error>>()
    };
    let cpu_before = cpu()?;
    let stolen_before = proc::stolen_seconds()?;
    let begin = Instant::now();
    source.execute("migrate", json!({ "uri": uri }))?;
    if let Some(after) = how.postcopy_after {
        sleep(after);
        source.execute("migrate-start-postcopy", Value::Null)?;
    }
    let end = source.wait_migrated()?;
    let cpu_seconds = cpu()? - cpu_before;
    let stolen = (proc::stolen_seconds()? - stolen_before) * 1e3;
    let info = settled(&mut source)?;
    let there = destination.execute("query-migrate", Value::Null)?;
    let phase = info["x-ferry"]["postcopy"]["time"].as_f64();

    let first = first_heartbeat(&destination)?;
    sleep(WATCH);
    let resident_destination = proc::resident(destination.process.id(), scenario.memory)?.guest;
    let left = source.serial.heartbeats();
    let last = left
        .last
        .ok_or_else(|| Error::Wrong("the source's guest never ran".to_owned()))?;
    let gap_after = destination.serial.heartbeats().longest_gap;
    let verified_pages = verify(&mut destination)?;
    let number = |value: &Value| value.as_u64().unwrap_or_default();
    Ok(Outcome {
        total: ms(end - begin),
        total_reported: info["total-time"].as_f64().unwrap_or_default(),
        felt: ms(first.saturating_duration_since(last)) - ms(last.saturating_duration_since(first)),
        reported: vmm
            .downtime(&info)
            .ok_or_else(|| Error::Wrong(format!("{} reports no downtime: {info}", vmm.name())))?,
        gap_quiet: ms(gap_quiet),
        gap_before: ms(left.longest_gap),
        gap_after: ms(gap_after),
        bytes: number(&info["ram"]["transferred"]),
        rounds: number(&info["ram"]["dirty-sync-count"]),
        cpu_seconds,
        stolen,
        resident_source,
        resident_destination,
        postcopy: phase.map(|us| postcopy(us / 1e3, &there)),
        verified_pages,
    })
}

fn postcopy(time: f64, there: &Value) -> Postcopy {
    let ns = |name: &str| there[name].as_f64().unwrap_or_default() / 1e6;
    let distribution = there["postcopy-latency-dist"].as_array();
    let counts: Vec<u64> = distribution
        .map(|counts| counts.iter().filter_map(Value::as_u64).collect())
        .unwrap_or_default();
    let all: u64 = counts.iter().sum();
    let mut below = 0;
    let median = counts.iter().position(|count| {
        below += count;
        2 * below >= all
    });
    let ferry = &there["x-ferry"]["postcopy"];
    Postcopy {
        time,
        requests: there["ram"]["postcopy-requests"]
            .as_u64()
            .unwrap_or_default(),
        average: ns("postcopy-latency"),
        // The bucket n ends at 2^(n+1) µs.
        median_below: median.map_or(0.0, |n| f64::from(2u32 << n.min(30)) / 1e3),
        longest: ferry["latency-max"].as_f64().unwrap_or_default() / 1e3,
        blocked: ferry["blocktime"].as_f64().unwrap_or_default() / 1e3,
    }
}

/// What the source says in the end. QEMU tells that it has completed before it has its times.
fn settled(source: &mut Running) -> Result<Value, Error> {
    let deadline = Instant::now() + PATIENCE;
    loop {
        let info = source.execute("query-migrate", Value::Null)?;
        if info["total-time"].as_f64().is_some_and(|total| total > 0.0) {
            return Ok(info);
        }
        if Instant::now() >= deadline {
            return Err(Error::Wrong(format!("no total time in {info}")));
        }
        sleep(LOOK);
    }
}

fn first_heartbeat(destination: &Running) -> Result<Instant, Error> {
    let deadline = Instant::now() + PATIENCE;
    loop {
        if let Some(first) = destination.serial.heartbeats().first {
            return Ok(first);
        }
        if Instant::now() >= deadline {
            return Err(Error::Wrong(format!(
                "the guest does not run at the destination\n{}",
                destination.process.output()
            )));
        }
        sleep(LOOK);
    }
}

/// Has the guest check every page, and everything that it checked since its start.
fn verify(destination: &mut Running) -> Result<u64, Error> {
    destination.send(command::VERIFY)?;
    let (pages, errors) = destination.wait_for(|line| match Report::parse(line) {
        Some(Report::Verified { pages, errors, .. }) => Some((pages, errors)),
        Some(Report::Error { .. }) => Some((0, 1)),
        _ => None,
    })?;
    match errors {
        0 => Ok(pages),
        errors => Err(Error::Wrong(format!(
            "{errors} pages of the guest are damaged"
        ))),
    }
}

pub(crate) fn ms(time: Duration) -> f64 {
    time.as_secs_f64() * 1e3
}
