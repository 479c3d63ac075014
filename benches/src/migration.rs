//! One migration, measured from outside.

mod cost;
mod outcome;
pub mod plots;
mod rounds;
pub mod waits;

use std::path::Path;
use std::thread::sleep;
use std::time::{Duration, Instant};

use guest_tests::dirtier::Report;
use serde_json::{Value, json};

use crate::end::End;
use crate::error::{Error, PATIENCE};
use crate::network::Network;
use crate::proc;
use crate::remote::Connection;
use crate::scenario::Scenario;
use crate::setting;
use crate::vmm::{Guest, Kind, Role, Running, Vmm};

pub use cost::{CpuTime, GuestWork};
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

/// Runs the scenario's guest, migrates it, has it verify its memory. It goes to the host of that
/// agent, or to another process on this one.
pub fn run(
    vmm: &dyn Vmm,
    scenario: &Scenario,
    agent: Option<&mut Connection>,
    dir: &Path,
) -> Result<Outcome, Error> {
    let kernel = dir.join("dirtier.elf");
    std::fs::write(&kernel, guest_tests::DIRTIER).map_err(Error::io("the guest's image"))?;
    let guest = Guest {
        kernel,
        append: scenario.work.to_string(),
        memory: scenario.memory,
        vcpus: scenario.vcpus,
        prealloc: scenario.prealloc,
        drives: vec![],
    };
    if guest.prealloc && !vmm.knows_prealloc() {
        return Err(Error::no_prealloc(vmm));
    }
    let network = Network::new(scenario.link)?;
    let mut source = Running::start_in(&network, vmm, &guest, Role::Source, dir)?;
    let mut destination: Box<dyn End + '_> = match agent {
        Some(agent) => Box::new(agent.start(vmm.name(), &guest)?),
        None => Box::new(Running::start_in(
            &network,
            vmm,
            &guest,
            Role::Destination,
            dir,
        )?),
    };
    let destination = destination.as_mut();
    let without = tell(vmm.kind(), scenario, &mut source, destination)?;
    let uri = destination.listen()?;
    if scenario.prealloc {
        wait_for_memory(destination, scenario.memory)?;
    }

    source.execute("cont", Value::Null)?;
    source
        .wait_for(|line| matches!(Report::parse(line), Some(Report::Ready { .. })).then_some(()))?;
    let quiet = source.work()?;
    source.serial.forget_gaps();
    sleep(WATCH);
    let gap_quiet = source.serial.heartbeats().longest_gap;
    let resident_source = source.resident()?;
    let before = source.work()?;
    source.serial.forget_gaps();

    let cpu_before = [source.cpu()?, destination.cpu()?];
    let stolen_before = proc::stolen_seconds()?;
    let sent_before = network.sent();
    let begin = Instant::now();
    let mut passes = Passes::new(begin);
    let end = migrate(&mut source, &uri, scenario.postcopy_after, &mut passes);
    let end = end.map_err(|err| match err.is_refusal() {
        true => err,
        false => Error::Wrong(format!(
            "{err}\nThe destination has printed:\n{}",
            destination.output()
        )),
    })?;
    let sent = network.sent();
    let cpu_after = [source.cpu()?, destination.cpu()?];
    let stolen = (proc::stolen_seconds()? - stolen_before) * 1e3;
    wait_for_guest(destination)?;
    let after = destination.work()?;
    let info = settled(&mut source)?;
    let there = destination.execute("query-migrate", Value::Null)?;
    let phase = info["x-ferry"]["postcopy"]["time"].as_f64();

    sleep(WATCH);
    let resident_destination = destination.resident()?;
    let clock_uncertainty = destination.relate_clocks()?;
    let left = source.serial.heartbeats();
    let arrived = destination.heartbeats()?;
    let (Some(last), Some(first)) = (left.last, arrived.first) else {
        return Err(Error::Wrong("the source's guest never ran".to_owned()));
    };
    let verified_pages = destination.verify()?;
    let number = |value: &Value| value.as_u64().unwrap_or_default();
    Ok(Outcome {
        total: ms(end - begin),
        total_reported: info["total-time"].as_f64().unwrap_or_default(),
        felt: ms(first.saturating_duration_since(last)) - ms(last.saturating_duration_since(first)),
        clock_uncertainty: clock_uncertainty.map(ms),
        reported: vmm
            .downtime(&info)
            .ok_or_else(|| Error::Wrong(format!("{} reports no downtime: {info}", vmm.name())))?,
        gap_quiet: ms(gap_quiet),
        gap_before: ms(left.longest_gap),
        gap_after: ms(arrived.longest_gap),
        work: cost::of(quiet, before, after),
        bytes: number(&info["ram"]["transferred"]),
        wire: sent.zip(sent_before).map(|(after, before)| after - before),
        rounds: number(&info["ram"]["dirty-sync-count"]),
        cpu: cost::cpu(cpu_before, cpu_after),
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

/// Migrates; returns when the event came that it is completed.
fn migrate(
    source: &mut Running,
    uri: &str,
    postcopy_after: Option<Duration>,
    passes: &mut Passes,
) -> Result<Instant, Error> {
    source.execute("migrate", json!({ "uri": uri }))?;
    let patience = postcopy_after.unwrap_or(LONGEST);
    let mut end = source.wait_migrated(patience, |at, info| passes.begin(at, info))?;
    if end.is_none() && postcopy_after.is_some() {
        source.execute("migrate-start-postcopy", Value::Null)?;
        end = source.wait_migrated(LONGEST, |at, info| passes.begin(at, info))?;
    }
    end.ok_or_else(|| {
        Error::Wrong(format!(
            "{}: the migration goes on and on: it was given up after {LONGEST:?}",
            source.name
        ))
    })
}

/// Tells both ends what the scenario asks for; returns the settings that this VMM doesn't know.
fn tell(
    kind: Kind,
    scenario: &Scenario,
    source: &mut Running,
    destination: &mut dyn End,
) -> Result<Vec<String>, Error> {
    let settings = scenario.settings.of(kind);
    // First, as the scenario's settings may say otherwise.
    let limit = u64::try_from(scenario.downtime_limit.as_millis()).unwrap_or(u64::MAX);
    let parameters = json!({ "max-bandwidth": MAX_BANDWIDTH, "downtime-limit": limit });
    source.execute("migrate-set-parameters", parameters)?;
    let mut without = Vec::new();
    for process in [destination, source as &mut dyn End] {
        let mut capabilities = vec![json!({ "capability": "events", "state": true })];
        if scenario.postcopy_after.is_some() {
            capabilities.push(json!({ "capability": "postcopy-ram", "state": true }));
        }
        let capabilities = json!({ "capabilities": capabilities });
        process.execute("migrate-set-capabilities", capabilities)?;
        without = setting::apply(process, settings)?;
    }
    Ok(without)
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

/// Waits until the destination has its RAM, of which a piece less than a quarter isn't counted, see
/// [`proc::resident`].
fn wait_for_memory(destination: &mut dyn End, bytes: u64) -> Result<(), Error> {
    let deadline = Instant::now() + PATIENCE;
    loop {
        let resident = destination.resident()?;
        if resident >= bytes - bytes / 4 {
            return Ok(());
        }
        if Instant::now() >= deadline {
            return Err(Error::Wrong(format!(
                "the destination was to have {bytes} bytes of RAM before the guest comes, but has \
                 {resident}"
            )));
        }
        sleep(LOOK);
    }
}

/// Waits until the guest runs at the destination.
fn wait_for_guest(destination: &mut dyn End) -> Result<(), Error> {
    let deadline = Instant::now() + PATIENCE;
    while destination.heartbeats()?.first.is_none() {
        if Instant::now() >= deadline {
            return Err(Error::Wrong(format!(
                "the guest does not run at the destination\n{}",
                destination.output()
            )));
        }
        sleep(LOOK);
    }
    Ok(())
}

pub(crate) fn ms(time: Duration) -> f64 {
    time.as_secs_f64() * 1e3
}
