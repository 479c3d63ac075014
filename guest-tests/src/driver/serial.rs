//! Watching a guest's serial port from outside: when each heartbeat came, and what the guest says.

use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::mpsc::{self, Receiver, RecvTimeoutError};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use crate::{Event, Reader};

/// How long to wait between two attempts to connect to a port that isn't there yet.
const CONNECT_RETRY: Duration = Duration::from_millis(2);

/// A line that a guest wrote.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Line {
    /// Without its end.
    pub text: String,
    /// When its end was read.
    pub at: Instant,
}

/// The heartbeats seen so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Heartbeats {
    /// How many.
    pub count: u64,
    /// When the first one was read.
    pub first: Option<Instant>,
    /// When the last one was read.
    pub last: Option<Instant>,
    /// The longest time from one to the next.
    pub longest_gap: Duration,
}

impl Heartbeats {
    fn beat(&mut self, at: Instant) {
        if let Some(last) = self.last {
            self.longest_gap = self.longest_gap.max(at - last);
        }
        self.first.get_or_insert(at);
        self.last = Some(at);
        self.count += 1;
    }
}

/// A thread that reads a guest's serial port and takes the time.
#[derive(Debug)]
pub struct Watcher {
    stream: UnixStream,
    lines: Receiver<Line>,
    heartbeats: Arc<Mutex<Heartbeats>>,
    thread: Option<JoinHandle<()>>,
}

impl Watcher {
    /// Connects to a serial port that is a Unix socket; one that isn't there yet is waited for.
    pub fn connect(path: &Path, patience: Duration) -> io::Result<Self> {
        let deadline = Instant::now() + patience;
        let stream = loop {
            match UnixStream::connect(path) {
                Ok(stream) => break stream,
                Err(err) if Instant::now() >= deadline => return Err(err),
                Err(_) => thread::sleep(CONNECT_RETRY),
            }
        };
        Self::over(stream)
    }

    /// Watches a connected stream.
    pub fn over(stream: UnixStream) -> io::Result<Self> {
        let reader = stream.try_clone()?;
        let heartbeats = Arc::new(Mutex::new(Heartbeats::default()));
        let (sender, lines) = mpsc::channel();
        let seen = Arc::clone(&heartbeats);
        let thread = thread::Builder::new()
            .name("watcher".to_owned())
            .spawn(move || watch(reader, &seen, &sender))?;
        Ok(Self {
            stream,
            lines,
            heartbeats,
            thread: Some(thread),
        })
    }

    /// Sends bytes to the guest.
    pub fn send(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.stream.write_all(bytes)
    }

    /// The next line; `None` if none came in time or the port is gone.
    pub fn next_line(&self, patience: Duration) -> Option<Line> {
        self.lines.recv_timeout(patience).ok()
    }

    /// The next line that `parse` takes, and what it made of it. Others are passed over.
    pub fn wait_for<T>(
        &self,
        patience: Duration,
        mut parse: impl FnMut(&str) -> Option<T>,
    ) -> Result<(T, Instant), WaitError> {
        let deadline = Instant::now() + patience;
        let mut others = Vec::new();
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            match self.lines.recv_timeout(left) {
                Ok(line) => match parse(&line.text) {
                    Some(found) => return Ok((found, line.at)),
                    None => others.push(line.text),
                },
                Err(RecvTimeoutError::Timeout) => {
                    return Err(WaitError::Timeout { patience, others });
                }
                Err(RecvTimeoutError::Disconnected) => return Err(WaitError::Closed { others }),
            }
        }
    }

    /// The heartbeats seen so far.
    pub fn heartbeats(&self) -> Heartbeats {
        *self.lock()
    }

    /// Forgets the longest gap; the next one counts from the last heartbeat on.
    pub fn forget_gaps(&self) {
        self.lock().longest_gap = Duration::ZERO;
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Heartbeats> {
        self.heartbeats
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Watcher {
    fn drop(&mut self) {
        // Fails only if the peer has closed the connection already, which ends the thread too.
        let _ = self.stream.shutdown(std::net::Shutdown::Both);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// Why a line did not come. Both tell what came instead.
#[derive(Debug, thiserror::Error)]
pub enum WaitError {
    /// Not in time.
    #[error("the guest did not say it within {patience:?}; it said {others:?}")]
    Timeout {
        /// How long it was waited for.
        patience: Duration,
        /// The lines that came.
        others: Vec<String>,
    },
    /// The port was closed.
    #[error("the serial port was closed; before that the guest said {others:?}")]
    Closed {
        /// The lines that came.
        others: Vec<String>,
    },
}

fn watch(mut stream: UnixStream, heartbeats: &Mutex<Heartbeats>, lines: &mpsc::Sender<Line>) {
    let mut reader = Reader::default();
    let mut buffer = [0; 4096];
    loop {
        let count = match stream.read(&mut buffer) {
            Ok(0) => return,
            Ok(count) => count,
            Err(err) if err.kind() == io::ErrorKind::Interrupted => continue,
            Err(_) => return,
        };
        let at = Instant::now();
        for event in reader.read(buffer.get(..count).unwrap_or_default()) {
            match event {
                Event::Heartbeat => heartbeats
                    .lock()
                    .unwrap_or_else(PoisonError::into_inner)
                    .beat(at),
                // A receiver that is gone doesn't want lines any more.
                Event::Line(text) => drop(lines.send(Line { text, at })),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_longest_gap_is_between_neighbours() {
        let start = Instant::now();
        let mut beats = Heartbeats::default();
        for ms in [0, 1, 4, 5] {
            beats.beat(start + Duration::from_millis(ms));
        }
        assert_eq!(beats.count, 4);
        assert_eq!(beats.longest_gap, Duration::from_millis(3));
    }
}
