//! Each command: what it does, what it returns, what it refuses.

use serde_json::{Value, json};

use super::Setup;
use crate::control::command::*;

#[tokio::test]
async fn queries_answer_in_the_shape_of_the_schema() {
    let setup = Setup::new();
    let mut client = setup.client().await;
    for (name, expected) in [
        ("query-name", json!({"name": "fake"})),
        (
            "query-status",
            json!({"running": true, "status": "running"}),
        ),
        ("query-balloon", json!({"actual": 512 << 20})),
        ("query-block", json!([])),
        ("query-migrate", json!({})),
        (
            "query-migrate-parameters",
            json!({
                "max-bandwidth": 0, "avail-switchover-bandwidth": 0, "downtime-limit": 30,
                "announce-initial": 50, "announce-max": 550, "announce-rounds": 5,
                "announce-step": 100, "max-postcopy-bandwidth": 0, "x-postcopy-after-rounds": 0,
                "x-postcopy-after-time": 0, "x-postcopy-no-convergence": false,
                "multifd-channels": 2, "multifd-compression": "none", "multifd-zstd-level": 1,
                "xbzrle-cache-size": 64 << 20, "throttle-trigger-threshold": 50,
                "cpu-throttle-initial": 20, "cpu-throttle-increment": 10,
                "cpu-throttle-tailslow": false, "max-cpu-throttle": 99,
                "vcpu-dirty-limit": 1, "x-migration-timeout": 0, "x-migration-timeout-action": "cancel",
            }),
        ),
        (
            "query-migrate-capabilities",
            json!([
                {"capability": "auto-converge", "state": false},
                {"capability": "dirty-limit", "state": false},
                {"capability": "events", "state": true},
                {"capability": "postcopy-ram", "state": false},
                {"capability": "xbzrle", "state": false},
                {"capability": "multifd", "state": false},
                {"capability": "zero-copy-send", "state": false},
                {"capability": "x-page-checksum", "state": true},
            ]),
        ),
    ] {
        assert_eq!(
            client.execute(name, json!({})).await.unwrap(),
            expected,
            "{name}"
        );
    }
    let version = client.execute("query-version", json!({})).await.unwrap();
    assert_eq!(
        version["package"],
        concat!("ferry-", env!("CARGO_PKG_VERSION"))
    );
    let cpus = client.execute("query-cpus-fast", json!({})).await.unwrap();
    assert_eq!(cpus.as_array().unwrap().len(), 2);
    assert_eq!(cpus[1]["cpu-index"], 1);
    assert_eq!(cpus[1]["thread-id"], 101);
    assert_eq!(cpus[1]["target"], "x86_64");
    assert_eq!(cpus[1]["props"]["core-id"], 1);

    setup.machine.state().name = None;
    assert_eq!(
        client.execute("query-name", json!({})).await.unwrap(),
        json!({})
    );
}

#[tokio::test]
async fn every_listed_command_exists_and_refuses_unknown_arguments() {
    let setup = Setup::new();
    let mut client = setup.client().await;
    let commands = client.execute("query-commands", json!({})).await.unwrap();
    let names: Vec<&str> = commands
        .as_array()
        .unwrap()
        .iter()
        .map(|c| c["name"].as_str().unwrap())
        .collect();
    for needed in [
        "qmp_capabilities",
        "migrate",
        "migrate-incoming",
        "human-monitor-command",
    ] {
        assert!(names.contains(&needed), "{needed}");
    }
    for name in names.into_iter().filter(|name| *name != "qmp_capabilities") {
        // What a command needs, so that the unknown argument is all that is wrong.
        let mut arguments = match name {
            "balloon" => json!({"value": 1}),
            "calc-dirty-rate" => json!({"calc-time": 1}),
            "migrate" | "migrate-incoming" | "migrate-recover" => json!({"uri": "tcp:h:1"}),
            "migrate-set-capabilities" => json!({"capabilities": []}),
            "human-monitor-command" => json!({"command-line": "stop"}),
            "set_link" => json!({"name": "net0", "up": true}),
            _ => json!({}),
        };
        arguments["bogus"] = json!(1);
        let desc = client.refused(name, arguments).await;
        assert_eq!(desc, "Parameter 'bogus' is unexpected", "{name}");
    }
    assert!(setup.machine.calls().is_empty());
}

