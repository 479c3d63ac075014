//! The VMMs that are measured: how each is started, and where it differs in what it reports.

mod ferry;
mod qemu;

use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use clap::ValueEnum;
use guest_tests::driver::process::Process;
use guest_tests::driver::qmp::{Client, QmpError};
use guest_tests::driver::serial::Watcher;
use serde::Serialize;
use serde_json::Value;

use crate::error::{Error, PATIENCE};
use crate::migration::Round;
use crate::network::Network;

pub use ferry::Ferry;
pub use qemu::Qemu;

/// How long to wait between two looks at a process that starts.
const LOOK: Duration = Duration::from_millis(2);

/// What a VMM boots.
#[derive(Clone, Debug)]
pub struct Guest {
    /// An ELF file with a PVH note.
    pub kernel: PathBuf,
    /// Its command line.
    pub append: String,
    /// Its RAM in bytes, whole MiB.
    pub memory: u64,
    /// Whether the destination takes all of its RAM from the host before it listens.
    pub prealloc: bool,
    /// Its disks.
    pub drives: Vec<Drive>,
}

/// A disk.
#[derive(Clone, Debug)]
pub struct Drive {
    /// The image.
    pub path: PathBuf,
    /// Its format.
    pub format: DriveFormat,
    /// How the host's page cache is used: `writeback` or `none`.
    pub cache: DriveCache,
    /// Bytes of the disk.
    pub size: u64,
}

/// An image's format.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum DriveFormat {
    /// As it is.
    Raw,
    /// QEMU's.
    Qcow2,
}

/// How the host's page cache is used.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum DriveCache {
    /// For reading and writing.
    Writeback,
    /// Not at all (`O_DIRECT`).
    None,
}

impl Drive {
    /// The options that all VMMs understand alike.
    fn options(&self) -> String {
        let format = match self.format {
            DriveFormat::Raw => "raw",
            DriveFormat::Qcow2 => "qcow2",
        };
        let cache = match self.cache {
            DriveCache::Writeback => "writeback",
            DriveCache::None => "none",
        };
        format!("file={},format={format},cache={cache}", self.path.display())
    }
}

/// What a process is to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// Boot the guest when `cont` says so.
    Source,
    /// Wait for `migrate-incoming`.
    Destination,
}

/// The sockets of a process.
#[derive(Clone, Debug)]
pub struct Sockets {
    /// Its QMP server.
    pub qmp: PathBuf,
    /// Its guest's serial port.
    pub serial: PathBuf,
}

/// The downtime as the source reports it, in milliseconds.
#[derive(Clone, Copy, Debug, Default, Serialize)]
pub struct Reported {
    /// The whole.
    pub total: f64,
    /// Stopping the vCPUs, where it is told.
    pub stop: Option<f64>,
    /// Sending the last pages.
    pub last_pages: Option<f64>,
    /// Saving the state.
    pub save: Option<f64>,
    /// Sending the state.
    pub send: Option<f64>,
    /// Checking and loading it.
    pub load: Option<f64>,
    /// From the agreement to the first instruction.
    pub start: Option<f64>,
}

/// The program that a VMM is, in whatever build or configuration.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Ferry.
    Ferry,
    /// QEMU.
    Qemu,
}

/// A VMM.
pub trait Vmm {
    /// For tables.
    fn name(&self) -> &str;

    /// Which one it is.
    fn kind(&self) -> Kind;

    /// The binary.
    fn program(&self) -> &Path;

    /// Its arguments for one end of a migration.
    fn arguments(&self, guest: &Guest, role: Role, sockets: &Sockets) -> Vec<String>;

    /// Its arguments for a guest that runs at once and writes to standard output.
    fn direct_arguments(&self, guest: &Guest) -> Vec<String>;

    /// Whether this build can have its RAM before it listens ([`Guest::prealloc`]).
    fn knows_prealloc(&self) -> bool {
        true
    }

    /// The downtime in an answer to `query-migrate`.
    fn downtime(&self, info: &Value) -> Option<Reported>;

    /// The rounds in an answer to `query-migrate` after the end, if it tells them.
    fn rounds(&self, _info: &Value) -> Option<Vec<Round>> {
        None
    }
}

/// What a VMM says of its version: the first line of `--version`.
pub fn version(vmm: &dyn Vmm) -> String {
    let output = Command::new(vmm.program()).arg("--version").output();
    let said = output.map(|output| output.stdout).unwrap_or_default();
    let said = String::from_utf8_lossy(&said);
    said.lines().next().unwrap_or_default().to_owned()
}

/// A running VMM.
#[derive(Debug)]
pub struct Running {
    pub(crate) name: String,
    /// Bytes of its guest's RAM.
    pub(crate) memory: u64,
    /// Where it listens for a guest.
    pub(crate) address: IpAddr,
    /// The process.
    pub process: Process,
    /// The guest's serial port.
    pub serial: Watcher,
    qmp: Client,
}

