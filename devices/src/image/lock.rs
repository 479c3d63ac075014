//! Locks that keep processes from using one image in ways that do not fit together.
//!
//! They are those of QEMU's file driver, so that a QEMU and a Ferry exclude each other: a shared
//! lock on byte 100+n says that a process uses permission n, one on byte 200+n that it does not
//! let others use it. A process takes its locks first and then looks for conflicting ones: of two
//! that come at once, at least one sees the other. They are locks of the open file (OFD), so two
//! images in one process exclude each other too, and the end of a process frees them.

// `fcntl` for OFD locks of single bytes has no safe wrapper.
#![allow(unsafe_code)]

use std::io;
use std::os::fd::AsRawFd;

use super::file::HostFile;
use super::{Error, Format, Result};

const USED: i64 = 100;
const UNSHARED: i64 = 200;

/// QEMU's names, by bit.
const NAMES: [&str; 4] = ["consistent read", "write", "write unchanged", "resize"];
const CONSISTENT_READ: u8 = 1 << 0;
const WRITE: u8 = 1 << 1;
const RESIZE: u8 = 1 << 3;

/// What is done with a file of an image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Use {
    /// It is only read: others may read too.
    Read,
    /// A disk is written in place.
    Write,
    /// A file that grows with what is written to the disk.
    WriteAndGrow,
}

impl Use {
    /// What writing an image of this format needs.
    pub(super) fn of(format: Format) -> Use {
        match format {
            Format::Raw => Use::Write,
            Format::Qcow2 => Use::WriteAndGrow,
        }
    }

    fn permissions(self) -> u8 {
        match self {
            Use::Read => CONSISTENT_READ,
            Use::Write => CONSISTENT_READ | WRITE,
            Use::WriteAndGrow => CONSISTENT_READ | WRITE | RESIZE,
        }
    }
}

/// Whatever an image is used for, nobody else may change it: its contents are cached here or in
/// the guest.
const NOT_SHARED: u8 = WRITE | RESIZE;

/// Takes the locks, or none.
pub(super) fn acquire(file: &HostFile, usage: Use) -> Result<()> {
    let result = take(file, usage);
    if result.is_err() {
        release(file);
    }
    result
}

fn take(file: &HostFile, usage: Use) -> Result<()> {
    let used = usage.permissions();
    for (n, _) in bits(used) {
        set(file, USED + n, libc::F_RDLCK)?;
    }
    for (n, _) in bits(NOT_SHARED) {
        set(file, UNSHARED + n, libc::F_RDLCK)?;
    }
    for (n, permission) in bits(used) {
        if held_by_other(file, UNSHARED + n)? {
            return Err(Error::Locked {
                path: file.path.clone(),
                permission,
                shared: false,
            });
        }
    }
    for (n, permission) in bits(NOT_SHARED) {
        if held_by_other(file, USED + n)? {
            return Err(Error::Locked {
                path: file.path.clone(),
                permission,
                shared: true,
            });
        }
    }
    Ok(())
}

/// Frees all locks on the file.
pub(super) fn release(file: &HostFile) {
    for n in 0..NAMES.len() as i64 {
        for byte in [USED + n, UNSHARED + n] {
            // Unlocking what is locked or not can't fail; the end of the process does it too.
            if let Err(error) = set(file, byte, libc::F_UNLCK) {
                tracing::warn!("{error}");
            }
        }
    }
}

fn bits(permissions: u8) -> impl Iterator<Item = (i64, &'static str)> {
    (0..)
        .zip(NAMES)
        .filter(move |(n, _)| permissions & (1 << n) != 0)
}

fn set(file: &HostFile, byte: i64, kind: libc::c_int) -> Result<()> {
    fcntl(file, libc::F_OFD_SETLK, byte, kind).map(drop)
}

/// A lock that excludes the shared ones is asked about, not taken.
fn held_by_other(file: &HostFile, byte: i64) -> Result<bool> {
    let found = fcntl(file, libc::F_OFD_GETLK, byte, libc::F_WRLCK)?;
    Ok(libc::c_int::from(found.l_type) != libc::F_UNLCK)
}

fn fcntl(file: &HostFile, op: libc::c_int, byte: i64, kind: libc::c_int) -> Result<libc::flock> {
    let mut lock = libc::flock {
        l_type: kind as libc::c_short,
        l_whence: libc::SEEK_SET as libc::c_short,
        l_start: byte,
        l_len: 1,
        l_pid: 0,
    };
    // SAFETY: the descriptor is open, and both operations take a pointer to a flock structure.
    if unsafe { libc::fcntl(file.file.as_raw_fd(), op, &raw mut lock) } == -1 {
        let source = io::Error::last_os_error();
        return Err(Error::Lock {
            path: file.path.clone(),
            source,
        });
    }
    Ok(lock)
}
