//! The other host of a migration between two: `ferry bench agent` there, and this side of the
//! conversation with it.
//!
//! [`protocol`] has what is said, [`agent`] answers, [`Connection`] asks, [`clock`] relates the
//! clocks of the two hosts.

pub mod agent;
mod clock;
mod protocol;
mod session;
#[cfg(test)]
mod tests;
pub mod token;

use std::io::{BufReader, Write};
use std::net::{TcpStream, ToSocketAddrs};
use std::time::{Duration, Instant};

use guest_tests::driver::serial::Heartbeats;
use serde::de::DeserializeOwned;
use serde_json::Value;

use crate::end::{End, Work};
use crate::error::{Error, PATIENCE};
use crate::proc::Cpu;
use crate::vmm::Guest;
use clock::{Relation, Sample};
use protocol::{Answer, Beats, Request, VERSION, Welcome, Worked};
use token::Token;

/// How often the clocks are compared; the quickest answer counts.
const COMPARISONS: usize = 40;

/// A connection to the agent on the other host.
#[derive(Debug)]
pub struct Connection {
    address: String,
    stream: BufReader<TcpStream>,
    /// What times of this host are counted from.
    epoch: Instant,
    relation: Relation,
    welcome: Welcome,
}

impl Connection {
    /// Connects to the agent at `address` (HOST:PORT) and shows it the token.
    pub fn connect(address: &str, token: &Token) -> Result<Self, Error> {
        let what = || format!("the agent at {address}");
        let mut addresses = address.to_socket_addrs().map_err(Error::io(what()))?;
        let first = addresses
            .next()
            .ok_or_else(|| Error::Wrong(format!("{} has no address", what())))?;
        let stream = TcpStream::connect_timeout(&first, PATIENCE).map_err(Error::io(what()))?;
        let told = stream
            .set_nodelay(true)
            .and_then(|()| stream.set_write_timeout(Some(PATIENCE)))
            // Whatever is waited for there is given up there first.
            .and_then(|()| stream.set_read_timeout(Some(2 * PATIENCE)));
        told.map_err(Error::io(what()))?;
        let mut connection = Self {
            address: address.to_owned(),
            stream: BufReader::new(stream),
            epoch: Instant::now(),
            relation: Relation::default(),
            welcome: Welcome::default(),
        };
        connection.welcome = connection.ask(&Request::Hello {
            version: VERSION,
            build: protocol::build(),
            token: token.reveal().to_owned(),
        })?;
        connection.compare_clocks()?;
        Ok(connection)
    }

    /// What the other host is, for a report.
    pub fn describe(&self) -> String {
        let Welcome { machine, vmms } = &self.welcome;
        let each = vmms
            .iter()
            .map(|(name, version)| format!("{name}: {version}"));
        format!(
            "The destination is another host, {}: {} CPUs ({}), Linux {}; {}",
            self.address,
            machine.cpus,
            machine.processor,
            machine.kernel,
            each.collect::<Vec<_>>().join("; ")
        )
    }

    /// Starts a destination there for that guest, of the VMM that has that name there.
    pub fn start(&mut self, vmm: &str, guest: &Guest) -> Result<Remote<'_>, Error> {
        self.ask::<()>(&Request::Start {
            vmm: vmm.to_owned(),
            guest: guest.append.clone(),
            memory: guest.memory,
            vcpus: guest.vcpus,
            prealloc: guest.prealloc,
        })?;
        Ok(Remote { connection: self })
    }

    fn ask<T: DeserializeOwned>(&mut self, request: &Request) -> Result<T, Error> {
        let failed = |reason: String, refused| Error::Agent {
            address: self.address.clone(),
            reason,
            refused,
        };
        let line = protocol::line(request).map_err(|err| failed(err.to_string(), false))?;
        let sent = self.stream.get_mut().write_all(&line);
        sent.map_err(|err| failed(err.to_string(), false))?;
        let answer: Option<Answer> =
            protocol::read(&mut self.stream).map_err(|err| failed(err.to_string(), false))?;
        match answer {
            None => Err(failed("it has closed the connection".to_owned(), false)),
            Some(Answer::Error { reason, refused }) => Err(failed(reason, refused)),
            Some(Answer::Return(value)) => serde_json::from_value(value)
                .map_err(|err| failed(format!("it answered what makes no sense: {err}"), false)),
        }
    }

    fn compare_clocks(&mut self) -> Result<(), Error> {
        let mut samples = Vec::with_capacity(COMPARISONS);
        for _ in 0..COMPARISONS {
            let sent = self.epoch.elapsed();
            let there = Duration::from_nanos(self.ask(&Request::Clock)?);
            let received = self.epoch.elapsed();
            samples.push(Sample {
                sent,
                there,
                received,
            });
        }
        self.relation = clock::relate(&samples).unwrap_or_default();
        Ok(())
    }

    /// When that was by this host's clock.
    fn here(&self, there: u64) -> Instant {
        self.epoch + self.relation.here(Duration::from_nanos(there))
    }
}

/// A destination on the other host; it is killed when this is dropped.
#[derive(Debug)]
pub struct Remote<'a> {
    connection: &'a mut Connection,
}

impl End for Remote<'_> {
    fn execute(&mut self, command: &str, arguments: Value) -> Result<Value, Error> {
        self.connection.ask(&Request::Execute {
            command: command.to_owned(),
            arguments,
        })
    }

    fn listen(&mut self) -> Result<String, Error> {
        self.connection.ask(&Request::Listen)
    }

    fn cpu(&mut self) -> Result<Cpu, Error> {
        self.connection.ask(&Request::Cpu)
    }

    fn resident(&mut self) -> Result<u64, Error> {
        self.connection.ask(&Request::Resident)
    }

    fn heartbeats(&mut self) -> Result<Heartbeats, Error> {
        let Beats {
            count,
            first,
            last,
            longest_gap,
        } = self.connection.ask(&Request::Heartbeats)?;
        Ok(Heartbeats {
            count,
            first: first.map(|at| self.connection.here(at)),
            last: last.map(|at| self.connection.here(at)),
            longest_gap: Duration::from_nanos(longest_gap),
        })
    }

    fn work(&mut self) -> Result<Work, Error> {
        let Worked { at, written, turns } = self.connection.ask(&Request::Work)?;
        Ok(Work {
            at: self.connection.here(at),
            written,
            turns,
        })
    }

    fn verify(&mut self) -> Result<u64, Error> {
        self.connection.ask(&Request::Verify)
    }

    fn output(&mut self) -> String {
        let output = self.connection.ask(&Request::Output);
        output.unwrap_or_else(|err| err.to_string())
    }

    fn relate_clocks(&mut self) -> Result<Option<Duration>, Error> {
        self.connection.compare_clocks()?;
        Ok(Some(self.connection.relation.uncertainty))
    }
}

impl Drop for Remote<'_> {
    fn drop(&mut self) {
        // The agent kills it as well when the connection is gone.
        let _ = self.connection.ask::<()>(&Request::Stop);
    }
}
