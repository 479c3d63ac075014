//! `clock`: vCPUs that read their clocks all the time, and say so when one goes back.

use crate::Maybe;

crate::fields::options! {
    /// What the guest is to do.
    Options {
        /// vCPUs, the first included.
        cpus: u64 = 2,
        /// ms from one `Clock` report to the next; 0: only when asked.
        interval: u64 = 1000,
        /// Frequency of the TSC in kHz; 0: the guest finds out.
        tsc_khz: u64 = 0,
    }
}

crate::fields::words! {
    /// A clock.
    Clock {
        /// The time stamp counter.
        Tsc "tsc",
        /// The time stamp counter as CPL 0 reads it, once a millisecond.
        Tsc0 "tsc0",
        /// kvmclock.
        Kvmclock "kvmclock",
    }
}

/// What the guest does when it receives a byte; it looks for one every millisecond.
pub mod command {
    /// Report `Clocks` now.
    pub const CLOCKS: u8 = b'c';
    /// Power off.
    pub const QUIT: u8 = b'q';
}

crate::fields::reports! {
    /// What the guest says.
    Report {
        /// All vCPUs read their clocks.
        Ready "ready" {
            /// How many vCPUs.
            cpus: u64,
            /// Frequency of the TSC that the guest goes by, in kHz.
            tsc_khz: u64,
            /// Whether the VMM offers kvmclock.
            kvmclock: bool,
            /// Whether KVM says that kvmclock is the same on all vCPUs (PVCLOCK_TSC_STABLE_BIT).
            /// If not, it is compared on each vCPU only.
            stable: bool,
        },
        /// The clocks of the first vCPU, read right before the line is sent, and what all have
        /// seen.
        Clocks "clocks" {
            /// The time stamp counter.
            tsc: u64,
            /// The same as CPL 0 reads it. On hardware it is the same counter; where CPL 0 is
            /// interpreted, an offset that the VMM sets may apply here only.
            tsc0: u64,
            /// kvmclock, in ns, if offered.
            kvmclock: Maybe<u64>,
            /// µs of the longest step between two readings on one vCPU since the last report, by
            /// TSC. It includes stops.
            longest_step_us: u64,
            /// The same by kvmclock.
            longest_kvmclock_step_us: u64,
            /// Readings since the start, of all vCPUs.
            readings: u64,
            /// Steps back since the start.
            steps_back: u64,
        },
        /// A clock went back. Only the first hundred are reported.
        Back "back" {
            /// Which.
            clock: Clock,
            /// The vCPU that noticed.
            cpu: u64,
            /// Whether that vCPU itself had read the later time.
            same_cpu: bool,
            /// The later time, in cycles or ns.
            before: u64,
            /// The earlier time, read after it.
            after: u64,
        },
    }
}

#[cfg(test)]
mod tests {
    extern crate std;
    use std::string::ToString;

    use super::*;

    #[test]
    fn options_and_reports_read_back_as_written() {
        let options = Options {
            cpus: 4,
            interval: 0,
            tsc_khz: 1,
        };
        assert_eq!(Options::parse(&options.to_string()), Ok(options));
        for report in [
            Report::Clocks {
                tsc: u64::MAX,
                tsc0: 3,
                kvmclock: Maybe(None),
                longest_step_us: 1,
                longest_kvmclock_step_us: 0,
                readings: 9,
                steps_back: 0,
            },
            Report::Back {
                clock: Clock::Kvmclock,
                cpu: 1,
                same_cpu: false,
                before: 9,
                after: 8,
            },
        ] {
            assert_eq!(Report::parse(&report.to_string()), Some(report));
        }
    }
}
