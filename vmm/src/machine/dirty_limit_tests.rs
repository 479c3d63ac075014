use std::time::Duration;

use super::*;

const MIB: u64 = 1 << 20;

fn together(total: u64) -> Allowed {
    Allowed::Together {
        total: total * MIB,
        each: MIB,
    }
}

fn own<const N: usize>(limits: [Option<u64>; N]) -> Allowed {
    let bytes = |limit: Option<u64>| limit.map(|limit| limit * MIB);
    Allowed::Own(limits.into_iter().map(bytes).collect())
}

/// vCPUs that write so much if nothing holds them back, in MiB a second, whose writes are told by
/// faults if `told`.
struct Vcpus<const N: usize> {
    now: Instant,
    wants: [u64; N],
    written: [u64; N],
    told: bool,
    limit: DirtyLimit,
}

impl<const N: usize> Vcpus<N> {
    fn new(allowed: Allowed, wants: [u64; N]) -> Self {
        let mut vcpus = Self {
            now: Instant::now(),
            wants,
            written: [0; N],
            told: true,
            limit: DirtyLimit::default(),
        };
        vcpus.limit.allow(allowed);
        // The first look tells only where the counters are.
        vcpus
            .limit
            .look(vcpus.now, &vcpus.written, Some(0), &[0; N]);
        assert_eq!(vcpus.shares(), [0; N]);
        vcpus
    }

    fn shares(&self) -> [u8; N] {
        std::array::from_fn(|vcpu| self.limit.share(vcpu))
    }

    /// They run for a second, kept from it also by others, for these shares.
    fn run_with(&mut self, others: [u8; N]) -> [u8; N] {
        self.now += Duration::from_secs(1);
        let shares = self.shares();
        let kept: [u8; N] = std::array::from_fn(|vcpu| shares[vcpu].max(others[vcpu]));
        let mut measured = 0;
        for (vcpu, kept) in kept.iter().enumerate() {
            let bytes = self.wants[vcpu] * MIB * u64::from(100 - kept) / 100;
            measured += bytes;
            if self.told {
                self.written[vcpu] += bytes;
            }
        }
        self.limit
            .look(self.now, &self.written, Some(measured), &kept);
        self.shares()
    }

    fn run(&mut self) -> [u8; N] {
        self.run_with([0; N])
    }
}

#[test]
fn who_writes_little_is_left_alone() {
    let shares = |allowed, wants| Vcpus::new(allowed, wants).run();
    // The writer is brought down to what the others leave.
    assert_eq!(shares(together(60), [100, 0, 10]), [50, 0, 0]);
    // Two that write too much: to the same.
    assert_eq!(shares(together(50), [100, 50, 0]), [75, 50, 0]);
    // All is well.
    assert_eq!(shares(together(50), [20, 20, 0]), [0, 0, 0]);
    // What each may in any case.
    assert_eq!(shares(together(0), [4, 4, 0]), [75, 75, 0]);
    assert_eq!(shares(together(0), [100_000, 0, 0]), [99, 0, 0]);
}

#[test]
fn a_guest_is_brought_to_the_limit_and_let_go_when_it_writes_less() {
    let mut vcpus = Vcpus::new(together(40), [400, 5]);
    for _ in 0..3 {
        assert_eq!(vcpus.run(), [92, 0]);
    }
    assert_eq!(vcpus.limit.limit(0), Some(35 * MIB));
    vcpus.wants = [10, 5];
    assert_eq!(vcpus.run(), [0, 0]);
    assert_eq!(vcpus.limit.limit(0), Some(40 * MIB));
}

#[test]
fn if_faults_do_not_tell_all_are_treated_alike() {
    let mut vcpus = Vcpus::new(together(40), [160, 0]);
    vcpus.told = false;
    assert_eq!(vcpus.run(), [75, 75]);
}

#[test]
fn a_limit_of_its_own_concerns_one_vcpu_only() {
    let mut vcpus = Vcpus::new(own([Some(10), None, Some(50)]), [40, 400, 20]);
    assert_eq!(vcpus.run(), [75, 0, 0]);
    let limits = [0, 1, 2].map(|vcpu| vcpu_limit(&vcpus, vcpu));
    assert_eq!(limits, [Some(10), None, Some(50)]);
    vcpus.wants = [8, 400, 200];
    assert_eq!(vcpus.run(), [0, 0, 75]);
}

fn vcpu_limit<const N: usize>(vcpus: &Vcpus<N>, vcpu: usize) -> Option<u64> {
    vcpus.limit.limit(vcpu).map(|limit| limit / MIB)
}

#[test]
fn a_limit_that_is_taken_back_lets_its_vcpu_go_at_once() {
    let mut vcpus = Vcpus::new(own([Some(10), Some(10)]), [40, 40]);
    assert_eq!(vcpus.run(), [75, 75]);
    vcpus.limit.allow(own([None, Some(20)]));
    assert_eq!(vcpus.shares(), [0, 75]);
    assert_eq!(vcpus.run(), [0, 50]);
    vcpus.limit.allow(Allowed::default());
    assert_eq!(vcpu_limit(&vcpus, 1), None);
    assert_eq!(vcpus.run(), [0, 0]);
}

#[test]
fn who_is_slowed_down_by_others_as_well_is_not_taken_for_one_that_writes_little() {
    let mut vcpus = Vcpus::new(own([Some(10)]), [40]);
    assert_eq!(vcpus.run_with([90]), [75]);
    assert_eq!(vcpus.run_with([90]), [75]);
}

#[test]
fn a_stop_changes_nothing() {
    let mut vcpus = Vcpus::new(own([Some(10)]), [40]);
    assert_eq!(vcpus.run(), [75]);
    let later = vcpus.now + Duration::from_secs(60);
    vcpus.limit.skip(later, &vcpus.written);
    vcpus.now = later;
    assert_eq!(vcpus.shares(), [75]);
    assert_eq!(vcpus.limit.writes().rates(), [0.0]);
    assert_eq!(vcpus.run(), [75]);
}
