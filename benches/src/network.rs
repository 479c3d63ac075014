//! The network between the two processes of a migration.

use std::io;
use std::net::{IpAddr, Ipv4Addr};
use std::sync::Arc;

use guest_tests::driver::namespace::Namespace;
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

/// Where the two processes are, and what is between them.
#[derive(Debug)]
pub struct Network {
    /// The namespaces of the source and of the destination, where they have any.
    namespaces: Option<[Arc<Namespace>; 2]>,
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
        let namespace = Arc::new(Namespace::new()?);
        namespace.run("ip link set lo up")?;
        Ok(Self {
            namespaces: Some([Arc::clone(&namespace), namespace]),
            ..Self::HOST
        })
    }

    fn shaped(mbit: u32) -> Result<Self, Error> {
        let [source, destination] = [Namespace::new()?, Namespace::new()?];
        let other = destination.path();
        source.run(&format!(
            "ip link add link0 type veth peer name link0 netns {}",
            other.display()
        ))?;
        for (namespace, address) in [&source, &destination].into_iter().zip(ADDRESSES) {
            for command in [
                "ip link set lo up",
                &format!("ip addr add {address}/24 dev link0"),
                "ip link set link0 up",
                &format!(
                    "tc qdisc add dev link0 root tbf rate {mbit}mbit burst {BURST} latency {LATENCY}"
                ),
            ] {
                namespace.run(command)?;
            }
        }
        Ok(Self {
            namespaces: Some([source, destination].map(Arc::new)),
            interface: "link0",
            address: IpAddr::V4(ADDRESSES[1]),
        })
    }

    /// The namespace that the process of that role is in, if it has one of its own.
    fn namespace(&self, role: Role) -> Option<&Namespace> {
        let [source, destination] = self.namespaces.as_ref()?;
        Some(match role {
            Role::Source => source,
            Role::Destination => destination,
        })
    }

    /// Runs this where the process of that role is to be: what it starts is there.
    pub fn within<T: Send>(&self, role: Role, run: impl FnOnce() -> T + Send) -> io::Result<T> {
        match self.namespace(role) {
            Some(namespace) => namespace.within(run),
            None => Ok(run()),
        }
    }

    /// Where the destination listens.
    pub fn address(&self) -> IpAddr {
        self.address
    }

    /// Bytes that the source's side has sent so far, packets' headers included; over loopback with
    /// those of the destination. `None` if it can't be told from other traffic.
    pub fn sent(&self) -> Option<u64> {
        let namespace = self.namespace(Role::Source)?;
        let told = namespace.run(&format!("ip -s -j link show {}", self.interface));
        let told: Value = serde_json::from_str(&told.ok()?).ok()?;
        told[0]["stats64"]["tx"]["bytes"].as_u64()
    }
}

/// Whether this user may make namespaces and links.
pub fn may_shape() -> bool {
    rustix::process::geteuid().is_root()
}
