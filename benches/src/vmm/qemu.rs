//! QEMU, with the machine type that has the least in it.

use std::path::{Path, PathBuf};

use serde_json::Value;

use super::{Guest, Reported, Role, Sockets, Vmm};

/// An installed QEMU.
#[derive(Clone, Debug)]
pub struct Qemu {
    program: PathBuf,
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
        Some(Self { program })
    }
}

impl Vmm for Qemu {
    fn name(&self) -> &str {
        "qemu"
    }

    fn program(&self) -> &Path {
        &self.program
    }

    fn arguments(&self, guest: &Guest, role: Role, sockets: &Sockets) -> Vec<String> {
        let server = |path: &Path| format!("unix:{},server=on,wait=off", path.display());
        let mut arguments = machine(guest);
        arguments.extend([
            "-serial".to_owned(),
            server(&sockets.serial),
            "-qmp".to_owned(),
            server(&sockets.qmp),
        ]);
        match role {
            Role::Source => arguments.push("-S".to_owned()),
            Role::Destination => arguments.extend(["-incoming", "defer"].map(str::to_owned)),
        }
        arguments
    }

    fn direct_arguments(&self, guest: &Guest) -> Vec<String> {
        let mut arguments = machine(guest);
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
    ]
    .map(str::to_owned)
    .into();
    arguments.extend([
        "-m".to_owned(),
        format!("{}M", guest.memory >> 20),
        "-kernel".to_owned(),
        guest.kernel.display().to_string(),
        "-append".to_owned(),
        guest.append.clone(),
    ]);
    arguments
}
