//! A connection with somebody in the middle, who sees every frame and decides what becomes of it.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use migration::frame::{HEADER_LEN, Kind};
use migration::link::Stream;
use migration::message::PREAMBLE_LEN;
use migration::uri::Uri;
use rustix::net::{Shutdown, shutdown};

/// A frame on its way. The preamble counts as one, of no kind.
pub(crate) struct Frame {
    /// Counts the connections from 0.
    pub(crate) connection: usize,
    /// Whether that is a fault channel: it began with JOIN.
    pub(crate) fault_channel: bool,
    pub(crate) from_source: bool,
    /// Counts the frames of its direction from 0.
    pub(crate) index: usize,
    pub(crate) kind: Option<Kind>,
    /// Header, body and payload.
    pub(crate) bytes: Vec<u8>,
    /// Where the payload begins.
    pub(crate) payload: usize,
}

/// What becomes of a frame.
pub(crate) enum Fate {
    /// It goes on, as it is or as it was changed.
    Pass,
    /// It goes on, and takes as long as on a link of so many bytes a second.
    PassSlowly(u32),
    /// This many bytes of it go on; then the connection ends.
    Cut(usize),
    /// It goes on; then the connection ends.
    PassAndCut,
    /// It goes nowhere, nor does anything after it; the connection stays.
    Hold,
}

trait Socket: Read + Write + AsFd + Send + Sized + 'static {
    fn clone(&self) -> Self;
}

impl Socket for UnixStream {
    fn clone(&self) -> Self {
        self.try_clone().unwrap()
    }
}

impl Socket for TcpStream {
    fn clone(&self) -> Self {
        self.try_clone().unwrap()
    }
}

fn read_frame(stream: &mut impl Read, from_source: bool, index: usize) -> Option<Frame> {
    let preamble = from_source && index == 0;
    let mut bytes = vec![0; if preamble { PREAMBLE_LEN } else { HEADER_LEN }];
    stream.read_exact(&mut bytes).ok()?;
    let mut frame = Frame {
        connection: 0,
        fault_channel: false,
        from_source,
        index,
        kind: None,
        payload: bytes.len(),
        bytes,
    };
    if !preamble {
        let bytes = &mut frame.bytes;
        let word = |at: usize| u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap()) as usize;
        let (body, payload) = (word(8), word(12));
        frame.kind = Kind::ALL.into_iter().find(|kind| *kind as u8 == bytes[2]);
        bytes.resize(HEADER_LEN + body + payload, 0);
        stream.read_exact(&mut bytes[HEADER_LEN..]).ok()?;
        frame.payload = HEADER_LEN + body;
    }
    Some(frame)
}

type Decide = Arc<Mutex<dyn FnMut(&mut Frame) -> Fate + Send>>;

/// A connection; `decide` is called with each frame.
pub(crate) fn proxied(decide: impl FnMut(&mut Frame) -> Fate + Send + 'static) -> (Stream, Stream) {
    let (source, near) = UnixStream::pair().unwrap();
    let (far, destination) = UnixStream::pair().unwrap();
    let decide: Decide = Arc::new(Mutex::new(decide));
    connect(&near, &far, 0, &decide);
    (source.into(), destination.into())
}

/// Takes connections for a listener, for as long as it lives.
pub(crate) struct Proxy {
    pub(crate) uri: Uri,
    address: SocketAddr,
    ended: Arc<AtomicBool>,
}

impl Proxy {
    /// One in front of `target`; `decide` is called with each frame of each connection.
    pub(crate) fn new(
        target: Uri,
        decide: impl FnMut(&mut Frame) -> Fate + Send + 'static,
    ) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let uri = format!("tcp:{address}").parse().unwrap();
        let ended = Arc::new(AtomicBool::new(false));
        let decide: Decide = Arc::new(Mutex::new(decide));
        std::thread::spawn({
            let ended = Arc::clone(&ended);
            move || {
                for connection in 0.. {
                    let (near, _) = listener.accept().unwrap();
                    if ended.load(Ordering::SeqCst) {
                        return;
                    }
                    // Nobody there: what was accepted is closed.
                    if let Ok(far) = TcpStream::connect(socket_address(&target)) {
                        connect(&near, &far, connection, &decide);
                    }
                }
            }
        });
        Self {
            uri,
            address,
            ended,
        }
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.ended.store(true, Ordering::SeqCst);
        let _ = TcpStream::connect(self.address);
    }
}

pub(crate) fn socket_address(uri: &Uri) -> (String, u16) {
    match uri {
        Uri::Tcp { host, port } => (host.clone(), *port),
        other => panic!("not TCP: {other}"),
    }
}

/// Joins the two, with a thread for each direction.
fn connect<S: Socket>(near: &S, far: &S, connection: usize, decide: &Decide) {
    let fault_channel = Arc::new(AtomicBool::new(false));
    for from_source in [true, false] {
        let (mut from, mut to) = if from_source {
            (near.clone(), far.clone())
        } else {
            (far.clone(), near.clone())
        };
        let decide = Arc::clone(decide);
        let fault_channel = Arc::clone(&fault_channel);
        std::thread::spawn(move || {
            for index in 0.. {
                let Some(mut frame) = read_frame(&mut from, from_source, index) else {
                    // What one side ends, ends for the other.
                    let _ = shutdown(&to, Shutdown::Write);
                    return;
                };
                frame.connection = connection;
                if frame.kind == Some(Kind::Join) {
                    fault_channel.store(true, Ordering::SeqCst);
                }
                frame.fault_channel = fault_channel.load(Ordering::SeqCst);
                let fate = decide.lock().unwrap()(&mut frame);
                let (len, cut) = match fate {
                    Fate::Pass => (frame.bytes.len(), false),
                    Fate::PassSlowly(rate) => {
                        let seconds = frame.bytes.len() as f64 / f64::from(rate);
                        std::thread::sleep(Duration::from_secs_f64(seconds));
                        (frame.bytes.len(), false)
                    }
                    Fate::PassAndCut => (frame.bytes.len(), true),
                    Fate::Cut(len) => (len.min(frame.bytes.len()), true),
                    Fate::Hold => {
                        // Reads no more, and notices the end of the connection only.
                        wait_for_end(&from);
                        let _ = shutdown(&to, Shutdown::Write);
                        return;
                    }
                };
                if to.write_all(&frame.bytes[..len]).is_err() || cut {
                    let _ = shutdown(&to, Shutdown::Both);
                    let _ = shutdown(&from, Shutdown::Both);
                    return;
                }
            }
        });
    }
}

fn wait_for_end(stream: &impl AsFd) {
    use rustix::event::{PollFd, PollFlags, poll};
    let mut fds = [PollFd::new(stream, PollFlags::RDHUP)];
    poll(&mut fds, None).unwrap();
}
