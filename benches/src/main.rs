//! The benchmark's command line.

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use benches::error::Error;
use benches::scenario::{Link, Scenario};
use benches::summary::{Spread, Table};
use benches::vmm::{Drive, DriveCache, DriveFormat, Ferry, Qemu, Vmm};
use benches::{disk, migration, pause, proc, start};
use clap::{Args, Parser, Subcommand};
use guest_tests::Size;
use guest_tests::dirtier::{Data, Pattern, Rate};
use guest_tests::mmio::Wait;
use serde_json::{Value, json};

/// Measures Ferry, and QEMU beside it, on this machine
#[derive(Debug, Parser)]
#[command(name = "benches")]
struct Cli {
    #[command(flatten)]
    common: Common,
    #[command(subcommand)]
    what: What,
}

#[derive(Args, Debug)]
struct Common {
    /// How often each VMM is measured
    #[arg(long, global = true, default_value_t = 5, value_parser = clap::value_parser!(u16).range(1..))]
    runs: u16,
    /// The build of Ferry to measure
    #[arg(long, global = true, default_value = "target/release/ferry")]
    ferry: PathBuf,
    /// Another build of Ferry to compare with
    #[arg(long, global = true, value_name = "FERRY")]
    before: Option<PathBuf>,
    /// Leave QEMU out
    #[arg(long, global = true)]
    without_qemu: bool,
    /// Forbid huge pages to every VMM: where the machine itself is virtual, they can be slow
    #[arg(long, global = true)]
    no_huge_pages: bool,
    /// Write every figure of every run to this file
    #[arg(long, global = true, value_name = "FILE")]
    json: Option<PathBuf>,
}

#[derive(Debug, Subcommand)]
enum What {
    /// A running guest moves to a second process on this machine
    Migration(Migration),
    /// From the start of the process to the guest's first instruction; resident memory
    Start(Work),
    /// From `stop` to its answer, whatever the guest does
    Pause {
        /// How often each guest is paused
        #[arg(long, default_value_t = 100)]
        times: usize,
    },
    /// How fast the guest's driver finds its disk
    Disk(Disk),
}

#[derive(Args, Debug)]
struct Disk {
    /// The image's format
    #[arg(long, value_enum, default_value = "raw")]
    format: DriveFormat,
    /// How the host's page cache is used
    #[arg(long, value_enum, default_value = "writeback")]
    cache: DriveCache,
    /// How the guest waits for its disk: irq, poll
    #[arg(long, default_value = "irq", value_parser = word::<Wait>)]
    wait: Wait,
    /// The disk's size
    #[arg(long, default_value = "256M", value_parser = word::<Size>)]
    size: Size,
    /// How long each measurement lasts
    #[arg(long, default_value_t = 1)]
    seconds: u64,
    /// Only work whose description contains this, such as `randread` or `depth 32`
    #[arg(long, default_value = "")]
    only: String,
    /// The directory for the image, on the file system to be measured
    #[arg(long, default_value = "target")]
    dir: PathBuf,
}

#[derive(Args, Debug)]
struct Migration {
    #[command(flatten)]
    work: Work,
    /// The downtime limit in ms
    #[arg(long, default_value_t = 30)]
    downtime_limit: u64,
    /// Over a link of so many Mbit/s between two network namespaces, instead of loopback
    #[arg(long, value_name = "MBIT")]
    link: Option<u32>,
    /// Switch to post-copy so many ms after the start
    #[arg(long, value_name = "MS")]
    postcopy_after: Option<u64>,
}

/// A known scenario, and where it is to differ.
#[derive(Args, Debug)]
struct Work {
    /// busy (1 GiB, 512 MiB random, 20,000 pages/s in 64 MiB), idle (the same, rewriting nothing),
    /// or sparse (4 GiB, 64 MiB touched, idle)
    #[arg(default_value = "busy", value_parser = known_scenario)]
    scenario: Scenario,
    /// The guest's memory
    #[arg(long, value_parser = word::<Size>)]
    memory: Option<Size>,
    /// How much of it is filled
    #[arg(long, value_parser = word::<Size>)]
    fill: Option<Size>,
    /// With what: random, text, zero
    #[arg(long, value_parser = word::<Data>)]
    data: Option<Data>,
    /// How much is rewritten
    #[arg(long, value_parser = word::<Size>)]
    working_set: Option<Size>,
    /// At so many pages a second, or `max`
    #[arg(long, value_parser = word::<Rate>)]
    rate: Option<Rate>,
    /// In which order: sequential, random, hot
    #[arg(long, value_parser = word::<Pattern>)]
    pattern: Option<Pattern>,
    /// µs between heartbeats
    #[arg(long)]
    heartbeat: Option<u64>,
}

