//! The user's terminal: a pty with a child process on it, which is this test binary.

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::Arc;

use rustix::process::{Pid, Signal, kill_process};
use rustix::termios::{LocalModes, Termios, tcgetattr};

use super::signals::{Termination, Terminations};
use super::*;
use crate::control::command::{Control, EventKind, ShutdownCause};
use crate::control::fake::FakeMachine;
use crate::control::monitor;

/// What the child does, by the value of this variable.
const CHILD: &str = "FERRY_TEST_TERMINAL";

/// A guest that answers each byte with itself in brackets.
struct Echo(SerialOutput);

impl SerialInput for Echo {
    fn room(&self) -> usize {
        16
    }

    fn push(&self, bytes: &[u8]) {
        for byte in bytes {
            self.0.send(format!("<{byte:02x}>").as_bytes());
        }
    }

    fn push_break(&self) {
        self.0.send(b"<break>");
    }
}

/// The child's part.
#[test]
#[ignore = "the other tests run it in a process of its own"]
fn child() {
    let Ok(mode) = std::env::var(CHILD) else {
        return;
    };
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap();
    runtime.block_on(async {
        let machine = FakeMachine::new();
        let mut events = machine.subscribe();
        let mut terminations = Terminations::new().unwrap();
        let serial = if mode == "monitor" {
            SerialBackend::None
        } else {
            SerialBackend::Stdio
        };
        let console = Console::open(&serial, mode != "serial").unwrap();
        console.connect_guest(Arc::new(Echo(console.output())));
        if mode != "serial" {
            let foreground = monitor::terminal::spawn(machine.clone()).unwrap();
            let quit = machine.clone();
            console.connect_monitor(
                foreground,
                Box::new(move || quit.quit(ShutdownCause::HostUi, false).unwrap()),
            );
        }
        console.output().send(b"ready\n");
        match mode.as_str() {
            "panic" => panic!("on purpose"),
            "exit" => std::process::exit(7),
            _ => {}
        }
        loop {
            tokio::select! {
                event = events.recv() => {
                    if let EventKind::Shutdown { reason, .. } = event.unwrap().kind {
                        drop(console);
                        println!("ended by {reason:?}");
                        break;
                    }
                }
                signal = terminations.next() => {
                    assert_ne!(signal, Termination::Quit);
                    // Without dropping the console, as a process that hangs at its end.
                    std::process::exit(128 + signal.number());
                }
            }
        }
    });
}

struct Session {
    child: Child,
    terminal: File,
    /// Kept open, so that the terminal can be looked at when the child has ended.
    peer: OwnedFd,
    before: Termios,
    text: String,
}

