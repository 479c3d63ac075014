//! What the two sides of a migration tell and check about the machine before any page moves.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;

use devices::image::{Fingerprint, Format};
use migration::section::{Section, SectionError, Sections};
use serde::{Deserialize, Serialize};

use crate::cpuid::{GuestCpu, HostCpu, compatibility};
use crate::machine::config::{Given, MachineConfig};
use crate::section_body::{self, BodyError};

/// The names of the configuration sections, and the version of each that this build speaks.
const MACHINE: (&str, u32) = ("machine", 1);
const CPU: (&str, u32) = ("cpu", 1);
const VIRTIO: (&str, u32) = ("virtio", 1);
const DISKS: (&str, u32) = ("disks", 1);

/// The most bytes of a guest's name.
const MAX_NAME: usize = 255;

/// The most bytes of the body of such a section.
const MAX_BODY: usize = 256 << 10;

/// The names of the files that travel with a guest.
pub(super) const KERNEL: &str = "kernel";
/// See [`KERNEL`].
pub(super) const INITRD: &str = "initrd";

/// Why an offer can't be made or read.
#[derive(Debug, thiserror::Error)]
pub(super) enum OfferError {
    /// A section is not as it should be.
    #[error("configuration section '{section}': {source}")]
    Body {
        /// Its name.
        section: &'static str,
        /// What is wrong.
        source: BodyError,
    },
    /// The set of sections is not as it should be.
    #[error("configuration: {0}")]
    Sections(#[from] SectionError),
    /// A boot file can't be read.
    #[error("cannot read {file}: {source}")]
    File {
        /// Which.
        file: String,
        /// Why.
        source: io::Error,
    },
}

/// A file that both sides may have, by its contents.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct FileIdentity {
    pub(super) name: String,
    pub(super) len: u64,
    pub(super) crc32: u32,
}

impl FileIdentity {
    /// Reads the whole file, wherever its position is.
    pub(super) fn of(name: &str, file: &File) -> io::Result<Self> {
        let mut hasher = crc32fast::Hasher::new();
        let mut buffer = vec![0; 1 << 18];
        let mut len = 0;
        loop {
            let count = match file.read_at(&mut buffer, len) {
                Ok(0) => break,
                Ok(count) => count,
                Err(err) if err.kind() == io::ErrorKind::Interrupted => continue,
                Err(err) => return Err(err),
            };
            hasher.update(buffer.get(..count).unwrap_or_default());
            len += count as u64;
        }
        Ok(Self {
            name: name.to_owned(),
            len,
            crc32: hasher.finalize(),
        })
    }
}

/// An image's format, as it travels.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) enum MovingFormat {
    Raw,
    Qcow2,
}

impl From<Format> for MovingFormat {
    fn from(format: Format) -> Self {
        match format {
            Format::Raw => Self::Raw,
            Format::Qcow2 => Self::Qcow2,
        }
    }
}

impl From<MovingFormat> for Format {
    fn from(format: MovingFormat) -> Self {
        match format {
            MovingFormat::Raw => Self::Raw,
            MovingFormat::Qcow2 => Self::Qcow2,
        }
    }
}

/// What tells on another host whether a backing file has the same contents.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct BackingIdentity {
    capacity: u64,
    crc32: u32,
    /// Whether the checksum is over all of it, and not only over samples.
    whole: bool,
}

impl From<Fingerprint> for BackingIdentity {
    fn from(fingerprint: Fingerprint) -> Self {
        let Fingerprint {
            capacity,
            crc32,
            whole,
        } = fingerprint;
        Self {
            capacity,
            crc32,
            whole,
        }
    }
}

/// A disk whose contents travel with the guest.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct MovingDisk {
    pub(super) id: String,
    /// The format of the source's image: that of one that is made at the destination.
    pub(super) format: MovingFormat,
    /// Bytes that the source's image takes there.
    pub(super) allocated: u64,
    /// The backing file, if only what is above it travels.
    pub(super) backing: Option<BackingIdentity>,
}

