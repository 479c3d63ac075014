//! Migration parameters.

use super::{done, session};
use crate::control::command::*;
use crate::control::monitor::is_failure;

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
         max-cpu-throttle: 99\nvcpu-dirty-limit: 1 MB/s\nx-vcpu-dirty-limit-period: 200 ms\nx-migration-timeout: 0 ms\n\
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
        "migrate_set_parameter x-vcpu-dirty-limit-period 50",
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
        vcpu_dirty_limit_period: 50,
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
