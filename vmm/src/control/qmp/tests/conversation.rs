//! How a conversation goes: the negotiation, broken messages, events, clients that misbehave.

use std::time::Duration;

use serde_json::json;
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};

use super::Setup;
use crate::control::command::*;
use crate::control::fake::FakeMachine;
use crate::control::qmp::server::listen;

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

/// `FERRY_FAKE_QMP=/tmp/qmp cargo test -p vmm serve_a_fake -- --ignored`
/// For trying a client of another make: serves until the client says quit.
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
