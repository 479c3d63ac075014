//! What `info` shows of the machine.

use super::{done, session};
use crate::control::command::*;
use crate::control::monitor::is_failure;

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