#[tokio::test]
async fn actions_reach_the_machine_and_their_events_come_first() {
    let setup = Setup::new();
    let mut client = setup.client().await;
    for (command, event) in [
        ("stop", "STOP"),
        ("cont", "RESUME"),
        ("system_reset", "RESET"),
        ("system_powerdown", "POWERDOWN"),
        ("quit", "SHUTDOWN"),
    ] {
        let told = client.ask(json!({ "execute": command }).to_string()).await;
        assert_eq!(told["event"], event);
        assert!(told["timestamp"]["seconds"].as_i64().unwrap() > 1_000_000_000);
        assert_eq!(client.receive().await, json!({"return": {}}));
    }
    assert_eq!(
        setup.machine.calls(),
        [
            "stop",
            "cont",
            "system_reset",
            "system_powerdown",
            "quit HostQmpQuit"
        ]
    );
    setup.machine.state().failure = Some(CommandError::generic("no"));
    assert_eq!(client.refused("cont", json!({})).await, "no");
}

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
async fn commands_about_the_network_reach_the_machine() {
    let setup = Setup::new();
    let mut client = setup.client().await;
    for (command, arguments) in [
        ("set_link", json!({"name": "net0", "up": false})),
        ("announce-self", json!({})),
        (
            "announce-self",
            json!({"initial": 1, "max": 2, "rounds": 3, "step": 4, "interfaces": ["a"]}),
        ),
    ] {
        let told = client.execute(command, arguments).await.unwrap();
        assert_eq!(told, json!({}));
    }
    assert_eq!(
        setup.machine.calls(),
        [
            "set_link net0 false",
            "announce_self None rounds None",
            "announce_self Some([\"a\"]) rounds Some(3)"
        ]
    );
    assert_eq!(
        client.refused("set_link", json!({"up": true})).await,
        "Parameter 'name' is missing"
    );
}

#[tokio::test]
async fn parameters_and_capabilities_are_checked_and_set() {
    let setup = Setup::new();
    let mut client = setup.client().await;
    let set = json!({"downtime-limit": 50, "max-bandwidth": u64::MAX, "announce-rounds": 2,
        "max-postcopy-bandwidth": 5, "x-postcopy-after-rounds": 3, "x-postcopy-after-time": 1500,
        "x-postcopy-no-convergence": true, "multifd-compression": "zstd",
        "multifd-channels": 4, "multifd-zstd-level": 3, "xbzrle-cache-size": 8192, "cpu-throttle-initial": 30,
        "cpu-throttle-tailslow": true, "x-migration-timeout": 5000,
        "x-migration-timeout-action": "postcopy"});
    client.execute("migrate-set-parameters", set).await.unwrap();
    assert_eq!(
        client
            .execute("query-migrate-parameters", json!({}))
            .await
            .unwrap(),
        json!({
            "max-bandwidth": u64::MAX, "avail-switchover-bandwidth": 0, "downtime-limit": 50,
            "announce-initial": 50, "announce-max": 550, "announce-rounds": 2,
            "announce-step": 100, "max-postcopy-bandwidth": 5, "x-postcopy-after-rounds": 3,
            "x-postcopy-after-time": 1500, "x-postcopy-no-convergence": true,
            "multifd-channels": 4, "multifd-compression": "zstd", "multifd-zstd-level": 3, "xbzrle-cache-size": 8192,
            "throttle-trigger-threshold": 50, "cpu-throttle-initial": 30,
            "cpu-throttle-increment": 10, "cpu-throttle-tailslow": true, "max-cpu-throttle": 99,
            "vcpu-dirty-limit": 1, "x-migration-timeout": 5000, "x-migration-timeout-action": "postcopy",
        })
    );
    for (arguments, desc) in [
        (
            json!({"max-bandwidth": "5"}),
            "Invalid parameter type for 'max-bandwidth', expected: integer",
        ),
        (
            json!({"multifd-compression": "zlib"}),
            "Parameter 'multifd-compression' does not accept value 'zlib': it is none, lz4 \
             (fast), or zstd (smaller)",
        ),
        (
            json!({"multifd-zstd-level": 21}),
            "Parameter 'multifd-zstd-level' expects a value between 1 and 20, got 21",
        ),
        (
            json!({"xbzrle-cache-size": 5000}),
            "Parameter 'xbzrle-cache-size' expects a power of two no less than the target page \
             size of 4096 bytes, got 5000",
        ),
        (
            json!({"max-bandwidth": 1.5}),
            "Parameter 'max-bandwidth' expects uint64",
        ),
        (
            json!({"max-bandwidth": -1}),
            "Parameter 'max-bandwidth' expects uint64",
        ),
        (
            json!({"downtime-limit": 2_000_001, "max-bandwidth": 1}),
            "Parameter 'downtime-limit' expects an integer in the range of 0 to 2000000 ms, \
             got 2000001",
        ),
        (
            json!({"announce-step": 10_001}),
            "Parameter 'announce-step' expects a value between 0 and 10000",
        ),
        (
            json!({"multifd-channels": 256}),
            "Parameter 'multifd-channels' expects a value between 1 and 255, got 256",
        ),
        (
            json!({"multifd-queues": 2}),
            "Parameter 'multifd-queues' is unexpected",
        ),
    ] {
        assert_eq!(
            client.refused("migrate-set-parameters", arguments).await,
            desc
        );
    }
    assert_eq!(setup.machine.parameters().max_bandwidth, u64::MAX);

    let capability =
        |name: &str, state: Value| json!({"capabilities": [{"capability": name, "state": state}]});
    let set = capability("events", json!(false));
    client
        .execute("migrate-set-capabilities", set)
        .await
        .unwrap();
    let set = capability("postcopy-ram", json!(true));
    client
        .execute("migrate-set-capabilities", set)
        .await
        .unwrap();
    let Capabilities {
        auto_converge,
        dirty_limit,
        events,
        postcopy_ram,
        xbzrle,
        multifd,
        zero_copy_send,
        page_checksum,
    } = setup.machine.capabilities();
    assert!(!auto_converge && !dirty_limit && !events && postcopy_ram && !xbzrle && !multifd);
    assert!(!zero_copy_send && page_checksum);
    for (arguments, desc) in [
        (json!({}), "Parameter 'capabilities' is missing"),
        (
            capability("rdma-pin-all", json!(true)),
            "Parameter 'capability' does not accept value 'rdma-pin-all'",
        ),
        (
            capability("events", json!(1)),
            "Invalid parameter type for 'capabilities[0].state', expected: boolean",
        ),
    ] {
        assert_eq!(
            client.refused("migrate-set-capabilities", arguments).await,
            desc
        );
    }
}

