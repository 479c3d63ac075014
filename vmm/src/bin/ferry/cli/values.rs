//! What stands behind an option, read and checked. QEMU's `key=value` forms are understood where
//! people are used to them.

use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;

use vmm::console::SerialBackend;
use vmm::control::command::{ParameterChange, Uri};
use vmm::control::size::parse_size;

use vmm::kvm::MAX_VCPUS;
use vmm::machine::config::BalloonOptions;
use vmm::machine::config::GivenNet;
use vmm::memory::MIN_RAM;

/// `--serial`.
pub(crate) fn serial(text: &str) -> Result<SerialBackend, String> {
    match text.split_once(':') {
        None if text == "stdio" => Ok(SerialBackend::Stdio),
        None if text == "pty" => Ok(SerialBackend::Pty),
        None if text == "none" || text == "null" => Ok(SerialBackend::None),
        Some(("file", "")) => Err("the path is missing (file:PATH)".into()),
        Some(("file", path)) => Ok(SerialBackend::File(path.into())),
        Some(("unix", rest)) => Ok(SerialBackend::Unix(unix_socket(rest)?)),
        _ => Err("expected stdio, file:PATH, unix:PATH, pty or none".into()),
    }
}

/// `--balloon`: what is not named is on.
pub(crate) fn balloon(text: &str) -> Result<BalloonOptions, String> {
    let mut options = BalloonOptions {
        free_page_reporting: true,
        free_page_hint: true,
        deflate_on_oom: true,
    };
    for field in text.split(',').filter(|_| !text.is_empty()) {
        let (name, value) = field.split_once('=').unwrap_or((field, "on"));
        let option = match name {
            "free-page-reporting" => &mut options.free_page_reporting,
            "free-page-hint" => &mut options.free_page_hint,
            "deflate-on-oom" => &mut options.deflate_on_oom,
            _ => {
                return Err(format!(
                    "'{name}' is not known: expected free-page-reporting, free-page-hint or \
                     deflate-on-oom"
                ));
            }
        };
        *option = match value {
            "on" => true,
            "off" => false,
            _ => return Err(format!("'{name}' is on or off, not '{value}'")),
        };
    }
    Ok(options)
}

/// `--monitor`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum MonitorSpec {
    /// Standard input and output, shared with the serial port if that is there too.
    Stdio,
    /// A Unix socket to listen on.
    Unix(PathBuf),
    /// None.
    None,
}

impl MonitorSpec {
    /// The socket's path.
    pub(crate) fn path(&self) -> Option<&PathBuf> {
        match self {
            Self::Unix(path) => Some(path),
            Self::Stdio | Self::None => None,
        }
    }
}

impl FromStr for MonitorSpec {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text.split_once(':') {
            None if text == "stdio" => Ok(Self::Stdio),
            None if text == "none" => Ok(Self::None),
            Some(("unix", rest)) => Ok(Self::Unix(unix_socket(rest)?)),
            _ => Err("expected stdio, unix:PATH or none".into()),
        }
    }
}

/// `--qmp`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum QmpSpec {
    /// A Unix socket to listen on.
    Unix(PathBuf),
    /// None.
    None,
}

impl QmpSpec {
    /// The socket's path.
    pub(crate) fn path(&self) -> Option<&PathBuf> {
        match self {
            Self::Unix(path) => Some(path),
            Self::None => None,
        }
    }
}

impl FromStr for QmpSpec {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text.split_once(':') {
            None if text == "none" => Ok(Self::None),
            Some(("unix", rest)) => Ok(Self::Unix(unix_socket(rest)?)),
            _ => Err("expected unix:PATH or none".into()),
        }
    }
}

/// Reads `PATH`, or QEMU's `PATH,server=on,wait=off`. In QEMU a comma in the path is doubled.
fn unix_socket(text: &str) -> Result<PathBuf, String> {
    let mut fields = split_commas(text).into_iter();
    let path = fields.next().unwrap_or_default();
    for field in fields {
        match field.as_str() {
            "server" | "server=on" | "nowait" | "wait=off" => {}
            "wait" | "wait=on" => {
                return Err(
                    "'wait=on' is not supported: ferry does not wait for a client \
                            (--paused keeps the guest from running)"
                        .into(),
                );
            }
            "server=off" => return Err("'server=off' is not supported: ferry listens".into()),
            _ => return Err(format!("'{field}' is not known behind unix:PATH")),
        }
    }
    match path.len() {
        0 => Err("the path is missing (unix:PATH)".into()),
        // sun_path has 108 bytes with the terminating NUL (unix(7)).
        108.. => Err("the path of a Unix socket has at most 107 bytes".into()),
        _ => Ok(path.into()),
    }
}

/// Cuts at commas; two in a row are one that belongs to the text, as in QEMU's options.
pub(super) fn split_commas(text: &str) -> Vec<String> {
    let mut fields = vec![String::new()];
    let mut rest = text.chars().peekable();
    while let Some(c) = rest.next() {
        if c == ',' && rest.next_if_eq(&',').is_none() {
            fields.push(String::new());
        } else if let Some(field) = fields.last_mut() {
            field.push(c);
        }
    }
    fields
}

