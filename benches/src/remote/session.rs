//! What the agent does for a peer that it has welcomed.

use std::net::IpAddr;
use std::time::{Duration, Instant};

use guest_tests::dirtier::Options;
use serde_json::{Value, json};
use tempfile::TempDir;

use super::protocol::{Beats, Request, Worked};
use crate::end::End;
use crate::error::Error;
use crate::machine::Machine;
use crate::network::Network;
use crate::vmm::{Guest, Role, Running, Vmm};

/// The QMP commands that a peer may run: none of them starts a program or opens a file.
const ALLOWED: [&str; 4] = [
    "migrate-set-capabilities",
    "migrate-set-parameters",
    "query-migrate",
    "query-migrate-capabilities",
];

/// How many bytes the guest's options may have.
const LONGEST_OPTIONS: usize = 1000;

/// One peer's destination. It is killed when this is dropped.
pub(super) struct Session<'a> {
    vmms: &'a [Box<dyn Vmm>],
    /// What times are counted from.
    epoch: Instant,
    network: Network,
    running: Option<Running>,
    dir: TempDir,
}

impl<'a> Session<'a> {
    /// Guests are to come to that address.
    pub(super) fn new(
        vmms: &'a [Box<dyn Vmm>],
        epoch: Instant,
        address: IpAddr,
    ) -> Result<Self, Error> {
        let dir = tempfile::Builder::new().prefix("bench").tempdir();
        Ok(Self {
            vmms,
            epoch,
            network: Network::at(address),
            running: None,
            dir: dir.map_err(Error::io("a directory for sockets"))?,
        })
    }

    pub(super) fn obey(&mut self, request: Request) -> Result<Value, Error> {
        match request {
            Request::Hello { .. } => Err(Error::Wrong("hello comes once".to_owned())),
            Request::Clock => Ok(json!(self.nanoseconds(Instant::now()))),
            Request::Start {
                vmm,
                guest,
                memory,
                vcpus,
                prealloc,
            } => self.start(&vmm, &guest, memory, vcpus, prealloc),
            Request::Stop => {
                self.running = None;
                Ok(Value::Null)
            }
            Request::Execute { command, arguments } => {
                if !ALLOWED.contains(&command.as_str()) {
                    let known = ALLOWED.join(", ");
                    return Err(Error::Wrong(format!(
                        "the agent does not run '{command}', only {known}"
                    )));
                }
                End::execute(self.running()?, &command, arguments)
            }
            Request::Listen => Ok(json!(self.running()?.listen()?)),
            Request::Cpu => Ok(json!(self.running()?.cpu()?)),
            Request::Resident => Ok(json!(self.running()?.resident()?)),
            Request::Heartbeats => {
                let seen = self.running()?.heartbeats()?;
                Ok(json!(Beats {
                    count: seen.count,
                    first: seen.first.map(|at| self.nanoseconds(at)),
                    last: seen.last.map(|at| self.nanoseconds(at)),
                    longest_gap: nanoseconds(seen.longest_gap),
                }))
            }
            Request::Work => {
                let work = self.running()?.work()?;
                Ok(json!(Worked {
                    at: self.nanoseconds(work.at),
                    written: work.written,
                    turns: work.turns,
                }))
            }
            Request::Verify => Ok(json!(self.running()?.verify()?)),
            Request::Output => Ok(json!(self.running()?.output())),
        }
    }

    fn start(
        &mut self,
        name: &str,
        options: &str,
        memory: u64,
        vcpus: u8,
        prealloc: bool,
    ) -> Result<Value, Error> {
        let vmms = self.vmms.iter();
        let vmm = vmms.clone().find(|vmm| vmm.name() == name).ok_or_else(|| {
            let known: Vec<&str> = vmms.map(|vmm| vmm.name()).collect();
            let known = known.join(", ");
            Error::Wrong(format!(
                "there is no VMM '{name}' on this host, but {known}"
            ))
        })?;
        if prealloc && !vmm.knows_prealloc() {
            return Err(Error::no_prealloc(vmm.as_ref()));
        }
        // What stands on a command line is written here, not there.
        let options = Some(options)
            .filter(|options| options.len() <= LONGEST_OPTIONS)
            .and_then(|options| Options::parse(options).ok())
            .ok_or_else(|| Error::Wrong(format!("no options of a guest: '{options:.80}'")))?;
        let there = Machine::this().memory;
        if memory < 1 << 20 || memory > there {
            return Err(Error::Wrong(format!(
                "a guest of {memory} bytes: the host has {there}, and 1 MiB is the least"
            )));
        }
        // The one before goes first: it may have all the memory that there is.
        self.running = None;
        let kernel = self.dir.path().join("dirtier.elf");
        std::fs::write(&kernel, guest_tests::DIRTIER).map_err(Error::io("the guest's image"))?;
        let guest = Guest {
            kernel,
            append: options.to_string(),
            memory,
            vcpus,
            prealloc,
            drives: vec![],
        };
        let dir = self.dir.path();
        let role = Role::Destination;
        self.running = Some(Running::start_in(
            &self.network,
            vmm.as_ref(),
            &guest,
            role,
            dir,
        )?);
        Ok(Value::Null)
    }

    fn running(&mut self) -> Result<&mut Running, Error> {
        let running = self.running.as_mut();
        running.ok_or_else(|| Error::Wrong("no destination was started".to_owned()))
    }

    fn nanoseconds(&self, at: Instant) -> u64 {
        nanoseconds(at.saturating_duration_since(self.epoch))
    }
}

fn nanoseconds(time: Duration) -> u64 {
    u64::try_from(time.as_nanos()).unwrap_or(u64::MAX)
}
