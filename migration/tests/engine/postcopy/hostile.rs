//! Peers that lie in post-copy: what they say is refused with a reason, at worst the connection
//! breaks, and the guest runs at one side.

mod damage;
mod destination;
mod source;

use std::io::{Read, Write};
use std::net::TcpStream;

use migration::frame::{HEADER_LEN, Header, Kind};
use migration::message::{Id, PREAMBLE_LEN, Preamble, Return};

use crate::hostile::body;

/// One end of a connection, in the hands of a test.
struct Peer {
    stream: TcpStream,
    sent: u32,
}

impl Peer {
    /// Of a destination: takes the preamble.
    fn accepted(mut stream: TcpStream) -> Self {
        stream.read_exact(&mut [0; PREAMBLE_LEN]).unwrap();
        Self { stream, sent: 0 }
    }

    /// Of a source, which has said where the connection belongs.
    fn connected(address: (String, u16), kind: Kind, body: &[u8]) -> Self {
        let mut stream = TcpStream::connect(address).unwrap();
        stream.write_all(&Preamble::OURS.encode()).unwrap();
        let mut peer = Self { stream, sent: 0 };
        peer.say(kind, body);
        peer
    }

    fn say(&mut self, kind: Kind, body: &[u8]) {
        self.say_with(kind, body, &[]);
    }

    /// What cannot be sent any more is not: the other side has seen enough.
    fn say_with(&mut self, kind: Kind, body: &[u8], payload: &[u8]) {
        let header = Header {
            kind,
            sequence: self.sent,
            body_len: body.len() as u32,
            payload_len: payload.len() as u32,
            body_crc: crc32fast::hash(body),
        };
        self.sent += 1;
        let frame = [&header.encode()[..], body, payload].concat();
        let _ = self.stream.write_all(&frame);
    }

    /// The next frame without its payload; `None` once the connection is over.
    fn hear(&mut self) -> Option<(Kind, Vec<u8>)> {
        let mut header = [0; HEADER_LEN];
        self.stream.read_exact(&mut header).ok()?;
        let header = Header::decode(&header).unwrap();
        let mut bytes = vec![0; header.body_len as usize + header.payload_len as usize];
        self.stream.read_exact(&mut bytes).ok()?;
        bytes.truncate(header.body_len as usize);
        Some((header.kind, bytes))
    }

    /// Waits for a frame of that kind, whatever comes before.
    fn hear_of(&mut self, kind: Kind) -> Vec<u8> {
        loop {
            match self.hear() {
                Some((found, body)) if found == kind => return body,
                Some(_) => {}
                None => panic!("{} never came", kind.name()),
            }
        }
    }
}

fn returning(id: Id, attempt: u32) -> Vec<u8> {
    body(|out| Return { id, attempt }.encode(out))
}

/// MISSING or ARRIVED.
fn bits(first: u64, words: &[u64]) -> Vec<u8> {
    let words = words.iter().flat_map(|word| word.to_le_bytes());
    first.to_le_bytes().into_iter().chain(words).collect()
}
