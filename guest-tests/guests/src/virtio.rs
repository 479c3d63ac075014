//! `virtio`: uses whatever it finds of virtio-rng, virtio-console and virtio-balloon, all along.

use crate::mmio::Wait;
use crate::{Hex, Name, Size};

crate::fields::options! {
    /// What the guest is to do.
    Options {
        /// Bytes of a request for random numbers, 16 to 64K.
        bytes: u64 = 4096,
        /// µs from one such request to the next, if the device is fast enough.
        every: u64 = 1_000,
        /// µs from one line `tick 1`, `tick 2`, … on the console to the next; 0: none.
        tick: u64 = 0,
        /// Memory to fill with known contents, for free page hints: whole MiB, of which of each
        /// four three are free whenever the balloon asks. 0: none, and no hints.
        hold: Size = Size(0),
        /// How to wait for the devices.
        wait: Wait = Wait::Poll,
        /// Whether to use VIRTIO_F_INDIRECT_DESC, where offered.
        indirect: bool = true,
        /// Whether to use VIRTIO_F_EVENT_IDX, where offered.
        event_idx: bool = true,
        /// µs from one heartbeat to the next; 0 is none at all.
        heartbeat: u64 = 1_000,
        /// ms from one `status` to the next; 0: only if asked.
        interval: u64 = 1_000,
        /// Frequency of the TSC in kHz; 0: the guest finds out.
        tsc_khz: u64 = 0,
    }
}

/// What the guest does when it receives a byte. It looks for one every few milliseconds.
pub mod command {
    /// Answer with `Status`.
    pub const STATUS: u8 = b's';
    /// Compare what `hold=` holds, and answer with `Verified`.
    pub const VERIFY: u8 = b'v';
    /// Power off.
    pub const QUIT: u8 = b'q';
    /// Reset the machine through the keyboard controller.
    pub const RESET: u8 = b'r';
}

crate::fields::reports! {
    /// What the guest says.
    Report {
        /// The work begins.
        Ready "ready" {
            /// Whether there is a virtio-rng device.
            rng: bool,
            /// Whether there is a virtio-console.
            console: bool,
            /// Whether there is a virtio-balloon.
            balloon: bool,
            /// How it waits.
            wait: Wait,
            /// Frequency of the TSC that the guest goes by, in kHz.
            tsc_khz: u64,
        },
        /// How it goes: every `interval=`, and as an answer to [`command::STATUS`]. What belongs
        /// to a device that is not there stays 0.
        Status "status" {
            /// Requests for random numbers that were answered.
            rng_requests: u64,
            /// Random bytes.
            rng_bytes: u64,
            /// A checksum of those of the last request.
            rng_checksum: Hex,
            /// Bytes that came over the console; all are sent back.
            console_received: u64,
            /// Bytes that the device has taken.
            console_sent: u64,
            /// The last number of a `tick`.
            ticks: u64,
            /// Pages that the device wants.
            balloon_target: u64,
            /// Pages that it has.
            balloon_actual: u64,
            /// Pages that were ever given.
            inflated: u64,
            /// Pages that were ever taken back; each was then written and read.
            deflated: u64,
            /// Things that were wrong.
            errors: u64,
            /// Times that something was done for a second, and no interrupt came.
            lost_interrupts: u64,
        },
        /// The answer to [`command::VERIFY`]: all of the memory of `hold=` was compared that is not
        /// free.
        Verified "verified" {
            /// Pages that were compared.
            pages: u64,
            /// Pages that were named as free and taken note of, in all requests for such.
            hinted: u64,
            /// Those of them that were written again: three of 32, once the device says that
            /// it listens no more.
            rewritten: u64,
            /// Things that were wrong, of all devices.
            errors: u64,
        },
        /// Something is wrong.
        Error "error" {
            /// `rng`, `console` or `balloon`.
            device: Name,
            /// What.
            what: Name,
            /// The number that is wrong.
            value: u64,
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
            bytes: 512,
            tick: 100,
            wait: Wait::Irq,
            ..Options::default()
        };
        assert_eq!(options.to_string(), "bytes=512 tick=100 wait=irq");
        assert_eq!(Options::parse(&options.to_string()), Ok(options));
        let report = Report::Error {
            device: Name::of(format_args!("rng")),
            what: Name::of(format_args!("all_equal")),
            value: 4096,
        };
        assert_eq!(
            report.to_string(),
            "error device=rng what=all_equal value=4096"
        );
        assert_eq!(Report::parse(&report.to_string()), Some(report));
    }
}
