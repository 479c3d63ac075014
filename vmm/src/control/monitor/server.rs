//! A monitor on a Unix socket: lines in, lines out, a prompt in between. No echo and no editing:
//! that is for the client's terminal to do (`ferry monitor` does).

use std::io;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;

use super::progress::{Follower, Progress};
use super::{CANCEL, GREETING, Outcome, PROMPT, Session};
use crate::control::command::Control;
use crate::control::socket::{Closing, Server, closed};

/// The longest line in bytes.
const MAX_LINE: usize = 4096;

/// How often progress is told, where it scrolls.
const PROGRESS: Duration = Duration::from_secs(1);

/// Listens for monitor clients. Must be called in a tokio runtime.
pub fn listen(path: &Path, machine: Arc<dyn Control>) -> io::Result<Server> {
    Server::listen(path, move |stream, closing| {
        let client = Client {
            session: Session::new(Arc::clone(&machine)),
            stream,
            closing,
            input: Vec::new(),
            hung_up: false,
        };
        async {
            if let Err(error) = client.serve().await {
                tracing::debug!(%error, "a monitor client leaves");
            }
        }
    })
}

struct Client {
    session: Session,
    stream: UnixStream,
    closing: Closing,
    /// Read, and not carried out yet.
    input: Vec<u8>,
    /// Whether the client has closed its side. It may still read.
    hung_up: bool,
}

impl Client {
    async fn serve(mut self) -> io::Result<()> {
        self.print(&format!("{GREETING}\n{PROMPT}")).await?;
        while let Some(line) = self.next_line().await? {
            match self.session.execute(&line) {
                Outcome::Done(text) => self.print(&text).await?,
                Outcome::Migrating => self.follow().await?,
                Outcome::Working => {
                    let text = tokio::select! {
                        text = self.session.finished() => text,
                        () = closed(&mut self.closing) => return Ok(()),
                    };
                    self.print(&text).await?;
                }
            }
            self.print(PROMPT).await?;
        }
        Ok(())
    }

    /// The next line without its end; `None` when there is none to come.
    async fn next_line(&mut self) -> io::Result<Option<String>> {
        loop {
            if let Some(end) = self.input.iter().position(|byte| *byte == b'\n') {
                let line: Vec<u8> = self.input.drain(..=end).collect();
                let line = String::from_utf8_lossy(&line);
                return Ok(Some(
                    line.replace(|c: char| c.is_control() && c != '\t', ""),
                ));
            }
            if self.input.len() > MAX_LINE {
                self.print(&format!("Error: line longer than {MAX_LINE} bytes\n"))
                    .await?;
                return Err(io::Error::other("it sent a line without end"));
            }
            if self.hung_up {
                return Ok(None);
            }
            tokio::select! {
                read = read(&mut self.stream, &mut self.input) => self.hung_up = read? == 0,
                () = closed(&mut self.closing) => return Ok(None),
            }
        }
    }

    /// Tells how the migration is doing until it ends.
    async fn follow(&mut self) -> io::Result<()> {
        let mut follower = Follower::new(Arc::clone(self.session.machine()), PROGRESS);
        loop {
            // What is typed meanwhile is kept for later, as far as there is room.
            let listening = !self.hung_up && self.input.len() <= MAX_LINE;
            tokio::select! {
                progress = follower.next() => match progress {
                    Progress::Line(line) => self.print(&(line + "\n")).await?,
                    Progress::End(text) => return self.print(&text).await,
                },
                read = read(&mut self.stream, &mut self.input), if listening => {
                    self.hung_up = read? == 0;
                    if self.input.contains(&CANCEL) {
                        self.input.clear();
                        follower.cancel();
                    }
                }
                () = closed(&mut self.closing) => {
                    return Err(io::Error::other("the process ends"));
                }
            }
        }
    }

    /// Waits until the client has taken the text: it gets no further before.
    async fn print(&mut self, text: &str) -> io::Result<()> {
        let text = text.replace('\n', "\r\n");
        // While it ends, the process waits for the client no longer than the server allows.
        self.stream.write_all(text.as_bytes()).await
    }
}

async fn read(stream: &mut UnixStream, input: &mut Vec<u8>) -> io::Result<usize> {
    let mut chunk = [0; 1024];
    let len = stream.read(&mut chunk).await?;
    input.extend_from_slice(chunk.get(..len).unwrap_or_default());
    Ok(len)
}
