//! Post-copy over Unix sockets.

use std::path::Path;

use serde_json::{Value, json};

use super::{
    enable, idle, push_slowly, recover_and_arrive, require_postcopy, resume, source,
    switch_at_once, wait_paused, wait_state,
};
use crate::harness::{Ferry, scratch};

fn address(dir: &Path, name: &str) -> String {
    format!("unix:{}", dir.join(name).display())
}

fn listens_at(destination: &mut Ferry, path: &Path) {
    let info = destination.query_migrate();
    let address = &info["socket-address"][0];
    let path = path.to_str().unwrap();
    assert_eq!(
        *address,
        json!({ "type": "unix", "path": path }),
        "{info:#}"
    );
}

/// Broken again and again, and recovered each time at another address, at last by TCP.
#[test]
fn a_guest_moves_by_unix_sockets() {
    require_postcopy!();
    let dir = scratch();
    let mut source = source(dir.path(), "src", idle());
    let first = address(dir.path(), "first");
    let mut destination = Ferry::start(dir.path(), "dst", &["--incoming", &first]);
    listens_at(&mut destination, &dir.path().join("first"));
    enable(&mut destination);
    push_slowly(&mut source);
    switch_at_once(&mut source, &first);
    wait_state(&mut source, "postcopy-active");
    for name in ["second", "third"] {
        wait_state(&mut destination, "postcopy-active");
        destination.wait_heartbeats(20);
        source.execute("migrate-pause", Value::Null);
        wait_paused(&mut source, &mut destination);
        let uri = address(dir.path(), name);
        destination.execute("migrate-recover", json!({ "uri": uri }));
        listens_at(&mut destination, &dir.path().join(name));
        resume(&mut source, &uri);
        wait_state(&mut source, "postcopy-active");
    }
    wait_state(&mut destination, "postcopy-active");
    destination.execute("migrate-pause", Value::Null);
    wait_paused(&mut source, &mut destination);
    recover_and_arrive(&mut source, &mut destination);
    for name in ["first", "second", "third"] {
        assert!(!dir.path().join(name).exists(), "the socket {name} is left");
    }
}
