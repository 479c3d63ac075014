//! Post-copy of guests whose memory came over several connections until then.

use guest_tests::dirtier::{Data, Options};
use serde_json::json;

use super::{arrived, destination, furious, require_postcopy, set, source};
use crate::harness::{Ferry, scratch};

fn over_four(ferry: &mut Ferry) {
    let on = json!({ "capabilities": [{ "capability": "multifd", "state": true }] });
    ferry.execute("migrate-set-capabilities", on);
    set(
        ferry,
        json!({ "multifd-channels": 4, "max-bandwidth": 40 << 20, "downtime-limit": 0 }),
    );
}

/// In the middle of the first round, and after two of them, plain and compressed.
#[test]
fn switched_while_four_connections_are_in_use() {
    require_postcopy!();
    let dir = scratch();
    let text = Options {
        data: Data::Text,
        ..furious()
    };
    let mut here = source(dir.path(), "a", text);
    for (name, rounds, method) in [
        ("b", 1, "none"),
        ("c", 3, "none"),
        ("d", 1, "zstd"),
        ("e", 3, "zstd"),
    ] {
        over_four(&mut here);
        // With and without checksums of pages, in turn.
        let checked = json!([{ "capability": "x-page-checksum", "state": rounds == 1 }]);
        here.execute(
            "migrate-set-capabilities",
            json!({ "capabilities": checked }),
        );
        set(&mut here, json!({ "multifd-compression": method }));
        let (mut there, uri) = destination(dir.path(), name);
        here.migrate(&uri);
        here.wait_migration("pages over more connections", |info| {
            info["ram"]["multifd-bytes"].as_u64() > Some(4 << 20)
                && info["ram"]["dirty-sync-count"].as_u64() >= Some(rounds)
        });
        here.execute("migrate-start-postcopy", json!(null));
        let (info, _) = arrived(&mut here, &mut there);
        assert_eq!(info["x-ferry"]["multifd"]["channels"], 4, "{info:#}");
        let late = info["ram"]["postcopy-bytes"].as_u64().unwrap();
        assert!(late > 0, "{info:#}");
        here.quit();
        here = there;
    }
}
