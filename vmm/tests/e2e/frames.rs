//! The migration stream taken apart into frames, from outside: docs/protocol.md.

use std::io::{self, Read};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::sync::mpsc::{self, Receiver, Sender};
use std::sync::{Arc, Condvar, Mutex};
use std::thread;

use crate::harness::PATIENCE;

pub const PREAMBLE: usize = 16;
pub const HEADER: usize = 24;

/// Types of frames.
pub mod kind {
    pub const HELLO: u8 = 0x01;
    pub const BLOB: u8 = 0x02;
    pub const PAGES: u8 = 0x03;
    pub const ZERO: u8 = 0x04;
    pub const SYNC: u8 = 0x05;
    pub const STATE: u8 = 0x06;
    pub const END: u8 = 0x07;
    pub const GO: u8 = 0x08;
    pub const BLOCKS: u8 = 0x0a;
    pub const FLUSH: u8 = 0x0b;
    pub const MISSING: u8 = 0x0c;
    pub const LATE: u8 = 0x0d;
    pub const JOIN: u8 = 0x0f;
    pub const RESUME: u8 = 0x10;
    pub const CONTINUE: u8 = 0x11;
    pub const ACCEPT: u8 = 0x81;
    pub const SYNC_ACK: u8 = 0x83;
    pub const READY: u8 = 0x84;
    pub const RUNNING: u8 = 0x85;
    pub const FLUSHED: u8 = 0x87;
    pub const COMPLETE: u8 = 0x89;
    pub const ARRIVED: u8 = 0x8b;
    pub const LEFT: u8 = 0x8c;
}

/// A frame as it is on the wire.
#[derive(Clone, Debug)]
pub struct Frame {
    /// Header, body and payload.
    pub bytes: Vec<u8>,
}

impl Frame {
    pub fn kind(&self) -> u8 {
        self.bytes[2]
    }

    fn number(&self, at: usize) -> usize {
        u32::from_le_bytes(self.bytes[at..at + 4].try_into().unwrap()) as usize
    }

    /// Length of the body.
    pub fn body_len(&self) -> usize {
        self.number(8)
    }

    /// The next frame; `None` at the end of the stream.
    pub fn read(from: &mut impl Read) -> io::Result<Option<Self>> {
        let mut frame = Self {
            bytes: vec![0; HEADER],
        };
        match from.read_exact(&mut frame.bytes) {
            Err(err) if err.kind() == io::ErrorKind::UnexpectedEof => return Ok(None),
            result => result?,
        }
        assert_eq!(frame.bytes[..2], *b"FY", "a frame begins here");
        let rest = frame.number(8) + frame.number(12);
        frame.bytes.resize(HEADER + rest, 0);
        from.read_exact(&mut frame.bytes[HEADER..])?;
        Ok(Some(frame))
    }

    /// Makes both checksums right again, so that only the contents are wrong.
    pub fn seal(&mut self) {
        let body = (HEADER + self.body_len()).min(self.bytes.len());
        let crc = crc32fast::hash(&self.bytes[HEADER..body]);
        self.bytes[16..20].copy_from_slice(&crc.to_le_bytes());
        let crc = crc32fast::hash(&self.bytes[..20]);
        self.bytes[20..24].copy_from_slice(&crc.to_le_bytes());
    }
}

/// Between a source and a destination: forwards whole frames up to the one at which it is to stop.
pub struct FrameProxy {
    pub uri: String,
    connections: Arc<Mutex<Vec<TcpStream>>>,
    reached: Receiver<()>,
    stream: Arc<Mutex<Vec<Frame>>>,
    gate: Arc<Gate>,
}

/// Closed until it is opened.
#[derive(Default)]
struct Gate {
    open: Mutex<bool>,
    opened: Condvar,
}

impl Gate {
    fn open(&self) {
        *self.open.lock().unwrap() = true;
        self.opened.notify_all();
    }

    fn wait(&self) {
        let open = self.open.lock().unwrap();
        drop(self.opened.wait_while(open, |open| !*open).unwrap());
    }
}

