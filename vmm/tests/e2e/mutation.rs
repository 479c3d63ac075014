//! A real destination process and streams that were damaged on purpose, thousands of ways.
//! The sequence is fixed: a failure happens again.

use std::io::{Read, Write};
use std::net::{Shutdown, TcpStream};

use guest_tests::driver::process::Process;
use serde_json::{Value, json};

use crate::frames::{Frame, FrameProxy, HEADER, PREAMBLE};
use crate::harness::{Ferry, Guest, PATIENCE, require_kvm, scratch};

/// The guest's memory.
const MEMORY: u64 = 16 << 20;

/// As many bytes may the process take beyond the guest's memory: its own (a debug build's, with
/// its binary), and the largest frames that the protocol allows.
const OVERHEAD: u64 = 64 << 20;

/// xorshift64*: Vigna, "An experimental exploration of Marsaglia's xorshift generators".
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    fn below(&mut self, bound: usize) -> usize {
        (self.next() % bound as u64) as usize
    }
}

/// The stream of a paused guest: no page comes twice, so no damage is repaired later.
fn record(dir: &std::path::Path) -> Vec<Frame> {
    let guest = Guest {
        image: guest_tests::STATE,
        append: "interval=250".to_owned(),
        memory: "16M",
        smp: 2,
    };
    let mut source = Ferry::run(dir, "rec", &guest, &[]);
    source.wait_line(|line| line.starts_with("ready").then_some(()));
    source.execute("stop", Value::Null);
    let (mut destination, uri) = Ferry::incoming(dir, "recd");
    let proxy = FrameProxy::to(&uri, None);
    source.migrate(&proxy.uri);
    source.wait_migrated("completed");
    destination.wait_status("paused");
    proxy.stream()
}

/// Versions 1 to 1.
fn preamble() -> [u8; PREAMBLE] {
    let mut bytes = *b"\x89FERRY\r\n\x01\0\x01\0\0\0\0\0";
    let crc = crc32fast::hash(&bytes[..12]);
    bytes[12..].copy_from_slice(&crc.to_le_bytes());
    bytes
}

/// The stream with one thing wrong in it, and what that is.
fn mutate(random: &mut Random, frames: &[Frame]) -> (Vec<u8>, String) {
    let mut frames = frames.to_vec();
    // Frames are all as likely, however long.
    let at = random.below(frames.len());
    let frame = &mut frames[at];
    let len = frame.bytes.len();
    let offset = random.below(len);
    let what = match random.below(8) {
        0 => {
            frame.bytes[offset] ^= 1 << random.below(8);
            "a flipped bit"
        }
        1 => {
            frame.bytes.truncate(offset);
            frames.truncate(at + 1);
            "an end"
        }
        2 => {
            let bytes: Vec<u8> = (0..=random.below(40))
                .map(|_| random.next() as u8)
                .collect();
            frame.bytes.splice(offset..offset, bytes);
            "an insertion"
        }
        3 => {
            let end = (offset + 1 + random.below(40)).min(len);
            frame.bytes.drain(offset..end);
            "an omission"
        }
        4 => {
            let other = random.below(frames.len());
            let copy = frames[other].clone();
            frames.insert(at, copy);
            "a frame twice"
        }
        5 => {
            frames.remove(at);
            "a frame left out"
        }
        // As somebody would do it who means harm: the checksums are right.
        _ => {
            for _ in 0..=random.below(3) {
                let header = random.below(4) == 0;
                let end = if header {
                    16
                } else {
                    HEADER + frame.body_len()
                };
                let start = if header { 2 } else { HEADER.min(end - 1) };
                let offset = (start + random.below(end - start)).min(frame.bytes.len() - 1);
                frame.bytes[offset] = match random.below(3) {
                    0 => 0xff,
                    1 => 0,
                    _ => random.next() as u8,
                };
            }
            frame.seal();
            "forged contents"
        }
    };
    let mut stream = preamble().to_vec();
    stream.extend(frames.iter().flat_map(|frame| &frame.bytes));
    (stream, format!("{what} in frame {at} at {offset}"))
}

