//! How long the guest waits for its memory.

use std::collections::HashMap;
use std::time::Duration;

/// How many buckets the distribution of latencies has, as QEMU's `postcopy-latency-dist`.
pub const BUCKETS: usize = 24;

/// How long faults waited that needed a page from the source, each from when it was read to when
/// its page was in place.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Latency {
    /// How many faults.
    pub faults: u64,
    /// All their waits together.
    pub total: Duration,
    /// The longest wait.
    pub longest: Duration,
    /// How many faults waited how long: the bucket `n` counts those of 2^n up to and without
    /// 2^(n+1) microseconds. The first also counts shorter ones, the last longer ones.
    pub distribution: [u64; BUCKETS],
}

impl Latency {
    /// The average wait; zero if there was none.
    pub fn average(&self) -> Duration {
        let nanoseconds = self.total.as_nanos() / u128::from(self.faults.max(1));
        Duration::from_nanos(u64::try_from(nanoseconds).unwrap_or(u64::MAX))
    }

    fn add(&mut self, wait: Duration) {
        self.faults += 1;
        self.total += wait;
        self.longest = self.longest.max(wait);
        let bucket = wait.as_micros().max(1).ilog2() as usize;
        if let Some(count) = self.distribution.get_mut(bucket.min(BUCKETS - 1)) {
            *count += 1;
        }
    }
}

/// Time in which something was so, perhaps is.
#[derive(Clone, Copy, Debug, Default)]
struct Stopwatch {
    total: Duration,
    since: Option<Duration>,
}

impl Stopwatch {
    fn start(&mut self, now: Duration) {
        self.since.get_or_insert(now);
    }

    fn stop(&mut self, now: Duration) {
        self.total = self.read(now);
        self.since = None;
    }

    fn read(&self, now: Duration) -> Duration {
        let running = self.since.map(|since| now.saturating_sub(since));
        self.total + running.unwrap_or_default()
    }
}

#[derive(Debug)]
struct Vcpu {
    thread: u32,
    /// For how many pages it waits. It may be more than one: a signal ends a wait, and the next
    /// thing that the vCPU touches is another page.
    pages: u64,
    blocked: Stopwatch,
}

#[derive(Debug)]
struct Wait {
    thread: Option<u32>,
    since: Duration,
}

/// Who waits for which page, and what came of it.
#[derive(Debug)]
pub(super) struct Waits {
    by_page: HashMap<u64, Vec<Wait>>,
    vcpus: Vec<Vcpu>,
    blocked_vcpus: usize,
    all_blocked: Stopwatch,
    latency: Latency,
}

impl Waits {
    /// With the vCPUs' threads, in order of the vCPUs.
    pub(super) fn new(vcpu_threads: &[u32]) -> Self {
        let vcpu = |&thread: &u32| Vcpu {
            thread,
            pages: 0,
            blocked: Stopwatch::default(),
        };
        Self {
            by_page: HashMap::new(),
            vcpus: vcpu_threads.iter().map(vcpu).collect(),
            blocked_vcpus: 0,
            all_blocked: Stopwatch::default(),
            latency: Latency::default(),
        }
    }

    /// A thread waits for a page. If it does already, it was only disturbed.
    pub(super) fn begin(&mut self, page: u64, thread: Option<u32>, now: Duration) {
        let waits = self.by_page.entry(page).or_default();
        if waits.iter().any(|wait| wait.thread == thread) {
            return;
        }
        waits.push(Wait { thread, since: now });
        let Some(vcpu) = vcpu(&mut self.vcpus, thread) else {
            return;
        };
        vcpu.pages += 1;
        if vcpu.pages == 1 {
            vcpu.blocked.start(now);
            self.blocked_vcpus += 1;
            if self.blocked_vcpus == self.vcpus.len() {
                self.all_blocked.start(now);
            }
        }
    }

