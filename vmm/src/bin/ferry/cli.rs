//! The command line.
//!
//! [`parse`] first brings QEMU's spelling into our own ([`qemu`]), then clap reads it; [`values`]
//! reads what stands behind an option.

mod affinity;
mod disk;
mod memory;
mod qemu;
#[cfg(test)]
mod tests;
pub(crate) mod values;

use std::ffi::OsString;
use std::path::PathBuf;
use std::time::Duration;

use clap::error::ErrorKind;
use clap::{Args, CommandFactory, Parser, Subcommand};

pub(crate) use affinity::merge as merge_affinity;
pub(crate) use memory::Memory;
pub(crate) use values::{Incoming, MonitorSpec, QmpSpec};
use vmm::affinity::Affinity;
use vmm::console::SerialBackend;
use vmm::cpuid::Model;
use vmm::machine::config::{BalloonOptions, DiskOptions, GivenNet};

/// What is logged unless the user says otherwise: what went wrong, and what becomes of the guest.
const DEFAULT_LOG: &str = "warn,vmm::instance=info";

/// What the user asked for.
#[derive(Clone, Debug, PartialEq, Parser)]
#[command(
    name = "ferry",
    version,
    about = "A minimal VMM on KVM that live-migrates its guest",
    max_term_width = 100,
    subcommand_required = true,
    arg_required_else_help = true
)]
pub(crate) struct Cli {
    /// What to log, to standard error: error, warn, info, debug, trace, or a filter such as
    /// `migration=debug,warn`
    /// [default: $FERRY_LOG, or warn,vmm::instance=info]
    #[arg(long, global = true, value_name = "FILTER")]
    pub(crate) log: Option<String>,
    /// What to do.
    #[command(subcommand)]
    pub(crate) command: Command,
}

/// The subcommands.
#[derive(Clone, Debug, PartialEq, Subcommand)]
pub(crate) enum Command {
    /// Run a guest, or wait for one that migrates here
    Run(Box<RunOptions>),
    /// Show a live migration on this machine: no arguments, no files
    Demo(DemoOptions),
    /// Attach to a running ferry, or run one of its monitor's commands
    Monitor(MonitorOptions),
    /// Measure migrations, starts, pauses and disks on this machine, beside QEMU if it is installed
    Bench(Box<benches::command::Options>),
}

