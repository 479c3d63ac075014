//! What is told of migrations, and following one in the foreground.

use std::time::Duration;

use super::{done, session};
use crate::control::command::*;
use crate::control::fake::FakeMachine;
use crate::control::monitor::is_failure;
use crate::control::monitor::progress::{Follower, Progress, line};

fn ram() -> MigrationStats {
    MigrationStats {
        transferred: 300 << 20,
        remaining: 256 << 20,
        total: 1 << 30,
        normal: 76_800,
        dirty_pages_rate: 20_000,
        mbps: 8000.0,
        dirty_sync_count: 2,
        page_size: 4096,
        ..Default::default()
    }
}

#[test]
fn info_migrate_tells_what_there_is_to_tell() {
    let (machine, mut session) = session();
    assert_eq!(done(&mut session, "info migrate"), "");
    machine.state().info = MigrationInfo {
        status: MigrationStatus::Failed,
        error_desc: Some("connection refused".into()),
        ..Default::default()
    };
    assert_eq!(
        done(&mut session, "info migrate"),
        "Migration status: failed (connection refused)\n"
    );
    machine.state().info = MigrationInfo {
        status: MigrationStatus::Completed,
        ram: Some(ram()),
        total_time: Some(1200),
        downtime: Some(9),
        ferry: Some(FerryMigrationInfo {
            downtime: Some(DowntimeParts {
                stop: 80,
                ..Default::default()
            }),
            zero_copy: Some(ZeroCopyInfo {
                sends: 40,
                done: 38,
                copied: 3,
                refused: 2,
            }),
            ..Default::default()
        }),
        ..Default::default()
    };
    let text = done(&mut session, "info migrate");
    for part in [
        "Migration status: completed\n",
        "total time: 1200 ms\n",
        "\ndowntime: 9 ms\n",
        "remaining ram: 262144 kbytes\n",
        "dirty sync count: 2\n",
        "page size: 4 kbytes\n",
        "downtime parts: stop 80 us,",
        "\nzero copy: 42 sends, 5 copied\n",
    ] {
        assert!(text.contains(part), "{part} is not in {text}");
    }
}

#[test]
fn info_migrate_tells_the_waits_after_the_downtime_apart_from_it() {
    let (machine, mut session) = session();
    machine.state().info = MigrationInfo {
        status: MigrationStatus::Completed,
        ram: Some(MigrationStats {
            postcopy_requests: 12,
            postcopy_bytes: 81_920,
            ..ram()
        }),
        downtime: Some(4),
        postcopy_blocktime: Some(7),
        postcopy_vcpu_blocktime: (0..12).collect(),
        postcopy_latency: Some(150_000),
        postcopy_latency_dist: vec![0, 5, 0, 0, 0, 0, 0, 0, 0, 0, 2],
        ..Default::default()
    };
    let text = done(&mut session, "info migrate");
    for part in [
        "\ndowntime: 4 ms\n",
        "postcopy ram: 80 kbytes\npostcopy request count: 12\n",
        "Postcopy Blocktime (ms): 7\n\
         Postcopy vCPU Blocktime (ms):\n [0, 1, 2, 3, 4, 5, 6, 7, 8, 9,\n  10, 11]\n\
         Postcopy Latency (ns): 150000\n\
         Postcopy Latency Distribution:\n  [     1 us -     2 us ]:          0\n",
        "\n  [     2 us -     4 us ]:          5\n",
        "\n  [     1 ms -     2 ms ]:          2\n",
    ] {
        assert!(text.contains(part), "{part} is not in {text}");
    }
}

#[test]
fn a_line_of_progress_has_the_figures() {
    let info = MigrationInfo {
        status: MigrationStatus::Active,
        ram: Some(ram()),
        expected_downtime: Some(12),
        ..Default::default()
    };
    assert_eq!(
        line(&info),
        "round 2: 75%, 256.0 MiB of 1.0 GiB remaining, 953.7 MiB/s, 20000 pages/s dirtied, \
         expected downtime 12 ms"
    );
    let setup = MigrationInfo {
        status: MigrationStatus::Setup,
        ..Default::default()
    };
    assert_eq!(line(&setup), "connecting");
}

#[tokio::test]
async fn a_migration_is_followed_to_its_end() {
    let machine = FakeMachine::new();
    let migrating = |status| MigrationInfo {
        status,
        ..Default::default()
    };
    machine.migration(migrating(MigrationStatus::Active));
    let mut follower = Follower::new(machine.clone(), Duration::from_millis(1));
    assert!(matches!(follower.next().await, Progress::Line(_)));
    assert!(matches!(follower.next().await, Progress::Line(_)));
    let failed = MigrationInfo {
        error_desc: Some("x".into()),
        ..migrating(MigrationStatus::Failed)
    };
    machine.migration(failed);
    assert_eq!(
        follower.next().await,
        Progress::End("Error: migration failed: x\n".into())
    );
}

#[tokio::test]
async fn a_migration_in_postcopy_is_followed_but_not_cancelled_and_a_pause_gives_the_prompt_back() {
    let machine = FakeMachine::new();
    let in_status = |status| MigrationInfo {
        status,
        ram: Some(MigrationStats {
            postcopy_requests: 12,
            ..ram()
        }),
        ..Default::default()
    };
    machine.migration(in_status(MigrationStatus::PostcopyActive));
    let mut follower = Follower::new(machine.clone(), Duration::from_millis(1));
    assert_eq!(
        follower.next().await,
        Progress::Line(
            "the guest runs at the destination, 256.0 MiB of 1.0 GiB to follow, 12 pages asked for"
                .into()
        )
    );
    machine.state().failure = Some(CommandError::generic("the guest has moved"));
    follower.cancel();
    let Progress::End(end) = follower.next().await else {
        panic!("still followed");
    };
    assert!(end.starts_with("Error: the guest has moved; the migration goes on"));

    machine.migration(in_status(MigrationStatus::PostcopyPaused));
    let Progress::End(end) = follower.next().await else {
        panic!("still followed");
    };
    assert!(is_failure(&end) && end.contains("migrate -r"), "{end}");
}
