//! The back ends, driven through real descriptors; the terminal is in `terminal_tests`.

use std::fs::{self, File};
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use rustix::fs::{CWD, Mode, OFlags, mknodat};

use super::*;

/// Waits until something is so; what it waits for happens soon on another thread.
fn until(mut condition: impl FnMut() -> bool) {
    while !condition() {
        thread::yield_now();
    }
}

/// A serial port whose guest reads only when the test says so.
struct Port {
    fifo: Mutex<Vec<u8>>,
    size: usize,
    pushed: Sender<()>,
}

impl Port {
    fn connect(console: &Console, size: usize) -> (Arc<Self>, Receiver<()>) {
        let (pushed, pushes) = channel();
        let port = Arc::new(Self {
            fifo: Mutex::default(),
            size,
            pushed,
        });
        console.connect_guest(port.clone());
        (port, pushes)
    }

    fn take(&self) -> Vec<u8> {
        std::mem::take(&mut *self.fifo.lock().unwrap())
    }
}

impl SerialInput for Port {
    fn room(&self) -> usize {
        self.size - self.fifo.lock().unwrap().len()
    }

    fn push(&self, bytes: &[u8]) {
        let mut fifo = self.fifo.lock().unwrap();
        fifo.extend(bytes);
        assert!(fifo.len() <= self.size, "more than there was room for");
        let _ = self.pushed.send(());
    }
}

fn fifo(dir: &tempfile::TempDir) -> PathBuf {
    let path = dir.path().join("fifo");
    mknodat(
        CWD,
        &path,
        rustix::fs::FileType::Fifo,
        Mode::from_raw_mode(0o600),
        0,
    )
    .unwrap();
    path
}

/// Bytes of which each place can be told.
fn pattern(len: usize) -> Vec<u8> {
    (0..len)
        .map(|at| (at % 251) as u8 ^ (at / 251) as u8)
        .collect()
}

#[test]
fn output_that_need_not_wait_is_refused_and_asked_for_again() {
    let dir = tempfile::tempdir().unwrap();
    let path = fifo(&dir);
    let console = Console::open(&SerialBackend::File(path.clone()), false).unwrap();
    let output = console.output();
    let (room, made) = channel();
    output.on_room(Box::new(move || room.send(()).unwrap()));
    let mut sent = 0;
    let taken = loop {
        let taken = output.try_send(&[b'x'; 5000]);
        sent += taken;
        if taken < 5000 {
            break taken;
        }
    };
    assert_eq!(output.queued(), QUEUE, "after {taken} bytes more");
    assert_eq!(output.try_send(b"y"), 0);
    assert!(made.try_recv().is_err());
    let mut reader = File::open(&path).unwrap();
    let mut read = vec![0; sent];
    reader.read_exact(&mut read).unwrap();
    made.recv().unwrap();
    assert_eq!(output.try_send(b"z"), 1);
    assert!(made.try_recv().is_err(), "told once");
    let mut last = [0];
    reader.read_exact(&mut last).unwrap();
    assert_eq!(last, *b"z");
    drop(console);
    assert_eq!(output.try_send(b"nowhere"), 7);
}

#[test]
fn a_file_is_created_or_emptied() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("log");
    fs::write(&path, "what was there before").unwrap();
    let console = Console::open(&SerialBackend::File(path.clone()), false).unwrap();
    console.output().send(b"hello");
    assert_eq!(fs::read(&path).unwrap(), b"hello");
    let missing = dir.path().join("no/log");
    let error = Console::open(&SerialBackend::File(missing), false)
        .unwrap_err()
        .to_string();
    assert!(error.contains("no/log"), "{error}");
}

#[test]
fn a_byte_is_there_when_the_call_returns() {
    let dir = tempfile::tempdir().unwrap();
    let path = fifo(&dir);
    // Nobody reads the FIFO when it is opened: that must not wait.
    let console = Console::open(&SerialBackend::File(path.clone()), false).unwrap();
    let flags = OFlags::RDONLY | OFlags::NONBLOCK;
    let mut reader = File::from(open(&path, flags, Mode::empty()).unwrap());
    for byte in 0..100 {
        console.output().write_all(&[byte]).unwrap();
        let mut read = [0];
        reader.read_exact(&mut read).unwrap();
        assert_eq!(read, [byte]);
    }
}

#[test]
fn a_full_fifo_makes_the_writer_wait_until_it_is_interrupted_and_nothing_is_lost() {
    let dir = tempfile::tempdir().unwrap();
    let path = fifo(&dir);
    let console = Console::open(&SerialBackend::File(path.clone()), false).unwrap();
    let output = console.output();
    let data = pattern(300_000);
    let writer = thread::spawn({
        let (output, data) = (output.clone(), data.clone());
        move || {
            for byte in data {
                output.send(&[byte]);
            }
        }
    });
    until(|| output.queued() == QUEUE);
    assert!(!writer.is_finished());
    assert!(!output.flush_until(Instant::now()));
    output.interrupt().raise();
    writer.join().unwrap();
    output.interrupt().clear();
    let mut read = vec![0; data.len()];
    File::open(&path).unwrap().read_exact(&mut read).unwrap();
    assert!(read == data, "bytes were lost or reordered");
    assert!(output.flush_until(Instant::now() + Duration::from_secs(10)));
}