/// `ferry run`. An option that was not given is `None` or empty, so that a destination can take
/// it from the source, and refuse one that was given and differs.
#[derive(Clone, Debug, Default, PartialEq, Args)]
#[command(
    override_usage = "ferry run --kernel FILE [OPTIONS]\n       \
                      ferry run --incoming ADDRESS [OPTIONS]\n       \
                      ferry run --loadvm TAG [OPTIONS]",
    after_help = "Options are also read in QEMU's spelling (-kernel, -m 2G, -smp 2, -incoming, \
                  -serial, -monitor, -qmp, -name, -S).\nA guest that migrates here brings with \
                  it what is not given."
)]
pub(crate) struct RunOptions {
    /// The guest's name
    #[arg(long, value_name = "NAME", value_parser = values::name, help_heading = "Guest")]
    pub(crate) name: Option<String>,
    /// The kernel: an ELF file with a PVH note, a 64-bit ELF Linux kernel, or a bzImage
    #[arg(long, value_name = "FILE", help_heading = "Guest")]
    pub(crate) kernel: Option<PathBuf>,
    /// The initial RAM disk
    #[arg(long, value_name = "FILE", help_heading = "Guest")]
    pub(crate) initrd: Option<PathBuf>,
    /// The kernel's command line
    #[arg(
        long,
        value_name = "TEXT",
        allow_hyphen_values = true,
        help_heading = "Guest"
    )]
    pub(crate) append: Option<String>,
    /// The guest's memory, with a unit or in MiB [default: 128M]. Behind a comma each, how this
    /// host has it: hugepages=on|off|transparent, hugepage-size=2M|1G, shared=on|off, path=DIR
    /// (in a file there), prealloc=on|off, host-nodes=LIST, policy=default|preferred|bind|interleave
    #[arg(
        long,
        value_name = "SIZE[,OPTIONS]",
        value_parser = memory::parse,
        help_heading = "Guest"
    )]
    pub(crate) memory: Option<Memory>,
    /// The number of vCPUs [default: 1]
    #[arg(long, value_name = "N", value_parser = values::cpus, help_heading = "Guest")]
    pub(crate) smp: Option<u32>,
    /// The host's CPUs on which threads run: vCPUs by their numbers, io (devices and all else) and
    /// migration, for example 0-1@2-3,io@0,migration@1; can be given several times
    /// [default: all CPUs]
    #[arg(
        long,
        value_name = "WHO@CPUS,…",
        value_parser = affinity::parse,
        help_heading = "Guest"
    )]
    pub(crate) cpu_affinity: Vec<Affinity>,
    /// The vCPUs' features: host, x86-64-v2 or x86-64-v3, less those behind a minus
    /// (host,-avx512f) [default: host]
    #[arg(long, value_name = "MODEL[,-FLAG…]", help_heading = "Guest")]
    pub(crate) cpu: Option<Model>,

    /// A disk: file=PATH, then format=raw|qcow2, readonly=on, id=NAME, cache=writeback|none,
    /// serial=TEXT, each behind a comma; can be given several times
    #[arg(long, value_name = "OPTIONS", value_parser = disk::parse, help_heading = "Devices")]
    pub(crate) disk: Vec<DiskOptions>,
    /// Give the guest an entropy source (virtio-rng)
    #[arg(long, help_heading = "Devices")]
    pub(crate) rng: bool,
    /// Give the guest a network card (virtio-net) on a tap interface of the host's, which is
    /// created if it isn't there; can be given several times
    /// [default: a random MAC address; id net0, net1, …]
    #[arg(
        long,
        value_name = "tap,ifname=NAME[,mac=MAC][,id=ID]",
        value_parser = values::net,
        help_heading = "Devices"
    )]
    pub(crate) net: Vec<GivenNet>,

    /// Give the guest a memory balloon (virtio-balloon): free-page-reporting=on|off (memory that
    /// the guest frees goes back to the host), free-page-hint=on|off (a migration leaves free
    /// pages out), deflate-on-oom=on|off [default: all on]
    #[arg(
        long,
        value_name = "NAME=on|off,…",
        num_args = 0..=1,
        default_missing_value = "",
        value_parser = values::balloon,
        help_heading = "Devices"
    )]
    pub(crate) balloon: Option<BalloonOptions>,
    /// Give the guest a console (virtio-console, hvc0 in Linux), connected as --serial can be; on
    /// stdio the serial port is not connected unless --serial says where
    #[arg(long, value_name = "WHERE", value_parser = values::serial, help_heading = "Devices")]
    pub(crate) console: Option<SerialBackend>,

    /// The guest's serial port: stdio, file:PATH, unix:PATH, pty or none [default: stdio]
    #[arg(long, value_name = "WHERE", value_parser = values::serial, help_heading = "Connections")]
    pub(crate) serial: Option<SerialBackend>,
    /// A monitor: stdio, unix:PATH or none; can be given several times [default: none]
    #[arg(long, value_name = "WHERE", help_heading = "Connections")]
    pub(crate) monitor: Vec<MonitorSpec>,
    /// A QMP server: unix:PATH or none; can be given several times [default: none]
    #[arg(long, value_name = "WHERE", help_heading = "Connections")]
    pub(crate) qmp: Vec<QmpSpec>,
    /// Wait for a guest: tcp:HOST:PORT, unix:PATH, file:PATH to load it from there, or defer
    /// until migrate_incoming tells
    #[arg(long, value_name = "ADDRESS", help_heading = "Connections")]
    pub(crate) incoming: Option<Incoming>,

    /// Begin with the guest and the disks of a snapshot that savevm has saved
    #[arg(
        long,
        value_name = "TAG",
        conflicts_with = "incoming",
        help_heading = "Behaviour"
    )]
    pub(crate) loadvm: Option<String>,
    /// Do not run the guest before it is told to (cont)
    #[arg(long, help_heading = "Behaviour")]
    pub(crate) paused: bool,
    /// End when the guest resets
    #[arg(long, help_heading = "Behaviour")]
    pub(crate) no_reboot: bool,
    /// Stay when the guest has powered off
    #[arg(long, help_heading = "Behaviour")]
    pub(crate) no_shutdown: bool,
}

