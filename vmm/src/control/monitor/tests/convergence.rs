//! Guests that don't converge: what would help, and limiting their vCPUs.

use super::{done, session};
use crate::control::command::*;
use crate::control::monitor::is_failure;

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
fn vcpus_are_limited_and_let_go_one_or_all() {
    let (machine, mut session) = session();
    let none = done(&mut session, "info vcpu_dirty_limit");
    assert_eq!(none, "Dirty page limit not enabled!\n");
    for (line, call) in [
        ("set_vcpu_dirty_limit 200", "set_vcpu_dirty_limit 200 None"),
        (
            "set_vcpu_dirty_limit 200 1",
            "set_vcpu_dirty_limit 200 Some(1)",
        ),
        ("cancel_vcpu_dirty_limit", "cancel_vcpu_dirty_limit None"),
        (
            "cancel_vcpu_dirty_limit 1",
            "cancel_vcpu_dirty_limit Some(1)",
        ),
    ] {
        let told = done(&mut session, line);
        assert!(told.contains("info vcpu_dirty_limit"), "{told}");
        assert!(!is_failure(&told), "{told}");
        assert_eq!(machine.calls(), [call]);
    }
    for wrong in ["set_vcpu_dirty_limit", "set_vcpu_dirty_limit -5"] {
        assert!(is_failure(&done(&mut session, wrong)), "{wrong}");
    }
    let limited = |cpu_index, rate_is_average| DirtyLimitInfo {
        cpu_index,
        limit_rate: 20,
        current_rate: 19,
        throttle_percentage: 35,
        rate_is_average,
    };
    machine.state().dirty_limits = vec![limited(0, false), limited(2, true)];
    assert_eq!(
        done(&mut session, "info vcpu_dirty_limit"),
        "vcpu[0], limit rate 20 (MB/s), current rate 19 (MB/s), kept from running 35 %\n\
         vcpu[2], limit rate 20 (MB/s), current rate 19 (MB/s) on average of all vCPUs, kept from \
         running 35 %\n"
    );
}

#[test]
fn what_each_vcpu_writes_is_shown_behind_what_all_write() {
    let (machine, mut session) = session();
    let vcpu = |id, dirty_rate| DirtyRateVcpu { id, dirty_rate };
    machine.state().dirty_rate = DirtyRateInfo {
        dirty_rate: Some(12),
        status: DirtyRateStatus::Measured,
        mode: DirtyRateMode::DirtyBitmap,
        vcpu_dirty_rate: Some(vec![vcpu(0, 12), vcpu(1, 0)]),
        ..Default::default()
    };
    let text = done(&mut session, "info dirty_rate");
    assert!(
        text.ends_with(
            "Dirty rate: 12 (MB/s)\nvcpu[0], Dirty rate: 12 (MB/s)\n\
             vcpu[1], Dirty rate: 0 (MB/s)\n"
        ),
        "{text}"
    );
    let ring = done(&mut session, "calc_dirty_rate -r 1");
    assert!(is_failure(&ring) && ring.contains("dirty-ring"), "{ring}");
}
