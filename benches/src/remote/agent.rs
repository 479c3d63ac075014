//! `ferry bench agent`: runs destinations for a benchmark on another host.
//!
//! Who has the token may start the VMMs that were named on the agent's command line, with the
//! guest that is in the binary, and nothing else: no program, file or VMM option comes from the
//! peer.

use std::io::{self, BufReader, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::thread::sleep;
use std::time::{Duration, Instant};

use super::protocol::{self, Answer, Request, VERSION, Welcome};
use super::session::Session;
use super::token::Token;
use crate::error::Error;
use crate::machine::Machine;
use crate::vmm::{self, Vmm};

/// How long a peer may take to show its token: there is only one at a time.
const HELLO: Duration = Duration::from_secs(10);

/// How long a peer may be silent; a migration can take ten minutes.
const SILENCE: Duration = Duration::from_secs(20 * 60);

/// What a wrong token costs.
const PENALTY: Duration = Duration::from_secs(1);

/// An agent that listens.
pub struct Agent {
    listener: TcpListener,
    token: Token,
    vmms: Vec<Box<dyn Vmm>>,
    epoch: Instant,
}

impl Agent {
    /// Listens at `address` (HOST:PORT).
    pub fn bind(address: &str, token: Token, vmms: Vec<Box<dyn Vmm>>) -> Result<Self, Error> {
        let listener =
            TcpListener::bind(address).map_err(Error::io(format!("listening at {address}")))?;
        Ok(Self {
            listener,
            token,
            vmms,
            epoch: Instant::now(),
        })
    }

    /// Where it listens.
    pub fn address(&self) -> Result<SocketAddr, Error> {
        self.listener
            .local_addr()
            .map_err(Error::io("the agent's address"))
    }

    /// Serves the next peer until it goes; `said` gets a line about each thing that happens.
    pub fn serve_one(&self, said: &mut dyn FnMut(String)) -> Result<(), Error> {
        let (stream, peer) = match self.listener.accept() {
            Ok(peer) => peer,
            // A peer that went before it was served is no reason to end.
            Err(err) if err.kind() == io::ErrorKind::ConnectionAborted => return Ok(()),
            Err(err) => return Err(Error::io("the agent")(err)),
        };
        said(format!("{peer}: connected"));
        // What a peer does wrong ends its connection only.
        match self.serve(stream) {
            Ok(()) => said(format!("{peer}: gone")),
            Err(err) => said(format!("{peer}: {err}")),
        }
        Ok(())
    }

    fn serve(&self, mut stream: TcpStream) -> io::Result<()> {
        stream.set_nodelay(true)?;
        stream.set_write_timeout(Some(HELLO))?;
        let mut requests = BufReader::new(Patient {
            stream: stream.try_clone()?,
            until: Some(Instant::now() + HELLO),
        });
        let Some(hello) = protocol::read(&mut requests)? else {
            return Ok(());
        };
        if let Err(reason) = self.welcome(&hello) {
            let refused = false;
            answer(
                &mut stream,
                &Answer::Error {
                    reason: reason.clone(),
                    refused,
                },
            )?;
            return Err(io::Error::other(reason));
        }
        let vmms = self.vmms.iter();
        let welcome = Welcome {
            machine: Machine::this(),
            vmms: vmms
                .map(|vmm| (vmm.name().to_owned(), vmm::version(vmm.as_ref())))
                .collect(),
        };
        answer(&mut stream, &Answer::Return(serde_json::json!(welcome)))?;
        requests.get_mut().until = None;
        let address = stream.local_addr()?.ip();
        let mut session = Session::new(&self.vmms, self.epoch, address)
            .map_err(|err| io::Error::other(err.to_string()))?;
        while let Some(request) = protocol::read(&mut requests)? {
            let said = match session.obey(request) {
                Ok(value) => Answer::Return(value),
                Err(err) => Answer::Error {
                    reason: err.to_string(),
                    refused: err.is_refusal(),
                },
            };
            answer(&mut stream, &said)?;
        }
        Ok(())
    }

    /// Whether that peer may ask for more.
    fn welcome(&self, hello: &Request) -> Result<(), String> {
        let Request::Hello {
            version,
            build,
            token,
        } = hello
        else {
            return Err("hello comes first".to_owned());
        };
        if !self.token.is(token) {
            sleep(PENALTY);
            return Err("that is not the token".to_owned());
        }
        let ours = (VERSION, protocol::build());
        if (*version, build) != (ours.0, &ours.1) {
            return Err(format!(
                "the agent speaks version {} ({}), you {version} ({build}): take the same build of \
                 ferry on both hosts",
                ours.0, ours.1
            ));
        }
        Ok(())
    }
}

/// A peer that is read from only so long.
struct Patient {
    stream: TcpStream,
    /// When all must be there, however little is missing; afterwards silence has its limit.
    until: Option<Instant>,
}

impl Read for Patient {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let left = match self.until {
            Some(until) => until.saturating_duration_since(Instant::now()),
            None => SILENCE,
        };
        if left.is_zero() {
            return Err(io::ErrorKind::TimedOut.into());
        }
        self.stream.set_read_timeout(Some(left))?;
        self.stream.read(buffer)
    }
}

fn answer(stream: &mut TcpStream, answer: &Answer) -> io::Result<()> {
    stream.write_all(&protocol::line(answer)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_shows_no_token_in_time_is_no_longer_read_from() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let mut peer = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        peer.write_all(b"{ {").unwrap();
        let mut patient = Patient {
            stream: listener.accept().unwrap().0,
            until: Some(Instant::now() + HELLO),
        };
        let mut byte = [0];
        assert_eq!(patient.read(&mut byte).unwrap(), 1);
        // There is more, but it is too late.
        patient.until = Some(Instant::now());
        let error = patient.read(&mut byte).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::TimedOut);
        patient.until = None;
        assert_eq!(patient.read(&mut byte).unwrap(), 1);
    }
}