fn known_scenario(name: &str) -> Result<Scenario, String> {
    Scenario::named(name).ok_or_else(|| "busy, idle or sparse".to_owned())
}

fn word<T: std::str::FromStr>(text: &str) -> Result<T, String> {
    text.parse()
        .map_err(|_| "neither a known word nor a number with a unit (K, M, G)".to_owned())
}

impl Work {
    fn scenario(&self) -> Scenario {
        let mut scenario = self.scenario.clone();
        let work = &mut scenario.work;
        scenario.memory = self.memory.map_or(scenario.memory, |Size(bytes)| bytes);
        work.fill = self.fill.unwrap_or(work.fill);
        work.data = self.data.unwrap_or(work.data);
        work.ws = self.working_set.unwrap_or(work.ws);
        work.rate = self.rate.unwrap_or(work.rate);
        work.pattern = self.pattern.unwrap_or(work.pattern);
        work.heartbeat = self.heartbeat.unwrap_or(work.heartbeat);
        scenario
    }
}

fn main() -> ExitCode {
    match bench(&Cli::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(err) => {
            eprintln!("benches: {err}");
            ExitCode::FAILURE
        }
    }
}

fn bench(cli: &Cli) -> Result<(), Error> {
    let mut vmms = contenders(&cli.common)?;
    if cli.common.no_huge_pages {
        // Children inherit it.
        rustix::thread::disable_transparent_huge_pages(true)
            .map_err(|err| Error::io("PR_SET_THP_DISABLE")(err.into()))?;
        println!("Huge pages are forbidden to every VMM.");
    }
    let load = proc::load();
    let mut record = match &cli.what {
        What::Migration(options) => migrations(cli, options, &vmms)?,
        What::Start(work) => starts(cli, &work.scenario(), &vmms)?,
        What::Pause { times } => pauses(*times, &vmms)?,
        What::Disk(options) => {
            if let Some(qemu) = Qemu::find().filter(|_| !cli.common.without_qemu) {
                vmms.push(Box::new(qemu.with_iothread()));
            }
            disks(cli.common.runs, options, &vmms)?
        }
    };
    println!("Load average: {load} before, {} after.", proc::load());
    record["load"] = json!(load);
    record["huge_pages"] = json!(!cli.common.no_huge_pages);
    if let Some(path) = &cli.common.json {
        std::fs::write(path, format!("{record:#}\n"))
            .map_err(Error::io(path.display().to_string()))?;
    }
    Ok(())
}

fn contenders(common: &Common) -> Result<Vec<Box<dyn Vmm>>, Error> {
    let build = |name: &str, program: &PathBuf| -> Result<Box<dyn Vmm>, Error> {
        let program = program.canonicalize().map_err(Error::io(format!(
            "{} (build it with `cargo build --release`)",
            program.display()
        )))?;
        Ok(Box::new(Ferry {
            name: name.to_owned(),
            program,
        }))
    };
    let mut vmms = vec![build("ferry", &common.ferry)?];
    if let Some(before) = &common.before {
        vmms.push(build("before", before)?);
    }
    if !common.without_qemu {
        match Qemu::find() {
            Some(qemu) => vmms.push(Box::new(qemu)),
            None => eprintln!(
                "WARNING: there is no {} on the search path (package qemu-system-x86): FERRY IS \
                 MEASURED ALONE",
                Qemu::PROGRAM
            ),
        }
    }
    Ok(vmms)
}

