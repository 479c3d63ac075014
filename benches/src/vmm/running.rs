//! A VMM's process, with its control socket and its guest's serial port.

use std::net::IpAddr;
use std::path::Path;
use std::time::{Duration, Instant};

use guest_tests::driver::process::Process;
use guest_tests::driver::qmp::{Client, QmpError};
use guest_tests::driver::serial::Watcher;
use serde_json::Value;

use super::{Guest, Role, Sockets, Vmm};
use crate::error::{Error, PATIENCE};
use crate::interrupt;
use crate::network::Network;

/// How long to wait between two looks at a process that starts.
const LOOK: Duration = Duration::from_millis(2);

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
        let program = vmm.program();
        let process = network.within(role, || Process::spawn(program, arguments, &log));
        let process = process.flatten();
        let mut process = process.map_err(Error::io(format!("starting {}", program.display())))?;
        // Here and not before: a process that starts later would not be ended.
        interrupt::check()?;
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
