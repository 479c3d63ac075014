//! A QMP socket and the conversation with each client.

use std::io;
use std::path::Path;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use serde_json::{Value, json};
use tokio::io::AsyncReadExt;
use tokio::net::UnixStream;
use tokio::sync::broadcast::{self, error::RecvError};
use tokio::time::{Instant, timeout_at};

use super::commands::{self, Execution};
use super::framing::JsonStream;
use super::request::{Request, answer};
use crate::control::command::{CommandError, CommandResult, Control, ErrorClass, Event};
use crate::control::socket::{Closing, Server, closed};

/// Above this many bytes that a client has not read, its commands wait.
const QUEUE_PAUSE: usize = 64 << 10;
/// Above this many, which only events can reach, it is given up.
const QUEUE_LIMIT: usize = 256 << 10;
/// A client that sends this many broken messages, and none that is whole, is given up.
const MAX_BROKEN: u32 = 64;
/// How long a client that has said its last may take to read the answers.
const LAST_WORDS: Duration = Duration::from_secs(1);

/// Listens for QMP clients. Must be called in a tokio runtime.
pub fn listen(path: &Path, machine: Arc<dyn Control>) -> io::Result<Server> {
    Server::listen(path, move |stream, closing| {
        Client::new(Arc::clone(&machine)).serve(stream, closing)
    })
}

pub(crate) struct Client {
    machine: Arc<dyn Control>,
    /// There once the capabilities are negotiated.
    events: Option<broadcast::Receiver<Event>>,
    input: JsonStream,
    /// What the client has not read yet.
    output: Vec<u8>,
    /// The command under way. The next one is read when it is over.
    work: Option<Working>,
    broken: u32,
}

/// A command that takes a while.
struct Working {
    id: Option<Value>,
    work: Pin<Box<dyn Future<Output = CommandResult<Value>> + Send>>,
}

/// Why a conversation ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum End {
    /// The client closed its side; it may still read.
    Hangup,
    /// The connection is gone.
    Broken,
    /// The process ends.
    Closing,
    /// It does not speak QMP.
    Garbage,
    /// It does not read.
    Stalled,
}

impl Client {
    pub(crate) fn new(machine: Arc<dyn Control>) -> Self {
        let mut client = Self {
            machine,
            events: None,
            input: JsonStream::default(),
            output: Vec::new(),
            work: None,
            broken: 0,
        };
        client.send(&json!({ "QMP": { "version": super::version(), "capabilities": [] } }));
        client
    }

    pub(crate) async fn serve(mut self, mut stream: UnixStream, mut closing: Closing) {
        let end = self.converse(&mut stream, &mut closing).await;
        tracing::debug!(?end, "a QMP client leaves");
        if end == End::Closing {
            self.queue_events();
        }
        if matches!(end, End::Hangup | End::Closing | End::Garbage) {
            let deadline = Instant::now() + LAST_WORDS;
            while !self.output.is_empty() {
                match timeout_at(deadline, stream.writable()).await {
                    Ok(Ok(())) if self.write(&stream).is_ok() => {}
                    _ => break,
                }
            }
        }
    }

    async fn converse(&mut self, stream: &mut UnixStream, closing: &mut Closing) -> End {
        let mut chunk = [0; 4096];
        loop {
            if let Err(end) = self.execute_queued() {
                return end;
            }
            if self.output.len() > QUEUE_LIMIT {
                tracing::warn!("a QMP client does not read; it is dropped");
                return End::Stalled;
            }
            let (mut reader, writer) = stream.split();
            tokio::select! {
                biased;
                () = closed(closing) => return End::Closing,
                ready = writer.writable(), if !self.output.is_empty() => {
                    if ready.and_then(|()| self.write(stream)).is_err() {
                        return End::Broken;
                    }
                }
                event = next_event(&mut self.events) => self.send(&event),
                result = finished(&mut self.work) => {
                    let id = self.work.take().and_then(|working| working.id);
                    self.answer(id, result);
                }
                read = reader.read(&mut chunk), if self.reads() => match read {
                    Ok(0) => return End::Hangup,
                    Ok(len) => self.input.feed(chunk.get(..len).unwrap_or_default()),
                    Err(_) => return End::Broken,
                },
            }
        }
    }