/// Waits for the control socket of a process, as long as there is a process.
fn alive(process: &mut Process, socket: &Path, name: &str) -> Result<(), Error> {
    let deadline = Instant::now() + PATIENCE;
    while !socket.exists() && Instant::now() < deadline {
        let ended = process.wait(LOOK).map_err(Error::io(name))?;
        if let Some(status) = ended {
            return Err(Error::Wrong(format!(
                "{name}: it has ended at its start ({status}):\n{}",
                process.output()
            )));
        }
    }
    Ok(())
}

impl Running {
    /// Starts a process whose sockets are in `dir`. No guest runs yet.
    pub fn start(vmm: &dyn Vmm, guest: &Guest, role: Role, dir: &Path) -> Result<Self, Error> {
        Self::start_in(&Network::HOST, vmm, guest, role, dir)
    }

    /// The same in a network.
    pub fn start_in(
        network: &Network,
        vmm: &dyn Vmm,
        guest: &Guest,
        role: Role,
        dir: &Path,
    ) -> Result<Self, Error> {
        let side = match role {
            Role::Source => "source",
            Role::Destination => "destination",
        };
        let name = format!("{}, {side}", vmm.name());
        let path = |what: &str| dir.join(format!("{side}.{what}"));
        let sockets = Sockets {
            qmp: path("qmp"),
            serial: path("serial"),
        };
        for socket in [&sockets.qmp, &sockets.serial] {
            // Of the run before.
            let _ = std::fs::remove_file(socket);
        }
        let arguments = vmm.arguments(guest, role, &sockets);
        let log = path("log");
        let process = match network.namespace(role) {
            None => Process::spawn(vmm.program(), arguments, &log),
            Some(namespace) => {
                // It becomes the program, with the same process id.
                let mut all = ["netns", "exec", namespace].map(str::to_owned).to_vec();
                all.push(vmm.program().display().to_string());
                all.extend(arguments);
                Process::spawn(Path::new("ip"), all, &log)
            }
        };
        let mut process =
            process.map_err(Error::io(format!("starting {}", vmm.program().display())))?;
        alive(&mut process, &sockets.qmp, &name)?;
        let qmp = Client::connect(&sockets.qmp, PATIENCE).map_err(|source| Error::Qmp {
            name: name.clone(),
            source,
            output: process.output(),
        })?;
        let serial = Watcher::connect(&sockets.serial, PATIENCE)
            .map_err(Error::io(format!("{name}: serial port")))?;
        Ok(Self {
            name,
            memory: guest.memory,
            address: network.address(),
            process,
            serial,
            qmp,
        })
    }

    /// Runs a QMP command.
    pub fn execute(&mut self, command: &str, arguments: Value) -> Result<Value, Error> {
        self.qmp
            .execute(command, arguments)
            .map_err(|source| Error::Qmp {
                name: self.name.clone(),
                source,
                output: self.process.output(),
            })
    }

    /// Waits for a line of the guest that `parse` takes.
    pub fn wait_for<T>(&self, parse: impl FnMut(&str) -> Option<T>) -> Result<T, Error> {
        Ok(self.wait_for_at(parse)?.0)
    }

    /// The same, and when it was read.
    pub fn wait_for_at<T>(
        &self,
        parse: impl FnMut(&str) -> Option<T>,
    ) -> Result<(T, Instant), Error> {
        let found = self.serial.wait_for(PATIENCE, parse);
        found.map_err(|source| Error::Guest {
            name: self.name.clone(),
            source,
        })
    }

    /// Sends a command to the guest.
    pub fn send(&mut self, command: u8) -> Result<(), Error> {
        let what = format!("{}: serial port", self.name);
        self.serial.send(&[command]).map_err(Error::io(what))
    }

    /// Waits until the migration has ended, well or not, and returns when that was told; `None` if
    /// it goes on after `patience`. When a pass over the guest's memory begins, `at_pass` gets what
    /// `query-migrate` says then.
    pub fn wait_migrated(
        &mut self,
        patience: Duration,
        mut at_pass: impl FnMut(Instant, &Value),
    ) -> Result<Option<Instant>, Error> {
        let deadline = Instant::now() + patience;
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            let event = match self
                .qmp
                .wait_event_of(&["MIGRATION", "MIGRATION_PASS"], left)
            {
                Ok(event) => event,
                Err(QmpError::Timeout(..)) => return Ok(None),
                Err(source) => {
                    return Err(Error::Qmp {
                        name: self.name.clone(),
                        source,
                        output: self.process.output(),
                    });
                }
            };
            if event.name == "MIGRATION_PASS" {
                at_pass(event.at, &self.execute("query-migrate", Value::Null)?);
                continue;
            }
            match event.data["status"].as_str() {
                Some("completed") => return Ok(Some(event.at)),
                Some("failed" | "cancelled") => {
                    let info = self.execute("query-migrate", Value::Null)?;
                    return Err(Error::Wrong(format!(
                        "{}: the migration failed: {info}\n{}",
                        self.name,
                        self.process.output()
                    )));
                }
                _ => {}
            }
        }
    }
}