/// Sends it all and reads what comes until the other side closes.
fn send(uri: &str, stream: &[u8]) {
    let mut connection = TcpStream::connect(uri.strip_prefix("tcp:").unwrap()).unwrap();
    connection.set_read_timeout(Some(PATIENCE)).unwrap();
    let mut answers = connection.try_clone().unwrap();
    let reader = std::thread::spawn(move || {
        // Reset, if it was closed before it had read all.
        let _ = answers.read_to_end(&mut Vec::new());
    });
    let _ = connection.write_all(stream);
    let _ = connection.shutdown(Shutdown::Write);
    reader.join().unwrap();
}

/// Bytes of memory that a process has ever had at once.
fn peak_memory(process: &Process) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{}/status", process.id())).unwrap();
    let line = status.lines().find(|line| line.starts_with("VmHWM:"));
    let kib = line.unwrap().split_whitespace().nth(1).unwrap();
    kib.parse::<u64>().unwrap() << 10
}

fn waiting(dir: &std::path::Path, index: usize) -> Ferry {
    Ferry::start(dir, &format!("d{index}"), &["--incoming", "defer"])
}

#[test]
fn a_damaged_stream_is_a_clear_error_and_never_more() {
    require_kvm!();
    const COUNT: usize = 600;
    let dir = scratch();
    let frames = record(dir.path());
    let mut random = Random(0x5eed_f0f0_1234_5678);
    let mut destination = waiting(dir.path(), 0);
    let mut arrived = 0;
    for index in 1..=COUNT {
        let (stream, what) = mutate(&mut random, &frames);
        let listen = json!({ "uri": "tcp:127.0.0.1:0", "exit-on-error": false });
        destination.execute("migrate-incoming", listen);
        let uri = destination.listening_at();
        send(&uri, &stream);
        let info = destination.wait_migration(&what, |info| {
            matches!(info["status"].as_str(), Some("completed" | "failed"))
        });
        let output = destination.process.output();
        assert!(!output.contains("panicked"), "{what}: {output}");
        let peak = peak_memory(&destination.process);
        assert!(peak <= MEMORY + OVERHEAD, "{what}: {} MiB", peak >> 20);
        if info["status"] == "failed" {
            let reason = info["error-desc"].as_str().unwrap_or_default();
            assert!(
                !reason.is_empty() && reason.len() < 4096,
                "{what}: {reason}"
            );
            assert_eq!(destination.status(), "inmigrate", "{what}");
        } else {
            // Forged contents may be contents, and more behind GO is not looked at.
            let last = format!("in frame {} ", frames.len() - 1);
            assert!(
                what.starts_with("forged") || what.contains(&last) || what.contains("a frame"),
                "{what} was not noticed"
            );
            arrived += 1;
            destination = waiting(dir.path(), index);
        }
    }
    assert!(arrived < COUNT / 4, "{arrived} of {COUNT} arrived");
}

#[test]
fn a_destination_that_fails_ends_with_one_clear_line() {
    require_kvm!();
    let dir = scratch();
    let frames = record(dir.path());
    for (index, cut) in [1, frames.len() / 2, frames.len() - 1]
        .into_iter()
        .enumerate()
    {
        let mut stream = preamble().to_vec();
        stream.extend(frames[..cut].iter().flat_map(|frame| &frame.bytes));
        let last = stream.len() - 1;
        stream[last] ^= 1;
        let (mut destination, uri) = Ferry::incoming(dir.path(), &format!("d{index}"));
        send(&uri, &stream);
        let (success, output) = destination.wait_exit();
        assert!(!success, "{output}");
        let lines: Vec<_> = output
            .lines()
            .filter(|line| line.starts_with("ferry: "))
            .collect();
        assert_eq!(lines.len(), 1, "{output}");
        assert!(lines[0].contains("the migration failed: "), "{output}");
        assert!(!output.contains("panicked"), "{output}");
    }
    // A recording that was not damaged is good.
    let mut stream = preamble().to_vec();
    stream.extend(frames.iter().flat_map(|frame| &frame.bytes));
    let (mut destination, uri) = Ferry::incoming(dir.path(), "good");
    send(&uri, &stream);
    destination.wait_status("paused");
}