/// `--net`: a tap. What QEMU's users give besides is understood where it means what ferry does.
pub(crate) fn net(text: &str) -> Result<GivenNet, String> {
    let mut fields = split_commas(text).into_iter();
    match fields.next().as_deref() {
        Some("tap") => {}
        Some(other) => {
            return Err(format!("'{other}' is not known: expected tap,ifname=NAME"));
        }
        None => return Err("expected tap,ifname=NAME".into()),
    }
    let (mut ifname, mut mac, mut id) = (None, None, None);
    for field in fields {
        let (key, value) = field.split_once('=').unwrap_or((&field, ""));
        match (key, value) {
            (_, "") => return Err(format!("'{key}' needs a value ({key}=…)")),
            ("ifname", name) => ifname = Some(name.to_owned()),
            ("mac" | "macaddr", address) => mac = Some(address.parse()?),
            ("id", name) => id = Some(name.to_owned()),
            ("script" | "downscript", "no") | ("vhost", "off") => {}
            ("script" | "downscript", _) => {
                return Err(format!(
                    "'{key}' is not supported: set the tap up before ferry runs (ip tuntap add)"
                ));
            }
            _ => {
                return Err(format!(
                    "'{field}' is not known: expected ifname=, mac= or id="
                ));
            }
        }
    }
    Ok(GivenNet {
        ifname: ifname.ok_or("the tap's name is missing (ifname=NAME)")?,
        mac,
        id,
    })
}

/// Two cards must not be confused.
pub(crate) fn check_nets(nets: &[GivenNet]) -> Result<(), String> {
    let ids: Vec<String> = nets
        .iter()
        .enumerate()
        .map(|(i, net)| net.id_at(i))
        .collect();
    for (index, (net, id)) in nets.iter().zip(&ids).enumerate() {
        for (other, other_id) in nets.iter().zip(&ids).skip(index + 1) {
            if net.mac.is_some() && net.mac == other.mac {
                return Err("two network cards (--net) have the same MAC address".into());
            }
            if id == other_id {
                return Err(format!("two network cards (--net) have the id {id}"));
            }
        }
    }
    Ok(())
}

/// `--incoming`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Incoming {
    /// Where to listen.
    At(Uri),
    /// Listen when `migrate_incoming` says where.
    Defer,
}

impl FromStr for Incoming {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "defer" => Ok(Self::Defer),
            _ => text.parse().map(Self::At).map_err(|error| {
                format!(
                    "{error}{}",
                    if text.contains(':') { "" } else { ", or defer" }
                )
            }),
        }
    }
}

/// `--name`: text, or QEMU's `guest=NAME,…`.
pub(crate) fn name(text: &str) -> Result<String, String> {
    let mut name = None;
    for (at, field) in split_commas(text).into_iter().enumerate() {
        match field.split_once('=') {
            Some(("guest", value)) => name = Some(value.to_owned()),
            // QEMU's own matters.
            Some(("process" | "debug-threads", _)) => {}
            None if at == 0 => name = Some(field),
            _ => {
                return Err(format!(
                    "'{field}' is not known here: expected NAME or guest=NAME"
                ));
            }
        }
    }
    match name {
        Some(name) if name.is_empty() => Err("the name is empty".into()),
        Some(name) if name.chars().any(char::is_control) || name.len() > 255 => {
            Err("a name has at most 255 bytes and no control characters".into())
        }
        Some(name) => Ok(name),
        None => Err("the name is missing".into()),
    }
}

/// A size in bytes: with a unit, or in MiB.
pub(crate) fn size(text: &str) -> Result<u64, String> {
    parse_size(text, 1 << 20).map_err(|error| error.to_string())
}

/// The size of a guest's memory.
pub(crate) fn memory(text: &str) -> Result<u64, String> {
    let bytes = size(text)?;
    if bytes < MIN_RAM {
        return Err("a guest has at least 16 MiB (16M)".into());
    }
    if !bytes.is_multiple_of(4096) {
        return Err("a guest's memory is a multiple of 4 KiB".into());
    }
    Ok(bytes)
}

/// `--smp`: a number, or QEMU's `cpus=N`.
pub(crate) fn cpus(text: &str) -> Result<u32, String> {
    let text = text.strip_prefix("cpus=").unwrap_or(text);
    if let Some((_, rest)) = text.split_once(',') {
        return Err(format!(
            "'{rest}' is not supported: all vCPUs are cores of one socket"
        ));
    }
    match text.parse() {
        Ok(cpus) if (1..=MAX_VCPUS).contains(&cpus) => Ok(cpus),
        _ => Err(format!("expected a number from 1 to {MAX_VCPUS}")),
    }
}

/// A time in milliseconds, up to QEMU's limit of a downtime.
pub(crate) fn milliseconds(text: &str) -> Result<Duration, String> {
    match text.strip_suffix("ms").unwrap_or(text).parse() {
        Ok(ms) if ms <= ParameterChange::MAX_DOWNTIME_LIMIT => Ok(Duration::from_millis(ms)),
        _ => Err(format!(
            "expected milliseconds, 0 to {}",
            ParameterChange::MAX_DOWNTIME_LIMIT
        )),
    }
}
