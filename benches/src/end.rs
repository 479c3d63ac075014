//! One end of a migration as it is watched: a process on this host, or on another.

use std::net::IpAddr;
use std::time::{Duration, Instant};

use guest_tests::dirtier::{Report, command};
use guest_tests::driver::serial::Heartbeats;
use serde_json::{Value, json};

use crate::error::Error;
use crate::proc::{self, Cpu};
use crate::vmm::Running;

/// What the guest has done since its start.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Work {
    /// When its answer was read.
    pub at: Instant,
    /// Pages rewritten.
    pub written: u64,
    /// Turns of its loop.
    pub turns: u64,
}

/// What is done with either end. Times are those of this host's clock.
pub trait End {
    /// Runs a QMP command.
    fn execute(&mut self, command: &str, arguments: Value) -> Result<Value, Error>;
    /// Lets it listen on a free port of its address; returns the URI for `migrate`.
    fn listen(&mut self) -> Result<String, Error>;
    /// CPU time so far.
    fn cpu(&mut self) -> Result<Cpu, Error>;
    /// Resident memory of the guest's RAM, in bytes.
    fn resident(&mut self) -> Result<u64, Error>;
    /// The heartbeats that were seen.
    fn heartbeats(&mut self) -> Result<Heartbeats, Error>;
    /// Asks the guest what it has done; the answer takes it about a millisecond.
    fn work(&mut self) -> Result<Work, Error>;
    /// Has the guest check every page, and everything that it checked since its start; how many
    /// pages that were. A damaged page is an error.
    fn verify(&mut self) -> Result<u64, Error>;
    /// What the process has printed.
    fn output(&mut self) -> String;
    /// Relates the other host's clock to this one's once more; by how much times may be wrong.
    /// `None` where there is but one clock.
    fn relate_clocks(&mut self) -> Result<Option<Duration>, Error> {
        Ok(None)
    }
}

impl End for Running {
    fn execute(&mut self, command: &str, arguments: Value) -> Result<Value, Error> {
        Running::execute(self, command, arguments)
    }

    fn listen(&mut self) -> Result<String, Error> {
        let host = match self.address {
            IpAddr::V4(v4) => v4.to_string(),
            IpAddr::V6(v6) => format!("[{v6}]"),
        };
        Running::execute(
            self,
            "migrate-incoming",
            json!({ "uri": format!("tcp:{host}:0") }),
        )?;
        let info = Running::execute(self, "query-migrate", Value::Null)?;
        match info["socket-address"][0]["port"].as_str() {
            Some(port) => Ok(format!("tcp:{host}:{port}")),
            None => Err(Error::Wrong(format!(
                "{}: where does it listen? {info}",
                self.name
            ))),
        }
    }

    fn cpu(&mut self) -> Result<Cpu, Error> {
        proc::cpu(self.process.id())
    }

    fn resident(&mut self) -> Result<u64, Error> {
        Ok(proc::resident(self.process.id(), self.memory)?.guest)
    }

    fn heartbeats(&mut self) -> Result<Heartbeats, Error> {
        Ok(self.serial.heartbeats())
    }

    fn work(&mut self) -> Result<Work, Error> {
        self.send(command::STATUS)?;
        let (told, at) = self.wait_for_at(|line| match Report::parse(line)? {
            Report::Status {
                written,
                turns,
                errors,
                ..
            } => Some((written, turns, errors)),
            _ => None,
        })?;
        let (written, turns, errors) = told;
        undamaged(errors)?;
        Ok(Work { at, written, turns })
    }

    fn verify(&mut self) -> Result<u64, Error> {
        self.send(command::VERIFY)?;
        let (pages, errors) = self.wait_for(|line| match Report::parse(line) {
            Some(Report::Verified { pages, errors, .. }) => Some((pages, errors)),
            Some(Report::Error { .. }) => Some((0, 1)),
            _ => None,
        })?;
        undamaged(errors)?;
        Ok(pages)
    }

    fn output(&mut self) -> String {
        self.process.output()
    }
}

fn undamaged(errors: u64) -> Result<(), Error> {
    match errors {
        0 => Ok(()),
        errors => Err(Error::Wrong(format!(
            "{errors} pages of the guest are damaged"
        ))),
    }
}
