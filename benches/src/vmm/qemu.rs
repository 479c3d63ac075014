//! QEMU, with the machine type that has the least in it.

use std::path::{Path, PathBuf};

use serde_json::Value;

use super::{Guest, Kind, Reported, Role, Sockets, Vmm};

/// An installed QEMU.
#[derive(Clone, Debug)]
pub struct Qemu {
    program: PathBuf,
    /// Whether a thread of its own serves each disk, instead of the main loop.
    iothread: bool,
}

impl Qemu {
    /// The name of its binary.
    pub const PROGRAM: &str = "qemu-system-x86_64";

    /// Looks for it along the search path.
    pub fn find() -> Option<Self> {
        let path = std::env::var_os("PATH")?;
        let program = std::env::split_paths(&path)
            .map(|dir| dir.join(Self::PROGRAM))
            .find(|program| program.is_file())?;
        Some(Self {
            program,
            iothread: false,
        })
    }

    /// The same, whose disks have a thread each.
    pub fn with_iothread(self) -> Self {
        Self {
            iothread: true,
            ..self
        }
    }

    fn machine(&self, guest: &Guest) -> Vec<String> {
        let mut arguments = machine(guest);
        if guest.drives.is_empty() {
            return arguments;
        }
        let mut add = |option: &str, value: String| {
            arguments.extend([option.to_owned(), value]);
        };
        // The guests find their devices on the command line, and know virtio 1 only.
        add("-M", "acpi=off".to_owned());
        add("-global", "virtio-mmio.force-legacy=false".to_owned());
        for (index, drive) in guest.drives.iter().enumerate() {
            let options = drive.options();
            add("-drive", format!("{options},if=none,id=drive{index}"));
            let mut device = format!("virtio-blk-device,drive=drive{index}");
            if self.iothread {
                add("-object", format!("iothread,id=thread{index}"));
                device += &format!(",iothread=thread{index}");
            }
            add("-device", device);
        }
        arguments
    }
}

impl Vmm for Qemu {
    fn name(&self) -> &str {
        if self.iothread {
            "qemu, iothread"
        } else {
            "qemu"
        }
    }

    fn kind(&self) -> Kind {
        Kind::Qemu
    }

    fn program(&self) -> &Path {
        &self.program
    }

    fn arguments(&self, guest: &Guest, role: Role, sockets: &Sockets) -> Vec<String> {
        let server = |path: &Path| format!("unix:{},server=on,wait=off", path.display());
        let mut arguments = self.machine(guest);
        arguments.extend([
            "-serial".to_owned(),
            server(&sockets.serial),
            "-qmp".to_owned(),
            server(&sockets.qmp),
        ]);
        if guest.prealloc {
            // The source as well: the stream calls memory by the name of its backend.
            let prealloc = match role {
                Role::Source => "off",
                Role::Destination => "on",
            };
            let memory = guest.memory >> 20;
            arguments.extend([
                "-object".to_owned(),
                format!("memory-backend-ram,id=ram,size={memory}M,prealloc={prealloc}"),
                "-machine".to_owned(),
                "memory-backend=ram".to_owned(),
            ]);
        }
        match role {
            Role::Source => arguments.push("-S".to_owned()),
            Role::Destination => arguments.extend(["-incoming", "defer"].map(str::to_owned)),
        }
        arguments
    }

    fn direct_arguments(&self, guest: &Guest) -> Vec<String> {
        let mut arguments = self.machine(guest);
        arguments.extend(["-serial", "stdio"].map(str::to_owned));
        arguments
    }

    fn downtime(&self, info: &Value) -> Option<Reported> {
        let total = info["downtime"].as_f64()?;
        Some(Reported {
            total,
            ..Reported::default()
        })
    }
}

fn machine(guest: &Guest) -> Vec<String> {
    let mut arguments: Vec<String> = [
        "-M",
        "microvm,rtc=off",
        "-accel",
        "kvm",
        "-nodefaults",
        "-no-user-config",
        "-display",
        "none",
        // By their names its vCPUs' threads are known.
        "-name",
        "bench,debug-threads=on",
    ]
    .map(str::to_owned)
    .into();
    arguments.extend([
        "-m".to_owned(),
        format!("{}M", guest.memory >> 20),
        "-smp".to_owned(),
        guest.vcpus.to_string(),
        "-kernel".to_owned(),
        guest.kernel.display().to_string(),
        "-append".to_owned(),
        guest.append.clone(),
    ]);
    arguments
}