impl Session {
    fn start(mode: &str) -> Self {
        let (master, peer) = pty::pair().unwrap();
        let before = tcgetattr(&peer).unwrap();
        let end = || Stdio::from(peer.try_clone().unwrap());
        let child = Command::new(std::env::current_exe().unwrap())
            .args([
                "--exact",
                "console::terminal_tests::child",
                "--ignored",
                "--nocapture",
            ])
            .env(CHILD, mode)
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

    fn send(&mut self, bytes: &[u8]) {
        self.terminal.write_all(bytes).unwrap();
    }

    /// Reads up to and including this text; returns what came before.
    fn expect(&mut self, end: &str) -> String {
        loop {
            if let Some(at) = self.text.find(end) {
                let rest = self.text.split_off(at + end.len());
                let mut found = std::mem::replace(&mut self.text, rest);
                found.truncate(at);
                return found;
            }
            let mut chunk = [0; 1024];
            let len = self.terminal.read(&mut chunk).unwrap();
            assert_ne!(len, 0);
            self.text.push_str(&String::from_utf8_lossy(&chunk[..len]));
        }
    }

    fn is_raw(&self) -> bool {
        !tcgetattr(&self.peer)
            .unwrap()
            .local_modes
            .contains(LocalModes::ICANON)
    }

    fn signal(&self, signal: Signal) {
        let pid = Pid::from_child(&self.child);
        kill_process(pid, signal).unwrap();
    }

    /// Waits for the child's end and checks that the terminal is as it was.
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
        // Nothing is left behind by a test that fails; one that has ended is left alone.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[test]
fn guest_and_monitor_share_the_keyboard() {
    let mut session = Session::start("shared");
    session.expect("ready");
    assert!(session.is_raw());
    // Ctrl-C and Ctrl-a itself go to the guest.
    session.send(b"a\x03\x01\x01\r");
    session.expect("<61><03><01><0d>");
    session.send(b"\x01b");
    session.expect("<break>");
    session.send(b"\x01h");
    session.expect("Ctrl-a x");
    // What the monitor has said is kept until it has the keyboard.
    assert!(!session.text.contains("monitor - type"));
    session.send(b"\x01c");
    session.expect(monitor::GREETING);
    session.expect(monitor::PROMPT);
    session.send(b"info sta\t\r");
    session.expect("VM status: running");
    session.expect(monitor::PROMPT);
    session.send(b"\x01c");
    session.send(b"z");
    session.expect("<7a>");
    session.send(b"\x01c");
    session.expect(monitor::PROMPT);
    // The line before is in the history.
    session.send(b"\x1b[A\r");
    session.expect("VM status: running");
    session.send(b"\x01x");
    session.expect("ended by HostUi");
    assert!(session.end().success());
}

#[test]
fn input_that_is_no_terminal_is_shared_as_well() {
    let mut child = Command::new(std::env::current_exe().unwrap())
        .args([
            "--exact",
            "console::terminal_tests::child",
            "--ignored",
            "--nocapture",
        ])
        .env(CHILD, "shared")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let keys = b"a\x01cinfo status\ninfo name\nquit\n";
    child.stdin.take().unwrap().write_all(keys).unwrap();
    let output = child.wait_with_output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    for part in [
        "<61>",
        "VM status: running\n",
        "fake\n",
        "ended by HostQmpQuit",
    ] {
        assert!(text.contains(part), "{part} is not in {text}");
    }
    assert!(output.status.success());
}

#[test]
fn ctrl_c_cancels_the_migration_that_is_waited_for() {
    let mut session = Session::start("monitor");
    session.expect(monitor::PROMPT);
    session.send(b"migrate tcp:h:1\r");
    // The line is rewritten in place.
    session.expect("\r\x1b[Kconnecting");
    session.expect("\r\x1b[Kconnecting");
    session.send(b"\x03");
    session.expect("Error: migration cancelled");
    session.expect(monitor::PROMPT);
    // While nothing is waited for, it gives up the line.
    session.send(b"nonsense\x03");
    session.expect("nonsense");
    session.send(b"quit\r");
    session.expect("ended by HostQmpQuit");
    assert!(session.end().success());
}

#[test]
fn without_a_monitor_ctrl_a_is_the_guests_and_ctrl_c_is_not() {
    let mut session = Session::start("serial");
    session.expect("ready");
    session.send(b"\x01c");
    session.expect("<01><63>");
    // The child has no controlling terminal here, so the mode is all there is to see.
    assert!(
        tcgetattr(&session.peer)
            .unwrap()
            .local_modes
            .contains(LocalModes::ISIG)
    );
    session.signal(Signal::INT);
    assert_eq!(session.end().code(), Some(128 + 2));
}

#[test]
fn the_terminal_is_restored_on_every_way_out() {
    for (signal, number) in [(Signal::TERM, 15), (Signal::HUP, 1), (Signal::INT, 2)] {
        let mut session = Session::start("shared");
        session.expect("ready");
        session.signal(signal);
        assert_eq!(session.end().code(), Some(128 + number));
    }
    let mut session = Session::start("exit");
    session.expect("ready");
    assert_eq!(session.end().code(), Some(7));
    let mut session = Session::start("panic");
    session.expect("ready");
    assert!(!session.end().success());
}
