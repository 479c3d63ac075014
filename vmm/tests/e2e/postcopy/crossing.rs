//! Between a source and a destination: forwards all connections, and breaks them together.

use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::sync::mpsc::{self, Receiver, Sender};
use std::sync::{Arc, Mutex};
use std::thread;

use crate::frames::{Frame, PREAMBLE};
use crate::harness::PATIENCE;

/// What happens at the frame at which a crossing stops.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Then {
    /// All connections are cut before it is forwarded.
    CutBefore,
    /// All connections are cut after it was forwarded.
    CutAfter,
    /// It is not forwarded, and nothing after it on that connection in that direction; nothing is
    /// cut.
    Hold,
}

/// A stop at the nth frame (from 0) of a type, counted over all connections.
pub type Stop = (u8, usize, Then);

pub struct Crossing {
    pub uri: String,
    shared: Arc<Shared>,
    reached: Receiver<()>,
}

struct Shared {
    /// `None` once they are cut.
    connections: Mutex<Option<Vec<TcpStream>>>,
    /// Frames of the stop's type that have come.
    seen: Mutex<usize>,
    stop: Option<Stop>,
}

impl Crossing {
    pub fn to(destination: &str, stop: Option<Stop>) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let uri = format!("tcp:{}", listener.local_addr().unwrap());
        let destination = destination.strip_prefix("tcp:").unwrap().to_owned();
        let shared = Arc::new(Shared {
            connections: Mutex::new(Some(Vec::new())),
            seen: Mutex::new(0),
            stop,
        });
        let (told, reached) = mpsc::channel();
        let accepting = Arc::clone(&shared);
        // Ends with the test's process: whoever connects once all is cut is cut, too.
        thread::spawn(move || {
            for source in listener.incoming() {
                let (Ok(source), Ok(sink)) = (source, TcpStream::connect(&destination)) else {
                    continue;
                };
                accepting.keep(&source, &sink);
                for (from, to, greets) in [
                    (source.try_clone().unwrap(), sink.try_clone().unwrap(), true),
                    (sink, source, false),
                ] {
                    let (shared, told) = (Arc::clone(&accepting), told.clone());
                    thread::spawn(move || shared.forward(from, to, greets, &told));
                }
            }
        });
        Self {
            uri,
            shared,
            reached,
        }
    }

    /// Waits for the frame at which it stops.
    pub fn wait_reached(&self) {
        self.reached.recv_timeout(PATIENCE).expect("that frame");
    }

    /// Breaks all connections, those to come, too.
    pub fn cut(&self) {
        self.shared.cut();
    }
}

impl Drop for Crossing {
    fn drop(&mut self) {
        self.cut();
    }
}

impl Shared {
    fn keep(&self, source: &TcpStream, sink: &TcpStream) {
        let mut connections = self.connections.lock().unwrap();
        for stream in [source, sink] {
            match &mut *connections {
                Some(connections) => connections.push(stream.try_clone().unwrap()),
                None => drop(stream.shutdown(Shutdown::Both)),
            }
        }
    }

    fn cut(&self) {
        for connection in self
            .connections
            .lock()
            .unwrap()
            .take()
            .into_iter()
            .flatten()
        {
            // An error says that it is closed already.
            let _ = connection.shutdown(Shutdown::Both);
        }
    }

    fn forward(&self, mut from: TcpStream, mut to: TcpStream, greets: bool, told: &Sender<()>) {
        if greets {
            let mut preamble = [0; PREAMBLE];
            if from.read_exact(&mut preamble).is_err() || to.write_all(&preamble).is_err() {
                return;
            }
        }
        while let Ok(Some(frame)) = Frame::read(&mut from) {
            let then = self.stops_at(&frame);
            match then {
                None => {}
                Some(Then::CutBefore) => self.cut(),
                Some(Then::Hold) => {
                    let _ = told.send(());
                    // Whatever else comes is swallowed, up to the end.
                    let _ = std::io::copy(&mut from, &mut std::io::sink());
                    return;
                }
                Some(Then::CutAfter) => {
                    let _ = to.write_all(&frame.bytes);
                    // What was written arrives; a cut of both directions could lose it.
                    let _ = to.shutdown(Shutdown::Write);
                    self.cut();
                }
            }
            if then.is_some() {
                // Nobody is there who wants to know it when the test is over.
                let _ = told.send(());
                return;
            }
            if to.write_all(&frame.bytes).is_err() {
                break;
            }
        }
        // What is on its way still arrives; an error says that it is closed already.
        let _ = to.shutdown(Shutdown::Write);
    }

    fn stops_at(&self, frame: &Frame) -> Option<Then> {
        let (kind, nth, then) = self.stop?;
        if frame.kind() != kind {
            return None;
        }
        let mut seen = self.seen.lock().unwrap();
        *seen += 1;
        (*seen == nth + 1).then_some(then)
    }
}
