//! The monitor and QMP of real processes, with several clients at once.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Command, Output};

use guest_tests::dirtier::Report;
use guest_tests::driver::qmp::Client;
use serde_json::{Value, json};

use crate::harness::{Ferry, Guest, PATIENCE, busy, ferry, furious, require_kvm, scratch};

/// A dirtier on two vCPUs' machine, with a monitor socket beside QMP.
fn run(dir: &Path, options: guest_tests::dirtier::Options) -> Ferry {
    let guest = Guest {
        smp: 2,
        ..Guest::dirtier("256M", options)
    };
    let monitor = format!("unix:{}", dir.join("hmp").display());
    let ferry = Ferry::run(dir, "a", &guest, &["--monitor", &monitor]);
    ferry.wait_for(|report| matches!(report, Report::Ready { .. }).then_some(()));
    ferry
}

/// `ferry monitor SOCKET COMMAND…`
fn monitor(socket: &Path, command: &[&str]) -> Output {
    Command::new(ferry())
        .arg("monitor")
        .arg(socket)
        .args(command)
        .output()
        .unwrap()
}

/// The answer to a command that must succeed.
fn told(socket: &Path, command: &[&str]) -> String {
    let output = monitor(socket, command);
    let text = String::from_utf8(output.stdout).unwrap();
    let error = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.success(), "{command:?}: {text}{error}");
    text
}

/// The answer to a command that must fail.
fn refused(socket: &Path, command: &[&str]) -> String {
    let output = monitor(socket, command);
    let text = String::from_utf8_lossy(&output.stdout).into_owned()
        + &String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{command:?}: {text}");
    text
}

fn threads(pid: u32) -> Vec<(u64, String)> {
    let tasks = std::fs::read_dir(format!("/proc/{pid}/task")).unwrap();
    tasks
        .map(|task| {
            let path = task.unwrap().path();
            let id = path.file_name().unwrap().to_str().unwrap();
            let name = std::fs::read_to_string(path.join("comm")).unwrap();
            (id.parse().unwrap(), name.trim().to_owned())
        })
        .collect()
}

#[test]
fn info_tells_everything_on_both_kinds_of_socket() {
    require_kvm!();
    let dir = scratch();
    let mut guest = run(dir.path(), busy());
    for socket in ["hmp", "a.qmp"] {
        let socket = dir.path().join(socket);
        let info = |topic: &str| told(&socket, &["info", topic]);
        assert_eq!(info("status"), "VM status: running\n");
        assert_eq!(info("name"), "a\n");
        assert!(info("version").starts_with("ferry "), "{}", info("version"));
        let cpus = info("cpus");
        assert!(cpus.starts_with("* CPU #0:"), "{cpus}");
        assert!(cpus.contains("\n  CPU #1:"), "{cpus}");
        for thread in cpus.lines() {
            let (_, id) = thread.split_once("thread_id=").unwrap();
            let tasks = threads(guest.process.id());
            assert!(tasks.iter().any(|task| task.0.to_string() == id), "{cpus}");
        }
        let registers = info("registers");
        assert!(registers.starts_with("CPU#0\n"), "{registers}");
        assert!(registers.contains("RIP="), "{registers}");
        let all = told(&socket, &["info", "registers", "-a"]);
        assert!(all.contains("CPU#0\n") && all.contains("CPU#1\n"), "{all}");
        assert!(info("migrate_parameters").contains("downtime-limit: 30 ms"));
        assert!(info("migrate_capabilities").contains("events: on"));
        assert_eq!(info("migrate"), "");
        assert!(told(&socket, &["help"]).contains("migrate_set_parameter"));
        assert!(told(&socket, &["help", "info"]).contains("info registers"));

        let answer = refused(&socket, &["info", "weather"]);
        assert!(
            answer.contains("unknown command: 'info weather'"),
            "{answer}"
        );
        let answer = refused(&socket, &["frobnicate"]);
        assert!(answer.contains("unknown command"), "{answer}");
        let answer = refused(&socket, &["info", "registers", "7"]);
        assert!(answer.contains('7'), "{answer}");
    }
    // Looking at the registers has done the guest no harm.
    guest.wait_heartbeats(20);
    guest.verify();
}

