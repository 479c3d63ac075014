//! Ferry itself.

use std::path::{Path, PathBuf};

use serde_json::Value;

use super::{Guest, Reported, Role, Sockets, Vmm};

/// A build of Ferry.
#[derive(Clone, Debug)]
pub struct Ferry {
    /// For tables; two builds can be compared.
    pub name: String,
    /// The binary.
    pub program: PathBuf,
}

impl Vmm for Ferry {
    fn name(&self) -> &str {
        &self.name
    }

    fn program(&self) -> &Path {
        &self.program
    }

    fn arguments(&self, guest: &Guest, role: Role, sockets: &Sockets) -> Vec<String> {
        let mut arguments: Vec<String> = ["run", "--monitor", "none"].map(str::to_owned).into();
        arguments.extend([
            format!("--qmp=unix:{}", sockets.qmp.display()),
            format!("--serial=unix:{}", sockets.serial.display()),
        ]);
        match role {
            Role::Source => {
                arguments.extend(machine(guest));
                arguments.push("--paused".to_owned());
            }
            Role::Destination => arguments.push("--incoming=defer".to_owned()),
        }
        arguments
    }

    fn direct_arguments(&self, guest: &Guest) -> Vec<String> {
        let mut arguments: Vec<String> = ["run", "--monitor", "none", "--serial", "stdio"]
            .map(str::to_owned)
            .into();
        arguments.extend(machine(guest));
        arguments
    }

    fn downtime(&self, info: &Value) -> Option<Reported> {
        let parts = &info["x-ferry"]["downtime"];
        let ms = |part: &str| parts[part].as_f64().map(|us| us / 1e3);
        Some(Reported {
            total: ms("total")?,
            stop: ms("stop"),
            last_pages: ms("last-pages"),
            save: ms("save"),
            send: ms("send"),
            load: ms("load"),
            start: ms("start"),
        })
    }
}

fn machine(guest: &Guest) -> Vec<String> {
    let mut arguments = vec![
        format!("--kernel={}", guest.kernel.display()),
        format!("--append={}", guest.append),
        format!("--memory={}M", guest.memory >> 20),
    ];
    let drives = guest.drives.iter();
    arguments.extend(drives.map(|drive| format!("--disk={}", drive.options())));
    arguments
}
