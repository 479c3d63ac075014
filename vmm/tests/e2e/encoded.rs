//! Pages that go compressed, or as differences to what was sent before.

use guest_tests::dirtier::{Data, Options, Rate};
use serde_json::{Value, json};

use crate::harness::{Ferry, busy, require_kvm, scratch};

/// Moves a guest with text in its memory, with these parameters; returns what the source tells.
fn move_text(rate: u64, capabilities: Value, parameters: Value) -> Value {
    let dir = scratch();
    let options = Options {
        data: Data::Text,
        rate: Rate::PerSecond(rate),
        ..busy()
    };
    let (mut destination, uri) = Ferry::incoming(dir.path(), "dst");
    let mut source = Ferry::run_dirtier(dir.path(), "src", "128M", options);
    source.execute(
        "migrate-set-capabilities",
        json!({ "capabilities": capabilities }),
    );
    source.execute("migrate-set-parameters", parameters);
    source.wait_heartbeats(50);
    source.migrate(&uri);
    let info = source.wait_migrated("completed");
    destination.wait_heartbeats(50);
    destination.verify();
    info
}

/// 40 MB/s: whatever the machine, compressing text is faster than sending it.
const SLOW: u64 = 40_000_000;

#[test]
fn text_goes_compressed_on_a_slow_link() {
    require_kvm!();
    for method in ["lz4", "zstd"] {
        let parameters = json!({ "multifd-compression": method, "max-bandwidth": SLOW });
        let info = move_text(1000, json!([]), parameters);
        let compression = &info["x-ferry"]["compression"];
        let [pages, bytes] = ["pages", "bytes"].map(|name| compression[name].as_u64().unwrap());
        assert!(pages >= 32 << 8, "{method}: {compression}");
        assert!(bytes < pages * 4096 * 4 / 5, "{method}: {compression}");
        let normal = info["ram"]["normal-bytes"].as_u64().unwrap();
        let transferred = info["ram"]["transferred"].as_u64().unwrap();
        assert!(transferred < normal, "{method}: {info}");
        assert!(info.get("xbzrle-cache").is_none());
    }
}

#[test]
fn what_is_written_again_goes_as_differences() {
    require_kvm!();
    let capabilities = json!([{ "capability": "xbzrle", "state": true }]);
    let parameters = json!({
        "max-bandwidth": SLOW, "downtime-limit": 20, "xbzrle-cache-size": 128 << 20,
    });
    let info = move_text(3000, capabilities, parameters);
    let figures = &info["xbzrle-cache"];
    assert_eq!(figures["cache-size"], 128 << 20, "{info}");
    // How many of them there are is the guest's affair: what it writes may be all of a page.
    let tried = ["pages", "cache-miss", "overflow"].map(|name| figures[name].as_u64().unwrap());
    assert!(tried.iter().sum::<u64>() > 0, "{info}");
}