/// `ferry demo`.
#[derive(Clone, Debug, PartialEq, Args)]
pub(crate) struct DemoOptions {
    /// The guest's memory, with a unit or in MiB
    #[arg(long, value_name = "SIZE", default_value = "1G", value_parser = values::memory)]
    pub(crate) memory: u64,
    /// How much of it the guest fills and then checks, with a unit or in MiB
    #[arg(long, value_name = "SIZE", default_value = "512M", value_parser = values::size)]
    pub(crate) fill: u64,
    /// How much of that it keeps rewriting, with a unit or in MiB
    #[arg(long, value_name = "SIZE", default_value = "64M", value_parser = values::size)]
    pub(crate) working_set: u64,
    /// How many pages it rewrites in a second
    #[arg(long, value_name = "PAGES", default_value_t = 20_000)]
    pub(crate) dirty_rate: u64,
    /// How long the migration may stop it, in milliseconds
    #[arg(long, value_name = "MS", default_value = "30", value_parser = values::milliseconds)]
    pub(crate) downtime_limit: Duration,
}

/// `ferry monitor`.
#[derive(Clone, Debug, PartialEq, Args)]
pub(crate) struct MonitorOptions {
    /// A socket that a running ferry has opened for --monitor or --qmp
    #[arg(value_name = "SOCKET")]
    pub(crate) socket: PathBuf,
    /// A command to run; without one, the monitor is attached to this terminal
    #[arg(
        value_name = "COMMAND",
        trailing_var_arg = true,
        allow_hyphen_values = true
    )]
    pub(crate) command: Vec<String>,
}

/// Reads the command line, the program's name included. An error is for
/// [`clap::Error::exit`], also where help or the version was asked for.
pub(crate) fn parse(args: impl IntoIterator<Item = OsString>) -> Result<Cli, clap::Error> {
    let args = qemu::translate(args)
        .map_err(|error| Cli::command().error(ErrorKind::ValueValidation, error))?;
    let cli = Cli::try_parse_from(args)?;
    if let Command::Run(options) = &cli.command {
        options.check().map_err(|error| {
            let mut command = Cli::command();
            match command.find_subcommand_mut("run") {
                Some(run) => run.error(ErrorKind::ArgumentConflict, error),
                None => command.error(ErrorKind::ArgumentConflict, error),
            }
        })?;
    }
    Ok(cli)
}

impl Cli {
    /// The filter of what is logged.
    pub(crate) fn log_filter(&self) -> String {
        let given = || self.log.clone().or_else(|| std::env::var("FERRY_LOG").ok());
        given().unwrap_or_else(|| DEFAULT_LOG.to_owned())
    }
}

impl RunOptions {
    /// What no single option can tell.
    fn check(&self) -> Result<(), String> {
        if self.kernel.is_none() && self.incoming.is_none() && self.loadvm.is_none() {
            return Err(
                "there is nothing to run: give --kernel FILE, or --incoming ADDRESS to \
                        wait for a guest, or --loadvm TAG"
                    .into(),
            );
        }
        if self
            .monitor
            .iter()
            .filter(|monitor| **monitor == MonitorSpec::Stdio)
            .count()
            > 1
        {
            return Err("--monitor stdio was given more than once".into());
        }
        if let (Some(SerialBackend::Stdio), Some(SerialBackend::Stdio)) =
            (&self.serial, &self.console)
        {
            return Err(
                "--serial and --console can't both be on stdio: put one elsewhere (pty, \
                 unix:PATH, file:PATH or none)"
                    .into(),
            );
        }
        merge_affinity(&self.cpu_affinity)?;
        disk::check(&self.disk)?;
        values::check_nets(&self.net)?;
        let mut paths: Vec<&PathBuf> = self.monitor.iter().filter_map(MonitorSpec::path).collect();
        paths.extend(self.qmp.iter().filter_map(QmpSpec::path));
        for console in [&self.serial, &self.console] {
            if let Some(SerialBackend::Unix(path)) = console {
                paths.push(path);
            }
        }
        paths.sort();
        match paths.windows(2).find(|pair| pair.first() == pair.last()) {
            Some([path, ..]) => Err(format!(
                "unix:{} is given for more than one socket",
                path.display()
            )),
            _ => Ok(()),
        }
    }
}
