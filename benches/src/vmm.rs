//! The VMMs that are measured: how each is started, and where it differs in what it reports.

mod ferry;
mod qemu;
mod running;

use std::path::{Path, PathBuf};
use std::process::Command;

use clap::ValueEnum;
use serde::Serialize;
use serde_json::Value;

use crate::migration::Round;

pub use ferry::Ferry;
pub use qemu::Qemu;
pub use running::Running;

/// What a VMM boots.
#[derive(Clone, Debug)]
pub struct Guest {
    /// An ELF file with a PVH note.
    pub kernel: PathBuf,
    /// Its command line.
    pub append: String,
    /// Its RAM in bytes, whole MiB.
    pub memory: u64,
    /// Its vCPUs.
    pub vcpus: u8,
    /// Whether the destination takes all of its RAM from the host before it listens.
    pub prealloc: bool,
    /// Its disks.
    pub drives: Vec<Drive>,
}

/// A disk.
#[derive(Clone, Debug)]
pub struct Drive {
    /// The image.
    pub path: PathBuf,
    /// Its format.
    pub format: DriveFormat,
    /// How the host's page cache is used: `writeback` or `none`.
    pub cache: DriveCache,
    /// Bytes of the disk.
    pub size: u64,
}

/// An image's format.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum DriveFormat {
    /// As it is.
    Raw,
    /// QEMU's.
    Qcow2,
}

/// How the host's page cache is used.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum DriveCache {
    /// For reading and writing.
    Writeback,
    /// Not at all (`O_DIRECT`).
    None,
}

impl Drive {
    /// The options that all VMMs understand alike.
    fn options(&self) -> String {
        let format = match self.format {
            DriveFormat::Raw => "raw",
            DriveFormat::Qcow2 => "qcow2",
        };
        let cache = match self.cache {
            DriveCache::Writeback => "writeback",
            DriveCache::None => "none",
        };
        format!("file={},format={format},cache={cache}", self.path.display())
    }
}

/// What a process is to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// Boot the guest when `cont` says so.
    Source,
    /// Wait for `migrate-incoming`.
    Destination,
}

/// The sockets of a process.
#[derive(Clone, Debug)]
pub struct Sockets {
    /// Its QMP server.
    pub qmp: PathBuf,
    /// Its guest's serial port.
    pub serial: PathBuf,
}

/// The downtime as the source reports it, in milliseconds.
#[derive(Clone, Copy, Debug, Default, Serialize)]
pub struct Reported {
    /// The whole.
    pub total: f64,
    /// Stopping the vCPUs, where it is told.
    pub stop: Option<f64>,
    /// Sending the last pages.
    pub last_pages: Option<f64>,
    /// Saving the state.
    pub save: Option<f64>,
    /// Sending the state.
    pub send: Option<f64>,
    /// Checking and loading it.
    pub load: Option<f64>,
    /// From the agreement to the first instruction.
    pub start: Option<f64>,
    /// What the whole was estimated to be when it was decided to stop the guest.
    pub expected: Option<f64>,
}

/// The program that a VMM is, in whatever build or configuration.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Ferry.
    Ferry,
    /// QEMU.
    Qemu,
}

/// A VMM.
pub trait Vmm {
    /// For tables.
    fn name(&self) -> &str;

    /// Which one it is.
    fn kind(&self) -> Kind;

    /// The binary.
    fn program(&self) -> &Path;

    /// Its arguments for one end of a migration.
    fn arguments(&self, guest: &Guest, role: Role, sockets: &Sockets) -> Vec<String>;

    /// Its arguments for a guest that runs at once and writes to standard output.
    fn direct_arguments(&self, guest: &Guest) -> Vec<String>;

    /// Whether this build can have its RAM before it listens ([`Guest::prealloc`]).
    fn knows_prealloc(&self) -> bool {
        true
    }

    /// The downtime in an answer to `query-migrate`.
    fn downtime(&self, info: &Value) -> Option<Reported>;

    /// The rounds in an answer to `query-migrate` after the end, if it tells them.
    fn rounds(&self, _info: &Value) -> Option<Vec<Round>> {
        None
    }
}

/// What a VMM says of its version: the first line of `--version`.
pub fn version(vmm: &dyn Vmm) -> String {
    let output = Command::new(vmm.program()).arg("--version").output();
    let said = output.map(|output| output.stdout).unwrap_or_default();
    let said = String::from_utf8_lossy(&said);
    said.lines().next().unwrap_or_default().to_owned()
}
