//! What is between a source and a destination, and does them harm at a chosen byte.

use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;

/// What a [`Proxy`] does with what it forwards.
#[derive(Clone, Copy)]
pub enum Tamper {
    /// Cuts both directions after this many bytes from the source.
    CutAfter(u64),
    /// Cuts both directions after this many bytes from the destination.
    CutAnswerAfter(u64),
    /// Flips a bit of the byte at this offset from the source.
    FlipAt(u64),
    /// Forwards nothing more after this many bytes from the source, and closes nothing.
    StallAfter(u64),
}

/// Between a source and a destination: forwards one connection, and tampers with it.
pub struct Proxy {
    pub uri: String,
    connections: Arc<Mutex<Vec<TcpStream>>>,
    pub forwarded: Arc<AtomicU64>,
}

impl Proxy {
    pub fn to(destination: &str, tamper: Tamper) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let uri = format!("tcp:{}", listener.local_addr().unwrap());
        let destination = destination.strip_prefix("tcp:").unwrap().to_owned();
        let connections = Arc::new(Mutex::new(Vec::new()));
        let forwarded = Arc::new(AtomicU64::new(0));
        let (kept, counted) = (Arc::clone(&connections), Arc::clone(&forwarded));
        // Ends with its connection, at the latest when the proxy is dropped.
        thread::spawn(move || {
            let Ok((source, _)) = listener.accept() else {
                return;
            };
            let Ok(sink) = TcpStream::connect(destination) else {
                return;
            };
            kept.lock()
                .unwrap()
                .extend([source.try_clone().unwrap(), sink.try_clone().unwrap()]);
            let (back_in, back_out) = (sink.try_clone().unwrap(), source.try_clone().unwrap());
            let back = match tamper {
                Tamper::CutAnswerAfter(limit) => Tamper::CutAfter(limit),
                _ => Tamper::CutAfter(u64::MAX),
            };
            let forth = match tamper {
                Tamper::CutAnswerAfter(_) => Tamper::CutAfter(u64::MAX),
                forth => forth,
            };
            let answers = thread::spawn(move || {
                forward(back_in, back_out, back, &AtomicU64::new(0));
            });
            forward(source, sink, forth, &counted);
            answers.join().unwrap();
        });
        Self {
            uri,
            connections,
            forwarded,
        }
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        for connection in self.connections.lock().unwrap().iter() {
            // An error says that it is closed already.
            let _ = connection.shutdown(Shutdown::Both);
        }
    }
}

fn forward(mut from: TcpStream, mut to: TcpStream, tamper: Tamper, forwarded: &AtomicU64) {
    let mut buffer = vec![0; 1 << 16];
    let mut offset = 0;
    loop {
        let count = match from.read(&mut buffer) {
            Ok(0) | Err(_) => break,
            Ok(count) => count,
        };
        let data = &mut buffer[..count];
        let end = offset + count as u64;
        let keep = match tamper {
            Tamper::FlipAt(at) if (offset..end).contains(&at) => {
                data[(at - offset) as usize] ^= 0x10;
                count
            }
            Tamper::CutAfter(at) | Tamper::StallAfter(at) if end > at => {
                at.saturating_sub(offset) as usize
            }
            _ => count,
        };
        if to.write_all(&data[..keep]).is_err() {
            break;
        }
        offset = end;
        forwarded.store(offset, Ordering::SeqCst);
        if keep < count {
            match tamper {
                // Whoever owns the proxy ends it.
                Tamper::StallAfter(_) => loop {
                    thread::park();
                },
                _ => break,
            }
        }
    }
    let _ = from.shutdown(Shutdown::Both);
    let _ = to.shutdown(Shutdown::Both);
}
