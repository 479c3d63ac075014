//! The guest's serial port on a terminal, a pty, a file and a FIFO, and the terminal afterwards.

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Stdio};

use guest_tests::boot::{self, Then};
use guest_tests::driver::process::Process;
use guest_tests::echo;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, Signal, kill_process};
use rustix::pty::{OpenptFlags, grantpt, ioctl_tiocgptpeer, openpt, unlockpt};
use rustix::termios::{LocalModes, Termios, tcgetattr};

use crate::harness::{PATIENCE, ferry, require_kvm, scratch};

/// A `ferry run` on a terminal.
struct Session {
    child: Child,
    terminal: File,
    /// Kept open, so that the terminal can be looked at when the process has ended.
    peer: OwnedFd,
    before: Termios,
    text: String,
}

impl Session {
    fn start(dir: &Path, image: &[u8], append: &str, options: &[&str]) -> Self {
        let kernel = dir.join("kernel");
        std::fs::write(&kernel, image).unwrap();
        let flags = OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC;
        let master = openpt(flags).unwrap();
        grantpt(&master).unwrap();
        unlockpt(&master).unwrap();
        let peer = ioctl_tiocgptpeer(&master, flags).unwrap();
        let before = tcgetattr(&peer).unwrap();
        let end = || Stdio::from(peer.try_clone().unwrap());
        let child = Command::new(ferry())
            .args(["run", "--memory", "64M", "--append", append, "--kernel"])
            .arg(&kernel)
            .args(options)
            .env("TERM", "xterm")
            .stdin(end())
            .stdout(end())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        Self {
            child,
            terminal: File::from(master),
            peer,
            before,
            text: String::new(),
        }
    }

    /// An `echo` guest with a monitor on the same terminal.
    fn shared(dir: &Path) -> Self {
        let options = ["--serial", "stdio", "--monitor", "stdio"];
        let mut session = Self::start(dir, guest_tests::ECHO, "", &options);
        session.expect("ready via=pic");
        session
    }

    fn send(&mut self, bytes: &[u8]) {
        self.terminal.write_all(bytes).unwrap();
    }

    /// Reads up to and including this text.
    fn expect(&mut self, end: &str) {
        loop {
            if let Some(at) = self.text.find(end) {
                self.text.drain(..at + end.len());
                return;
            }
            let mut ready = [PollFd::new(&self.terminal, PollFlags::IN)];
            let patience = Timespec::try_from(PATIENCE).unwrap();
            let ready = poll(&mut ready, Some(&patience)).unwrap();
            assert_ne!(ready, 0, "no '{end}' in: {:?}", self.text);
            let mut chunk = [0; 1024];
            let len = self.terminal.read(&mut chunk).unwrap();
            self.text.push_str(&String::from_utf8_lossy(&chunk[..len]));
        }
    }

    fn is_raw(&self) -> bool {
        let modes = tcgetattr(&self.peer).unwrap().local_modes;
        !modes.contains(LocalModes::ICANON)
    }

