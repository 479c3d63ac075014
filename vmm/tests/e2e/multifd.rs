//! Guests that move over several connections.

use guest_tests::dirtier::Data;
use serde_json::json;

use crate::harness::{Ferry, busy, require_kvm, scratch};

/// The guest writes text all the time, and what comes compressed, on whichever connection, is what
/// it wrote last.
#[test]
fn text_goes_compressed_over_four_connections() {
    require_kvm!();
    let dir = scratch();
    let options = guest_tests::dirtier::Options {
        data: Data::Text,
        ..busy()
    };
    let mut here = Ferry::run_dirtier(dir.path(), "a", "128M", options);
    for name in ["b", "c"] {
        here.execute(
            "migrate-set-capabilities",
            json!({ "capabilities": [{ "capability": "multifd", "state": true }] }),
        );
        // 40 MB/s: whatever the machine, compressing text is faster than sending it.
        here.execute(
            "migrate-set-parameters",
            json!({
                "multifd-channels": 4, "multifd-compression": "zstd", "max-bandwidth": 40_000_000,
            }),
        );
        let (mut there, uri) = Ferry::incoming(dir.path(), name);
        here.migrate(&uri);
        let info = here.wait_migrated("completed");
        there.wait_heartbeats(50);
        there.verify();
        assert_eq!(info["x-ferry"]["multifd"]["channels"], 4, "{info:#}");
        let compressed = info["x-ferry"]["compression"]["pages"].as_u64().unwrap();
        assert!(compressed >= 32 << 8, "{info:#}");
        // All pages with contents went there.
        let [there_only, all] =
            ["multifd-bytes", "transferred"].map(|name| info["ram"][name].as_u64().unwrap());
        assert!(there_only > all * 9 / 10, "{info:#}");
        here.quit();
        here = there;
    }
}