/// Measures all in turn, so often; the outcomes of each.
fn in_turn<T>(
    runs: u16,
    vmms: &[Box<dyn Vmm>],
    mut measure: impl FnMut(&dyn Vmm) -> Result<T, Error>,
) -> Result<Vec<Vec<T>>, Error> {
    let mut outcomes: Vec<Vec<T>> = vmms.iter().map(|_| Vec::new()).collect();
    for run in 1..=runs {
        for (vmm, outcomes) in vmms.iter().zip(&mut outcomes) {
            eprint!("\rrun {run} of {runs}: {}          ", vmm.name());
            outcomes.push(measure(vmm.as_ref())?);
        }
    }
    eprint!("\r{:40}\r", "");
    Ok(outcomes)
}

fn scratch() -> Result<tempfile::TempDir, Error> {
    // Short: the path of a Unix socket has at most 107 bytes.
    tempfile::Builder::new()
        .prefix("bench")
        .tempdir()
        .map_err(Error::io("a directory for sockets"))
}

fn table(vmms: &[Box<dyn Vmm>]) -> Table {
    let mut head = vec!["median (min–max)".to_owned()];
    head.extend(vmms.iter().map(|vmm| vmm.name().to_owned()));
    if let Some((first, others)) = vmms.split_first() {
        head.extend(
            others
                .iter()
                .map(|other| format!("{}/{}", first.name(), other.name())),
        );
    }
    Table::new(head)
}

fn figures<T>(outcomes: &[Vec<T>], pick: impl Fn(&T) -> Option<f64>) -> Vec<Vec<f64>> {
    outcomes
        .iter()
        .map(|of_one| of_one.iter().filter_map(&pick).collect())
        .collect()
}

fn by_name<T: serde::Serialize>(vmms: &[Box<dyn Vmm>], outcomes: &[Vec<T>]) -> Value {
    let named = vmms.iter().zip(outcomes);
    named
        .map(|(vmm, outcomes)| (vmm.name().to_owned(), json!(outcomes)))
        .collect()
}

fn migrations(cli: &Cli, options: &Migration, vmms: &[Box<dyn Vmm>]) -> Result<Value, Error> {
    const MIB: f64 = (1 << 20) as f64;
    let mut scenario = options.work.scenario();
    if let Some(mbit) = options.link {
        scenario.link = Link::Shaped { mbit };
    }
    let how = migration::How {
        downtime_limit: Duration::from_millis(options.downtime_limit),
        postcopy_after: options.postcopy_after.map(Duration::from_millis),
    };
    let dir = scratch()?;
    println!("{scenario}");
    let outcomes = in_turn(cli.common.runs, vmms, |vmm| {
        migration::run(vmm, &scenario, how, dir.path())
    })?;
    let mut table = table(vmms);
    type Pick = fn(&migration::Outcome) -> Option<f64>;
    let rows: [(&str, usize, Pick); 25] = [
        ("total, ms", 0, |o| Some(o.total)),
        ("total reported, ms", 0, |o| Some(o.total_reported)),
        ("downtime felt, ms", 2, |o| Some(o.felt)),
        ("downtime reported, ms", 2, |o| Some(o.reported.total)),
        ("  stop", 2, |o| o.reported.stop),
        ("  last pages", 2, |o| o.reported.last_pages),
        ("  save", 2, |o| o.reported.save),
        ("  send", 2, |o| o.reported.send),
        ("  load", 2, |o| o.reported.load),
        ("  start", 2, |o| o.reported.start),
        ("felt - reported, ms", 2, |o| {
            Some(o.felt - o.reported.total)
        }),
        ("longest gap when quiet, ms", 2, |o| Some(o.gap_quiet)),
        ("longest gap before, ms", 2, |o| Some(o.gap_before)),
        ("longest gap after, ms", 2, |o| Some(o.gap_after)),
        ("post-copy, ms", 1, |o| o.postcopy.map(|p| p.time)),
        ("  pages asked for", 0, |o| {
            o.postcopy.map(|p| p.requests as f64)
        }),
        ("  wait, average, ms", 3, |o| o.postcopy.map(|p| p.average)),
        ("  wait, median at most, ms", 3, |o| {
            o.postcopy.map(|p| p.median_below)
        }),
        ("  wait, longest, ms", 3, |o| o.postcopy.map(|p| p.longest)),
        ("  all vCPUs waited, ms", 1, |o| {
            o.postcopy.map(|p| p.blocked)
        }),
        ("sent, MiB", 1, |o| Some(o.bytes as f64 / MIB)),
        ("rounds", 0, |o| Some(o.rounds as f64)),
        ("CPU, s", 2, |o| Some(o.cpu_seconds)),
        ("stolen from this machine, ms", 0, |o| Some(o.stolen)),
        ("resident at the destination, of the source's", 3, |o| {
            Some(o.resident_destination as f64 / o.resident_source as f64)
        }),
    ];
    for (name, digits, pick) in rows {
        table.push_figures(name, digits, &figures(&outcomes, pick));
    }
    print!("{table}");
    println!("Memory verified at the destination in every run.");
    Ok(json!({ "scenario": scenario, "runs": by_name(vmms, &outcomes) }))
}

