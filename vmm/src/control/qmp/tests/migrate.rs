//! Commands on migrations, and what `query-migrate` tells of them.

use serde_json::{Value, json};

use super::Setup;
use crate::control::command::*;

#[tokio::test]
async fn migrate_takes_a_uri_or_a_channel() {
    let setup = Setup::new();
    let mut client = setup.client().await;
    let channel = |addr: Value| json!({"channels": [{"channel-type": "main", "addr": addr}]});
    for (arguments, call) in [
        (
            json!({"uri": "tcp:h:1", "detach": true, "blk": false}),
            "migrate tcp:h:1",
        ),
        (
            json!({"uri": "unix:/a", "resume": false, "inc": false}),
            "migrate unix:/a",
        ),
        (
            channel(json!({"transport": "socket", "type": "inet", "host": "::1", "port": "2"})),
            "migrate tcp:[::1]:2",
        ),
        (
            channel(json!({"transport": "socket", "type": "unix", "path": "/b"})),
            "migrate unix:/b",
        ),
        (json!({"uri": "file:/c"}), "migrate file:/c"),
        (
            json!({"uri": "tcp:h:1", "resume": true}),
            "migrate -r tcp:h:1",
        ),
        (
            channel(json!({"transport": "file", "filename": "/d", "offset": 0})),
            "migrate file:/d",
        ),
    ] {
        assert_eq!(
            client.execute("migrate", arguments).await.unwrap(),
            json!({})
        );
        assert_eq!(setup.machine.calls(), [call]);
    }
    for (arguments, desc) in [
        (json!({}), "Parameter 'uri' is missing"),
        (
            json!({"uri": 5}),
            "Invalid parameter type for 'uri', expected: string",
        ),
        (
            json!({"uri": "tcp:h:1", "detach": 3}),
            "Invalid parameter type for 'detach', expected: boolean",
        ),
        (
            json!({"uri": "tcp:h:1", "blk": 1}),
            "Invalid parameter type for 'blk', expected: boolean",
        ),
        (
            json!({"uri": "exec:cat"}),
            "'exec:cat' is no migration address: expected tcp:HOST:PORT, unix:PATH or file:PATH",
        ),
        (
            json!({"uri": "file:/a,offset=1"}),
            "'file:/a,offset=1' asks for an offset, which is not supported: a snapshot is a file of \
             its own. Expected file:PATH",
        ),
        (
            channel(json!({"transport": "file", "filename": "/d", "offset": 512})),
            "an 'offset' other than 0 is not supported: a snapshot is a file of its own",
        ),
        (
            json!({"channels": {}}),
            "Invalid parameter type for 'channels', expected: array",
        ),
        (
            json!({"channels": [3]}),
            "Invalid parameter type for 'channels[0]', expected: object",
        ),
        (
            json!({"channels": []}),
            "Parameter 'channels' expects one channel, of type main, got 0",
        ),
        (
            json!({"uri": "tcp:h:1", "channels": []}),
            "'uri' and 'channels' are mutually exclusive: exactly one of the two must be present",
        ),
        (
            channel(json!({"transport": "rdma"})),
            "Parameter 'channels[0].addr.transport' does not accept value 'rdma'",
        ),
        (
            channel(json!({"transport": "socket", "type": "inet", "host": "h"})),
            "Parameter 'channels[0].addr.port' is missing",
        ),
        (
            channel(json!({"transport": "socket", "type": "unix", "path": "/b", "to": 1})),
            "Parameter 'channels[0].addr.to' is unexpected",
        ),
    ] {
        assert_eq!(client.refused("migrate", arguments).await, desc);
    }
    assert!(setup.machine.calls().is_empty());

    client
        .execute("migrate-incoming", json!({"uri": "tcp:0:5"}))
        .await
        .unwrap();
    let stay = json!({"uri": "tcp:0:5", "exit-on-error": false});
    client.execute("migrate-incoming", stay).await.unwrap();
    client.execute("migrate_cancel", json!({})).await.unwrap();
    assert_eq!(
        setup.machine.calls(),
        [
            "migrate_incoming tcp:0:5 true",
            "migrate_incoming tcp:0:5 false",
            "migrate_cancel"
        ]
    );
}

#[tokio::test]
async fn postcopy_is_started_paused_and_recovered() {
    let setup = Setup::new();
    let mut client = setup.client().await;
    for (command, arguments, call) in [
        (
            "migrate-start-postcopy",
            json!({}),
            "migrate_start_postcopy",
        ),
        ("migrate-pause", json!({}), "migrate_pause"),
        (
            "migrate-recover",
            json!({"uri": "tcp:[::1]:0"}),
            "migrate_recover tcp:[::1]:0",
        ),
        ("quit", json!({"force": true}), "quit HostQmpQuit by force"),
    ] {
        client.execute(command, arguments).await.unwrap();
        assert_eq!(setup.machine.calls(), [call]);
    }
}

#[tokio::test]
async fn sends_without_a_copy_are_told_and_those_that_were_copied_under_qemus_name() {
    let setup = Setup::new();
    let mut client = setup.client().await;
    let on = json!({"capabilities": [{"capability": "zero-copy-send", "state": true}]});
    client
        .execute("migrate-set-capabilities", on)
        .await
        .unwrap();
    assert!(setup.machine.capabilities().zero_copy_send);
    setup.machine.state().info = MigrationInfo {
        status: MigrationStatus::Active,
        ram: Some(MigrationStats {
            dirty_sync_missed_zero_copy: 5,
            ..Default::default()
        }),
        ferry: Some(FerryMigrationInfo {
            zero_copy: Some(ZeroCopyInfo {
                sends: 40,
                done: 38,
                copied: 3,
                refused: 2,
            }),
            ..Default::default()
        }),
        ..Default::default()
    };
    let info = client.execute("query-migrate", json!({})).await.unwrap();
    assert_eq!(info["ram"]["dirty-sync-missed-zero-copy"], 5);
    assert_eq!(
        info["x-ferry"]["zero-copy"],
        json!({"sends": 40, "done": 38, "copied": 3, "refused": 2})
    );
}

#[tokio::test]
async fn the_waits_of_postcopy_are_told_under_qemus_names_and_are_no_downtime() {
    let setup = Setup::new();
    let mut client = setup.client().await;
    setup.machine.state().info = MigrationInfo {
        status: MigrationStatus::PostcopyActive,
        ram: Some(MigrationStats {
            postcopy_requests: 12,
            postcopy_bytes: 81_920,
            ..Default::default()
        }),
        downtime: Some(4),
        postcopy_blocktime: Some(7),
        postcopy_vcpu_blocktime: vec![9, 8],
        postcopy_latency: Some(150_000),
        postcopy_latency_dist: vec![0, 5],
        ferry: Some(FerryMigrationInfo {
            postcopy: Some(PostcopyInfo {
                missing_pages: 3,
                ..Default::default()
            }),
            ..Default::default()
        }),
        ..Default::default()
    };
    let info = client.execute("query-migrate", json!({})).await.unwrap();
    for (member, value) in [
        ("/status", json!("postcopy-active")),
        ("/ram/postcopy-requests", json!(12)),
        ("/ram/postcopy-bytes", json!(81_920)),
        ("/downtime", json!(4)),
        ("/postcopy-blocktime", json!(7)),
        ("/postcopy-vcpu-blocktime", json!([9, 8])),
        ("/postcopy-latency", json!(150_000)),
        ("/postcopy-latency-dist", json!([0, 5])),
        ("/x-ferry/postcopy/missing-pages", json!(3)),
    ] {
        assert_eq!(info.pointer(member), Some(&value), "{member}");
    }
}
