//! The commands, and what they answer.

mod server;

use std::sync::Arc;
use std::time::Duration;

use super::commands::COMMANDS;
use super::info::TOPICS;
use super::progress::{Follower, Progress, line};
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

#[test]
fn info_shows_the_machine() {
    let (machine, mut session) = session();
    assert_eq!(done(&mut session, "info balloon"), "balloon: actual=512\n");
    machine.state().balloon.ferry = Some(FerryBalloonInfo {
        guest_stats: vec![("stat-free-memory", 4096)],
        guest_stats_age: 7,
    });
    assert_eq!(
        done(&mut session, "info balloon"),
        "balloon: actual=512\nguest statistics, 7 ms old:\n  stat-free-memory: 4096\n"
    );
    assert_eq!(done(&mut session, "info name"), "fake\n");
    assert_eq!(done(&mut session, "info status"), "VM status: running\n");
    machine.state().run_state = RunState::Paused;
    assert_eq!(done(&mut session, "info status"), "VM status: paused\n");
    machine.state().run_state = RunState::Postmigrate;
    assert_eq!(
        done(&mut session, "info status"),
        "VM status: paused (postmigrate)\n"
    );
    assert_eq!(
        done(&mut session, "info cpus"),
        "* CPU #0: thread_id=100\n  CPU #1: (halted) thread_id=101\n"
    );
    done(&mut session, "cpu 1");
    assert!(done(&mut session, "info registers").starts_with("CPU#1\nRAX=0000000000000001\n"));
    assert!(done(&mut session, "info registers 0").starts_with("CPU#0\n"));
    let all = done(&mut session, "info registers -a");
    assert!(all.contains("CPU#0\n") && all.contains("CPU#1\n"));
    assert_eq!(
        done(&mut session, "info network"),
        "net0: index=0,type=nic,model=virtio-net-device,macaddr=52:54:00:12:34:56,link=up\n \
         \\ type=tap,ifname=tap3\n   received 7 packets, dropped 1; sent 5, dropped 0\n"
    );
    assert_eq!(
        done(&mut session, "info migrate_capabilities"),
        "auto-converge: off\ndirty-limit: off\nevents: on\npostcopy-ram: off\nxbzrle: off\n\
         multifd: off\nzero-copy-send: off\nx-page-checksum: on\n"
    );
}

#[test]
fn disks_are_shown_as_qemu_shows_them() {
    use crate::control::block::{BlockInfo, IoStatus};
    use devices::disk::Disk;
    use devices::image::{Cache, Format, Image, NewBacking};

    let (machine, mut session) = session();
    assert_eq!(done(&mut session, "info block"), "");
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name);
    let cache = Cache::Writeback;
    let base = Image::create(&path("base"), Format::Raw, 512, None, cache).unwrap();
    let base = BlockInfo::of(&Disk::new("base".to_owned(), base));
    let backing = NewBacking {
        name: "base".to_owned(),
        format: Format::Raw,
    };
    let top = Image::create(&path("top"), Format::Qcow2, 512, Some(&backing), cache).unwrap();
    let mut top = BlockInfo::of(&Disk::new("top".to_owned(), top));
    top.io_status = IoStatus::Nospace;
    top.inserted.ro = true;
    top.inserted.cache = Cache::None.into();
    machine.state().disks = vec![base, top];
    let shown = |name: &str| path(name).display().to_string();
    let second = format!(
        "top (top): {} (qcow2, read-only)\n    Cache mode:       writeback, direct\n    \
         I/O status:       nospace\n    Backing file:     base (chain depth: 1)\n",
        shown("top")
    );
    assert_eq!(
        done(&mut session, "info block"),
        format!(
            "base (base): {} (raw)\n    Cache mode:       writeback\n\n{second}",
            shown("base")
        )
    );
    assert_eq!(done(&mut session, "info block top"), second);
    assert!(is_failure(&done(&mut session, "info block other")));
}

