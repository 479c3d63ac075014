//! `ferry demo`: moves a bundled guest from one process of this machine to another, and tells how
//! it felt.

use std::io::{self, IsTerminal};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{Duration, Instant};

use guest_tests::dirtier::{Options, Rate, Report, command};
use guest_tests::driver::process::Process;
use guest_tests::driver::qmp::{Client, QmpError};
use guest_tests::driver::serial::{WaitError, Watcher};
use guest_tests::{Malformed, Size};
use indicatif::{ProgressBar, ProgressStyle};
use serde_json::{Value, json};

use crate::cli::DemoOptions;

/// How long a process may take to come up, and the guest to answer a question.
const PATIENCE: Duration = Duration::from_secs(30);
/// How long the guest may take to fill or to verify its memory.
const LONG_PATIENCE: Duration = Duration::from_secs(300);
/// How long the guest works before it is moved.
const WARM_UP: Duration = Duration::from_secs(1);
/// How often the migration is looked at.
const LOOK: Duration = Duration::from_millis(20);

/// Why the demo ended early.
#[derive(Debug, thiserror::Error)]
pub(crate) enum DemoError {
    /// A file or process of the demo's own.
    #[error("{doing}: {source}")]
    Io {
        /// What was being done.
        doing: &'static str,
        /// The cause.
        source: io::Error,
    },
    /// A process did not answer as it should.
    #[error("{who}: {source}\n{output}")]
    Control {
        /// Which process.
        who: &'static str,
        /// The cause.
        source: QmpError,
        /// What the process has printed.
        output: String,
    },
    /// The guest did not say what it should.
    #[error("the guest at the {who}: {source}\n{output}")]
    Guest {
        /// Which process.
        who: &'static str,
        /// The cause.
        source: WaitError,
        /// What the process has printed.
        output: String,
    },
    /// The guest had something to complain of.
    #[error("the guest reports: {0}")]
    Broken(String),
    /// The migration failed.
    #[error("the migration ended as '{status}': {reason}")]
    Migration {
        /// Its status.
        status: String,
        /// Why.
        reason: String,
    },
    /// Options that don't go together.
    #[error("{0}")]
    Options(String),
}

fn io_error(doing: &'static str) -> impl FnOnce(io::Error) -> DemoError {
    move |source| DemoError::Io { doing, source }
}

/// One of the two processes.
struct Side {
    who: &'static str,
    process: Process,
    qmp: Client,
    serial: Watcher,
}

impl Side {
    /// Starts `ferry run` with these arguments besides those of its sockets, which are in `dir`.
    fn start(who: &'static str, dir: &Path, arguments: &[String]) -> Result<Self, DemoError> {
        let qmp = dir.join(format!("{who}.qmp"));
        let serial = dir.join(format!("{who}.serial"));
        let mut all = vec![
            "run".to_owned(),
            "--name".to_owned(),
            who.to_owned(),
            "--monitor".to_owned(),
            "none".to_owned(),
            "--qmp".to_owned(),
            format!("unix:{}", qmp.display()),
            "--serial".to_owned(),
            format!("unix:{}", serial.display()),
        ];
        all.extend_from_slice(arguments);
        let program = std::env::current_exe().map_err(io_error("finding this program"))?;
        let log = dir.join(format!("{who}.log"));
        let process =
            Process::spawn(&program, &all, &log).map_err(io_error("starting a ferry process"))?;
        let serial = Watcher::connect(&serial, PATIENCE).map_err(|source| DemoError::Control {
            who,
            source: source.into(),
            output: process.output(),
        })?;
        let qmp = Client::connect(&qmp, PATIENCE).map_err(|source| DemoError::Control {
            who,
            source,
            output: process.output(),
        })?;
        Ok(Self {
            who,
            process,
            qmp,
            serial,
        })
    }

    fn execute(&mut self, command: &str, arguments: Value) -> Result<Value, DemoError> {
        self.qmp
            .execute(command, arguments)
            .map_err(|source| DemoError::Control {
                who: self.who,
                source,
                output: self.process.output(),
            })
    }

    /// The guest's own longest gap in µs since it was last asked.
    fn status(&mut self) -> Result<u64, DemoError> {
        self.serial
            .send(&[command::STATUS])
            .map_err(io_error("talking to the guest"))?;
        self.wait_for(PATIENCE, |report| match report {
            Report::Status { longest_gap_us, .. } => Some(longest_gap_us),
            _ => None,
        })
    }

