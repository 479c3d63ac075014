//! An agent and its peer, over loopback.

use std::io::{BufRead, BufReader, Write};
use std::net::{SocketAddr, TcpStream};
use std::path::{Path, PathBuf};
use std::thread::{self, JoinHandle};

use guest_tests::driver::skip;
use serde_json::{Value, json};

use super::agent::Agent;
use super::*;
use crate::migration;
use crate::scenario::{Link, Scenario};
use crate::vmm::{Ferry, Qemu, Vmm};

const SECRET: &str = "a secret for tests 0123456789";

fn token() -> Token {
    Token::new(SECRET).unwrap()
}

/// An agent that serves so many peers, with the VMM `make` makes; it says what happened.
fn agent(
    peers: usize,
    make: impl FnOnce() -> Vec<Box<dyn Vmm>> + Send + 'static,
) -> (SocketAddr, JoinHandle<Vec<String>>) {
    let (sender, address) = std::sync::mpsc::channel();
    let thread = thread::spawn(move || {
        let agent = Agent::bind("127.0.0.1:0", token(), make()).unwrap();
        sender.send(agent.address().unwrap()).unwrap();
        let mut said = Vec::new();
        for _ in 0..peers {
            agent.serve_one(&mut |what| said.push(what)).unwrap();
        }
        said
    });
    (address.recv().unwrap(), thread)
}

fn ferry(program: &Path) -> Vec<Box<dyn Vmm>> {
    vec![Box::new(Ferry {
        name: "ferry".to_owned(),
        program: program.to_owned(),
    })]
}

/// What the agent answers to a line that is sent as it is; null if it has hung up.
fn raw(stream: &mut BufReader<TcpStream>, line: &str) -> Value {
    let mut answer = String::new();
    let sent = stream.get_mut().write_all(format!("{line}\n").as_bytes());
    match sent.and_then(|()| stream.read_line(&mut answer)) {
        Ok(_) => serde_json::from_str(&answer).unwrap_or(Value::Null),
        Err(_) => Value::Null,
    }
}

#[test]
fn without_the_token_nothing_is_done() {
    let (address, thread) = agent(3, || ferry(Path::new("/nowhere/ferry")));
    let wrong = Token::new("another secret 0123456789").unwrap();
    let error = Connection::connect(&address.to_string(), &wrong).unwrap_err();
    assert!(error.to_string().contains("not the token"), "{error}");
    // Nor by who leaves the greeting out, or sends what is no message.
    let mut stream = BufReader::new(TcpStream::connect(address).unwrap());
    let answer = raw(&mut stream, r#"{"do":"cpu"}"#);
    assert_eq!(answer["error"]["reason"], "hello comes first");
    assert_eq!(raw(&mut stream, r#"{"do":"cpu"}"#), Value::Null);
    let mut stream = BufReader::new(TcpStream::connect(address).unwrap());
    assert_eq!(raw(&mut stream, "GET / HTTP/1.1"), Value::Null);
    drop(stream);
    let said = thread.join().unwrap().join("\n");
    assert!(!said.contains(SECRET), "{said}");
}

#[test]
fn a_peer_gets_only_what_is_on_the_agents_command_line() {
    let (address, thread) = agent(1, || ferry(Path::new("/nowhere/ferry")));
    let mut connection = Connection::connect(&address.to_string(), &token()).unwrap();
    let described = connection.describe();
    assert!(described.contains("ferry: "), "{described}");
    let guest = |append: &str, memory| Guest {
        kernel: PathBuf::new(),
        append: append.to_owned(),
        memory,
        vcpus: 1,
        prealloc: false,
        drives: vec![],
    };
    for (vmm, append, memory, reason) in [
        ("/bin/sh", "rate=0", 1 << 30, "no VMM '/bin/sh'"),
        (
            "ferry",
            "rate=0 -device x",
            1 << 30,
            "no options of a guest",
        ),
        ("ferry", "rate=0", u64::MAX, "bytes: the host has"),
        // Its own program isn't there: that is told, too.
        ("ferry", "rate=0", 1 << 30, "/nowhere/ferry"),
    ] {
        let error = connection.start(vmm, &guest(append, memory)).unwrap_err();
        assert!(error.to_string().contains(reason), "{error}");
    }
    for command in ["migrate", "quit", "human-monitor-command"] {
        let refused = connection.ask::<Value>(&Request::Execute {
            command: command.to_owned(),
            arguments: json!({ "uri": "exec:touch /tmp/x" }),
        });
        let error = refused.unwrap_err().to_string();
        assert!(error.contains("does not run"), "{error}");
    }
    let error = connection.ask::<Value>(&Request::Cpu).unwrap_err();
    assert!(error.to_string().contains("no destination"), "{error}");
    drop(connection);
    thread.join().unwrap();
}

#[test]
fn clocks_of_one_host_agree() {
    let (address, thread) = agent(1, Vec::new);
    let mut connection = Connection::connect(&address.to_string(), &token()).unwrap();
    let before = Instant::now();
    let there: u64 = connection.ask(&Request::Clock).unwrap();
    let after = Instant::now();
    let (at, wrong) = (connection.here(there), connection.relation.uncertainty);
    assert!(at + wrong >= before && at <= after + wrong, "{wrong:?}");
    drop(connection);
    thread.join().unwrap();
}

/// QEMU is what the tests of this crate can have; what Ferry does is its own tests' matter.
#[test]
fn a_guest_goes_to_the_agents_host() {
    if !Path::new("/dev/kvm").exists() {
        return skip("no /dev/kvm");
    }
    let Some(qemu) = Qemu::find() else {
        return skip("no qemu-system-x86_64 on the search path (package qemu-system-x86)");
    };
    let there = qemu.clone();
    let (address, thread) = agent(1, move || vec![Box::new(there)]);
    let mut connection = Connection::connect(&address.to_string(), &token()).unwrap();
    let mut scenario = Scenario::named("busy").unwrap();
    scenario.memory = 64 << 20;
    scenario.work.fill = guest_tests::Size(16 << 20);
    scenario.work.ws = guest_tests::Size(4 << 20);
    scenario.link = Link::Between;
    let dir = tempfile::tempdir().unwrap();
    let outcome = migration::run(&qemu, &scenario, Some(&mut connection), dir.path()).unwrap();
    assert_eq!(outcome.verified_pages, 4096);
    assert!(outcome.clock_uncertainty.is_some());
    assert!(outcome.resident_destination >= 64 << 20, "preallocated");
    assert!(outcome.work.turns.is_some_and(|turns| turns > 0.0));
    assert!(outcome.total > 0.0 && outcome.bytes > 16 << 20);
    drop(connection);
    thread.join().unwrap();
}
