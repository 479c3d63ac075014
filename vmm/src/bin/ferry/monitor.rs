//! `ferry monitor`: a running ferry's monitor, on this terminal or for one command.

use std::io::{self, IsTerminal, Write};
use std::process::ExitCode;
use std::time::Duration;

use rustyline::error::ReadlineError;
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::time::timeout;
use vmm::control::monitor::terminal::editor;
use vmm::control::monitor::{CANCEL, PROMPT, is_failure};

use crate::cli::MonitorOptions;

/// How long a server may take to say its first words.
const GREETING: Duration = Duration::from_secs(5);

/// The longest answer in bytes; nothing that a monitor says comes near.
const MAX_ANSWER: usize = 16 << 20;

/// Attaches, or runs the one command. The status tells whether that succeeded.
pub(crate) fn run(options: &MonitorOptions) -> ExitCode {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build();
    let result = runtime.and_then(|runtime| runtime.block_on(converse(options)));
    match result {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("ferry: {}: {error}", options.socket.display());
            ExitCode::FAILURE
        }
    }
}

async fn converse(options: &MonitorOptions) -> io::Result<bool> {
    let mut remote = Remote::connect(options).await?;
    if !options.command.is_empty() {
        return remote.execute(&command_line(&options.command)).await;
    }
    if !io::stdin().is_terminal() || !io::stdout().is_terminal() {
        let mut succeeded = true;
        for line in io::stdin().lines() {
            succeeded &= remote.execute(&line?).await?;
        }
        return Ok(succeeded);
    }
    let mut editor = editor().map_err(io::Error::other)?;
    loop {
        match editor.readline(PROMPT) {
            Ok(line) => {
                remote.execute(&line).await?;
                if remote.ended {
                    return Ok(true);
                }
            }
            Err(ReadlineError::Interrupted) => {}
            Err(ReadlineError::Eof) => return Ok(true),
            Err(error) => return Err(io::Error::other(error)),
        }
    }
}

/// Makes a line of the words that the shell has cut.
fn command_line(words: &[String]) -> String {
    if let [line] = words {
        return line.clone();
    }
    let quote = |word: &String| {
        if word.is_empty() || word.contains(|c: char| c.is_whitespace() || c == '"') {
            format!("\"{}\"", word.replace('\\', "\\\\").replace('"', "\\\""))
        } else {
            word.clone()
        }
    };
    words.iter().map(quote).collect::<Vec<_>>().join(" ")
}

/// What the other side speaks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Language {
    Monitor,
    Qmp,
}

/// The other side.
struct Remote {
    stream: UnixStream,
    /// Read and not looked at yet.
    input: Vec<u8>,
    language: Language,
    interrupts: Signal,
    /// Whether it has ended because it was told to.
    ended: bool,
}

impl Remote {
    async fn connect(options: &MonitorOptions) -> io::Result<Self> {
        let stream = UnixStream::connect(&options.socket)
            .await
            .map_err(|error| {
                let hint = "is ferry running with --monitor unix:PATH or --qmp unix:PATH?";
                io::Error::new(error.kind(), format!("cannot connect: {error} ({hint})"))
            })?;
        // From here on Ctrl-C does not end this process by itself.
        let interrupts = signal(SignalKind::interrupt())?;
        let input = Vec::new();
        let language = Language::Monitor;
        let mut remote = Self {
            stream,
            input,
            language,
            interrupts,
            ended: false,
        };
        match timeout(GREETING, remote.greet()).await {
            Ok(Ok(())) => Ok(remote),
            Ok(Err(error)) => Err(error),
            Err(_) => Err(io::Error::other(
                "this is neither a monitor nor a QMP socket",
            )),
        }
    }

    async fn greet(&mut self) -> io::Result<()> {
        loop {
            if self.input.starts_with(b"{") && self.input.contains(&b'\n') {
                self.language = Language::Qmp;
                self.next_message().await?;
                self.ask(&json!({ "execute": "qmp_capabilities" }))
                    .await?
                    .map_err(io::Error::other)?;
                return Ok(());
            }
            if self.input.ends_with(PROMPT.as_bytes()) {
                self.input.clear();
                return Ok(());
            }
            if self.read().await? == 0 {
                return Err(io::Error::other(
                    "this is neither a monitor nor a QMP socket",
                ));
            }
        }
    }

    /// Has a line carried out and prints the answer; true if it succeeded.
    async fn execute(&mut self, line: &str) -> io::Result<bool> {
        // One line is one command.
        let line = line.replace(['\r', '\n'], " ");
        match self.language {
            Language::Monitor => self.execute_line(&line).await,
            Language::Qmp => self.execute_in_qmp(&line).await,
        }
    }

