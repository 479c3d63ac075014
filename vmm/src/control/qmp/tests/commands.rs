//! Commands on the guest and its process: what they do, what they return, what they refuse.

use serde_json::json;

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
        ("query-vcpu-dirty-limit", json!([])),
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
                "vcpu-dirty-limit": 1, "x-vcpu-dirty-limit-period": 200,
                "x-migration-timeout": 0, "x-migration-timeout-action": "cancel",
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
            "set-vcpu-dirty-limit" => json!({"dirty-rate": 1}),
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
async fn a_quit_that_is_refused_says_why() {
    let setup = Setup::new();
    let mut client = setup.client().await;
    setup.machine.state().failure = Some(CommandError::generic("3 pages are missing here"));
    assert_eq!(
        client.refused("quit", json!({})).await,
        "3 pages are missing here"
    );
}