#[test]
fn a_monitor_on_a_socket_does_what_it_is_told() {
    require_kvm!();
    let dir = scratch();
    let mut guest = run(dir.path(), busy());
    let socket = dir.path().join("hmp");
    told(&socket, &["stop"]);
    assert_eq!(told(&socket, &["info", "status"]), "VM status: paused\n");
    assert_eq!(guest.status(), "paused");
    // One word or several.
    told(&socket, &["c"]);
    assert_eq!(guest.status(), "running");
    told(&socket, &["migrate_set_parameter downtime-limit 77"]);
    told(&socket, &["migrate_set_parameter", "max-bandwidth", "2G"]);
    told(&socket, &["migrate_set_capability", "events", "off"]);
    let parameters = guest.execute("query-migrate-parameters", Value::Null);
    assert_eq!(parameters["downtime-limit"], 77);
    assert_eq!(parameters["max-bandwidth"], 2u64 << 30);
    told(&socket, &["migrate_set_speed", "10"]);
    told(&socket, &["migrate_set_downtime", "0.5"]);
    let parameters = guest.execute("query-migrate-parameters", Value::Null);
    assert_eq!(parameters["downtime-limit"], 500);
    assert_eq!(parameters["max-bandwidth"], 10 << 20);
    let answer = refused(&socket, &["migrate_set_parameter", "cpu-throttle", "9"]);
    assert!(answer.contains("cpu-throttle"), "{answer}");
    let answer = refused(&socket, &["migrate_set_parameter", "downtime-limit", "-1"]);
    assert!(answer.contains("-1"), "{answer}");
    told(&socket, &["system_reset"]);
    guest.wait_for(|report| matches!(report, Report::Ready { .. }).then_some(()));
    told(&socket, &["quit"]);
    let (success, output) = guest.wait_exit();
    assert!(success, "{output}");
    let answer = refused(&socket, &["info", "status"]);
    assert!(answer.contains("is ferry running"), "{answer}");
}

#[test]
fn a_foreground_migrate_ends_with_the_migration() {
    require_kvm!();
    let dir = scratch();
    let guest = run(dir.path(), busy());
    let socket = dir.path().join("hmp");
    let answer = refused(&socket, &["migrate", "tcp:127.0.0.1:1"]);
    assert!(answer.contains("Error: "), "{answer}");
    assert!(answer.contains("refused"), "{answer}");
    let answer = refused(&socket, &["migrate", "nowhere"]);
    assert!(answer.contains("Error: "), "{answer}");

    let (mut destination, uri) = Ferry::incoming(dir.path(), "dst");
    let answer = told(&socket, &["migrate", &uri]);
    assert!(answer.contains("completed"), "{answer}");
    let info = told(&socket, &["info", "migrate"]);
    for line in [
        "Migration status: completed\n",
        "downtime: ",
        "downtime parts: ",
    ] {
        assert!(info.contains(line), "{info}");
    }
    let status = told(&socket, &["info", "status"]);
    assert_eq!(status, "VM status: paused (postmigrate)\n");
    destination.wait_heartbeats(20);
    destination.verify();
    drop(guest);
}

#[test]
fn a_migrate_in_the_background_can_be_cancelled_from_elsewhere() {
    require_kvm!();
    let dir = scratch();
    let mut guest = run(dir.path(), furious());
    let socket = dir.path().join("hmp");
    told(&socket, &["migrate_set_parameter", "downtime-limit", "0"]);
    let (_destination, uri) = Ferry::incoming(dir.path(), "dst");
    told(&socket, &["migrate", "-d", &uri]);
    guest.wait_migration("rounds", |info| {
        info["ram"]["dirty-sync-count"].as_u64() >= Some(2)
    });
    told(&dir.path().join("a.qmp"), &["migrate_cancel"]);
    guest.wait_migrated("cancelled");
    let info = told(&socket, &["info", "migrate"]);
    assert!(info.contains("Migration status: cancelled"), "{info}");
}

