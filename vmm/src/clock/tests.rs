use super::*;
use crate::kvm::tests::kvm_or_skip;
use crate::test_guest::Machine;
use vm_memory::{Bytes, GuestAddress};

#[test]
fn frequencies_within_250_ppm_are_the_same() {
    assert!(tsc_matches(2_596_120, 2_596_120));
    assert!(tsc_matches(2_596_120 + 649, 2_596_120));
    assert!(!tsc_matches(2_596_120 + 650, 2_596_120));
    assert!(!tsc_matches(2_000_000, 2_596_120));
}

#[test]
fn clocks_go_on_by_what_is_left_of_the_stop_and_never_back() {
    let state = ClockState {
        kvmclock: 1_000,
        tscs: vec![10],
        tsc_khz: 2_000_000,
        after_stop: 300_000,
    };
    let ms = Duration::from_millis;
    assert_eq!(state.advance(ms(5)), Duration::from_micros(4_700));
    // A guest that its user paused has been stopped for zero.
    assert_eq!(state.advance(Duration::ZERO), Duration::ZERO);
    assert_eq!(ticks(Duration::from_micros(4_700), 2_000_000), 9_400_000);
    // An hour at 5 GHz fits.
    assert_eq!(
        ticks(Duration::from_secs(3600), 5_000_000),
        18_000_000_000_000
    );
}

#[test]
fn the_same_clock_is_recognised_and_is_exact() {
    // The guest's TSC, less its offset, was read between two readings of the host's.
    let map = TscMap::between((1_000, 2_000), 1_400, (3_000_000, 3_000_100), true);
    assert_eq!(map.guest(10_000_000_000, 5), 10_000_000_005);
    assert_eq!(map.guest(500, 0), 500, "backwards as well");
    // An offset that makes the guest's TSC smaller than the host's: modulo 2^64.
    assert_eq!(map.guest(1_000, 500u64.wrapping_sub(1_000)), 500);
}

#[test]
fn a_scaled_clock_is_taken_from_the_later_reading() {
    let map = TscMap::between((1_000, 2_000), 70_000, (1_000_000, 4_000_000), true);
    assert_eq!(map.guest(2_000, 0), 70_000);
    assert_eq!(map.guest(2_000 + 4_000_000, 7), 70_000 + 1_000_000 + 7);
    assert_eq!(map.guest(2_000 - 400, 0), 70_000 - 100);
}

#[test]
fn a_section_for_another_number_of_vcpus_is_refused() {
    let state = ClockState {
        kvmclock: 1,
        tscs: vec![1, 2],
        tsc_khz: 1,
        after_stop: 0,
    };
    let section = state.to_section().unwrap();
    assert_eq!(ClockState::from_section(&section, 2).unwrap(), state);
    let error = ClockState::from_section(&section, 3).unwrap_err();
    assert_eq!(
        error.to_string(),
        "there are TSCs of 2 vCPUs, but the guest has 3"
    );
    let stopped = ClockState {
        tsc_khz: 0,
        ..state
    };
    ClockState::from_section(&stopped.to_section().unwrap(), 2).unwrap_err();
    let mut huge = section.clone();
    huge.body[8..16].copy_from_slice(&u64::MAX.to_le_bytes());
    ClockState::from_section(&huge, 2).unwrap_err();
}

fn clocks(machine: &Machine) -> Vec<&VcpuClockFd> {
    machine
        .threads
        .iter()
        .map(|thread| thread.clock())
        .collect()
}

/// What a guest would read now: kvmclock and each TSC.
fn read(machine: &Machine) -> (u64, Vec<u64>) {
    let now = ClockState::take(&machine.vm, &clocks(machine), MonotonicClock.now()).unwrap();
    (now.kvmclock, now.tscs)
}

