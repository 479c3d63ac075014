//! `ferry bench` as a program: what it reports, and what it leaves behind.

use std::path::Path;
use std::process::{Child, Command, Output, Stdio};
use std::time::Instant;

use rustix::process::{Pid, Signal, kill_process, test_kill_process};
use serde_json::Value;

use crate::harness::{LOOK, PATIENCE, ferry, require_kvm, scratch};

/// A migration of a small guest, Ferry alone; temporary files go to `dir`.
fn start(dir: &Path, more: &[&str]) -> Child {
    let mut command = Command::new(ferry());
    command.args(["bench", "migration", "--without-qemu", "--runs", "1"]);
    command.args(["--memory", "64M", "--fill", "16M", "--working-set", "8M"]);
    command.args(more).env("TMPDIR", dir);
    command.stdout(Stdio::piped()).stderr(Stdio::piped());
    command.spawn().unwrap()
}

fn said(output: &Output) -> String {
    let [out, err] = [&output.stdout, &output.stderr].map(|said| String::from_utf8_lossy(said));
    format!("{out}{err}")
}

fn children(of: u32) -> Vec<Pid> {
    let threads = std::fs::read_dir(format!("/proc/{of}/task")).unwrap();
    let lists = threads.map(|thread| {
        let path = thread.unwrap().path().join("children");
        std::fs::read_to_string(path).unwrap_or_default()
    });
    let ids: Vec<i32> = lists
        .flat_map(|list| {
            list.split_whitespace()
                .map(|id| id.parse().unwrap())
                .collect::<Vec<_>>()
        })
        .collect();
    ids.into_iter().filter_map(Pid::from_raw).collect()
}

#[test]
fn a_benchmark_verifies_the_guest_and_writes_its_figures() {
    require_kvm!();
    let dir = scratch();
    let [json, html] = ["figures.json", "figures.html"].map(|name| dir.path().join(name));
    let [json, html] = [&json, &html].map(|path| path.to_str().unwrap());
    let child = start(
        dir.path(),
        &["--rate", "1000", "--json", json, "--html", html],
    );
    let output = child.wait_with_output().unwrap();
    assert!(output.status.success(), "{}", said(&output));
    let figures: Value = serde_json::from_slice(&std::fs::read(json).unwrap()).unwrap();
    let run = &figures["sections"][0]["runs"]["ferry"][0];
    assert_eq!(run["verified_pages"], (16 << 20) / 4096, "{run}");
    for figure in ["total", "felt", "bytes", "gap_before", "gap_after"] {
        assert!(run[figure].as_f64() > Some(0.0), "{figure}: {run}");
    }
    assert!(run["reported"]["total"].as_f64() > Some(0.0), "{run}");
    let page = std::fs::read_to_string(html).unwrap();
    assert!(page.contains("<svg") && !page.contains("http-equiv=\"refresh\""));
    assert!(!page.contains("src=\"http"), "it needs nothing else");
}

#[test]
fn a_benchmark_that_is_ended_leaves_nothing_behind() {
    require_kvm!();
    for signal in [Signal::TERM, Signal::INT] {
        let dir = scratch();
        let mut child = start(dir.path(), &["--rate", "1000"]);
        let deadline = Instant::now() + PATIENCE;
        let started = loop {
            let children = children(child.id());
            if !children.is_empty() {
                break children;
            }
            assert_eq!(child.try_wait().unwrap(), None, "it ended too early");
            assert!(Instant::now() < deadline, "no VMM is started");
            std::thread::sleep(LOOK);
        };
        kill_process(Pid::from_child(&child), signal).unwrap();
        let output = child.wait_with_output().unwrap();
        assert_eq!(output.status.code(), Some(1), "{}", said(&output));
        assert!(
            said(&output).contains("ended by signal"),
            "{}",
            said(&output)
        );
        for process in started {
            assert!(
                test_kill_process(process).is_err(),
                "{process:?} is still there"
            );
        }
        let left: Vec<_> = std::fs::read_dir(dir.path()).unwrap().collect();
        assert!(left.is_empty(), "{left:?}");
    }
}