    /// Waits for a report of the guest; an error or a fault that it reports ends the demo.
    fn wait_for<T>(
        &self,
        patience: Duration,
        mut pick: impl FnMut(Report) -> Option<T>,
    ) -> Result<T, DemoError> {
        let answer = self
            .serial
            .wait_for(patience, |line| match Report::parse(line) {
                Some(Report::Error { .. }) => Some(Err(DemoError::Broken(line.to_owned()))),
                Some(report) => pick(report).map(Ok),
                None => Some(Err(DemoError::Broken(line.to_owned()))),
            });
        match answer {
            Ok((found, _)) => found,
            Err(source) => Err(DemoError::Guest {
                who: self.who,
                source,
                output: self.process.output(),
            }),
        }
    }
}

/// Runs the demo. Fails if the guest did not survive as it should.
pub(crate) fn run(options: &DemoOptions) -> Result<ExitCode, DemoError> {
    let guest = guest_options(options)?;
    let dir = tempfile::tempdir().map_err(io_error("making a directory for the demo"))?;
    let kernel = dir.path().join("dirtier");
    std::fs::write(&kernel, guest_tests::DIRTIER).map_err(io_error("writing the guest's image"))?;

    let mut destination = Side::start(
        "destination",
        dir.path(),
        &["--incoming".to_owned(), "tcp:127.0.0.1:0".to_owned()],
    )?;
    let mut source = start_source(dir.path(), kernel, options, &guest)?;
    println!(
        "A guest of {} writes {} pages a second in {}; it checks each page before, and all others.",
        Size(options.memory),
        options.dirty_rate,
        guest.ws,
    );
    let pages = source.wait_for(LONG_PATIENCE, |report| match report {
        Report::Ready { pages, .. } => Some(pages),
        _ => None,
    })?;
    println!(
        "It has filled {} MiB with random data at the source. Now it moves.",
        pages >> 8
    );
    std::thread::sleep(WARM_UP);

    let uri = listening_at(&mut destination)?;
    source.execute(
        "migrate-set-parameters",
        json!({ "downtime-limit": options.downtime_limit.as_millis() as u64 }),
    )?;
    // Its longest gap counts from here.
    source.status()?;
    source.execute("migrate", json!({ "uri": uri }))?;
    let info = watch(&mut source)?;
    summarize(&mut source, &mut destination, &info)?;
    Ok(ExitCode::SUCCESS)
}

fn guest_options(options: &DemoOptions) -> Result<Options, DemoError> {
    let fill = options.fill;
    if options.working_set > fill {
        return Err(DemoError::Options(format!(
            "the working set of {} is more than the {} that the guest fills",
            Size(options.working_set),
            Size(fill)
        )));
    }
    let guest = Options {
        fill: Size(fill),
        ws: Size(options.working_set),
        rate: Rate::PerSecond(options.dirty_rate),
        ..Options::default()
    };
    match Options::parse(&guest.to_string()) {
        Ok(_) => Ok(guest),
        Err(err @ (Malformed::Unknown(_) | Malformed::Value(_))) => {
            Err(DemoError::Options(err.to_string()))
        }
    }
}

fn start_source(
    dir: &Path,
    kernel: PathBuf,
    options: &DemoOptions,
    guest: &Options,
) -> Result<Side, DemoError> {
    let arguments = [
        "--kernel".to_owned(),
        kernel.display().to_string(),
        "--append".to_owned(),
        guest.to_string(),
        "--memory".to_owned(),
        Size(options.memory).to_string(),
    ];
    Side::start("source", dir, &arguments)
}

/// The URI at which a destination that was given port 0 listens.
fn listening_at(destination: &mut Side) -> Result<String, DemoError> {
    let info = destination.execute("query-migrate", Value::Null)?;
    let address = &info["socket-address"][0];
    match (address["host"].as_str(), address["port"].as_str()) {
        (Some(host), Some(port)) => Ok(format!("tcp:{host}:{port}")),
        _ => Err(DemoError::Migration {
            status: "setup".to_owned(),
            reason: format!("the destination does not say where it listens: {info}"),
        }),
    }
}

