//! The network between the two processes of a migration.

use std::net::{IpAddr, Ipv4Addr};
use std::process::Command;

use serde_json::Value;

use crate::error::Error;
use crate::scenario::Link;
use crate::vmm::Role;

/// What a token bucket lets through at once, in bytes: 2 ms of a 1 Gbit/s link.
const BURST: &str = "256k";

/// How long a packet may wait in it.
const LATENCY: &str = "20ms";

/// The address of the destination on a link of its own.
const ADDRESSES: [Ipv4Addr; 2] = [Ipv4Addr::new(10, 213, 77, 1), Ipv4Addr::new(10, 213, 77, 2)];

/// Where the two processes are, and what is between them. Namespaces of its own go with it.
#[derive(Debug)]
pub struct Network {
    /// The namespaces of the source and of the destination, where they have any.
    namespaces: Option<[String; 2]>,
    /// The interface that the migration takes, in the source's.
    interface: &'static str,
    address: IpAddr,
}

impl Network {
    /// This machine's own loopback.
    pub const HOST: Self = Self {
        namespaces: None,
        interface: "lo",
        address: IpAddr::V4(Ipv4Addr::LOCALHOST),
    };

    /// This machine's own network, where a destination listens at that address.
    pub fn at(address: IpAddr) -> Self {
        Self {
            namespaces: None,
            interface: "lo",
            address,
        }
    }

    /// Makes the link. A shaped one needs root, `ip` and `tc` (package iproute2). Loopback is that of
    /// a namespace of its own, so that its traffic can be counted, or else the machine's own.
    pub fn new(link: Link) -> Result<Self, Error> {
        match link {
            Link::Loopback if !may_shape() => Ok(Self::HOST),
            Link::Loopback => Self::loopback().or(Ok(Self::HOST)),
            Link::Between => Ok(Self::HOST),
            Link::Shaped { mbit } => Self::shaped(mbit),
        }
    }

    fn loopback() -> Result<Self, Error> {
        let name = format!("bench-{}", std::process::id());
        let network = Self {
            namespaces: Some([name.clone(), name.clone()]),
            ..Self::HOST
        };
        run("ip", &["netns", "add", &name])?;
        run("ip", &["-n", &name, "link", "set", "lo", "up"])?;
        Ok(network)
    }

    fn shaped(mbit: u32) -> Result<Self, Error> {
        let namespaces = ["s", "d"].map(|side| format!("bench-{}-{side}", std::process::id()));
        let network = Self {
            namespaces: Some(namespaces.clone()),
            interface: "link0",
            address: IpAddr::V4(ADDRESSES[1]),
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
        let [source, destination] = self.namespaces.as_ref()?;
        Some(match role {
            Role::Source => source,
            Role::Destination => destination,
        })
    }

    /// Where the destination listens.
    pub fn address(&self) -> IpAddr {
        self.address
    }

    /// Bytes that the source's side has sent so far, packets' headers included; over loopback with
    /// those of the destination. `None` if it can't be told from other traffic.
    pub fn sent(&self) -> Option<u64> {
        let namespace = self.namespace(Role::Source)?;
        let arguments = ["-n", namespace, "-s", "-j", "link", "show", self.interface];
        let told: Value = serde_json::from_str(&run("ip", &arguments).ok()?).ok()?;
        told[0]["stats64"]["tx"]["bytes"].as_u64()
    }
}

impl Drop for Network {
    fn drop(&mut self) {
        for namespace in self.namespaces.iter().flatten() {
            // The link goes with its first end, and a namespace that both share is deleted once.
            let _ = run("ip", &["netns", "del", namespace]);
        }
    }
}

/// Whether this user may make namespaces and links.
pub fn may_shape() -> bool {
    rustix::process::geteuid().is_root()
}

fn run(program: &str, arguments: &[&str]) -> Result<String, Error> {
    let what = || format!("{program} {}", arguments.join(" "));
    let output = Command::new(program).args(arguments).output();
    let output = output.map_err(Error::io(what()))?;
    if output.status.success() {
        return Ok(String::from_utf8_lossy(&output.stdout).into_owned());
    }
    let said = String::from_utf8_lossy(&output.stderr);
    Err(Error::Wrong(format!(
        "{} failed (it needs root): {}",
        what(),
        said.trim()
    )))
}
