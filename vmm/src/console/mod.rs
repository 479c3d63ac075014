//! The host's end of the guest's serial port, and the user's terminal.
//!
//! [`Console::open`] takes the descriptors; then [`SerialOutput`] is where the serial port
//! writes, and [`SerialInput`] is what it offers for what comes in. Standard input and output can
//! be shared by the serial port and the monitor, as in QEMU: [`escape`] has the keys for that.
//! [`terminal`] restores the terminal on every way out.
//!
//! A console has two threads: one hands over output that is queued, one reads. They are separate
//! since the reader may have to wait for a vCPU that in turn waits for the output.

pub mod escape;
mod input;
mod output;
mod pty;
pub mod signals;
mod sink;
mod stdio;
pub mod terminal;
mod unix;
mod wake;

#[cfg(test)]
mod terminal_tests;
#[cfg(test)]
mod tests;

use std::io::{self, IsTerminal, stdin, stdout};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::{fmt, fs, thread};

use rustix::fs::{Mode, OFlags, fcntl_getfl, fcntl_setfl, open};
use rustix::io::fcntl_dupfd_cloexec;
use rustix::stdio::{dup2_stdin, dup2_stdout};
use rustix::termios::{
    LocalModes, OptionalActions, tcgetattr, tcgetwinsize, tcsetattr, tcsetwinsize,
};

use crate::control::monitor::terminal::Foreground;
use crate::control::socket::SocketFile;
use escape::Escape;
use input::Inlet;
pub use input::{InputWaker, SerialInput};
use output::Drain;
pub use output::{Interrupt, QUEUE, SerialOutput};
use sink::Sink;
use stdio::{Keyboard, MonitorEnd, MonitorHooks};
use terminal::{RawTerminal, Signals};

/// What the guest's serial port (`--serial`) or its virtio console (`--console`) is connected to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum SerialBackend {
    /// Standard input and output.
    Stdio,
    /// A file, which is created or emptied, or an existing FIFO or device. Output only.
    File(PathBuf),
    /// A Unix socket that is listened on.
    Unix(PathBuf),
    /// A new pty.
    Pty,
    /// Nothing: output is thrown away.
    None,
}

/// The open descriptors behind the serial port, and behind a monitor on standard input and
/// output. Dropping it closes them and restores the terminal; what has not been
/// [flushed](SerialOutput::flush_until) is lost.
#[must_use = "dropping it closes the console"]
pub struct Console {
    serial: SerialOutput,
    inlet: Arc<Inlet>,
    pty: Option<PathBuf>,
    hooks: Arc<Mutex<Option<MonitorHooks>>>,
    /// The inlets of all input threads.
    inlets: Vec<Arc<Inlet>>,
    _drains: Vec<Drain>,
    _socket: Option<SocketFile>,
    _stdout: Option<RealOutput>,
    _raw: Option<RawTerminal>,
}

impl fmt::Debug for Console {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Console")
            .field("pty", &self.pty)
            .finish_non_exhaustive()
    }
}

impl Console {
    /// Opens the serial port's host side and, if the monitor is on standard input and output,
    /// the terminal for both. After that, the process's own standard input and output are those
    /// of the monitor: start [it](crate::control::monitor::terminal::spawn) then, and
    /// [connect](Self::connect_monitor) it.
    pub fn open(serial: &SerialBackend, monitor_on_stdio: bool) -> io::Result<Self> {
        Self::open_as("serial port", serial, monitor_on_stdio)
    }

    /// The same for another device than the serial port, which messages call `device`. One
    /// console of a process can be on standard input and output.
    pub fn open_as(
        device: &str,
        serial: &SerialBackend,
        monitor_on_stdio: bool,
    ) -> io::Result<Self> {
        let context = |what: &str, error: io::Error| {
            io::Error::new(
                error.kind(),
                format!("cannot open the {device}'s {what}: {error}"),
            )
        };
        let mut console = match serial {
            SerialBackend::Stdio => Self::with_sink(Some(Sink::shared(stdout().as_fd())?))?,
            SerialBackend::None => Self::with_sink(None)?,
            SerialBackend::File(path) => {
                let file = open_file(path)
                    .map_err(|error| context(&format!("file {}", path.display()), error))?;
                Self::with_sink(Some(Sink::owned(file)?))?
            }
            SerialBackend::Unix(path) => Self::with_socket(path)?,
            SerialBackend::Pty => Self::with_pty().map_err(|error| context("pty", error))?,
        };
        let serial_on_stdio = *serial == SerialBackend::Stdio;
        if serial_on_stdio || monitor_on_stdio {
            console.take_stdio(serial_on_stdio, monitor_on_stdio)?;
        }
        Ok(console)
    }

    fn with_sink(sink: Option<Sink>) -> io::Result<Self> {
        let (serial, drain) = SerialOutput::new(sink)?;
        let inlet = Inlet::new()?;
        Ok(Self {
            serial,
            inlets: vec![Arc::clone(&inlet)],
            inlet,
            pty: None,
            hooks: Arc::default(),
            _drains: vec![drain],
            _socket: None,
            _stdout: None,
            _raw: None,
        })
    }

    fn with_socket(path: &Path) -> io::Result<Self> {
        let (listener, file) = SocketFile::listen(path)?;
        listener.set_nonblocking(true)?;
        let mut console = Self::with_sink(None)?;
        console._socket = Some(file);
        let (inlet, output) = (Arc::clone(&console.inlet), console.serial.clone());
        spawn(move || unix::run(&inlet, &output, &listener))?;
        Ok(console)
    }

