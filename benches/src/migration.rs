//! One migration, measured from outside.

mod outcome;
pub mod plots;
mod rounds;
pub mod waits;

use std::path::Path;
use std::thread::sleep;
use std::time::{Duration, Instant};

use guest_tests::dirtier::{Report, command};
use serde_json::{Value, json};

use crate::error::{Error, PATIENCE};
use crate::network::Network;
use crate::proc;
use crate::scenario::Scenario;
use crate::setting;
use crate::vmm::{Guest, Role, Running, Vmm};

pub use outcome::{Outcome, Postcopy};
use rounds::Passes;
pub use rounds::Round;

/// What both VMMs are told, so that neither is held back.
const MAX_BANDWIDTH: u64 = 10_000_000_000;

/// How long the guest is watched before and after.
const WATCH: Duration = Duration::from_millis(700);

/// How long a migration may take.
const LONGEST: Duration = Duration::from_secs(600);

/// How long to wait between two looks.
const LOOK: Duration = Duration::from_millis(1);

/// Runs the scenario's guest, migrates it, has it verify its memory.
pub fn run(vmm: &dyn Vmm, scenario: &Scenario, dir: &Path) -> Result<Outcome, Error> {
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
    if scenario.postcopy_after.is_some() {
        for process in [&mut source, &mut destination] {
            let on = json!({ "capabilities": [{ "capability": "postcopy-ram", "state": true }] });
            process.execute("migrate-set-capabilities", on)?;
        }
    }
    let limit = u64::try_from(scenario.downtime_limit.as_millis()).unwrap_or(u64::MAX);
    let parameters = json!({ "max-bandwidth": MAX_BANDWIDTH, "downtime-limit": limit });
    source.execute("migrate-set-parameters", parameters)?;
    let mut without = Vec::new();
    for process in [&mut destination, &mut source] {
        without = setting::apply(process, scenario.settings.of(vmm.kind()))?;
    }
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
    let sent_before = network.sent();
    let begin = Instant::now();
    source.execute("migrate", json!({ "uri": uri }))?;
    let mut passes = Passes::new(begin);
    let patience = scenario.postcopy_after.unwrap_or(LONGEST);
    let mut end = source.wait_migrated(patience, |at, info| passes.begin(at, info))?;
    if end.is_none() && scenario.postcopy_after.is_some() {
        source.execute("migrate-start-postcopy", Value::Null)?;
        end = source.wait_migrated(LONGEST, |at, info| passes.begin(at, info))?;
    }
    let end = end.ok_or_else(|| {
        Error::Wrong(format!(
            "{}: the migration goes on and on: it was given up after {LONGEST:?}",
            vmm.name()
        ))
    })?;
    let sent = network.sent();
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
        wire: sent.zip(sent_before).map(|(after, before)| after - before),
        rounds: number(&info["ram"]["dirty-sync-count"]),
        cpu_seconds,
        stolen,
        resident_source,
        resident_destination,
        postcopy: phase.map(|us| Postcopy::told(us / 1e3, &there)),
        verified_pages,
        convergence: vmm
            .rounds(&info)
            .unwrap_or_else(|| passes.rounds(end, number(&info["ram"]["transferred"]))),
        without,
    })
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
