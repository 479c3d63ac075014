//! The monitor on a socket.

use std::sync::Arc;
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;

use crate::control::command::*;
use crate::control::fake::FakeMachine;
use crate::control::monitor::server::listen;
use crate::control::monitor::{CANCEL, PROMPT, is_failure};

struct Client {
    stream: UnixStream,
    text: String,
}

impl Client {
    /// Reads up to and including `end`, and returns it without.
    async fn until(&mut self, end: &str) -> String {
        loop {
            if let Some(at) = self.text.find(end) {
                let rest = self.text.split_off(at + end.len());
                let mut found = std::mem::replace(&mut self.text, rest);
                found.truncate(at);
                return found;
            }
            let mut chunk = [0; 4096];
            let len = self.stream.read(&mut chunk).await.unwrap();
            assert_ne!(len, 0, "hung up before {end:?}: {:?}", self.text);
            self.text
                .push_str(std::str::from_utf8(&chunk[..len]).unwrap());
        }
    }

    async fn send(&mut self, bytes: impl AsRef<[u8]>) {
        self.stream.write_all(bytes.as_ref()).await.unwrap();
    }
}

struct Setup {
    machine: Arc<FakeMachine>,
    server: crate::control::socket::Server,
    dir: tempfile::TempDir,
}

fn setup() -> Setup {
    let machine = FakeMachine::new();
    let dir = tempfile::tempdir().unwrap();
    let server = listen(&dir.path().join("mon"), machine.clone()).unwrap();
    Setup {
        machine,
        server,
        dir,
    }
}

async fn connect(setup: &Setup) -> Client {
    let stream = UnixStream::connect(setup.dir.path().join("mon"))
        .await
        .unwrap();
    let mut client = Client {
        stream,
        text: String::new(),
    };
    assert!(client.until(PROMPT).await.contains("type 'help'"));
    client
}

#[tokio::test]
async fn several_clients_at_once_are_served() {
    let setup = setup();
    let mut first = connect(&setup).await;
    let mut second = connect(&setup).await;
    first.send("info name\r\ninfo ").await;
    assert_eq!(first.until(PROMPT).await, "fake\r\n");
    second.send("stop\n").await;
    assert_eq!(second.until(PROMPT).await, "");
    first.send("status\n").await;
    assert_eq!(first.until(PROMPT).await, "VM status: paused\r\n");
    drop(first);
    second.send("info name\n").await;
    assert_eq!(second.until(PROMPT).await, "fake\r\n");
    setup.server.close(Duration::from_secs(5)).await;
}

#[tokio::test]
async fn a_migration_in_the_foreground_shows_progress_and_ctrl_c_cancels_it() {
    let setup = setup();
    let mut client = connect(&setup).await;
    client.send("migrate tcp:h:1\n").await;
    assert_eq!(client.until("\r\n").await, "connecting");
    client.send([CANCEL]).await;
    assert_eq!(client.until(PROMPT).await, "Error: migration cancelled\r\n");
    assert_eq!(setup.machine.calls(), ["migrate tcp:h:1", "migrate_cancel"]);

    client.send("migrate tcp:h:2\ninfo name\n").await;
    client.until("connecting\r\n").await;
    let status = MigrationStatus::Completed;
    let done = MigrationInfo {
        status,
        total_time: Some(5),
        downtime: Some(1),
        ..Default::default()
    };
    setup.machine.migration(done);
    assert_eq!(
        client.until(PROMPT).await,
        "Migration completed in 5 ms, downtime 1 ms\r\n"
    );
    // What was typed meanwhile is done afterwards.
    assert_eq!(client.until(PROMPT).await, "fake\r\n");
}

#[tokio::test]
async fn a_migration_goes_on_when_its_client_goes() {
    let setup = setup();
    let mut client = connect(&setup).await;
    client.send("migrate tcp:h:1\n").await;
    client.until("connecting").await;
    drop(client);
    let mut other = connect(&setup).await;
    other.send("info migrate\n").await;
    assert_eq!(other.until(PROMPT).await, "Migration status: setup\r\n");
}

#[tokio::test]
async fn a_line_without_end_is_cut_off() {
    let setup = setup();
    let mut client = connect(&setup).await;
    // The server may have hung up before all is written.
    let _ = client.stream.write_all(&vec![b'x'; 1 << 20]).await;
    let mut rest = Vec::new();
    let _ = client.stream.read_to_end(&mut rest).await;
    assert!(rest.len() < 1000);
    connect(&setup).await;
}

#[tokio::test]
async fn bytes_that_are_no_text_do_no_harm() {
    let setup = setup();
    let mut client = connect(&setup).await;
    client.send(b"\xff\xfe\x00\x1b[A\nstatus\n").await;
    assert!(is_failure(&client.until(PROMPT).await));
    assert!(is_failure(&client.until(PROMPT).await));
}
