//! Conversations with the QMP server, through a real socket.

use std::sync::Arc;
use std::time::Duration;

use serde_json::{Value, json};
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::UnixStream;

use super::server::listen;
use crate::control::command::*;
use crate::control::fake::FakeMachine;
use crate::control::socket::Server;

struct Setup {
    machine: Arc<FakeMachine>,
    server: Server,
    dir: tempfile::TempDir,
}

impl Setup {
    fn new() -> Self {
        let machine = FakeMachine::new();
        let dir = tempfile::tempdir().unwrap();
        let server = listen(&dir.path().join("qmp"), machine.clone()).unwrap();
        Self {
            machine,
            server,
            dir,
        }
    }

    async fn stream(&self) -> UnixStream {
        UnixStream::connect(self.dir.path().join("qmp"))
            .await
            .unwrap()
    }

    /// A client that has seen the greeting.
    async fn greeted(&self) -> Client {
        let mut client = Client(BufReader::new(self.stream().await));
        let greeting = client.receive().await;
        assert_eq!(greeting["QMP"]["capabilities"], json!([]));
        assert!(greeting["QMP"]["version"]["qemu"]["major"].is_u64());
        client
    }

    /// A client that has negotiated.
    async fn client(&self) -> Client {
        let mut client = self.greeted().await;
        assert_eq!(
            client.ask(r#"{"execute":"qmp_capabilities"}"#).await,
            json!({"return": {}})
        );
        client
    }
}

struct Client(BufReader<UnixStream>);

impl Client {
    async fn send(&mut self, bytes: impl AsRef<[u8]>) {
        self.0.get_mut().write_all(bytes.as_ref()).await.unwrap();
    }

    async fn receive(&mut self) -> Value {
        let mut line = String::new();
        assert_ne!(
            self.0.read_line(&mut line).await.unwrap(),
            0,
            "the server hung up"
        );
        assert!(line.ends_with("\r\n"));
        serde_json::from_str(&line).unwrap()
    }

    async fn ask(&mut self, message: impl AsRef<[u8]>) -> Value {
        self.send(message).await;
        self.receive().await
    }

    /// Executes a command; what it returns, or its error as (class, desc).
    async fn execute(&mut self, name: &str, arguments: Value) -> Result<Value, (String, String)> {
        let message = json!({ "execute": name, "arguments": arguments, "id": 7 });
        let mut answer = self.ask(message.to_string()).await;
        while answer.get("event").is_some() {
            answer = self.receive().await;
        }
        assert_eq!(answer["id"], 7);
        let text = |value: &Value| value.as_str().unwrap().to_owned();
        match answer.get("error") {
            None => Ok(answer["return"].clone()),
            Some(error) => Err((text(&error["class"]), text(&error["desc"]))),
        }
    }

