//! Finding a tap interface, or making one.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::OpenOptionsExt;

use rustix::io::Errno;
use rustix::ioctl::{Opcode, Setter, Updater, ioctl};
use rustix::net::{AddressFamily, SocketType, socket};

use super::super::spec::header;

const TUN: &str = "/dev/net/tun";

/// The most bytes of an interface's name: IFNAMSIZ less the terminating zero.
pub const MAX_NAME: usize = libc::IFNAMSIZ - 1;

/// Why a tap can't be used.
#[derive(Debug, thiserror::Error)]
pub enum TapError {
    /// No such name.
    #[error("'{0}' is no name of an interface: 1 to {MAX_NAME} bytes, without spaces, '/' and ':'")]
    Name(String),
    /// The kernel has no taps.
    #[error("{TUN} is not there: load the kernel's module (modprobe tun)")]
    NoTun,
    /// It may not be used.
    #[error(
        "no right to use the tap {0}: this takes CAP_NET_ADMIN (root has it), or a tap that was \
         made for this user (ip tuntap add {0} mode tap user USER)"
    )]
    Denied(String),
    /// Somebody has it.
    #[error("the tap {0} is in use by another process")]
    Busy(String),
    /// An interface of another kind.
    #[error(
        "the interface {0} is there, but is no tap with one queue (ip tuntap add {0} mode tap)"
    )]
    NotATap(String),
    /// Anything else.
    #[error("the tap {name}: {what}: {source}")]
    Io {
        /// Which.
        name: String,
        /// What failed.
        what: &'static str,
        /// Why.
        source: Errno,
    },
}

/// Attaches to the tap of that name, or creates it; returns its descriptor, which doesn't block,
/// and its name.
pub(super) fn open(name: &str) -> Result<(File, String), TapError> {
    check_name(name)?;
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(libc::O_NONBLOCK)
        .open(TUN)
        .map_err(|err| match err.kind() {
            io::ErrorKind::NotFound => TapError::NoTun,
            io::ErrorKind::PermissionDenied => TapError::Denied(name.to_owned()),
            _ => failed(name, "cannot open /dev/net/tun", super::errno(&err)),
        })?;
    let name = attach(&file, name)?;
    // SAFETY: the kernel reads an int.
    let set = unsafe {
        let length =
            Setter::<{ libc::TUNSETVNETHDRSZ as Opcode }, _>::new(header::LEN as libc::c_int);
        ioctl(&file, length)
    };
    set.map_err(|err| failed(&name, "cannot set the length of headers", err))?;
    Ok((file, name))
}

fn check_name(name: &str) -> Result<(), TapError> {
    let bad = |c: char| c.is_whitespace() || c.is_control() || matches!(c, '/' | ':');
    // The kernel takes `%d`, and no other sign of the kind.
    let percent = name.replacen("%d", "", 1).contains('%');
    if name.is_empty() || name.len() > MAX_NAME || name.contains(bad) || percent {
        return Err(TapError::Name(name.to_owned()));
    }
    if matches!(name, "." | "..") {
        return Err(TapError::Name(name.to_owned()));
    }
    Ok(())
}

/// Makes `file` a tap of that name; returns the name that it has.
fn attach(file: &File, name: &str) -> Result<String, TapError> {
    let mut request = request(name);
    request.ifr_ifru.ifru_flags =
        (libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR) as libc::c_short;
    // SAFETY: the kernel reads and writes a struct ifreq.
    let attached = unsafe {
        let update = Updater::<{ libc::TUNSETIFF as Opcode }, _>::new(&mut request);
        ioctl(file, update)
    };
    attached.map_err(|err| match err {
        Errno::PERM | Errno::ACCESS => TapError::Denied(name.to_owned()),
        Errno::BUSY => TapError::Busy(name.to_owned()),
        Errno::INVAL => TapError::NotATap(name.to_owned()),
        err => failed(name, "cannot attach to it", err),
    })?;
    let name = request.ifr_name.iter().map(|&c| c as u8);
    let name: Vec<u8> = name.take_while(|&c| c != 0).collect();
    Ok(String::from_utf8_lossy(&name).into_owned())
}

/// An interface's MTU in bytes.
pub(super) fn mtu(name: &str) -> Result<u16, TapError> {
    let what = "cannot read its MTU";
    let socket = socket(AddressFamily::INET, SocketType::DGRAM, None)
        .map_err(|err| failed(name, what, err))?;
    let mut request = request(name);
    // SAFETY: the kernel reads and writes a struct ifreq.
    let asked = unsafe {
        let update = Updater::<{ libc::SIOCGIFMTU as Opcode }, _>::new(&mut request);
        ioctl(&socket, update)
    };
    asked.map_err(|err| failed(name, what, err))?;
    // SAFETY: this is the member that SIOCGIFMTU writes.
    let mtu = unsafe { request.ifr_ifru.ifru_mtu };
    u16::try_from(mtu).map_err(|_| failed(name, "its MTU makes no sense", Errno::INVAL))
}

fn request(name: &str) -> libc::ifreq {
    let mut bytes = [0; libc::IFNAMSIZ];
    // All but the last, which stays zero.
    for (to, from) in bytes.iter_mut().zip(name.bytes().take(MAX_NAME)) {
        *to = from as libc::c_char;
    }
    // SAFETY: all zeroes are a value of this structure of numbers.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    request.ifr_name = bytes;
    request
}

pub(super) fn failed(name: &str, what: &'static str, source: Errno) -> TapError {
    TapError::Io {
        name: name.to_owned(),
        what,
        source,
    }
}