#[test]
fn qmp_serves_several_clients_and_garbage_harms_nobody() {
    require_kvm!();
    let dir = scratch();
    let mut guest = run(dir.path(), busy());
    let socket = dir.path().join("a.qmp");
    let mut second = Client::connect(&socket, PATIENCE).unwrap();

    for garbage in [
        b"GET / HTTP/1.0\r\n\r\n".to_vec(),
        vec![0xff; 3000],
        [b"{\"execute\": \"".to_vec(), vec![b'x'; 1 << 20]].concat(),
        vec![b'['; 100_000],
        b"{}{}{}[]1 \"\" null".to_vec(),
    ] {
        let mut stranger = UnixStream::connect(&socket).unwrap();
        // It may be dropped before it has said all.
        let _ = stranger.write_all(&garbage);
        let _ = stranger.shutdown(std::net::Shutdown::Write);
        let mut answer = Vec::new();
        let _ = stranger.read_to_end(&mut answer);
        assert!(answer.starts_with(b"{\"QMP\":"), "{answer:?}");
    }
    // One that never reads, in the middle of all that follows.
    let mut deaf = UnixStream::connect(&socket).unwrap();
    deaf.write_all(b"{\"execute\": \"qmp_capabilities\"}")
        .unwrap();

    let pid = guest.process.id();
    let cpus = guest.execute("query-cpus-fast", Value::Null);
    let tasks = threads(pid);
    let cpus = cpus.as_array().unwrap();
    assert_eq!(cpus.len(), 2);
    for (index, cpu) in cpus.iter().enumerate() {
        assert_eq!(cpu["cpu-index"], index);
        assert!(tasks.iter().any(|task| cpu["thread-id"] == task.0), "{cpu}");
    }
    assert_ne!(cpus[0]["thread-id"], cpus[1]["thread-id"]);

    second.execute("stop", Value::Null).unwrap();
    for client in [&mut guest.qmp, &mut second] {
        client.wait_event("STOP", PATIENCE).unwrap();
    }
    let answer = guest.execute(
        "human-monitor-command",
        json!({ "command-line": "info status" }),
    );
    assert_eq!(answer, "VM status: paused\n");
    let answer = guest.execute(
        "human-monitor-command",
        json!({ "command-line": "nonsense" }),
    );
    assert!(answer.as_str().unwrap().contains("unknown command"));
    guest.execute("cont", Value::Null);
    second.wait_event("RESUME", PATIENCE).unwrap();

    let refusal = guest.refused("no-such-command", Value::Null);
    assert!(refusal.contains("no-such-command"), "{refusal}");
    let names = guest.execute("query-commands", Value::Null);
    for command in ["migrate", "query-migrate", "human-monitor-command", "quit"] {
        assert!(
            names
                .as_array()
                .unwrap()
                .contains(&json!({ "name": command }))
        );
    }
    assert_eq!(guest.execute("query-name", Value::Null)["name"], "a");
    guest.verify();
    drop(deaf);
}

#[test]
fn options_are_understood_in_qemus_spelling() {
    require_kvm!();
    let dir = scratch();
    let at = |name: &str| dir.path().join(name).display().to_string();
    std::fs::write(at("kernel"), guest_tests::BOOT).unwrap();
    std::fs::write(at("initrd"), b"some words").unwrap();
    let (qmp, hmp) = (
        format!("unix:{},server=on,wait=off", at("qmp")),
        format!("unix:{},server,nowait", at("hmp")),
    );
    let serial = format!("file:{}", at("serial"));
    let (kernel, initrd) = (at("kernel"), at("initrd"));
    let arguments = [
        "run",
        "-name",
        "vm7",
        "-kernel",
        &kernel,
        "-initrd",
        &initrd,
        "-append",
        "-dashed then=off",
        "-m",
        "48",
        "-smp",
        "2",
        "-cpu",
        "host",
        "-serial",
        &serial,
        "-monitor",
        &hmp,
        "-qmp",
        &qmp,
        "-enable-kvm",
        "-nodefaults",
        "-no-reboot",
        "-S",
    ];
    let log = dir.path().join("log");
    let mut process =
        guest_tests::driver::process::Process::spawn(ferry(), arguments, &log).unwrap();
    let mut client = Client::connect(&dir.path().join("qmp"), PATIENCE)
        .unwrap_or_else(|err| panic!("{err}: {}", process.output()));
    let status = client.execute("query-status", Value::Null).unwrap();
    assert_eq!(status["status"], "prelaunch");
    assert_eq!(told(&dir.path().join("hmp"), &["info", "name"]), "vm7\n");
    client.execute("cont", Value::Null).unwrap();
    assert!(process.wait(PATIENCE).unwrap().unwrap().success());
    let said = std::fs::read_to_string(at("serial")).unwrap();
    assert!(said.contains("command_line -dashed then=off\n"), "{said}");
    assert!(said.contains("initrd address="), "{said}");
    assert!(said.contains("size=0x2f00000 kind=1"), "48 MiB: {said}");
}
