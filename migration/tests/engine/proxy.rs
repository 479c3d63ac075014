//! A connection with somebody in the middle, who sees every frame and decides what becomes of it.

use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex};

use migration::frame::{HEADER_LEN, Kind};
use migration::link::Stream;
use migration::message::PREAMBLE_LEN;

/// A frame on its way. The preamble counts as one, of no kind.
pub(crate) struct Frame {
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
    /// This many bytes of it go on; then the connection ends.
    Cut(usize),
    /// It goes on; then the connection ends.
    PassAndCut,
    /// It goes nowhere, nor does anything after it; the connection stays.
    Hold,
}

fn read_frame(stream: &mut UnixStream, from_source: bool, index: usize) -> Option<Frame> {
    let preamble = from_source && index == 0;
    let mut bytes = vec![0; if preamble { PREAMBLE_LEN } else { HEADER_LEN }];
    stream.read_exact(&mut bytes).ok()?;
    let mut frame = Frame {
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

/// A connection; `decide` is called with each frame.
pub(crate) fn proxied(decide: impl FnMut(&mut Frame) -> Fate + Send + 'static) -> (Stream, Stream) {
    let (source, near) = UnixStream::pair().unwrap();
    let (far, destination) = UnixStream::pair().unwrap();
    let decide = Arc::new(Mutex::new(decide));
    for from_source in [true, false] {
        let (mut from, mut to) = if from_source {
            (&near, &far)
        } else {
            (&far, &near)
        }
        .map(|stream| stream.try_clone().unwrap());
        let decide = Arc::clone(&decide);
        std::thread::spawn(move || {
            for index in 0.. {
                let Some(mut frame) = read_frame(&mut from, from_source, index) else {
                    // What one side ends, ends for the other.
                    let _ = to.shutdown(Shutdown::Write);
                    return;
                };
                let fate = decide.lock().unwrap()(&mut frame);
                let (len, cut) = match fate {
                    Fate::Pass => (frame.bytes.len(), false),
                    Fate::PassAndCut => (frame.bytes.len(), true),
                    Fate::Cut(len) => (len.min(frame.bytes.len()), true),
                    Fate::Hold => {
                        // Reads no more, and notices the end of the connection only.
                        wait_for_end(&from);
                        let _ = to.shutdown(Shutdown::Write);
                        return;
                    }
                };
                if to.write_all(&frame.bytes[..len]).is_err() || cut {
                    let _ = to.shutdown(Shutdown::Both);
                    let _ = from.shutdown(Shutdown::Both);
                    return;
                }
            }
        });
    }
    (source.into(), destination.into())
}

fn wait_for_end(stream: &UnixStream) {
    use rustix::event::{PollFd, PollFlags, poll};
    let mut fds = [PollFd::new(stream, PollFlags::RDHUP)];
    poll(&mut fds, None).unwrap();
}

trait Map<T> {
    fn map<U>(self, f: impl Fn(T) -> U) -> (U, U);
}

impl<T> Map<T> for (T, T) {
    fn map<U>(self, f: impl Fn(T) -> U) -> (U, U) {
        (f(self.0), f(self.1))
    }
}