/// The machine that moves: the configuration sections of an offer, decoded.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct MovingMachine {
    pub(super) name: Option<String>,
    pub(super) config: MachineConfig,
    /// The devices by name, each with the version of its state.
    pub(super) devices: Vec<(String, u32)>,
    /// The kernel, and the initrd if there is one.
    pub(super) files: Vec<FileIdentity>,
    pub(super) cpu: GuestCpu,
    /// The disks that travel; the others are shared storage.
    pub(super) disks: Vec<MovingDisk>,
}

/// The body of section `machine`, version 1.
#[derive(Serialize, Deserialize)]
struct SavedMachine {
    name: Option<String>,
    memory: u64,
    vcpus: u32,
    cpu_model: String,
    command_line: String,
    devices: Vec<(String, u32)>,
    files: Vec<FileIdentity>,
}

impl MovingMachine {
    /// The configuration sections.
    pub(super) fn to_sections(&self) -> Result<Vec<Section>, OfferError> {
        let Self {
            name,
            config:
                MachineConfig {
                    memory,
                    vcpus,
                    cpu: cpu_model,
                    command_line,
                    virtio,
                },
            devices,
            files,
            cpu,
            disks,
        } = self.clone();
        let machine = SavedMachine {
            name,
            memory,
            vcpus,
            cpu_model,
            command_line,
            devices,
            files,
        };
        Ok(vec![
            section(MACHINE, &machine)?,
            section(CPU, &cpu)?,
            section(VIRTIO, &virtio)?,
            section(DISKS, &disks)?,
        ])
    }

    /// Reads what [`to_sections`](Self::to_sections) made. Nothing in it has been checked yet but
    /// its form.
    pub(super) fn from_sections(sections: &[Section]) -> Result<Self, OfferError> {
        let mut sections = Sections::new(sections.to_vec())?;
        let SavedMachine {
            name,
            memory,
            vcpus,
            cpu_model,
            command_line,
            devices,
            files,
        } = body(&mut sections, MACHINE)?;
        let cpu = body(&mut sections, CPU)?;
        let virtio = body(&mut sections, VIRTIO)?;
        let disks = body(&mut sections, DISKS)?;
        sections.finish()?;
        Ok(Self {
            name,
            config: MachineConfig {
                memory,
                vcpus,
                cpu: cpu_model,
                command_line,
                virtio,
            },
            devices,
            files,
            cpu,
            disks,
        })
    }

    /// Every reason why this machine can't come to a host with this processor and `host_memory`
    /// bytes of RAM, and to a process with these options, a sentence each; none if it can.
    pub(super) fn objections(
        &self,
        given: &Given,
        host: &HostCpu,
        host_memory: u64,
    ) -> Result<Vec<String>, OfferError> {
        let mut objections = given.differences(&self.config);
        // KVM and the engine allocate in proportion to it, so a stranger must not choose it.
        if given.memory.is_none() && self.config.memory > host_memory {
            objections.push(format!(
                "the guest has {} bytes of memory, more than this host ({host_memory} bytes): if \
                 that is meant, give the destination --memory too",
                self.config.memory
            ));
        }
        if let Some(name) = &self.name
            && (name.len() > MAX_NAME || name.chars().any(char::is_control))
        {
            objections.push(format!(
                "the guest's name is longer than {MAX_NAME} bytes or has control characters: \
                 {name:?}"
            ));
        }
        for (option, name, path) in [
            ("--kernel", KERNEL, &given.kernel),
            ("--initrd", INITRD, &given.initrd),
        ] {
            if let Some(path) = path {
                objections.extend(self.other_file(option, name, path)?);
            }
        }
        objections.extend(compatibility(&self.cpu, host));
        Ok(objections)
    }

