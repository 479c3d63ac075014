//! A small blocking QMP client.

use std::collections::VecDeque;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

/// How long to wait between two attempts to connect to a server that is starting.
const CONNECT_RETRY: Duration = Duration::from_millis(2);

/// Why a QMP exchange failed.
#[derive(Debug, thiserror::Error)]
pub enum QmpError {
    /// The socket could not be connected, or broke.
    #[error("QMP socket: {0}")]
    Io(#[from] std::io::Error),
    /// The server closed the connection.
    #[error("the QMP server closed the connection while '{0}' was waited for")]
    Closed(String),
    /// The answer is no QMP.
    #[error("the QMP server sent '{0}'")]
    Garbage(String),
    /// The command failed.
    #[error("{command}: {class}: {desc}")]
    Command {
        /// The command.
        command: String,
        /// QMP's error class.
        class: String,
        /// QMP's error description.
        desc: String,
    },
    /// Something did not happen in time.
    #[error("'{0}' did not come within {1:?}")]
    Timeout(String, Duration),
}

/// An event, with the time at which it was read.
#[derive(Clone, Debug)]
pub struct Event {
    /// Such as `STOP`.
    pub name: String,
    /// The event's data, null if it has none.
    pub data: Value,
    /// When it was read from the socket.
    pub at: Instant,
}

/// A connection to a QMP server, past its negotiation.
#[derive(Debug)]
pub struct Client {
    reader: BufReader<UnixStream>,
    events: VecDeque<Event>,
}

impl Client {
    /// Connects and negotiates; a server that doesn't listen yet is waited for.
    pub fn connect(path: &Path, patience: Duration) -> Result<Self, QmpError> {
        let deadline = Instant::now() + patience;
        let stream = loop {
            match UnixStream::connect(path) {
                Ok(stream) => break stream,
                Err(err) if Instant::now() >= deadline => return Err(err.into()),
                Err(_) => std::thread::sleep(CONNECT_RETRY),
            }
        };
        stream.set_read_timeout(Some(patience))?;
        stream.set_write_timeout(Some(patience))?;
        let mut client = Self {
            reader: BufReader::new(stream),
            events: VecDeque::new(),
        };
        let greeting = client.read("greeting")?;
        if greeting.get("QMP").is_none() {
            return Err(QmpError::Garbage(greeting.to_string()));
        }
        client.execute("qmp_capabilities", Value::Null)?;
        Ok(client)
    }

    /// Runs a command and returns what it returns. Events that come meanwhile are kept.
    pub fn execute(&mut self, command: &str, arguments: Value) -> Result<Value, QmpError> {
        let mut request = json!({ "execute": command });
        if !arguments.is_null() {
            request["arguments"] = arguments;
        }
        let mut line = request.to_string();
        line.push('\n');
        self.reader.get_mut().write_all(line.as_bytes())?;
        loop {
            let mut answer = self.read(command)?;
            if let Some(value) = answer.get_mut("return") {
                return Ok(value.take());
            }
            if let Some(error) = answer.get("error") {
                let text = |key: &str| error[key].as_str().unwrap_or_default().to_owned();
                return Err(QmpError::Command {
                    command: command.to_owned(),
                    class: text("class"),
                    desc: text("desc"),
                });
            }
            if !self.keep_event(&answer) {
                return Err(QmpError::Garbage(answer.to_string()));
            }
        }
    }

    /// Waits for the next event of that name and returns it; others stay kept.
    pub fn wait_event(&mut self, name: &str, patience: Duration) -> Result<Event, QmpError> {
        self.wait_event_of(&[name], patience)
    }

    /// The same for an event with any of these names.
    pub fn wait_event_of(&mut self, names: &[&str], patience: Duration) -> Result<Event, QmpError> {
        let deadline = Instant::now() + patience;
        loop {
            let wanted = |event: &Event| names.contains(&event.name.as_str());
            if let Some(at) = self.events.iter().position(wanted)
                && let Some(event) = self.events.remove(at)
            {
                return Ok(event);
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(QmpError::Timeout(names.join(" or "), patience));
            }
            self.reader.get_ref().set_read_timeout(Some(left))?;
            let answer = self.read(names.first().unwrap_or(&"an event"));
            self.reader.get_ref().set_read_timeout(Some(patience))?;
            match answer {
                Ok(answer) if self.keep_event(&answer) => {}
                Ok(answer) => return Err(QmpError::Garbage(answer.to_string())),
                Err(QmpError::Io(err)) if is_timeout(&err) => {
                    return Err(QmpError::Timeout(names.join(" or "), patience));
                }
                Err(err) => return Err(err),
            }
        }
    }

    /// The events read so far and not waited for, oldest first.
    pub fn take_events(&mut self) -> Vec<Event> {
        self.events.drain(..).collect()
    }

    fn keep_event(&mut self, answer: &Value) -> bool {
        let Some(name) = answer.get("event").and_then(Value::as_str) else {
            return false;
        };
        self.events.push_back(Event {
            name: name.to_owned(),
            data: answer.get("data").cloned().unwrap_or_default(),
            at: Instant::now(),
        });
        true
    }

    fn read(&mut self, waited_for: &str) -> Result<Value, QmpError> {
        let mut line = String::new();
        if self.reader.read_line(&mut line)? == 0 {
            return Err(QmpError::Closed(waited_for.to_owned()));
        }
        serde_json::from_str(&line).map_err(|_| QmpError::Garbage(line.trim_end().to_owned()))
    }
}

fn is_timeout(err: &std::io::Error) -> bool {
    matches!(
        err.kind(),
        std::io::ErrorKind::WouldBlock | std::io::ErrorKind::TimedOut
    )
}
