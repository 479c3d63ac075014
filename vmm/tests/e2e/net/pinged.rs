//! A guest that is pinged, from a third host, while it moves to another one on the same bridge.

use std::time::Duration;

use super::{GUEST, run_ready};
use crate::bridge::{HOSTS, Network, TAP};
use crate::harness::{Ferry, require_kvm, scratch};
use crate::ping::{Pinger, check_lost};

#[test]
fn a_guest_that_moves_loses_what_the_downtime_explains() {
    require_kvm!();
    let Some(network) = Network::new() else {
        return;
    };
    let [here, there] = &network.hosts;
    let dir = scratch();
    let mut source = here
        .within(|| run_ready(TAP, dir.path(), "source"))
        .unwrap();
    let pinger = Pinger::start(
        &network.client,
        GUEST.parse().unwrap(),
        Duration::from_millis(10),
    );
    pinger.wait_answers(100);
    let uri = format!("tcp:{}:0", HOSTS[1]);
    let arguments = ["--incoming", &uri, "--net", &format!("tap,ifname={TAP}")];
    let mut destination = there
        .within(|| Ferry::start(dir.path(), "destination", &arguments))
        .unwrap();
    let uri = destination.listening_at();
    source.migrate(&uri);
    let info = source.wait_migrated("completed");
    source.quit();
    pinger.wait_answers(100);
    let every = pinger.every;
    let pings = pinger.finish();
    let downtime = info["downtime"].as_u64().unwrap();
    let lost = check_lost(&pings, every, downtime);
    eprintln!("{lost} pings of one in {every:?} were lost, downtime {downtime} ms");
    let status = destination.status();
    assert_eq!(status, "running");
}