#[test]
fn a_slow_reader_gets_everything_in_order() {
    let dir = tempfile::tempdir().unwrap();
    let path = fifo(&dir);
    let console = Console::open(&SerialBackend::File(path.clone()), false).unwrap();
    let data = pattern(1_000_000);
    let mut reader = File::open(&path).unwrap();
    let reader = thread::spawn({
        let len = data.len();
        move || {
            let mut read = vec![0; len];
            for piece in read.chunks_mut(777) {
                reader.read_exact(piece).unwrap();
            }
            read
        }
    });
    for piece in data.chunks(13) {
        console.output().send(piece);
    }
    assert!(reader.join().unwrap() == data);
}

#[test]
fn a_reader_that_goes_frees_the_writer() {
    let (reader, writer) = io::pipe().unwrap();
    let (output, _drain) = SerialOutput::new(Some(Sink::shared(writer.as_fd()).unwrap())).unwrap();
    drop(writer);
    let stuck = thread::spawn({
        let output = output.clone();
        move || output.send(&[0; 300_000])
    });
    until(|| output.queued() == QUEUE);
    drop(reader);
    stuck.join().unwrap();
    output.send(b"into the void");
    assert_eq!(output.queued(), 0);
}

#[test]
fn the_end_of_a_console_frees_the_writer() {
    let dir = tempfile::tempdir().unwrap();
    let console = Console::open(&SerialBackend::File(fifo(&dir)), false).unwrap();
    let output = console.output();
    let stuck = thread::spawn({
        let output = output.clone();
        move || output.send(&[0; 300_000])
    });
    until(|| output.queued() == QUEUE);
    drop(console);
    stuck.join().unwrap();
}

#[test]
fn a_socket_serves_one_client_after_the_other() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("serial");
    let console = Console::open(&SerialBackend::Unix(path.clone()), false).unwrap();
    let (port, pushes) = Port::connect(&console, 16);
    // Nobody is there: this goes nowhere, and does not wait.
    console.output().send(&[b'-'; 300_000]);
    for name in [b"one", b"two"] {
        let mut client = UnixStream::connect(&path).unwrap();
        client.write_all(name).unwrap();
        pushes.recv().unwrap();
        until(|| port.fifo.lock().unwrap().len() == 3);
        assert_eq!(port.take(), name);
        console.output().send(b"for ");
        console.output().send(name);
        let mut read = [0; 7];
        client.read_exact(&mut read).unwrap();
        assert_eq!(&read[4..], name);
        while pushes.try_recv().is_ok() {}
    }
    drop(console);
    assert!(!path.exists());
}

#[test]
fn a_client_that_goes_frees_the_writer_and_one_that_only_reads_stays() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("serial");
    let console = Console::open(&SerialBackend::Unix(path.clone()), false).unwrap();
    let (_port, pushes) = Port::connect(&console, 16);
    let mut client = UnixStream::connect(&path).unwrap();
    client.write_all(b"x").unwrap();
    client.shutdown(std::net::Shutdown::Write).unwrap();
    pushes.recv().unwrap();
    let output = console.output();
    let stuck = thread::spawn({
        let output = output.clone();
        move || output.send(&pattern(2_000_000))
    });
    until(|| output.queued() == QUEUE);
    let mut read = vec![0; 1000];
    client.read_exact(&mut read).unwrap();
    assert!(read == pattern(1000));
    drop(client);
    stuck.join().unwrap();
}

#[test]
fn no_more_is_read_than_the_guest_has_room_for() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("serial");
    let console = Console::open(&SerialBackend::Unix(path.clone()), false).unwrap();
    let (port, pushes) = Port::connect(&console, 4);
    let data = pattern(1000);
    let mut client = UnixStream::connect(&path).unwrap();
    client.write_all(&data).unwrap();
    let mut got = Vec::new();
    while got.len() < data.len() {
        pushes.recv().unwrap();
        got.extend(port.take());
        console.input_waker().wake();
    }
    assert_eq!(got, data);
}

#[test]
fn a_pty_serves_whoever_opens_it() {
    let console = Console::open(&SerialBackend::Pty, false).unwrap();
    let (port, pushes) = Port::connect(&console, 16);
    let path = console.pty_path().unwrap().to_owned();
    for _ in 0..2 {
        // Nobody is there: this goes nowhere, and does not wait.
        console.output().send(&[b'-'; 300_000]);
        let flags = OFlags::RDWR | OFlags::NOCTTY;
        let mut reader = File::from(open(&path, flags, Mode::empty()).unwrap());
        reader.write_all(b"in\r\x03").unwrap();
        let mut got = Vec::new();
        while got.len() < 4 {
            pushes.recv().unwrap();
            got.extend(port.take());
        }
        assert_eq!(got, b"in\r\x03", "the pty is not raw");
        console.output().send(b"out\n");
        let mut read = [0; 4];
        reader.read_exact(&mut read).unwrap();
        assert_eq!(&read, b"out\n");
        while pushes.try_recv().is_ok() {}
    }
}

#[test]
fn without_a_back_end_output_is_thrown_away() {
    let console = Console::open(&SerialBackend::None, false).unwrap();
    console.output().send(&[0; 300_000]);
    assert!(console.output().flush_until(Instant::now()));
}
