//! The small kernel with all devices, pinged from a third host while it moves to another one on the
//! same bridge.

use std::path::Path;
use std::time::Duration;

use super::small::{boot, echoes, wait_passes};
use super::{BOOT, wait_said};
use crate::bridge::{CLIENT, HOSTS, Network, TAP};
use crate::harness::{Ferry, require_kvm, scratch};
use crate::ping::{Pinger, check_lost, slowest_of};

const GUEST: &str = "10.0.0.2";
const MAC: &str = "52:54:00:aa:bb:02";

/// What the kernel says of its devices.
const FOUND: [&str; 7] = [
    "virtio_blk virtio0: [vda] 32768 512-byte logical blocks",
    // It has read the disk's first sector.
    " vda: vda1",
    "Free page reporting enabled",
    "printk: console [hvc0] enabled",
    "IP-Config: Complete",
    "hwaddr=52:54:00:aa:bb:02, ipaddr=10.0.0.2",
    "Run /init as init process",
];

/// A disk of 16 MiB with a partition table: one partition, all but the first 2048 sectors.
fn partitioned(path: &Path) {
    let mut sector = [0; 512];
    sector[446 + 4] = 0x83;
    sector[446 + 8..446 + 12].copy_from_slice(&2048u32.to_le_bytes());
    sector[446 + 12..446 + 16].copy_from_slice(&30720u32.to_le_bytes());
    sector[510..].copy_from_slice(&[0x55, 0xaa]);
    std::fs::write(path, sector).unwrap();
    let image = std::fs::OpenOptions::new().write(true).open(path).unwrap();
    image.set_len(16 << 20).unwrap();
}

/// The options for the devices that a host has its own part of.
fn devices(dir: &Path, console: &str, more: &str) -> [String; 6] {
    let at = |name: &str| dir.join(name).display().to_string();
    [
        "--disk",
        &format!("file={},format=raw", at("disk")),
        "--net",
        &format!("tap,ifname={TAP}{more}"),
        "--console",
        &format!("file:{}", at(console)),
    ]
    .map(str::to_owned)
}

/// Pings a guest, which is told `word`, over a migration.
fn moves_while_it_is_pinged(word: &str, said: &[&str]) {
    require_kvm!();
    let Some(network) = Network::new() else {
        return;
    };
    let [here, there] = &network.hosts;
    let dir = scratch();
    partitioned(&dir.path().join("disk"));
    let more = devices(dir.path(), "console", &format!(",mac={MAC}"));
    let mut more: Vec<_> = more.iter().map(String::as_str).collect();
    more.extend(["--rng", "--balloon"]);
    let append =
        format!("console=hvc0 console=ttyS0 ip={GUEST}::{CLIENT}:255.255.255.0::eth0:off {word}");
    let Some(mut source) = here
        .within(|| boot(dir.path(), "source", &more, &append))
        .unwrap()
    else {
        return;
    };
    wait_said(&source, BOOT, &[&FOUND, said].concat());
    let passes = wait_passes(&mut source, 3);
    echoes(&mut source, "typed at the source");
    // The kernel's log is on the virtio console, too.
    let log = std::fs::read_to_string(dir.path().join("console")).unwrap();
    assert!(log.contains("Run /init as init process"), "{log}");

    // Where CPL 0 is interpreted, it can't answer a hundred pings in a second; what doesn't fit into
    // its queue waits in the tap, and would be lost with it. So it is given the time it needs.
    let address = GUEST.parse().unwrap();
    let slowest = slowest_of(20, &network.client, address);
    let every = slowest.max(Duration::from_millis(10));
    let pinger = Pinger::start(&network.client, address, every);
    pinger.wait_answers(10);
    let uri = format!("tcp:{}:0", HOSTS[1]);
    let back_ends = devices(dir.path(), "console-there", "");
    let mut arguments = vec!["--incoming", &uri];
    arguments.extend(back_ends.iter().map(String::as_str));
    let mut destination = there
        .within(|| Ferry::start(dir.path(), "destination", &arguments))
        .unwrap();
    let uri = destination.listening_at();
    source.migrate(&uri);
    let info = source.wait_migrated("completed");
    source.quit();
    pinger.wait_answers(10);

    wait_passes(&mut destination, passes + 10);
    echoes(&mut destination, "typed at the destination");
    let downtime = info["downtime"].as_u64().unwrap();
    let lost = check_lost(&pinger.finish(), every, downtime);
    eprintln!(
        "{lost} pings of one in {every:?} were lost, downtime {downtime} ms; an answer took \
         {slowest:?} at most"
    );
}

#[test]
fn a_pinged_linux_with_all_devices_moves_and_answers() {
    moves_while_it_is_pinged("", &["ACPI: Interpreter enabled"]);
}

#[test]
fn so_does_one_without_acpi() {
    let registered = "virtio-mmio: Registering device virtio-mmio.4 at 0xd0004000-0xd0004fff";
    moves_while_it_is_pinged("acpi=off", &["found SMP MP-table", registered]);
}
