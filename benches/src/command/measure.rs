//! What each subcommand measures, as sections of a report.

use serde_json::json;

use super::Output;
use super::options::{Best, Disk};
use super::tune;
use crate::contenders::in_turn;
use crate::error::Error;
use crate::figure::{Row, Unit};
use crate::remote::Connection;
use crate::report::Section;
use crate::scenario::{Link, Scenario};
use crate::vmm::{Drive, Kind, Qemu, Vmm};
use crate::{disk, migration, network, pause, start};

fn scratch() -> Result<tempfile::TempDir, Error> {
    // Short: the path of a Unix socket has at most 107 bytes.
    tempfile::Builder::new()
        .prefix("bench")
        .tempdir()
        .map_err(Error::io("a directory for sockets"))
}

/// These scenarios, or all if there are none; those that this user can't run are left out, with a
/// note.
pub(super) fn suite(
    chosen: &[Scenario],
    best: Best,
    mut agent: Option<Connection>,
    vmms: &[Box<dyn Vmm>],
    output: &mut Output<'_>,
) -> Result<(), Error> {
    let all = match chosen {
        [] => Scenario::all(),
        chosen => chosen.to_vec(),
    };
    let may_shape = network::may_shape();
    for scenario in all {
        let without = match scenario.link {
            Link::Loopback | Link::Between => None,
            Link::Shaped { .. } if agent.is_some() => Some("shaped links are for one host"),
            Link::Shaped { .. } if may_shape => None,
            Link::Shaped { .. } => Some("a shaped link needs root"),
        };
        if let Some(reason) = without {
            let name = scenario.name;
            output.note(format!("WARNING: {name} is left out: {reason}"));
            continue;
        }
        let section = migration(best.of(scenario), best, agent.as_mut(), vmms, output)?;
        output.add(section)?;
    }
    Ok(())
}

pub(super) fn migration(
    mut scenario: Scenario,
    best: Best,
    mut agent: Option<&mut Connection>,
    vmms: &[Box<dyn Vmm>],
    output: &Output<'_>,
) -> Result<Section, Error> {
    if agent.is_some() {
        if scenario.link != Link::Loopback {
            return Err(Error::Wrong(format!(
                "{}: shaped links are for one host; say --link 0 for the network between the two",
                scenario.name
            )));
        }
        scenario.link = Link::Between;
    }
    let dir = scratch()?;
    let mut tuned = None;
    if let Some(qemu) = vmms.iter().find(|vmm| vmm.kind() == Kind::Qemu)
        && best.tune_qemu
    {
        let say = |what: &str| output.progress(&format!("{}, {what}", scenario.name));
        let tuning = tune::qemu(
            qemu.as_ref(),
            &scenario,
            agent.as_deref_mut(),
            dir.path(),
            say,
        )?;
        scenario.settings.qemu = tuning.best;
        tuned = Some(tuning.note);
    }
    let scenario = &scenario;
    let runs = in_turn(
        output.common.runs,
        vmms,
        |what| output.progress(&format!("{}, {what}", scenario.name)),
        |vmm| migration::run(vmm, scenario, agent.as_deref_mut(), dir.path()),
    )?;
    let mut section = Section::of(&scenario.name, scenario.to_string(), vmms, &runs);
    section.input = json!(scenario);
    section.notes.extend(tuned);
    section.plots = migration::plots::all(&section, &runs);
    for (vmm, runs) in vmms.iter().zip(&runs) {
        if let Some(run) = runs.first().filter(|run| !run.without.is_empty()) {
            let without = run.without.join(" ");
            let note = format!("WARNING: {} was measured without {without}", vmm.name());
            section.notes.push(note);
        }
    }
    for (vmm, runs) in vmms.iter().zip(&runs) {
        if let Some(waits) = migration::waits::distribution(runs) {
            section.notes.push(format!("{}: {waits}", vmm.name()));
        }
    }
    let verified = "Memory verified at the destination in every run.";
    section.notes.push(verified.to_owned());
    Ok(section)
}

pub(super) fn start(
    scenario: &Scenario,
    vmms: &[Box<dyn Vmm>],
    output: &Output<'_>,
) -> Result<Section, Error> {
    let dir = scratch()?;
    let runs = in_turn(
        output.common.runs,
        vmms,
        |what| output.progress(what),
        |vmm| start::run(vmm, scenario, dir.path()),
    )?;
    let mut section = Section::of("start", scenario.to_string(), vmms, &runs);
    section.input = json!(scenario);
    Ok(section)
}

pub(super) fn pause(times: usize, vmms: &[Box<dyn Vmm>]) -> Result<Section, Error> {
    let dir = scratch()?;
    let mut rows = Vec::new();
    for activity in &pause::ACTIVITIES {
        let mut values = Vec::new();
        for vmm in vmms {
            let pauses = pause::run(vmm.as_ref(), activity, times, dir.path())?;
            values.push(pauses.into_iter().map(Some).collect());
        }
        rows.push(Row {
            name: activity.name.to_owned(),
            unit: Unit::Milliseconds,
            digits: 2,
            headline: false,
            values,
        });
    }
    let names = vmms.iter().map(|vmm| vmm.name().to_owned());
    let of_each = |row: &Row| json!({ "guest": row.name, "ms": row.values });
    Ok(Section {
        title: "pause".to_owned(),
        description: format!("stop to its answer, {times} times for each guest"),
        notes: vec![],
        vmms: names.collect(),
        in_turn: false,
        runs: rows.iter().map(of_each).collect(),
        rows,
        plots: vec![],
        input: json!({ "times": times }),
    })
}

pub(super) fn disk(
    options: &Disk,
    mut vmms: Vec<Box<dyn Vmm>>,
    output: &mut Output<'_>,
) -> Result<(), Error> {
    if let Some(qemu) = Qemu::find().filter(|_| !output.common.without_qemu) {
        vmms.push(Box::new(qemu.with_iothread()));
    }
    let sockets = scratch()?;
    let dir = tempfile::Builder::new()
        .prefix("bench")
        .tempdir_in(&options.dir)
        .map_err(Error::io(format!(
            "a directory in {}",
            options.dir.display()
        )))?;
    let drive = Drive {
        path: disk::image(dir.path(), options.format, options.size.0)?,
        format: options.format,
        cache: options.cache,
        size: options.size.0,
    };
    let Disk {
        format,
        cache,
        wait,
        size,
        seconds,
        ..
    } = options;
    let all = disk::Work::all();
    for work in all.filter(|work| work.to_string().contains(&options.only)) {
        let runs = in_turn(
            output.common.runs,
            &vmms,
            |what| output.progress(&format!("{work}, {what}")),
            |vmm| disk::run(vmm, work, *wait, *seconds, &drive, sockets.path()),
        )?;
        let description = format!("{format:?}, cache {cache:?}, {size}, the guest waits by {wait}");
        let mut section = Section::of(format!("disk, {work}"), description, &vmms, &runs);
        section.input = json!({
            "work": work.to_string(), "format": format, "cache": cache,
            "wait": wait.to_string(), "size": size.0, "seconds": seconds,
        });
        output.add(section)?;
    }
    Ok(())
}
