//! Snapshots.

use std::time::Duration;

use super::{done, session};
use crate::control::command::*;
use crate::control::monitor::{Outcome, is_failure};

#[tokio::test]
async fn snapshots_are_waited_for() {
    let (machine, mut session) = session();
    for (line, call) in [
        ("savevm", "savevm None"),
        ("savevm a", "savevm Some(\"a\")"),
        ("loadvm a", "loadvm a"),
        ("delvm a", "delvm a"),
    ] {
        assert_eq!(session.execute(line), Outcome::Working, "{line}");
        assert_eq!(session.finished().await, "", "{line}");
        assert_eq!(machine.calls(), [call]);
    }
    machine.state().failure = Some(CommandError::generic("no space"));
    assert_eq!(session.execute("savevm a"), Outcome::Working);
    assert_eq!(session.finished().await, "Error: no space\n");
    for wrong in ["loadvm", "delvm", "savevm a b"] {
        assert!(is_failure(&done(&mut session, wrong)), "{wrong}");
    }
}

#[test]
fn snapshots_are_listed_as_qemu_does() {
    let (machine, mut session) = session();
    let empty = "There is no snapshot available.\n";
    assert_eq!(done(&mut session, "info snapshots"), empty);
    let saved = SavedInfo {
        state_bytes: 42 << 20,
        date: std::time::SystemTime::UNIX_EPOCH + Duration::from_secs(1_709_210_096),
        vm_clock: Duration::from_millis(61_007),
    };
    let info = |tag: &str, saved, problem: Option<&str>| SnapshotInfo {
        tag: tag.into(),
        saved,
        problem: problem.map(str::to_owned),
    };
    machine.state().snapshots = vec![
        info("before-update", Some(saved), None),
        info("old", None, Some("it is corrupted")),
    ];
    assert_eq!(
        done(&mut session, "info snapshots"),
        "List of snapshots present on all disks:\n\
         ID      TAG               VM_SIZE                 DATE        VM_CLOCK     ICOUNT\n\
         --      before-update    42.0 MiB  2024-02-29 12:34:56  0000:01:01.007         --\n\
         --      old                    --                   --              --         --\n\
         'old' can't be loaded: it is corrupted\n"
    );
}