/// What happens when the frame has come at which a proxy stops.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Then {
    /// It is not forwarded, and both directions are closed.
    Cut,
    /// It is not forwarded, nor anything after it in that direction, and nothing is closed.
    Hold,
    /// It is forwarded after [`FrameProxy::go_on`], and so is the rest.
    Wait,
}

/// A stop at the nth frame (from 0) of a type.
pub type Stop = (u8, usize, Then);

impl FrameProxy {
    pub fn to(destination: &str, stop: Option<Stop>) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let uri = format!("tcp:{}", listener.local_addr().unwrap());
        let destination = destination.strip_prefix("tcp:").unwrap().to_owned();
        let connections = Arc::new(Mutex::new(Vec::new()));
        let stream = Arc::new(Mutex::new(Vec::new()));
        let gate = Arc::new(Gate::default());
        let waiting = Arc::clone(&gate);
        let (reached_sender, reached) = mpsc::channel();
        let (kept, recorded) = (Arc::clone(&connections), Arc::clone(&stream));
        // Ends with its connection, at the latest when the proxy is dropped.
        thread::spawn(move || {
            let (Ok((mut source, _)), Ok(mut sink)) =
                (listener.accept(), TcpStream::connect(destination))
            else {
                return;
            };
            kept.lock()
                .unwrap()
                .extend([source.try_clone().unwrap(), sink.try_clone().unwrap()]);
            let (answers, back) = (sink.try_clone().unwrap(), source.try_clone().unwrap());
            let (told, gate) = (reached_sender.clone(), Arc::clone(&waiting));
            let answering = thread::spawn(move || {
                forward(answers, back, stop, &told, &gate, &Mutex::default());
            });
            let mut preamble = [0; PREAMBLE];
            if source.read_exact(&mut preamble).is_ok()
                && io::Write::write_all(&mut sink, &preamble).is_ok()
            {
                forward(source, sink, stop, &reached_sender, &waiting, &recorded);
            }
            answering.join().unwrap();
        });
        Self {
            uri,
            connections,
            reached,
            stream,
            gate,
        }
    }

    /// Waits for the frame at which it stops.
    pub fn wait_reached(&self) {
        self.reached.recv_timeout(PATIENCE).expect("that frame");
    }

    /// Forwards the frame at which it waits, and all after it.
    pub fn go_on(&self) {
        self.gate.open();
    }

    /// The frames that came from the source.
    pub fn stream(&self) -> Vec<Frame> {
        self.stream.lock().unwrap().clone()
    }
}

impl Drop for FrameProxy {
    fn drop(&mut self) {
        for connection in self.connections.lock().unwrap().iter() {
            // An error says that it is closed already.
            let _ = connection.shutdown(Shutdown::Both);
        }
        self.gate.open();
    }
}

fn forward(
    mut from: TcpStream,
    mut to: TcpStream,
    stop: Option<Stop>,
    reached: &Sender<()>,
    gate: &Gate,
    recorded: &Mutex<Vec<Frame>>,
) {
    let mut seen = 0;
    while let Ok(Some(frame)) = Frame::read(&mut from) {
        recorded.lock().unwrap().push(frame.clone());
        if let Some((kind, nth, then)) = stop
            && frame.kind() == kind
        {
            if seen == nth {
                if then == Then::Cut {
                    let _ = from.shutdown(Shutdown::Both);
                    let _ = to.shutdown(Shutdown::Both);
                }
                // Nobody is there who wants to know it when the test is over.
                let _ = reached.send(());
                match then {
                    Then::Cut => return,
                    Then::Hold => {
                        // Whatever else comes is swallowed, up to the end.
                        let _ = io::copy(&mut from, &mut io::sink());
                        return;
                    }
                    Then::Wait => gate.wait(),
                }
            }
            seen += 1;
        }
        if io::Write::write_all(&mut to, &frame.bytes).is_err() {
            break;
        }
    }
    // What is on its way still arrives; an error says that it is closed already.
    let _ = to.shutdown(Shutdown::Write);
}