#[test]
fn migration_parameters_have_qemus_units() {
    let (machine, mut session) = session();
    for (line, expected) in [
        ("migrate_set_speed 100", (100 << 20, 0, 30)),
        ("migrate_set_parameter max-bandwidth 1G", (1 << 30, 0, 30)),
        (
            "migrate_set_parameter avail-switchover-bandwidth 2",
            (1 << 30, 2 << 20, 30),
        ),
        (
            "migrate_set_parameter downtime-limit 250",
            (1 << 30, 2 << 20, 250),
        ),
        ("migrate_set_downtime 0.05", (1 << 30, 2 << 20, 50)),
        ("migrate_set_downtime 7ms", (1 << 30, 2 << 20, 7)),
        ("migrate_set_speed 0", (0, 2 << 20, 7)),
    ] {
        assert_eq!(done(&mut session, line), "");
        let p = machine.parameters();
        let set = (
            p.max_bandwidth,
            p.avail_switchover_bandwidth,
            p.downtime_limit,
        );
        assert_eq!(set, expected, "{line}");
    }
    assert_eq!(
        done(&mut session, "info migrate_parameters"),
        "max-bandwidth: 0 bytes/second\navail-switchover-bandwidth: 2097152 bytes/second\n\
         downtime-limit: 7 ms\nmax-postcopy-bandwidth: 0 bytes/second\n\
         multifd-channels: 2\nmultifd-compression: none\nmultifd-zstd-level: 1\n\
         xbzrle-cache-size: 67108864 bytes\n\
         x-postcopy-after-rounds: 0\nx-postcopy-after-time: 0 ms\n\
         x-postcopy-no-convergence: off\nthrottle-trigger-threshold: 50\n\
         cpu-throttle-initial: 20\ncpu-throttle-increment: 10\ncpu-throttle-tailslow: off\n\
         max-cpu-throttle: 99\nvcpu-dirty-limit: 1 MB/s\nx-migration-timeout: 0 ms\n\
         x-migration-timeout-action: cancel\nannounce-initial: 50 ms\nannounce-max: 550 ms\n\
         announce-rounds: 5\nannounce-step: 100 ms\n"
    );
    for line in [
        "migrate_set_parameter multifd-compression zstd",
        "migrate_set_parameter multifd-channels 4",
        "migrate_set_parameter multifd-zstd-level 7",
        "migrate_set_parameter xbzrle-cache-size 128M",
        "migrate_set_parameter cpu-throttle-tailslow on",
        "migrate_set_parameter max-cpu-throttle 80",
        "migrate_set_parameter x-migration-timeout 60000",
        "migrate_set_parameter x-migration-timeout-action force",
    ] {
        assert_eq!(done(&mut session, line), "");
    }
    let p = machine.parameters();
    assert_eq!(p.multifd_compression, MultifdCompression::Zstd);
    assert_eq!(p.multifd_channels, 4);
    assert_eq!((p.multifd_zstd_level, p.xbzrle_cache_size), (7, 128 << 20));
    let convergence = ConvergenceParameters {
        tailslow: true,
        max: 80,
        timeout: 60_000,
        timeout_action: TimeoutAction::Force,
        ..Default::default()
    };
    assert_eq!(p.convergence, convergence);
    for line in [
        "migrate_set_parameter multifd-compression zlib",
        "migrate_set_parameter multifd-channels 0",
        "migrate_set_parameter multifd-zstd-level 0",
        "migrate_set_parameter xbzrle-cache-size 100M",
        "migrate_set_parameter cpu-throttle-initial 100",
        "migrate_set_parameter x-migration-timeout-action explode",
    ] {
        assert!(is_failure(&done(&mut session, line)), "{line}");
    }
    done(&mut session, "migrate_set_parameter announce-rounds 3");
    assert_eq!(machine.parameters().announce.rounds, 3);
    assert!(is_failure(&done(
        &mut session,
        "migrate_set_parameter announce-rounds 1001"
    )));
    assert!(is_failure(&done(&mut session, "migrate_set_downtime 2001")));
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
fn a_forecast_is_shown_and_says_what_would_help() {
    let (machine, mut session) = session();
    machine.state().forecast = MigrationForecast {
        converges: true,
        rounds: Some(3),
        total_time: Some(4500),
        downtime: Some(12),
        least_downtime: 4,
        memory: 512 << 20,
        dirty_rate: 20 << 20,
        ..MigrationForecast::default()
    };
    assert_eq!(
        done(&mut session, "info migration_forecast 100"),
        "memory: 512.0 MiB\ndirty rate: 20.0 MiB/s\nbandwidth: 100.0 MiB/s\nconverges: yes\n\
         rounds: 3\ntotal time: 4500 ms\ndowntime: 12 ms\nleast downtime: 4 ms\n"
    );
    machine.state().forecast = MigrationForecast {
        least_downtime: 4,
        throttle_needed: Some(40),
        bandwidth_needed: Some(2 << 30),
        ..MigrationForecast::default()
    };
    let text = done(&mut session, "info migration_forecast 1G");
    assert!(
        text.ends_with(
            "bandwidth: 1.0 GiB/s\nconverges: no\nleast downtime: 4 ms\n\
             throttle needed: 40 %\nbandwidth needed: 2.0 GiB/s\n"
        ),
        "{text}"
    );
    let wrong = done(&mut session, "info migration_forecast fast");
    assert!(is_failure(&wrong), "{wrong}");
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
