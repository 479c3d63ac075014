//! Standard input: keys for the guest, for the monitor, or for both in turn.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::{Arc, Mutex, PoisonError};

use rustix::event::PollFlags;
use rustix::io::Errno;
use rustix::termios::{tcgetwinsize, tcsetwinsize};

use super::escape::{Escape, HELP, Key};
use super::input::Inlet;
use super::output::SerialOutput;
use crate::control::monitor::CANCEL;
use crate::control::monitor::terminal::Foreground;

/// How many bytes are read ahead for one that does not take them, so that Ctrl-a is still seen.
const AHEAD: usize = 4096;

/// What the keys do beside being input: set when the monitor runs.
pub(super) struct MonitorHooks {
    pub(super) foreground: Arc<Foreground>,
    pub(super) quit: Box<dyn Fn() + Send>,
}

/// The monitor's end of standard input and output, which the process itself sees as 0 and 1.
pub(super) struct MonitorEnd {
    /// Its keys go here.
    pub(super) keys: Option<OwnedFd>,
    /// Its output comes from here, if it edits lines; otherwise it writes to standard output.
    pub(super) screen: Option<OwnedFd>,
}

/// Who reads the keys.
pub(super) struct Keyboard {
    pub(super) inlet: Arc<Inlet>,
    /// The real standard input.
    pub(super) stdin: OwnedFd,
    /// The real standard output.
    pub(super) screen: SerialOutput,
    /// Whether the guest has the keyboard, at first.
    pub(super) guest_focus: bool,
    /// The commands behind Ctrl-a, if guest and monitor share the keyboard.
    pub(super) escape: Option<Escape>,
    pub(super) monitor: Option<MonitorEnd>,
    pub(super) hooks: Arc<Mutex<Option<MonitorHooks>>>,
    /// Whether the monitor has had the keyboard, and so has shown its prompt.
    pub(super) monitor_seen: bool,
}

impl Keyboard {
    /// Hands keys on until the console is closed.
    pub(super) fn run(mut self) {
        if self.monitor.is_none() {
            return self.run_guest_only();
        }
        let mut to_guest = VecDeque::new();
        let mut to_monitor = VecDeque::new();
        let mut typing = true;
        while !self.inlet.is_closed() {
            if !to_guest.is_empty() {
                let room = self.inlet.room().min(to_guest.len());
                let now: Vec<u8> = to_guest.drain(..room).collect();
                self.inlet.push(&now);
            }
            let listening = typing && to_guest.len() < AHEAD && to_monitor.len() < AHEAD;
            let keys = self
                .monitor
                .as_ref()
                .and_then(|monitor| monitor.keys.as_ref());
            let screen = self
                .monitor
                .as_ref()
                .and_then(|monitor| monitor.screen.as_ref());
            // What the monitor says while the guest has the keyboard is kept for later.
            let [typed, takes, says] = self.inlet.wait(
                [
                    listening.then_some((self.stdin.as_fd(), PollFlags::IN)),
                    keys.filter(|_| !to_monitor.is_empty())
                        .map(|fd| (fd.as_fd(), PollFlags::OUT)),
                    screen
                        .filter(|_| !self.guest_focus)
                        .map(|fd| (fd.as_fd(), PollFlags::IN)),
                ],
                None,
            );
            if let (Some(screen), true) = (screen, says.contains(PollFlags::IN)) {
                let mut text = [0; 1024];
                if let Ok(len) = rustix::io::read(screen, &mut text) {
                    self.screen.send(text.get(..len).unwrap_or_default());
                }
            }
            if let (Some(keys), false) = (keys, takes.is_empty()) {
                let bytes: &[u8] = to_monitor.make_contiguous();
                match rustix::io::write(keys, bytes) {
                    Ok(len) => _ = to_monitor.drain(..len.min(to_monitor.len())),
                    Err(Errno::AGAIN | Errno::INTR) => {}
                    // The monitor is gone; the keys lead nowhere.
                    Err(_) => to_monitor.clear(),
                }
            }
            if !typed.is_empty() {
                let mut bytes = [0; 256];
                match rustix::io::read(&self.stdin, &mut bytes) {
                    Ok(len @ 1..) => {
                        for byte in bytes.iter().take(len) {
                            self.key(*byte, &mut to_guest, &mut to_monitor);
                        }
                    }
                    Err(Errno::AGAIN | Errno::INTR) => {}
                    Ok(_) | Err(_) => typing = false,
                }
            }
            if let Some(monitor) = &mut self.monitor
                && !typing
                && to_monitor.is_empty()
            {
                monitor.keys = None;
            }
        }
    }

    /// Without a monitor no key has a meaning, so none is read before the guest can take it.
    fn run_guest_only(&self) {
        let mut typing = true;
        while !self.inlet.is_closed() {
            let room = if typing { self.inlet.room() } else { 0 };
            let stdin = (room > 0).then_some((self.stdin.as_fd(), PollFlags::IN));
            let [ready] = self.inlet.wait([stdin], None);
            if !ready.is_empty() {
                typing = self.inlet.transfer(&self.stdin, room);
            }
        }
    }

    fn key(&mut self, byte: u8, to_guest: &mut VecDeque<u8>, to_monitor: &mut VecDeque<u8>) {
        let key = self
            .escape
            .as_mut()
            .map_or(Key::Input(byte), |escape| escape.feed(byte));
        match key {
            Key::Input(byte) if self.guest_focus => to_guest.push_back(byte),
            Key::Input(CANCEL) if self.is_busy() => {
                self.with_hooks(|hooks| hooks.foreground.cancel())
            }
            Key::Input(byte) => {
                if byte == b'\r' {
                    self.copy_window_size();
                }
                to_monitor.push_back(byte);
            }
            Key::Nothing => {}
            Key::Switch => {
                self.guest_focus = !self.guest_focus;
                self.screen.send(b"\r\n");
                if !self.guest_focus && self.edits() {
                    self.copy_window_size();
                    // An editor that waits shows its prompt again if the line is given up.
                    if std::mem::replace(&mut self.monitor_seen, true) && !self.is_busy() {
                        to_monitor.push_back(CANCEL);
                    }
                }
            }
            Key::Quit => self.with_hooks(|hooks| (hooks.quit)()),
            Key::Help => self.screen.send(HELP.as_bytes()),
            Key::Break => {
                if let Some(guest) = self.inlet.guest() {
                    guest.push_break();
                }
            }
        }
    }

    fn with_hooks(&self, action: impl FnOnce(&MonitorHooks)) {
        let hooks = self.hooks.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(hooks) = &*hooks {
            action(hooks);
        }
    }

    fn is_busy(&self) -> bool {
        let mut busy = false;
        self.with_hooks(|hooks| busy = hooks.foreground.is_busy());
        busy
    }

    fn edits(&self) -> bool {
        self.monitor
            .as_ref()
            .is_some_and(|monitor| monitor.screen.is_some())
    }

    /// The editor asks its own terminal how wide it is.
    fn copy_window_size(&self) {
        if let Some(MonitorEnd {
            screen: Some(screen),
            ..
        }) = &self.monitor
        {
            let copied: io::Result<()> = tcgetwinsize(&self.stdin)
                .and_then(|size| tcsetwinsize(screen, size))
                .map_err(io::Error::from);
            if let Err(error) = copied {
                tracing::debug!(%error, "the terminal's size is unknown");
            }
        }
    }
}
