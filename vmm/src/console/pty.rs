//! A pty as the guest's serial port, and how to make one.

use std::ffi::OsStr;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::PathBuf;

use rustix::event::{PollFlags, Timespec};
use rustix::pty::{OpenptFlags, grantpt, ioctl_tiocgptpeer, openpt, ptsname, unlockpt};
use rustix::termios::{OptionalActions, tcgetattr, tcsetattr};

use super::input::Inlet;
use super::sink::Sink;

/// Makes a pty: its master and its other end, which becomes nobody's controlling terminal.
pub(super) fn pair() -> io::Result<(OwnedFd, OwnedFd)> {
    let flags = OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC;
    let master = openpt(flags)?;
    grantpt(&master)?;
    unlockpt(&master)?;
    let peer = ioctl_tiocgptpeer(&master, flags)?;
    Ok((master, peer))
}

/// A raw pty that nobody has opened: its master and the path of its other end.
pub(super) fn open() -> io::Result<(OwnedFd, PathBuf)> {
    let (master, peer) = pair()?;
    // The mode stays when the last one closes the other end, and only from then on does the
    // master tell whether somebody has opened it.
    let mut mode = tcgetattr(&peer)?;
    mode.make_raw();
    tcsetattr(&peer, OptionalActions::Now, &mode)?;
    let path = ptsname(&master, Vec::new())?;
    Ok((master, PathBuf::from(OsStr::from_bytes(path.as_bytes()))))
}

/// Hands input to the guest until the console is closed.
pub(super) fn run(inlet: &Inlet, master: &Sink) {
    /// While nobody has the pty open, waiting for it returns at once, so it is looked at now and
    /// then.
    const LOOK: Timespec = Timespec {
        tv_sec: 0,
        tv_nsec: 200_000_000,
    };
    while !inlet.is_closed() {
        if master.is_deserted() {
            inlet.wait([], Some(&LOOK));
            continue;
        }
        let room = inlet.room();
        let flags = if room > 0 {
            PollFlags::IN
        } else {
            PollFlags::empty()
        };
        let [ready] = inlet.wait([Some((master.as_fd(), flags))], None);
        if ready.contains(PollFlags::IN) {
            // An error says that the other end was closed: that shows above.
            inlet.transfer(master, room);
        }
    }
}
