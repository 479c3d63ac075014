//! Two hosts and a client on one bridge, each a network namespace of its own. The kernel clears up
//! after them, however a test ends.
#![allow(unsafe_code, reason = "only so can a thread have a namespace")]

use std::fs::File;
use std::os::fd::{AsFd, AsRawFd};
use std::path::Path;
use std::process::Command;
use std::thread;

use rustix::thread::{LinkNameSpaceType, UnshareFlags, move_into_link_name_space, unshare_unsafe};

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
                skip(&err);
                None
            }
        }
    }

    fn make() -> Result<Self, String> {
        let switch = Namespace::new()?;
        switch.ip("link add br0 type bridge")?;
        switch.ip("link set br0 up")?;
        let on_the_bridge = |number: usize| {
            let namespace = Namespace::new()?;
            let (port, path) = (format!("port{number}"), namespace.path());
            switch.ip(&format!(
                "link add {port} type veth peer name eth0 netns {path}"
            ))?;
            switch.ip(&format!("link set {port} master br0 up"))?;
            namespace.ip("link set lo up")?;
            Ok::<_, String>(namespace)
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
                host.ip(line)?;
            }
            Ok::<_, String>(host)
        };
        let hosts = [host(0)?, host(1)?];
        let client = on_the_bridge(2)?;
        client.ip(&format!("addr add {CLIENT}/24 dev eth0"))?;
        client.ip("link set eth0 up")?;
        Ok(Self {
            client,
            hosts,
            _switch: switch,
        })
    }
}

/// A network namespace.
pub struct Namespace(File);

impl Namespace {
    fn new() -> Result<Self, String> {
        let made = thread::spawn(|| {
            // SAFETY: no file descriptor is concerned.
            unsafe { unshare_unsafe(UnshareFlags::NEWNET) }
                .map_err(|err| format!("no network namespace ({err}): this takes root"))?;
            let file = File::open("/proc/thread-self/ns/net");
            file.map_err(|err| format!("/proc/thread-self/ns/net: {err}"))
        });
        made.join().unwrap().map(Self)
    }

    /// What `ip` can call it by.
    fn path(&self) -> String {
        format!("/proc/{}/fd/{}", std::process::id(), self.0.as_raw_fd())
    }

    /// Runs this on a thread in the namespace: processes that it starts and sockets that it opens
    /// are there, too.
    pub fn within<T: Send>(&self, run: impl FnOnce() -> T + Send) -> T {
        thread::scope(|scope| {
            let inside = scope.spawn(|| {
                move_into_link_name_space(self.0.as_fd(), Some(LinkNameSpaceType::Network))
                    .unwrap();
                run()
            });
            inside
                .join()
                .unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        })
    }

    /// Runs `ip` there.
    fn ip(&self, line: &str) -> Result<(), String> {
        let output = self.within(|| Command::new("ip").args(line.split(' ')).output());
        match output {
            Ok(output) if output.status.success() => Ok(()),
            Ok(output) => Err(format!(
                "ip {line}: {}",
                String::from_utf8_lossy(&output.stderr)
            )),
            Err(err) => Err(format!("ip: {err} (package iproute2)")),
        }
    }
}