    fn with_pty() -> io::Result<Self> {
        let (master, path) = pty::open()?;
        let reader = Sink::pty(fcntl_dupfd_cloexec(&master, 0)?)?;
        let mut console = Self::with_sink(Some(Sink::pty(master)?))?;
        tracing::info!(path = %path.display(), "a console is a pty");
        console.pty = Some(path);
        let inlet = Arc::clone(&console.inlet);
        spawn(move || pty::run(&inlet, &reader))?;
        Ok(console)
    }

    /// Has the keys of standard input read, for the guest, the monitor or both.
    fn take_stdio(&mut self, serial: bool, monitor: bool) -> io::Result<()> {
        let terminal = stdin().is_terminal();
        if !serial && !terminal {
            // The monitor reads lines by itself.
            return Ok(());
        }
        if terminal {
            // Alone, the guest's user ends ferry with Ctrl-C, as in QEMU.
            let signals = if monitor {
                Signals::Reader
            } else {
                Signals::Process
            };
            self._raw = Some(RawTerminal::new(stdin().as_fd(), signals)?);
        }
        let keys = fcntl_dupfd_cloexec(stdin(), 0)?;
        let screen = if serial {
            self.serial.clone()
        } else {
            let (screen, drain) = SerialOutput::new(Some(Sink::shared(stdout().as_fd())?))?;
            self._drains.push(drain);
            screen
        };
        let inlet = if serial {
            Arc::clone(&self.inlet)
        } else {
            let inlet = Inlet::new()?;
            self.inlets.push(Arc::clone(&inlet));
            inlet
        };
        let monitor = if monitor {
            Some(self.replace_standard(terminal)?)
        } else {
            None
        };
        let keyboard = Keyboard {
            inlet,
            stdin: keys,
            screen,
            guest_focus: serial,
            escape: (serial && monitor.is_some()).then(Escape::default),
            monitor,
            hooks: Arc::clone(&self.hooks),
            monitor_seen: !serial,
        };
        spawn(move || keyboard.run())
    }

    /// Gives the process another standard input and, to edit lines, another terminal: the line
    /// editor knows no other descriptors. Returns the ends that lead there.
    fn replace_standard(&mut self, terminal: bool) -> io::Result<MonitorEnd> {
        let end = if terminal && stdout().is_terminal() {
            let (master, peer) = pty::pair()?;
            // What is typed ahead of the editor reaches it; Ctrl-C would throw it away.
            let mut mode = tcgetattr(&peer)?;
            mode.local_modes.remove(LocalModes::ISIG);
            tcsetattr(&peer, OptionalActions::Now, &mode)?;
            if let Ok(size) = tcgetwinsize(stdin()) {
                tcsetwinsize(&master, size)?;
            }
            self._stdout = Some(RealOutput(fcntl_dupfd_cloexec(stdout(), 0)?));
            dup2_stdin(&peer)?;
            dup2_stdout(&peer)?;
            MonitorEnd {
                keys: Some(fcntl_dupfd_cloexec(&master, 0)?),
                screen: Some(master),
            }
        } else {
            let (reader, writer) = io::pipe()?;
            dup2_stdin(&reader)?;
            MonitorEnd {
                keys: Some(OwnedFd::from(writer)),
                screen: None,
            }
        };
        if let Some(keys) = &end.keys {
            fcntl_setfl(keys, fcntl_getfl(keys)? | OFlags::NONBLOCK)?;
        }
        Ok(end)
    }

    /// Where the guest's serial port writes.
    pub fn output(&self) -> SerialOutput {
        self.serial.clone()
    }

    /// What the serial port calls when the guest has read.
    pub fn input_waker(&self) -> InputWaker {
        InputWaker(Arc::clone(&self.inlet))
    }

    /// Connects the guest's serial port: from here on, input arrives there.
    pub fn connect_guest(&self, guest: Arc<dyn SerialInput>) {
        self.inlet.connect(guest);
    }

    /// Connects the monitor on standard input and output. `quit` is called on Ctrl-a x, on a
    /// thread of the console.
    pub fn connect_monitor(&self, foreground: Arc<Foreground>, quit: Box<dyn Fn() + Send>) {
        let hooks = MonitorHooks { foreground, quit };
        *self.hooks.lock().unwrap_or_else(PoisonError::into_inner) = Some(hooks);
    }

    /// Where the other end of the pty is, if the serial port is one.
    pub fn pty_path(&self) -> Option<&Path> {
        self.pty.as_deref()
    }
}

impl Drop for Console {
    fn drop(&mut self) {
        if let Some(hooks) = &*self.hooks.lock().unwrap_or_else(PoisonError::into_inner) {
            hooks.foreground.close();
        }
        for inlet in &self.inlets {
            inlet.close();
        }
    }
}

/// The standard output that the process was started with; dropping it puts it back. Standard
/// input is not put back: the editor's thread may still be there, and would take the terminal.
struct RealOutput(OwnedFd);

impl Drop for RealOutput {
    fn drop(&mut self) {
        if let Err(error) = dup2_stdout(&self.0) {
            tracing::warn!(%error, "cannot put standard output back");
        }
    }
}

/// Starts an input thread. It is not waited for at the end: it may be waiting for the guest.
fn spawn(run: impl FnOnce() + Send + 'static) -> io::Result<()> {
    thread::Builder::new()
        .name("console-in".into())
        .spawn(run)
        .map(drop)
}

fn open_file(path: &Path) -> io::Result<OwnedFd> {
    // With O_RDWR a FIFO can be opened and written while nobody reads it (fifo(7)).
    let how = if fs::metadata(path).is_ok_and(|metadata| metadata.file_type().is_fifo()) {
        OFlags::RDWR
    } else {
        OFlags::WRONLY | OFlags::CREATE | OFlags::TRUNC
    };
    let always = OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
    Ok(open(path, how | always, Mode::from_raw_mode(0o666))?)
}
