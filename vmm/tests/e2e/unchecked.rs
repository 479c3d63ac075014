//! Guests that move without checksums of pages.

use guest_tests::dirtier::{Options, Rate};
use serde_json::{Value, json};

use crate::harness::{Ferry, busy, require_kvm, scratch};

/// Moves a guest with these capabilities beside; it verifies all of its memory where it arrives.
fn moves(options: Options, capabilities: &[&str]) -> Value {
    let dir = scratch();
    let mut source = Ferry::run_dirtier(dir.path(), "src", "128M", options);
    let on = capabilities
        .iter()
        .map(|name| json!({ "capability": name, "state": true }));
    let off = json!({ "capability": "x-page-checksum", "state": false });
    let all: Vec<_> = on.chain([off]).collect();
    source.execute("migrate-set-capabilities", json!({ "capabilities": all }));
    let (mut destination, uri) = Ferry::incoming(dir.path(), "dst");
    source.wait_heartbeats(50);
    source.migrate(&uri);
    let info = source.wait_migrated("completed");
    destination.wait_heartbeats(50);
    destination.verify();
    info
}

#[test]
fn a_working_guest_moves_in_each_way_that_pages_go() {
    require_kvm!();
    for capabilities in [&[][..], &["zero-copy-send"], &["multifd"], &["xbzrle"]] {
        let info = moves(busy(), capabilities);
        let pages = info["ram"]["normal"].as_u64().unwrap();
        assert!(pages >= 64 << 8, "{capabilities:?}: {info:#}");
    }
}

#[test]
fn what_a_page_takes_beside_its_data_is_less_than_a_checksum() {
    require_kvm!();
    let idle = Options {
        rate: Rate::PerSecond(0),
        sweep: 0,
        ..busy()
    };
    let info = moves(idle, &[]);
    let pages = info["ram"]["normal"].as_u64().unwrap();
    let control = info["x-ferry"]["bytes"]["control"].as_u64().unwrap();
    assert!(pages >= 64 << 8 && control < pages * 4, "{info:#}");
}
