//! Ferry itself.

use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::Value;

use super::{Guest, Kind, Reported, Role, Sockets, Vmm};
use crate::migration::Round;

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

    fn kind(&self) -> Kind {
        Kind::Ferry
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
            Role::Destination => {
                arguments.push("--incoming=defer".to_owned());
                if guest.prealloc {
                    arguments.push(format!("--memory={}M,prealloc=on", guest.memory >> 20));
                }
            }
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

    fn knows_prealloc(&self) -> bool {
        let output = Command::new(&self.program).args(["run", "--help"]).output();
        output.is_ok_and(|output| String::from_utf8_lossy(&output.stdout).contains("prealloc="))
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
            expected: ms("expected"),
        })
    }

    fn rounds(&self, info: &Value) -> Option<Vec<Round>> {
        /// Bytes of a page.
        const PAGE: u64 = 4096;
        let told = info["x-ferry"]["rounds"].as_array()?;
        let mut rounds: Vec<Round> = told
            .iter()
            .map(|round| {
                let number = |name: &str| round[name].as_u64().unwrap_or_default();
                Round {
                    number: number("round"),
                    begin: 0.0,
                    time: number("time") as f64 / 1e3,
                    to_send: number("pages") * PAGE,
                    sent: number("bytes"),
                    dirtied: round["dirtied"].as_u64().map(|pages| pages * PAGE),
                }
            })
            .collect();
        // They follow each other without a gap, and the last one ends when all does.
        let mut end = info["total-time"].as_f64()?;
        for round in rounds.iter_mut().rev() {
            end -= round.time;
            round.begin = end.max(0.0);
        }
        Some(rounds)
    }
}

fn machine(guest: &Guest) -> Vec<String> {
    let mut arguments = vec![
        format!("--kernel={}", guest.kernel.display()),
        format!("--append={}", guest.append),
        format!("--memory={}M", guest.memory >> 20),
        format!("--smp={}", guest.vcpus),
    ];
    let drives = guest.drives.iter();
    arguments.extend(drives.map(|drive| format!("--disk={}", drive.options())));
    arguments
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn rounds_end_with_the_migration() {
        let ferry = Ferry {
            name: "ferry".to_owned(),
            program: PathBuf::new(),
        };
        let info = json!({ "total-time": 100, "x-ferry": { "rounds": [
            { "round": 1, "pages": 10, "sent": 8, "zero": 2, "bytes": 33000, "time": 80000, "dirtied": 3 },
            { "round": 2, "pages": 3, "sent": 3, "zero": 0, "bytes": 12400, "time": 5000 },
        ] } });
        let rounds = ferry.rounds(&info).unwrap();
        assert_eq!([rounds[0].begin, rounds[1].begin], [15.0, 95.0]);
        assert_eq!(rounds[0].to_send, 40960);
        assert_eq!([rounds[0].dirtied, rounds[1].dirtied], [Some(12288), None]);
        assert!(ferry.rounds(&json!({ "total-time": 1 })).is_none());
    }
}