    async fn refused(&mut self, name: &str, arguments: Value) -> String {
        let (class, desc) = self.execute(name, arguments).await.unwrap_err();
        assert_eq!(class, "GenericError");
        desc
    }
}

#[tokio::test]
async fn before_the_negotiation_nothing_else_is_done() {
    let setup = Setup::new();
    let mut client = setup.greeted().await;
    assert_eq!(
        client.ask(r#"{"execute":"stop","id":1}"#).await,
        json!({"error": {"class": "CommandNotFound",
            "desc": "Expecting capabilities negotiation with 'qmp_capabilities'"}, "id": 1})
    );
    let oob = r#"{"execute":"qmp_capabilities","arguments":{"enable":["oob"]}}"#;
    assert_eq!(
        client.ask(oob).await["error"]["desc"],
        "Capability 'oob' not available"
    );
    client
        .ask(r#"{"execute":"qmp_capabilities","arguments":{"enable":[]}}"#)
        .await;
    assert_eq!(
        client.ask(r#"{"execute":"qmp_capabilities"}"#).await["error"]["class"],
        "CommandNotFound"
    );
    assert!(setup.machine.calls().is_empty());
}

#[tokio::test]
async fn the_envelope_is_checked() {
    let setup = Setup::new();
    let mut client = setup.client().await;
    for (message, desc) in [
        ("[]", "QMP input must be a JSON object"),
        ("{}", "QMP input lacks member 'execute'"),
        (
            r#"{"execute":5}"#,
            "QMP input member 'execute' must be a string",
        ),
        (
            r#"{"execute":"stop","arguments":[]}"#,
            "QMP input member 'arguments' must be an object",
        ),
        (
            r#"{"execute":"stop","x":1}"#,
            "QMP input member 'x' is unexpected",
        ),
        (
            r#"{"exec-oob":"stop"}"#,
            "QMP input member 'exec-oob' is not supported",
        ),
    ] {
        assert_eq!(client.ask(message).await["error"]["desc"], desc);
    }
    assert_eq!(
        client.ask(r#"{"execute":"nope","id":{"a":[null]}}"#).await,
        json!({"error": {"class": "CommandNotFound", "desc": "The command nope has not been found"},
            "id": {"a": [null]}})
    );
    assert!(setup.machine.calls().is_empty());
}

#[tokio::test]
async fn broken_json_is_told_and_the_conversation_goes_on() {
    let setup = Setup::new();
    let mut client = setup.client().await;
    let error = client.ask("{\"execute\" 5}").await;
    assert_eq!(error["error"]["class"], "GenericError");
    assert!(
        error["error"]["desc"]
            .as_str()
            .unwrap()
            .starts_with("JSON parse error, ")
    );
    client
        .send(r#"{"execute":"query-name","id":1}{"execute":"query-name","id":2}"#)
        .await;
    assert_eq!(client.receive().await["id"], 1);
    assert_eq!(client.receive().await["id"], 2);
}

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
        ("query-migrate", json!({})),
        (
            "query-migrate-parameters",
            json!({"max-bandwidth": 0, "avail-switchover-bandwidth": 0, "downtime-limit": 30}),
        ),
        (
            "query-migrate-capabilities",
            json!([{"capability": "events", "state": true}]),
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
            "migrate" | "migrate-incoming" => json!({"uri": "tcp:h:1"}),
            "migrate-set-capabilities" => json!({"capabilities": []}),
            "human-monitor-command" => json!({"command-line": "stop"}),
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
        ("quit", "SHUTDOWN"),
    ] {
        let told = client.ask(json!({ "execute": command }).to_string()).await;
        assert_eq!(told["event"], event);
        assert!(told["timestamp"]["seconds"].as_i64().unwrap() > 1_000_000_000);
        assert_eq!(client.receive().await, json!({"return": {}}));
    }
    assert_eq!(
        setup.machine.calls(),
        ["stop", "cont", "system_reset", "quit HostQmpQuit"]
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
            json!({"uri": "tcp:h:1", "resume": true}),
            "Cannot resume if there is no paused migration",
        ),
        (
            json!({"uri": "tcp:h:1", "blk": true}),
            "Parameter 'blk' is not supported: Ferry does not copy disks in a migration",
        ),
        (
            json!({"uri": "exec:cat"}),
            "'exec:cat' is no migration address: expected tcp:HOST:PORT or unix:PATH",
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
async fn parameters_and_capabilities_are_checked_and_set() {
    let setup = Setup::new();
    let mut client = setup.client().await;
    let set = json!({"downtime-limit": 50, "max-bandwidth": u64::MAX});
    client.execute("migrate-set-parameters", set).await.unwrap();
    assert_eq!(
        client
            .execute("query-migrate-parameters", json!({}))
            .await
            .unwrap(),
        json!({"max-bandwidth": u64::MAX, "avail-switchover-bandwidth": 0, "downtime-limit": 50})
    );
    for (arguments, desc) in [
        (
            json!({"max-bandwidth": "5"}),
            "Invalid parameter type for 'max-bandwidth', expected: integer",
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
            json!({"multifd-channels": 2}),
            "Parameter 'multifd-channels' is unexpected",
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
    assert!(!setup.machine.capabilities()[0].state);
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
async fn events_go_to_every_client_that_has_negotiated() {
    let setup = Setup::new();
    let mut first = setup.client().await;
    let mut second = setup.client().await;
    let mut silent = setup.greeted().await;
    setup.machine.send(EventKind::MigrationPass { pass: 2 });
    for client in [&mut first, &mut second] {
        let event = client.receive().await;
        assert_eq!(event["event"], "MIGRATION_PASS");
        assert_eq!(event["data"], json!({"pass": 2}));
    }
    // The next thing that the third one hears is the answer.
    assert!(
        silent
            .ask(r#"{"execute":"qmp_capabilities"}"#)
            .await
            .get("return")
            .is_some()
    );
}

#[tokio::test]
async fn a_client_that_stops_reading_is_dropped_and_the_others_are_served() {
    let setup = Setup::new();
    let mut stalled = setup.client().await;
    let mut other = setup.client().await;
    // More than the socket's buffer and the server's queue hold together.
    for pass in 0..40_000 {
        setup.machine.send(EventKind::MigrationPass { pass });
        assert_eq!(other.receive().await["data"]["pass"], pass);
    }
    let mut rest = Vec::new();
    stalled.0.read_to_end(&mut rest).await.unwrap();
    assert!(rest.len() < 40_000 * 90, "the client was not dropped");
}

#[tokio::test]
async fn commands_wait_while_their_answers_are_not_read() {
    let setup = Setup::new();
    let mut client = setup.client().await;
    let (mut reader, mut writer) = client.0.get_mut().split();
    let count = 20_000;
    let write = async {
        for _ in 0..count {
            writer
                .write_all(b"{\"execute\":\"query-commands\"}")
                .await
                .unwrap();
        }
    };
    // Nothing is read until the writer cannot go on: the server has stopped taking commands.
    let mut write = std::pin::pin!(write);
    let stuck = tokio::time::timeout(Duration::from_millis(300), &mut write).await;
    assert!(stuck.is_err(), "the server queued all answers");
    let mut lines = BufReader::new(&mut reader).lines();
    let read = async {
        for _ in 0..count {
            assert!(
                lines
                    .next_line()
                    .await
                    .unwrap()
                    .unwrap()
                    .starts_with("{\"return\"")
            );
        }
    };
    tokio::join!(write, read);
}

#[tokio::test]
async fn a_client_that_sends_garbage_is_dropped() {
    let setup = Setup::new();
    let mut other = setup.client().await;
    for garbage in [
        vec![0xff; 100_000],
        vec![b'['; 100_000],
        vec![b'"'; 1],
        vec![b'{'; 10],
    ] {
        let mut client = setup.greeted().await;
        // The server may have hung up before all is written.
        let _ = client.0.get_mut().write_all(&garbage).await;
        let mut endless = vec![b'a'; 1 << 20];
        endless.insert(0, b'"');
        let _ = client.0.get_mut().write_all(&endless).await;
        let mut rest = Vec::new();
        let _ = client.0.read_to_end(&mut rest).await;
        assert!(rest.len() < 64 << 10, "{} bytes", rest.len());
    }
    assert!(other.execute("query-status", json!({})).await.is_ok());
}

#[tokio::test]
async fn half_a_connection_still_gets_its_answers() {
    let setup = Setup::new();
    let mut stream = setup.stream().await;
    stream
        .write_all(br#"{"execute":"qmp_capabilities"}{"execute":"query-name"}"#)
        .await
        .unwrap();
    stream.shutdown().await.unwrap();
    let mut text = String::new();
    stream.read_to_string(&mut text).await.unwrap();
    assert_eq!(text.lines().count(), 3);
    assert!(text.contains("fake"));
}

#[tokio::test]
async fn the_last_words_are_delivered_when_the_process_ends() {
    let setup = Setup::new();
    let mut client = setup.client().await;
    setup
        .machine
        .send(EventKind::shutdown(ShutdownCause::GuestShutdown));
    setup.server.close(Duration::from_secs(5)).await;
    assert_eq!(client.receive().await["event"], "SHUTDOWN");
    assert_eq!(client.0.read_line(&mut String::new()).await.unwrap(), 0);
    assert!(!setup.dir.path().join("qmp").exists());
}

/// For trying a client of another make: serves until the client says quit.
/// `FERRY_FAKE_QMP=/tmp/qmp cargo test -p vmm serve_a_fake -- --ignored`
#[tokio::test]
#[ignore = "serves a client that is started by hand"]
async fn serve_a_fake_machine() {
    let path = std::env::var_os("FERRY_FAKE_QMP").expect("FERRY_FAKE_QMP: the socket's path");
    let machine = FakeMachine::new();
    let mut events = machine.subscribe();
    let monitor = std::env::var_os("FERRY_FAKE_MONITOR").map(|path| {
        crate::control::monitor::server::listen(path.as_ref(), machine.clone()).unwrap()
    });
    let server = listen(path.as_ref(), machine.clone()).unwrap();
    while !matches!(
        events.recv().await.unwrap().kind,
        EventKind::Shutdown { .. }
    ) {}
    server.close(Duration::from_secs(1)).await;
    if let Some(monitor) = monitor {
        monitor.close(Duration::from_secs(1)).await;
    }
}