fn starts(cli: &Cli, scenario: &Scenario, vmms: &[Box<dyn Vmm>]) -> Result<Value, Error> {
    const MIB: f64 = (1 << 20) as f64;
    let dir = scratch()?;
    println!("{scenario}");
    let outcomes = in_turn(cli.common.runs, vmms, |vmm| {
        start::run(vmm, scenario, dir.path())
    })?;
    let mut table = table(vmms);
    type Pick = fn(&start::Outcome) -> Option<f64>;
    let rows: [(&str, usize, Pick); 3] = [
        ("start to the guest's first byte, ms", 1, |o| {
            Some(o.first_byte)
        }),
        ("resident besides the guest's, MiB", 1, |o| {
            Some(o.resident.own as f64 / MIB)
        }),
        ("the guest's, MiB", 1, |o| {
            Some(o.resident.guest as f64 / MIB)
        }),
    ];
    for (name, digits, pick) in rows {
        table.push_figures(name, digits, &figures(&outcomes, pick));
    }
    print!("{table}");
    Ok(json!({ "scenario": scenario, "runs": by_name(vmms, &outcomes) }))
}

fn pauses(times: usize, vmms: &[Box<dyn Vmm>]) -> Result<Value, Error> {
    let dir = scratch()?;
    let mut head = vec!["stop to its answer, ms".to_owned()];
    head.extend(vmms.iter().map(|vmm| vmm.name().to_owned()));
    let mut table = Table::new(head);
    let mut record = Vec::new();
    for activity in &pause::ACTIVITIES {
        let mut row = vec![activity.name.to_owned()];
        for vmm in vmms {
            let pauses = pause::run(vmm.as_ref(), activity, times, dir.path())?;
            record.push(json!({ "guest": activity.name, "vmm": vmm.name(), "ms": pauses }));
            row.extend(Spread::of(pauses).map(|spread| spread.to_string()));
        }
        table.push(row);
    }
    print!("{table}");
    Ok(json!({ "pauses": record }))
}

fn disks(runs: u16, options: &Disk, vmms: &[Box<dyn Vmm>]) -> Result<Value, Error> {
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
    println!(
        "{:?}, cache {:?}, {}, the guest waits by {}",
        options.format, options.cache, options.size, options.wait
    );
    let mut table = table(vmms);
    let mut record = Vec::new();
    for work in disk::Work::all().filter(|work| work.to_string().contains(&options.only)) {
        let outcomes = in_turn(runs, vmms, |vmm| {
            disk::run(
                vmm,
                work,
                options.wait,
                options.seconds,
                &drive,
                sockets.path(),
            )
        })?;
        table.push_figures(
            &format!("{work}: requests/s"),
            0,
            &figures(&outcomes, |o| Some(o.iops)),
        );
        table.push_figures(
            "  median latency, µs",
            1,
            &figures(&outcomes, |o| Some(o.p50)),
        );
        table.push_figures("  99 %, µs", 1, &figures(&outcomes, |o| Some(o.p99)));
        record.push(json!({ "work": work.to_string(), "runs": by_name(vmms, &outcomes) }));
    }
    print!("{table}");
    Ok(json!({
        "format": options.format, "cache": options.cache, "wait": options.wait.to_string(),
        "size": options.size.0, "seconds": options.seconds, "disk": record,
    }))
}