    /// What was given here as a file must be what the guest was booted from there.
    fn other_file(
        &self,
        option: &str,
        name: &str,
        path: &Path,
    ) -> Result<Option<String>, OfferError> {
        let here = File::open(path)
            .and_then(|file| FileIdentity::of(name, &file))
            .map_err(|source| OfferError::File {
                file: path.display().to_string(),
                source,
            })?;
        let there = self.files.iter().find(|file| file.name == name);
        Ok(if there == Some(&here) {
            None
        } else {
            Some(format!(
                "{option} '{}' is not the file that the guest was booted from at the source",
                path.display()
            ))
        })
    }
}

fn section<T: Serialize>(
    (name, version): (&'static str, u32),
    value: &T,
) -> Result<Section, OfferError> {
    let body = section_body::encode(value).map_err(|source| OfferError::Body {
        section: name,
        source,
    })?;
    Ok(Section {
        name: name.to_owned(),
        version,
        body,
    })
}

fn body<T: serde::de::DeserializeOwned>(
    sections: &mut Sections,
    (name, version): (&'static str, u32),
) -> Result<T, OfferError> {
    let section = sections.take(name, version, version)?;
    section_body::decode::<MAX_BODY, _>(&section.body).map_err(|source| OfferError::Body {
        section: name,
        source,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::machine::config::VirtioConfig;
    use std::io::Write;

    fn moving() -> MovingMachine {
        MovingMachine {
            name: Some("web".to_owned()),
            config: MachineConfig {
                memory: 1 << 30,
                vcpus: 2,
                cpu: "host".to_owned(),
                command_line: "quiet".to_owned(),
                virtio: vec![VirtioConfig::Rng],
            },
            devices: vec![("serial".to_owned(), 1)],
            files: vec![FileIdentity {
                name: KERNEL.to_owned(),
                len: 5,
                crc32: crc32fast::hash(b"hello"),
            }],
            cpu: GuestCpu {
                cpuid: Default::default(),
                tsc_khz: 2_000_000,
            },
            disks: vec![MovingDisk {
                id: "disk0".to_owned(),
                format: MovingFormat::Qcow2,
                allocated: 1 << 20,
                backing: None,
            }],
        }
    }

    fn host() -> HostCpu {
        HostCpu {
            supported: Default::default(),
            tsc_khz: 2_000_000,
            tsc_control: false,
        }
    }

    #[test]
    fn a_machine_reads_back_as_told() {
        let machine = moving();
        let sections = machine.to_sections().unwrap();
        assert_eq!(MovingMachine::from_sections(&sections).unwrap(), machine);
        let mut more = sections.clone();
        more.push(Section {
            name: "tpm".to_owned(),
            version: 1,
            body: vec![],
        });
        let error = MovingMachine::from_sections(&more).unwrap_err().to_string();
        assert_eq!(error, "configuration: unknown state section(s): tpm");
        let error = MovingMachine::from_sections(&sections[..1]).unwrap_err();
        assert!(error.to_string().contains("'cpu' is missing"), "{error}");
        let mut cut = sections;
        cut[0].body.pop();
        let error = MovingMachine::from_sections(&cut).unwrap_err();
        assert!(error.to_string().contains("section 'machine'"), "{error}");
    }

    #[test]
    fn all_that_differs_is_objected_to() {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        file.write_all(b"hello").unwrap();
        let mut given = Given {
            kernel: Some(file.path().to_owned()),
            ..Given::default()
        };
        assert!(
            moving()
                .objections(&given, &host(), 2 << 30)
                .unwrap()
                .is_empty()
        );
        file.write_all(b"!").unwrap();
        given.vcpus = Some(1);
        given.initrd = Some(file.path().to_owned());
        let faster = HostCpu {
            tsc_khz: 3_000_000,
            ..host()
        };
        let objections = moving().objections(&given, &faster, 1 << 29).unwrap();
        assert_eq!(objections.len(), 5, "{objections:#?}");
        for (objection, start) in objections.iter().zip([
            "--smp",
            "the guest has 1073741824 bytes",
            "--kernel",
            "--initrd",
            "the guest's TSC",
        ]) {
            assert!(objection.starts_with(start), "{objection}");
        }
    }
}
