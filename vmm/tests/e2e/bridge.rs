//! Two hosts and a client on one bridge, each a network namespace of its own. The kernel clears up
//! after them, however a test ends.

use std::path::Path;

use guest_tests::driver::namespace::{Namespace, NamespaceError};

use crate::harness::skip;

/// The client's address.
pub const CLIENT: &str = "10.0.0.1";
/// The hosts' own addresses, over which guests migrate.
pub const HOSTS: [&str; 2] = ["10.0.0.11", "10.0.0.12"];
/// The tap that each host has.
pub const TAP: &str = "tap0";

/// What is there as long as this is.
pub struct Network {
    pub client: Namespace,
    pub hosts: [Namespace; 2],
    /// Where the bridge is.
    _switch: Namespace,
}

impl Network {
    /// `None`, with a notice, where there can't be such a network.
    pub fn new() -> Option<Self> {
        if !Path::new("/dev/net/tun").exists() {
            skip("there is no /dev/net/tun (modprobe tun)");
            return None;
        }
        match Self::make() {
            Ok(network) => Some(network),
            Err(err) => {
                skip(&err.to_string());
                None
            }
        }
    }

    fn make() -> Result<Self, NamespaceError> {
        let switch = Namespace::new()?;
        switch.run("ip link add br0 type bridge")?;
        switch.run("ip link set br0 up")?;
        let on_the_bridge = |number: usize| {
            let namespace = Namespace::new()?;
            let port = format!("port{number}");
            switch.run(&format!(
                "ip link add {port} type veth peer name eth0 netns {}",
                namespace.path().display()
            ))?;
            switch.run(&format!("ip link set {port} master br0 up"))?;
            namespace.run("ip link set lo up")?;
            Ok::<_, NamespaceError>(namespace)
        };
        let host = |number: usize| {
            let host = on_the_bridge(number)?;
            for line in [
                "link add br0 type bridge",
                &format!("addr add {}/24 dev br0", HOSTS[number]),
                &format!("tuntap add {TAP} mode tap"),
                &format!("link set {TAP} master br0 up"),
                "link set eth0 master br0 up",
                "link set br0 up",
            ] {
                host.run(&format!("ip {line}"))?;
            }
            Ok::<_, NamespaceError>(host)
        };
        let hosts = [host(0)?, host(1)?];
        let client = on_the_bridge(2)?;
        client.run(&format!("ip addr add {CLIENT}/24 dev eth0"))?;
        client.run("ip link set eth0 up")?;
        Ok(Self {
            client,
            hosts,
            _switch: switch,
        })
    }
}