/// Shows the rounds as they come; returns what the source says at the end.
fn watch(source: &mut Side) -> Result<Value, DemoError> {
    let bar = progress_bar();
    let show = |line: String| {
        if bar.is_hidden() {
            println!("{line}");
        } else {
            bar.println(line);
        }
    };
    show(format!(
        "{:>6} {:>10} {:>10} {:>10} {:>10} {:>12} {:>10}",
        "round", "pages", "sent", "MiB", "ms", "MiB/s", "dirtied"
    ));
    let mut shown = 0;
    let info = loop {
        let info = source.execute("query-migrate", Value::Null)?;
        let status = info["status"].as_str().unwrap_or_default();
        let ended = matches!(status, "completed" | "failed" | "cancelled");
        for round in info["x-ferry"]["rounds"].as_array().into_iter().flatten() {
            let number = round["round"].as_u64().unwrap_or_default();
            if number > shown && (ended || round.get("dirtied").is_some()) {
                show(round_line(round));
                shown = number;
            }
        }
        let ram = |key: &str| info["ram"][key].as_u64().unwrap_or_default();
        bar.set_length(ram("total"));
        bar.set_position(ram("total").saturating_sub(ram("remaining")));
        if ended {
            break info;
        }
        std::thread::sleep(LOOK);
    };
    bar.finish_and_clear();
    match info["status"].as_str() {
        Some("completed") => Ok(info),
        status => Err(DemoError::Migration {
            status: status.unwrap_or("unknown").to_owned(),
            reason: info["error-desc"]
                .as_str()
                .unwrap_or("no reason given")
                .to_owned(),
        }),
    }
}

fn progress_bar() -> ProgressBar {
    if !io::stdout().is_terminal() {
        return ProgressBar::hidden();
    }
    let bar = ProgressBar::new(0);
    if let Ok(style) =
        ProgressStyle::with_template("{wide_bar} {binary_bytes} of {binary_total_bytes}")
    {
        bar.set_style(style);
    }
    bar
}

fn round_line(round: &Value) -> String {
    let number = |key: &str| round[key].as_u64().unwrap_or_default();
    let mib = number("bytes") as f64 / f64::from(1 << 20);
    let ms = number("time") as f64 / 1000.0;
    let dirtied = match round["dirtied"].as_u64() {
        Some(pages) => pages.to_string(),
        None => "-".to_owned(),
    };
    format!(
        "{:>6} {:>10} {:>10} {:>10.1} {:>10.1} {:>12.0} {:>10}",
        number("round"),
        number("pages"),
        number("sent"),
        mib,
        ms,
        if ms > 0.0 { mib / (ms / 1000.0) } else { 0.0 },
        dirtied,
    )
}

fn summarize(source: &mut Side, destination: &mut Side, info: &Value) -> Result<(), DemoError> {
    let longest_gap = destination.status()?;
    destination
        .serial
        .send(&[command::VERIFY])
        .map_err(io_error("talking to the guest"))?;
    let (pages, errors) = destination.wait_for(LONG_PATIENCE, |report| match report {
        Report::Verified { pages, errors, .. } => Some((pages, errors)),
        _ => None,
    })?;
    let felt = felt_outside(source, destination);
    let ms = |us: u64| us as f64 / 1000.0;
    let part = |key: &str| {
        ms(info["x-ferry"]["downtime"][key]
            .as_u64()
            .unwrap_or_default())
    };
    println!();
    println!("The guest runs at the destination.");
    if let Some(felt) = felt {
        println!(
            "  downtime felt        {:.1} ms (from its last heartbeat there to its first here)",
            felt.as_secs_f64() * 1000.0
        );
    }
    println!(
        "  downtime reported    {:.1} ms: stop {:.1}, last pages {:.1}, save {:.1}, send {:.1}, \
         load {:.1}, start {:.1}",
        part("total"),
        part("stop"),
        part("last-pages"),
        part("save"),
        part("send"),
        part("load"),
        part("start"),
    );
    println!(
        "  the guest's own      {:.1} ms, its longest wait since the migration began, by its TSC",
        ms(longest_gap)
    );
    let number = |key: &str| info["ram"][key].as_u64().unwrap_or_default();
    println!(
        "  total time           {} ms, {} rounds",
        info["total-time"].as_u64().unwrap_or_default(),
        number("dirty-sync-count"),
    );
    println!(
        "  sent                 {:.1} MiB: {} pages, and {} zero pages that were only named",
        number("transferred") as f64 / f64::from(1 << 20),
        number("normal"),
        number("duplicate"),
    );
    println!("  memory verified      {pages} pages, {errors} errors");
    if errors == 0 {
        Ok(())
    } else {
        Err(DemoError::Broken(format!("{errors} damaged pages")))
    }
}

fn felt_outside(source: &Side, destination: &Side) -> Option<Duration> {
    let last: Instant = source.serial.heartbeats().last?;
    let first = destination.serial.heartbeats().first?;
    Some(first.saturating_duration_since(last))
}