#[test]
fn clocks_of_another_vm_go_on_from_those_saved() {
    let Some(kvm) = kvm_or_skip() else { return };
    let source = Machine::new(&kvm, 2);
    let far = clocks(&source);
    // Distinguishable from the host's, and a guest that set its vCPUs apart.
    far[0]
        .set_tsc_offset(1_000_000_000_000u64.wrapping_sub(host_tsc()))
        .unwrap();
    let offset = far[0].tsc_offset().unwrap();
    far[1].set_tsc_offset(offset.wrapping_add(12_345)).unwrap();
    let can_set = offset != 0;
    if !can_set {
        guest_tests::driver::skip(
            "in part: this KVM keeps the guest's TSC the host's; needs hardware KVM",
        );
    }
    set_kvmclock(&source.vm, 77_000_000_000).unwrap();

    let stopped_at = MonotonicClock.now();
    let (last_kvmclock, last_tscs) = read(&source);
    let saved = ClockState::take(&source.vm, &far, stopped_at).unwrap();
    let section = saved.to_section().unwrap();
    let loaded = ClockState::from_section(&section, 2).unwrap();

    let destination = Machine::new(&kvm, 2);
    let near = clocks(&destination);
    loaded.set(&destination.vm, &near, Duration::ZERO).unwrap();
    let stopped_for = Duration::from_secs(3);
    let before = MonotonicClock.now();
    loaded.set(&destination.vm, &near, stopped_for).unwrap();
    let (kvmclock, tscs) = read(&destination);
    let slack = MonotonicClock.now() - before + Duration::from_millis(1);

    assert!(
        kvmclock >= last_kvmclock + 2_999_000_000,
        "{kvmclock} {last_kvmclock}"
    );
    let most = last_kvmclock + (stopped_for + slack).as_nanos() as u64;
    assert!(kvmclock <= most, "{kvmclock} {most}");
    if !can_set {
        assert!(tscs.iter().zip(&last_tscs).all(|(now, last)| now >= last));
        let far_ahead = ClockState {
            tscs: vec![host_tsc() + ticks(Duration::from_secs(60), saved.tsc_khz); 2],
            ..saved
        };
        let error = far_ahead.set(&destination.vm, &near, Duration::ZERO);
        assert!(
            matches!(error, Err(ClockError::GoesBack { .. })),
            "{error:?}"
        );
        return;
    }
    let (least, most) = (
        ticks(Duration::from_millis(2_999), saved.tsc_khz),
        ticks(stopped_for + slack, saved.tsc_khz),
    );
    for (now, last) in tscs.iter().zip(&last_tscs) {
        assert!((last + least..=last + most).contains(now), "{now} {last}");
    }
    assert_eq!(tscs[1] - tscs[0], 12_345, "as far apart as they were");
}

#[test]
fn a_guest_continued_on_its_host_finds_kvmclock_where_it_stopped() {
    let Some(kvm) = kvm_or_skip() else { return };
    let machine = Machine::new(&kvm, 1);
    let stopped = ClockState::take(&machine.vm, &clocks(&machine), MonotonicClock.now()).unwrap();
    // A minute passes, as far as kvmclock is concerned.
    set_kvmclock(&machine.vm, stopped.kvmclock + 60_000_000_000).unwrap();
    tell_stopped(&machine.vm, &clocks(&machine));
    stopped.resume_kvmclock(&machine.vm).unwrap();
    let (kvmclock, _) = read(&machine);
    assert!((stopped.kvmclock..stopped.kvmclock + 30_000_000_000).contains(&kvmclock));
}

#[test]
fn rdtsc_in_user_mode_is_the_tsc_that_is_migrated_or_the_hosts() {
    let Some(kvm) = kvm_or_skip() else { return };
    let mut machine = Machine::new(&kvm, 1);
    machine.enter_user_mode(&[
        0x0f, 0x31, // again: rdtsc
        0x89, 0x04, 0x25, 0x00, 0x00, 0x20, 0x00, // mov [0x200000], eax
        0x89, 0x14, 0x25, 0x04, 0x00, 0x20, 0x00, // mov [0x200004], edx
        0xeb, 0xee, // jmp again
    ]);
    let offset = 1u64 << 50;
    clocks(&machine)[0].set_tsc_offset(offset).unwrap();
    let before = host_tsc();
    let mut tsc = 0;
    while tsc == 0 {
        machine.run();
        machine.threads[0].wait_entered();
        machine.pause();
        tsc = machine
            .ram()
            .read_obj::<u64>(GuestAddress(0x20_0000))
            .unwrap();
    }
    let after = host_tsc();
    let offset_applies = (before + offset..=after + offset).contains(&tsc);
    let is_the_hosts = (before..=after).contains(&tsc);
    eprintln!("at CPL 3 the TSC's offset applies: {offset_applies}");
    assert!(offset_applies || is_the_hosts, "{before} {tsc} {after}");
}
