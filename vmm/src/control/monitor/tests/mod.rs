//! The commands, and what they answer.

mod convergence;
mod info;
mod migrate;
mod parameters;
mod server;
mod snapshots;

use std::sync::Arc;

use super::commands::COMMANDS;
use super::info::TOPICS;
use super::{Outcome, Session, is_failure};
use crate::control::command::*;
use crate::control::fake::FakeMachine;

fn session() -> (Arc<FakeMachine>, Session) {
    let machine = FakeMachine::new();
    (machine.clone(), Session::new(machine))
}

fn done(session: &mut Session, line: &str) -> String {
    match session.execute(line) {
        Outcome::Done(text) => text,
        outcome => panic!("{line} is in the foreground: {outcome:?}"),
    }
}

#[test]
fn actions_reach_the_machine_under_both_names() {
    let (machine, mut session) = session();
    for line in [
        "stop",
        "s",
        "cont",
        "c",
        "system_reset",
        "system_powerdown",
        "balloon 256",
        "balloon 1G",
        "migrate_cancel",
        "migrate_start_postcopy",
        "migrate_pause",
        "migrate_recover tcp:h:1",
        "migrate -r tcp:h:1",
        "set_link net0 off",
        "announce_self",
        "announce_self net0,net1",
        "quit",
        "q -f",
        "",
        "  ",
    ] {
        assert_eq!(done(&mut session, line), "", "{line}");
    }
    assert_eq!(
        machine.calls(),
        [
            "stop",
            "stop",
            "cont",
            "cont",
            "system_reset",
            "system_powerdown",
            "balloon 268435456",
            "balloon 1073741824",
            "migrate_cancel",
            "migrate_start_postcopy",
            "migrate_pause",
            "migrate_recover tcp:h:1",
            "migrate -r tcp:h:1",
            "set_link net0 false",
            "announce_self None rounds None",
            "announce_self Some([\"net0\", \"net1\"]) rounds None",
            "quit HostQmpQuit",
            "quit HostQmpQuit by force"
        ]
    );
}

#[test]
fn what_is_wrong_is_said_in_qemus_words_and_seen_as_a_failure() {
    let (machine, mut session) = session();
    for (line, answer) in [
        ("nope", "unknown command: 'nope'\n"),
        ("info nope", "unknown command: 'info nope'\n"),
        ("help nope", "unknown command: 'nope'\n"),
        (
            "migrate -d",
            "migrate: string expected\nTry \"help migrate\" for more information\n",
        ),
        (
            "migrate -z tcp:h:1",
            "migrate: unsupported option -z\nTry \"help migrate\" for more information\n",
        ),
        (
            "stop 5",
            "stop|s: extraneous characters at the end of line\nTry \"help stop\" for more \
             information\n",
        ),
        (
            "migrate_set_parameter foo 1",
            "Error: invalid parameter value: foo\n",
        ),
        (
            "migrate_set_parameter downtime-limit x",
            "Error: 'x' is not a whole number of milliseconds\n",
        ),
        (
            "migrate_set_downtime -1",
            "Error: '-1' is not a time in seconds\n",
        ),
        (
            "migrate_set_downtime nan",
            "Error: 'nan' is not a time in seconds\n",
        ),
        (
            "migrate_set_capability foo on",
            "Error: Parameter 'capability' does not accept value 'foo'\n",
        ),
        ("info registers 7", "Error: there is no vCPU 7\n"),
        ("cpu 7", "Error: there is no vCPU 7\n"),
        ("stop \"", "Error: unterminated string\n"),
    ] {
        let text = done(&mut session, line);
        assert_eq!(text, answer, "{line}");
        assert!(is_failure(&text), "{line}");
    }
    for line in [
        "migrate_set_speed x",
        "migrate exec:cat",
        "migrate_incoming tcp:h",
    ] {
        assert!(is_failure(&done(&mut session, line)), "{line}");
    }
    assert!(machine.calls().is_empty());
    machine.state().failure = Some(CommandError::generic("a migration is under way"));
    assert_eq!(
        done(&mut session, "migrate tcp:h:1"),
        "Error: a migration is under way\n"
    );
}

#[test]
fn every_command_and_topic_has_help() {
    let (machine, mut session) = session();
    let all = done(&mut session, "help");
    for command in COMMANDS {
        for name in command.names {
            let help = done(&mut session, &format!("help {name}"));
            assert!(!help.is_empty() && !is_failure(&help), "{help}");
        }
        assert!(all.contains(command.names[0]));
    }
    // For the forecast.
    machine.state().parameters.max_bandwidth = 1;
    for topic in TOPICS {
        let text = done(&mut session, &format!("info {}", topic.name));
        assert!(!is_failure(&text), "{text}");
        assert!(done(&mut session, "help info").contains(topic.name));
    }
    assert!(machine.calls().is_empty());
    assert!(COMMANDS.is_sorted_by_key(|command| command.names[0]));
}