    /// A page is in place: nobody waits for it any more.
    pub(super) fn end(&mut self, page: u64, now: Duration) {
        for wait in self.by_page.remove(&page).unwrap_or_default() {
            self.latency.add(now.saturating_sub(wait.since));
            let Some(vcpu) = vcpu(&mut self.vcpus, wait.thread) else {
                continue;
            };
            vcpu.pages -= 1;
            if vcpu.pages == 0 {
                vcpu.blocked.stop(now);
                if self.blocked_vcpus == self.vcpus.len() {
                    self.all_blocked.stop(now);
                }
                self.blocked_vcpus -= 1;
            }
        }
    }

    pub(super) fn latency(&self) -> &Latency {
        &self.latency
    }

    /// For how long each vCPU was blocked, in their order.
    pub(super) fn vcpu_block_time(&self, now: Duration) -> Vec<Duration> {
        let blocked = |vcpu: &Vcpu| vcpu.blocked.read(now);
        self.vcpus.iter().map(blocked).collect()
    }

    /// For how long all vCPUs were blocked at once.
    pub(super) fn block_time(&self, now: Duration) -> Duration {
        self.all_blocked.read(now)
    }
}

fn vcpu(vcpus: &mut [Vcpu], thread: Option<u32>) -> Option<&mut Vcpu> {
    let thread = thread?;
    vcpus.iter_mut().find(|vcpu| vcpu.thread == thread)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn us(microseconds: u64) -> Duration {
        Duration::from_micros(microseconds)
    }

    #[test]
    fn waits_fall_into_powers_of_two() {
        let mut latency = Latency::default();
        for wait in [
            Duration::from_nanos(300),
            us(1),
            us(2),
            us(3),
            us(4),
            us(256),
            us(511),
            us(512),
            Duration::from_secs(3600),
        ] {
            latency.add(wait);
        }
        let mut expected = [0; BUCKETS];
        for (bucket, count) in [(0, 2), (1, 2), (2, 1), (8, 2), (9, 1), (23, 1)] {
            expected[bucket] = count;
        }
        assert_eq!(latency.distribution, expected);
        assert_eq!(latency.faults, 9);
        assert_eq!(latency.longest, Duration::from_secs(3600));
        assert_eq!(latency.average(), latency.total / 9);
        assert_eq!(Latency::default().average(), Duration::ZERO);
    }

    #[test]
    fn block_time_is_when_all_vcpus_wait() {
        let mut waits = Waits::new(&[10, 11]);
        waits.begin(1, Some(10), us(100));
        waits.begin(2, Some(11), us(130));
        waits.begin(3, Some(99), us(130));
        assert_eq!(waits.block_time(us(135)), us(5));
        waits.end(1, us(150));
        waits.end(3, us(155));
        waits.end(2, us(160));
        waits.end(2, us(170));
        assert_eq!(waits.vcpu_block_time(us(500)), [us(50), us(30)]);
        assert_eq!(waits.block_time(us(500)), us(20));
        let latency = waits.latency();
        assert_eq!((latency.faults, latency.total), (3, us(50 + 30 + 25)));
        assert_eq!(latency.longest, us(50));
    }

    #[test]
    fn a_disturbed_vcpu_is_blocked_once() {
        let mut waits = Waits::new(&[10]);
        waits.begin(1, Some(10), us(0));
        waits.begin(1, Some(10), us(5));
        waits.begin(2, Some(10), us(10));
        waits.end(1, us(20));
        assert_eq!(waits.vcpu_block_time(us(30)), [us(30)]);
        waits.end(2, us(40));
        assert_eq!(waits.vcpu_block_time(us(90)), [us(40)]);
        assert_eq!(waits.block_time(us(90)), us(40));
        assert_eq!(waits.latency().faults, 2);
    }

    #[test]
    fn without_thread_numbers_only_latencies_are_known() {
        let mut waits = Waits::new(&[10]);
        waits.begin(1, None, us(0));
        waits.end(1, us(8));
        assert_eq!(waits.latency().faults, 1);
        assert_eq!(waits.vcpu_block_time(us(10)), [Duration::ZERO]);
        assert_eq!(waits.block_time(us(10)), Duration::ZERO);
    }
}