#[tokio::test]
async fn the_monitor_answers_in_a_string() {
    let setup = Setup::new();
    let mut client = setup.client().await;
    let line = |line: &str| json!({ "command-line": line });
    assert_eq!(
        client
            .execute("human-monitor-command", line("info status"))
            .await
            .unwrap(),
        "VM status: running\n"
    );
    assert_eq!(
        client
            .execute("human-monitor-command", line("nope"))
            .await
            .unwrap(),
        "unknown command: 'nope'\n"
    );
    // Two at once: each has its answer, in order.
    let save =
        json!({ "execute": "human-monitor-command", "arguments": line("savevm a"), "id": 1 });
    let stop = json!({ "execute": "query-name", "id": 2 });
    let first = client.ask(format!("{save}{stop}")).await;
    assert_eq!(first, json!({ "return": "", "id": 1 }));
    assert_eq!(client.receive().await["id"], 2);
    assert_eq!(setup.machine.calls(), ["savevm Some(\"a\")"]);
    let started = client
        .execute("human-monitor-command", line("migrate tcp:h:1"))
        .await
        .unwrap();
    assert!(started.as_str().unwrap().contains("continuing detached"));
    let second = json!({"command-line": "info registers", "cpu-index": 1});
    let registers = client
        .execute("human-monitor-command", second)
        .await
        .unwrap();
    assert!(registers.as_str().unwrap().starts_with("CPU#1\n"));
    let none = json!({"command-line": "info registers", "cpu-index": 9});
    assert_eq!(
        client.refused("human-monitor-command", none).await,
        "Parameter 'cpu-index' expects a CPU number"
    );
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
async fn a_forecast_is_for_the_link_that_is_given_or_known() {
    let setup = Setup::new();
    let mut client = setup.client().await;
    let name = "x-query-migration-forecast";
    setup.machine.state().parameters.max_bandwidth = 0;
    let refused = client.refused(name, json!({})).await;
    assert!(refused.contains("give it"), "{refused}");
    let refused = client.refused(name, json!({"bandwidth": 0})).await;
    assert!(refused.contains("at least 1, got 0"), "{refused}");

    setup.machine.state().forecast = MigrationForecast {
        least_downtime: 4,
        throttle_needed: Some(40),
        memory: 7,
        dirty_rate: 8,
        ..MigrationForecast::default()
    };
    // Measured, limited, assumed, given: the last that is there counts.
    let mut expected = json!({
        "converges": false, "least-downtime": 4, "throttle-needed": 40,
        "memory": 7, "dirty-rate": 8, "bandwidth": 1,
    });
    setup.machine.state().info.ferry = Some(FerryMigrationInfo {
        bandwidth: Some(1),
        ..Default::default()
    });
    let told = client.execute(name, json!({})).await.unwrap();
    assert_eq!(told, expected);
    setup.machine.state().parameters.max_bandwidth = 2;
    let told = client.execute(name, json!({})).await.unwrap();
    assert_eq!(told["bandwidth"], 2);
    setup.machine.state().parameters.avail_switchover_bandwidth = 3;
    let told = client.execute(name, json!({})).await.unwrap();
    assert_eq!(told["bandwidth"], 3);
    expected["bandwidth"] = json!(4);
    let told = client.execute(name, json!({"bandwidth": 4})).await.unwrap();
    assert_eq!(told, expected);

    setup.machine.state().failure = Some(CommandError::generic("not measured"));
    assert_eq!(
        client.refused(name, json!({"bandwidth": 4})).await,
        "not measured"
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
async fn a_quit_that_is_refused_says_why() {
    let setup = Setup::new();
    let mut client = setup.client().await;
    setup.machine.state().failure = Some(CommandError::generic("3 pages are missing here"));
    assert_eq!(
        client.refused("quit", json!({})).await,
        "3 pages are missing here"
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
