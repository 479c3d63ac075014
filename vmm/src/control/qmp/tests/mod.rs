//! The QMP server, through a real socket.

mod commands;
mod convergence;
mod conversation;
mod migrate;
mod parameters;

use std::sync::Arc;

use serde_json::{Value, json};
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};
use tokio::net::UnixStream;

use super::server::listen;
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