    /// Whether the client is listened to now.
    fn reads(&self) -> bool {
        self.output.len() < QUEUE_PAUSE && self.work.is_none()
    }

    /// Carries out what has arrived, as long as the client reads the answers.
    fn execute_queued(&mut self) -> Result<(), End> {
        while self.reads() {
            let Some(next) = self.input.next_value() else {
                return Ok(());
            };
            match next {
                Ok(message) => {
                    self.broken = 0;
                    let Request { id, command } = Request::parse(message);
                    let execution = match command {
                        Ok((name, arguments)) => self.execute(&name, arguments),
                        Err(error) => Execution::Done(Err(error)),
                    };
                    match execution {
                        Execution::Done(result) => self.answer(id, result),
                        Execution::Working(work) => self.work = Some(Working { id, work }),
                    }
                }
                Err(error) => {
                    self.send(&answer(None, Err(CommandError::generic(error.to_string()))));
                    self.broken = self.broken.saturating_add(1);
                    if error.is_fatal() || self.broken >= MAX_BROKEN {
                        tracing::warn!(%error, "a client of the QMP socket does not speak QMP");
                        return Err(End::Garbage);
                    }
                }
            }
        }
        Ok(())
    }

    fn execute(&mut self, name: &str, arguments: super::arguments::Arguments) -> Execution {
        match name {
            "qmp_capabilities" => Execution::Done(self.negotiate(arguments)),
            _ if self.events.is_none() => Execution::Done(not_now(
                "Expecting capabilities negotiation with 'qmp_capabilities'",
            )),
            _ => commands::execute(&self.machine, name, arguments),
        }
    }

    fn answer(&mut self, id: Option<Value>, result: CommandResult<Value>) {
        // What a command caused is told before its answer, as QEMU does.
        self.queue_events();
        self.send(&answer(id, result));
    }

    fn negotiate(&mut self, mut arguments: super::arguments::Arguments) -> CommandResult<Value> {
        if self.events.is_some() {
            return not_now("Capabilities negotiation is already complete, command ignored");
        }
        let enable = arguments.strings("enable")?.unwrap_or_default();
        arguments.finish()?;
        if let Some(name) = enable.first() {
            return Err(CommandError::generic(format!(
                "Capability '{name}' not available"
            )));
        }
        self.events = Some(self.machine.subscribe());
        Ok(json!({}))
    }

    fn queue_events(&mut self) {
        while let Some(events) = &mut self.events {
            match events.try_recv() {
                Ok(event) => self.send(&event),
                Err(broadcast::error::TryRecvError::Lagged(lost)) => warn_lost(lost),
                Err(_) => return,
            }
        }
    }

    fn send(&mut self, message: &impl serde::Serialize) {
        match serde_json::to_vec(message) {
            Ok(json) => {
                self.output.extend_from_slice(&json);
                self.output.extend_from_slice(b"\r\n");
            }
            Err(error) => tracing::error!(%error, "a QMP message cannot be written as JSON"),
        }
    }

    fn write(&mut self, stream: &UnixStream) -> io::Result<()> {
        match stream.try_write(&self.output) {
            Ok(len) => {
                self.output.drain(..len.min(self.output.len()));
                Ok(())
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(()),
            Err(error) => Err(error),
        }
    }
}

fn not_now(desc: &str) -> CommandResult<Value> {
    Err(CommandError::new(ErrorClass::CommandNotFound, desc))
}

fn warn_lost(lost: u64) {
    tracing::warn!("{lost} events came too fast to be told to a QMP client");
}

/// What the command under way leads to; never, if there is none.
async fn finished(work: &mut Option<Working>) -> CommandResult<Value> {
    match work {
        Some(working) => working.work.as_mut().await,
        None => std::future::pending().await,
    }
}

/// The next event; never, for a client that gets none.
async fn next_event(events: &mut Option<broadcast::Receiver<Event>>) -> Event {
    while let Some(receiver) = events {
        match receiver.recv().await {
            Ok(event) => return event,
            Err(RecvError::Lagged(lost)) => warn_lost(lost),
            Err(RecvError::Closed) => break,
        }
    }
    std::future::pending().await
}
