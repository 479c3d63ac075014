//! The network between the two processes of a migration.

use std::process::Command;

use crate::error::Error;
use crate::scenario::Link;
use crate::vmm::Role;

/// What a token bucket lets through at once, in bytes: 2 ms of a 1 Gbit/s link.
const BURST: &str = "256k";

/// How long a packet may wait in it.
const LATENCY: &str = "20ms";

/// The address of the destination on a link of its own.
const ADDRESSES: [&str; 2] = ["10.213.77.1", "10.213.77.2"];

/// Where the two processes are.
#[derive(Debug)]
pub enum Network {
    /// Both on this machine's loopback.
    Loopback,
    /// Each in a network namespace, with a shaped link between them; they go with this.
    Shaped {
        /// The namespaces of the source and of the destination.
        namespaces: [String; 2],
    },
}

impl Network {
    /// Makes the link. A shaped one needs root, `ip` and `tc` (package iproute2).
    pub fn new(link: Link) -> Result<Self, Error> {
        let Link::Shaped { mbit } = link else {
            return Ok(Self::Loopback);
        };
        let namespaces = ["s", "d"].map(|side| format!("bench-{}-{side}", std::process::id()));
        let network = Self::Shaped {
            namespaces: namespaces.clone(),
        };
        let [source, destination] = &namespaces;
        for namespace in &namespaces {
            run("ip", &["netns", "add", namespace])?;
        }
        run(
            "ip",
            &[
                "link",
                "add",
                "link0",
                "netns",
                source,
                "type",
                "veth",
                "peer",
                "name",
                "link0",
                "netns",
                destination,
            ],
        )?;
        let rate = format!("{mbit}mbit");
        for (namespace, address) in namespaces.iter().zip(ADDRESSES) {
            let address = format!("{address}/24");
            run(
                "ip",
                &["-n", namespace, "addr", "add", &address, "dev", "link0"],
            )?;
            run("ip", &["-n", namespace, "link", "set", "link0", "up"])?;
            run("ip", &["-n", namespace, "link", "set", "lo", "up"])?;
            run(
                "tc",
                &[
                    "-n", namespace, "qdisc", "add", "dev", "link0", "root", "tbf", "rate", &rate,
                    "burst", BURST, "latency", LATENCY,
                ],
            )?;
        }
        Ok(network)
    }

    /// The namespace that the process of that role is in, if it has one of its own.
    pub fn namespace(&self, role: Role) -> Option<&str> {
        match (self, role) {
            (Self::Loopback, _) => None,
            (Self::Shaped { namespaces }, Role::Source) => Some(&namespaces[0]),
            (Self::Shaped { namespaces }, Role::Destination) => Some(&namespaces[1]),
        }
    }

    /// Where the destination listens.
    pub fn address(&self) -> &'static str {
        match self {
            Self::Loopback => "127.0.0.1",
            Self::Shaped { .. } => ADDRESSES[1],
        }
    }
}

impl Drop for Network {
    fn drop(&mut self) {
        if let Self::Shaped { namespaces } = self {
            for namespace in namespaces {
                // The link goes with its first end.
                let _ = run("ip", &["netns", "del", namespace]);
            }
        }
    }
}

/// Whether this user may make namespaces and links.
pub fn may_shape() -> bool {
    rustix::process::geteuid().is_root()
}

fn run(program: &str, arguments: &[&str]) -> Result<(), Error> {
    let what = || format!("{program} {}", arguments.join(" "));
    let output = Command::new(program).args(arguments).output();
    let output = output.map_err(Error::io(what()))?;
    if output.status.success() {
        return Ok(());
    }
    let said = String::from_utf8_lossy(&output.stderr);
    Err(Error::Wrong(format!(
        "{} failed (it needs root): {}",
        what(),
        said.trim()
    )))
}