    async fn execute_line(&mut self, line: &str) -> io::Result<bool> {
        self.stream
            .write_all(format!("{line}\n").as_bytes())
            .await?;
        let mut failed = false;
        loop {
            // Whole lines are shown as they come: a migration's progress is one at a time.
            while let Some(end) = self.input.iter().position(|byte| *byte == b'\n') {
                let text: Vec<u8> = self.input.drain(..=end).collect();
                let text = String::from_utf8_lossy(&text).replace('\r', "");
                failed |= is_failure(&text);
                print(&text)?;
            }
            if self.input == PROMPT.as_bytes() {
                self.input.clear();
                self.ended = is_quit(line) && !failed;
                return Ok(!failed);
            }
            let read = tokio::select! {
                read = read(&mut self.stream, &mut self.input) => read?,
                _ = self.interrupts.recv() => {
                    self.stream.write_all(&[CANCEL]).await?;
                    continue;
                }
            };
            if read == 0 {
                return self.end_of(line).map(|()| !failed);
            }
            if self.input.len() > MAX_ANSWER {
                return Err(io::Error::other("an answer has no end"));
            }
        }
    }

    async fn execute_in_qmp(&mut self, line: &str) -> io::Result<bool> {
        let command = json!({
            "execute": "human-monitor-command",
            "arguments": { "command-line": line },
        });
        match self.ask(&command).await {
            Ok(Ok(answer)) => {
                let text = answer.as_str().unwrap_or_default().replace('\r', "");
                print(&text)?;
                self.ended = is_quit(line);
                Ok(!is_failure(&text))
            }
            Ok(Err(desc)) => {
                print(&format!("Error: {desc}\n"))?;
                Ok(false)
            }
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => {
                self.end_of(line).map(|()| true)
            }
            Err(error) => Err(error),
        }
    }

    /// Sends a command; what it returns, or the description of its error.
    async fn ask(&mut self, command: &Value) -> io::Result<Result<Value, String>> {
        self.stream
            .write_all(format!("{command}\n").as_bytes())
            .await?;
        loop {
            let mut message = self.next_message().await?;
            if let Some(value) = message.get_mut("return") {
                return Ok(Ok(value.take()));
            }
            if let Some(error) = message.get("error") {
                let desc = error
                    .get("desc")
                    .and_then(Value::as_str)
                    .unwrap_or("no description");
                return Ok(Err(desc.to_owned()));
            }
            // All else is an event.
        }
    }

    async fn next_message(&mut self) -> io::Result<Value> {
        loop {
            if let Some(end) = self.input.iter().position(|byte| *byte == b'\n') {
                let line: Vec<u8> = self.input.drain(..=end).collect();
                return serde_json::from_slice(&line).map_err(io::Error::other);
            }
            let read = tokio::select! {
                read = read(&mut self.stream, &mut self.input) => read?,
                // What was asked for goes on there; there is nothing to wait for here.
                _ = self.interrupts.recv() => return Err(io::ErrorKind::Interrupted.into()),
            };
            if read == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            if self.input.len() > MAX_ANSWER {
                return Err(io::Error::other("an answer has no end"));
            }
        }
    }

    async fn read(&mut self) -> io::Result<usize> {
        read(&mut self.stream, &mut self.input).await
    }

    /// The connection has ended while this line was carried out.
    fn end_of(&mut self, line: &str) -> io::Result<()> {
        self.ended = is_quit(line);
        if self.ended {
            Ok(())
        } else {
            Err(io::Error::other("ferry has closed the connection"))
        }
    }
}

fn is_quit(line: &str) -> bool {
    matches!(line.trim(), "quit" | "q")
}

async fn read(stream: &mut UnixStream, input: &mut Vec<u8>) -> io::Result<usize> {
    let mut chunk = [0; 4096];
    let len = stream.read(&mut chunk).await?;
    input.extend_from_slice(chunk.get(..len).unwrap_or_default());
    Ok(len)
}

fn print(text: &str) -> io::Result<()> {
    let mut out = io::stdout().lock();
    out.write_all(text.as_bytes())?;
    out.flush()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_become_a_line_that_means_the_same() {
        let line =
            |words: &[&str]| command_line(&words.iter().map(|w| w.to_string()).collect::<Vec<_>>());
        assert_eq!(line(&["info status"]), "info status");
        assert_eq!(
            line(&["migrate", "-d", "unix:/a b"]),
            "migrate -d \"unix:/a b\""
        );
        assert_eq!(line(&["x", "", "\"\\ "]), "x \"\" \"\\\"\\\\ \"");
    }
}