    /// Waits for the process to end, and checks that the terminal is as it was.
    fn end(mut self) -> ExitStatus {
        let status = self.child.wait().unwrap();
        let after = tcgetattr(&self.peer).unwrap();
        assert_eq!(after.local_modes, self.before.local_modes);
        assert_eq!(after.input_modes, self.before.input_modes);
        assert_eq!(after.output_modes, self.before.output_modes);
        status
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        // One that has ended is left alone.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[test]
fn guest_and_monitor_share_a_terminal() {
    require_kvm!();
    let dir = scratch();
    let mut session = Session::shared(dir.path());
    assert!(session.is_raw());
    session.send(b"hello guest\r");
    session.expect("hello guest");
    session.send(b"\x01c");
    session.expect("(ferry) ");
    session.send(b"info status\r");
    session.expect("VM status: running");
    session.send(b"stop\r");
    session.send(b"info status\r");
    session.expect("VM status: paused");
    session.send(b"cont\r");
    session.expect("(ferry) ");
    session.send(b"\x01c");
    session.send(b"again\r");
    session.expect("again");
    session.send(b"\x01x");
    assert!(session.end().success());
}

#[test]
fn the_terminal_is_restored_after_a_signal_and_a_power_off() {
    require_kvm!();
    let dir = scratch();
    for signal in [Signal::TERM, Signal::HUP, Signal::INT] {
        let session = Session::shared(dir.path());
        assert!(session.is_raw());
        kill_process(Pid::from_child(&session.child), signal).unwrap();
        session.end();
    }
    let mut session = Session::shared(dir.path());
    session.send(&[echo::command::QUIT]);
    assert!(session.end().success());

    let mut session = Session::shared(dir.path());
    session.send(b"\x01c");
    session.expect("(ferry) ");
    session.send(b"quit\r");
    assert!(session.end().success());
}

fn boot_guest(dir: &Path) -> String {
    let kernel = dir.join("kernel");
    std::fs::write(&kernel, guest_tests::BOOT).unwrap();
    kernel.display().to_string()
}

/// Runs a guest that says how it was booted and powers off, with its serial port there.
fn boot_to(dir: &Path, serial: &str) -> Process {
    let kernel = boot_guest(dir);
    let append = boot::Options {
        then: Then::Off,
        cpus: 1,
    };
    let append = append.to_string();
    let arguments = [
        "run", "--kernel", &kernel, "--append", &append, "--memory", "64M", "--serial", serial,
    ];
    Process::spawn(ferry(), arguments, &dir.join("log")).unwrap()
}

fn assert_whole(said: &str) {
    assert!(said.contains("\nentered protocol=pvh"), "{said}");
    assert!(said.ends_with("\ndone then=off\n"), "{said}");
}

#[test]
fn a_file_gets_all_that_the_guest_says() {
    require_kvm!();
    let dir = scratch();
    let path = dir.path().join("serial");
    std::fs::write(&path, "what was there before").unwrap();
    let mut process = boot_to(dir.path(), &format!("file:{}", path.display()));
    let status = process.wait(PATIENCE).unwrap().expect("it ends");
    assert!(status.success(), "{}", process.output());
    let said = std::fs::read_to_string(&path).unwrap();
    assert_whole(&said);
    assert!(!said.contains("before"), "{said}");
}

#[test]
fn a_fifo_gets_all_that_the_guest_says() {
    require_kvm!();
    let dir = scratch();
    let path = dir.path().join("fifo");
    rustix::fs::mknodat(
        rustix::fs::CWD,
        &path,
        rustix::fs::FileType::Fifo,
        rustix::fs::Mode::from_raw_mode(0o600),
        0,
    )
    .unwrap();
    let mut process = boot_to(dir.path(), &format!("file:{}", path.display()));
    let mut said = String::new();
    // Waits for ferry to open it, and then for it to close it.
    File::open(&path)
        .unwrap()
        .read_to_string(&mut said)
        .unwrap();
    assert_whole(&said);
    let status = process.wait(PATIENCE).unwrap().expect("it ends");
    assert!(status.success(), "{}", process.output());
}

#[test]
fn a_pty_is_named_and_works_both_ways() {
    require_kvm!();
    let dir = scratch();
    let kernel = dir.path().join("kernel");
    std::fs::write(&kernel, guest_tests::ECHO).unwrap();
    let kernel = kernel.display().to_string();
    let qmp = format!("unix:{}", dir.path().join("qmp").display());
    let arguments = [
        "run", "--kernel", &kernel, "--memory", "64M", "--serial", "pty", "--qmp", &qmp, "--paused",
    ];
    let mut process = Process::spawn(ferry(), arguments, &dir.path().join("log")).unwrap();
    // QMP is there after the pty's name was said.
    let mut client =
        guest_tests::driver::qmp::Client::connect(&dir.path().join("qmp"), PATIENCE).unwrap();
    let output = process.output();
    let (_, rest) = output
        .split_once("char device redirected to ")
        .unwrap_or_else(|| panic!("no pty in: {output}"));
    let path = rest.split_whitespace().next().unwrap();
    let mut pty = File::options().read(true).write(true).open(path).unwrap();
    // It is as a serial line should be.
    assert!(
        !tcgetattr(&pty)
            .unwrap()
            .local_modes
            .contains(LocalModes::ECHO)
    );
    client.execute("cont", serde_json::Value::Null).unwrap();
    let mut said = String::new();
    let mut expect = |pty: &mut File, end: &str| {
        while !said.contains(end) {
            let mut chunk = [0; 256];
            let len = pty.read(&mut chunk).unwrap();
            assert_ne!(len, 0, "{said}");
            said.push_str(&String::from_utf8_lossy(&chunk[..len]));
        }
    };
    expect(&mut pty, "ready via=pic");
    pty.write_all(b"over the pty").unwrap();
    expect(&mut pty, "over the pty");
    pty.write_all(&[echo::command::QUIT]).unwrap();
    let status = process.wait(PATIENCE).unwrap().expect("it ends");
    assert!(status.success(), "{}", process.output());
}
