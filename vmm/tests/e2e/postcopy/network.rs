//! A guest on the network that moves before its memory.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::Receiver;

use guest_tests::net::{Options, Report};
use serde_json::{Value, json};

use super::crossing::Crossing;
use super::{
    destination_with, enable, push_fast, recover, require_postcopy, set, switch_at_once,
    wait_paused, wait_state,
};
use crate::harness::{Ferry, PATIENCE, scratch};
use crate::net::{echo, in_a_network, net_guest, with_tap};

/// Datagrams that the guest has sent back, by their numbers, and how often.
struct Answers {
    come: Receiver<u64>,
    seen: BTreeMap<u64, u64>,
}

impl Answers {
    /// Waits for so many more.
    fn wait(&mut self, more: usize) {
        let enough = self.seen.len() + more;
        while self.seen.len() < enough {
            let number = self.come.recv_timeout(PATIENCE);
            *self.seen.entry(number.expect("an answer")).or_insert(0) += 1;
        }
    }
}

/// It answers while its memory comes, after a break of the connection, and when all is there.
#[test]
fn a_guest_answers_while_its_memory_comes() {
    require_postcopy!();
    if !in_a_network() {
        return;
    }
    let dir = scratch();
    let [option, tap0] = with_tap("tap0");
    let guest = net_guest(&Options::default());
    let mut source = Ferry::run(dir.path(), "src", &guest, &[&option, &tap0]);
    source
        .wait_line(|line| matches!(Report::parse(line), Some(Report::Ready { .. })).then_some(()));
    let over = Arc::new(AtomicBool::new(false));
    let (answer, come) = std::sync::mpsc::channel();
    let until = Arc::clone(&over);
    // In this thread's namespace.
    let echo = std::thread::spawn(move || echo(&until, &|number| answer.send(number).unwrap()));
    let mut answers = Answers {
        come,
        seen: BTreeMap::new(),
    };
    answers.wait(20);

    let tap1 = ["--net", "tap,ifname=tap1"];
    let (mut destination, uri) = destination_with(dir.path(), "dst", &tap1);
    enable(&mut source);
    set(&mut source, json!({ "max-postcopy-bandwidth": 64 << 10 }));
    let crossing = Crossing::to(&uri, None);
    switch_at_once(&mut source, &crossing.uri);
    wait_state(&mut destination, "postcopy-active");
    let packets = |ferry: &mut Ferry| {
        let arguments = json!({ "command-line": "info network" });
        ferry.execute("human-monitor-command", arguments)
    };
    let left = packets(&mut source);
    answers.wait(50);
    let info = destination.query_migrate();
    assert_eq!(info["status"], "postcopy-active", "{info:#}");
    crossing.cut();
    wait_paused(&mut source, &mut destination);
    let _crossing = recover(&mut source, &mut destination, None);
    wait_state(&mut destination, "postcopy-active");
    answers.wait(50);
    let info = destination.query_migrate();
    assert_eq!(info["status"], "postcopy-active", "{info:#}");
    push_fast(&mut source);
    source.wait_migrated("completed");
    destination.wait_migrated("completed");
    answers.wait(50);
    assert_eq!(packets(&mut source), left, "the source's card is at rest");
    source.execute("quit", Value::Null);
    source.wait_exit();
    answers.wait(10);
    over.store(true, Ordering::Relaxed);
    echo.join().unwrap();
    let twice = answers.seen.values().any(|&times| times != 1);
    assert!(!twice, "answers came twice: {:?}", answers.seen);
}
