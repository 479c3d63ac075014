//! `disk`: writes virtio-blk devices and verifies what it wrote, all along; or measures them.

use core::fmt;
use core::str::FromStr;

use crate::dirtier::Rate;
use crate::mmio::Wait;
use crate::{Hex, Maybe, Size};

crate::fields::words! {
    /// What to do with the disks.
    Mode {
        /// Write, read and verify, in random order.
        Mixed "mixed",
        /// Write the area once, then read and verify.
        Fill "fill",
        /// Read and verify what a guest with the same seed and area has filled; writes nothing.
        Read "read",
    }
}

crate::fields::words! {
    /// What is known of the area at the start.
    Holds {
        /// Nothing: a sector is verified once it has been written.
        Unknown "unknown",
        /// Zeros, as in a new image.
        Zero "zero",
        /// What [`Mode::Fill`] with the same seed and area wrote.
        Fill "fill",
    }
}

crate::fields::words! {
    /// What to measure.
    Bench {
        /// Nothing.
        None "none",
        /// Reading in order.
        SeqRead "seqread",
        /// Writing in order.
        SeqWrite "seqwrite",
        /// Reading anywhere.
        RandRead "randread",
        /// Writing anywhere.
        RandWrite "randwrite",
    }
}

crate::fields::words! {
    /// What to do after a request that the device failed.
    OnError {
        /// Go on.
        Go "go",
        /// Power off.
        Stop "stop",
    }
}

crate::fields::options! {
    /// What the guest is to do.
    Options {
        /// What to do.
        mode: Mode = Mode::Mixed,
        /// What is known of the area at the start; in mode `read` it is `fill` in any case.
        holds: Holds = Holds::Unknown,
        /// What discarded sectors hold, `unknown` or `zero`: virtio lets the device choose.
        discarded: Holds = Holds::Unknown,
        /// Of the random numbers, and a part of what is written.
        seed: u64 = 1,
        /// Where on each disk the area begins, in bytes.
        from: Size = Size(0),
        /// Bytes of the area on each disk; less if the disk ends before.
        area: Size = Size(64 << 20),
        /// Bytes of the largest request, at most 128K.
        max: Size = Size(128 << 10),
        /// Pieces of memory that a request's data is in, at most.
        segments: u64 = 8,
        /// Requests in flight on each disk, 1 to 64.
        depth: u64 = 8,
        /// Requests a second on each disk.
        rate: Rate = Rate::Max,
        /// Of 100 requests, how many are writes.
        writes: u64 = 40,
        /// Of 100 requests, how many are discards, where the device can.
        discards: u64 = 2,
        /// Of 100 requests, how many write zeroes, where the device can.
        zeroes: u64 = 2,
        /// A flush after so many writes; 0: none.
        flush: u64 = 64,
        /// Buffers that are kept and compared again later: 0 to 256.
        keep: u64 = 32,
        /// What to do after a failed request.
        on_error: OnError = OnError::Go,
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
        /// What to measure; if anything, nothing is verified, and the guest powers off at the end.
        bench: Bench = Bench::None,
        /// Bytes of a request that is measured.
        bs: Size = Size(4 << 10),
        /// How long to measure each disk.
        seconds: u64 = 5,
        /// Changes a sector in memory before it is compared, once, after so many that were right.
        corrupt: Maybe<u64> = Maybe(None),
        /// Frequency of the TSC in kHz; 0: the guest finds out.
        tsc_khz: u64 = 0,
    }
}

/// What the guest does when it receives a byte. It looks for one every few milliseconds.
pub mod command {
    /// Let the requests in flight end, flush, read the whole area and verify it; answer with
    /// `Verified` for each disk, and go on.
    pub const VERIFY: u8 = b'v';
    /// Answer with `Status` for each disk.
    pub const STATUS: u8 = b's';
    /// As `VERIFY`, then power off: the image now holds what was reported.
    pub const FINISH: u8 = b'f';
    /// Power off at once, whatever is in flight.
    pub const QUIT: u8 = b'q';
    /// Reset the machine through the keyboard controller.
    pub const RESET: u8 = b'r';
}

/// What the guest knows of a sector.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Held {
    /// Nothing.
    Unknown,
    /// Zeros.
    Zero,
    /// What it wrote with this number, from 1.
    Generation(u32),
}

impl fmt::Display for Held {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unknown => f.write_str("-"),
            Self::Zero => f.write_str("zero"),
            Self::Generation(generation) => generation.fmt(f),
        }
    }
}

impl FromStr for Held {
    type Err = ();

    fn from_str(text: &str) -> Result<Self, ()> {
        match text {
            "-" => Ok(Self::Unknown),
            "zero" => Ok(Self::Zero),
            _ => text.parse().map(Self::Generation).map_err(|_| ()),
        }
    }
}

crate::fields::words! {
    /// A request's type.
    Op {
        /// VIRTIO_BLK_T_IN.
        Read "read",
        /// VIRTIO_BLK_T_OUT.
        Write "write",
        /// VIRTIO_BLK_T_FLUSH.
        Flush "flush",
        /// VIRTIO_BLK_T_DISCARD.
        Discard "discard",
        /// VIRTIO_BLK_T_WRITE_ZEROES.
        WriteZeroes "write_zeroes",
    }
}

crate::fields::words! {
    /// What is wrong with a sector.
    Kind {
        /// It holds another generation of itself: a write is lost, late, or came twice.
        Stale "stale",
        /// It holds another sector, or another seed's: something went to the wrong place.
        Misplaced "misplaced",
        /// It holds zeros.
        Zero "zero",
        /// It holds a part of what was written.
        Damaged "damaged",
        /// It holds something that no guest of this kind wrote.
        Foreign "foreign",
    }
}

crate::fields::words! {
    /// Where a wrong sector was found.
    Place {
        /// In what the device has just read.
        Disk "disk",
        /// In the guest's memory, some time after it was right there: what the device put there,
        /// or the guest, did not survive.
        Memory "memory",
    }
}

crate::fields::reports! {
    /// What the guest says.
    Report {
        /// A disk that it found; once for each, numbered in the command line's order.
        Disk "disk" {
            /// Its number.
            device: u64,
            /// Where its registers are.
            address: Hex,
            /// Sectors of 512 bytes.
            capacity: u64,
            /// Whether it can't be written.
            readonly: bool,
            /// Whether it knows flushes.
            flush: bool,
            /// Sectors of its largest discard; 0: it knows none.
            max_discard: u64,
            /// Sectors of its largest write of zeroes; 0: it knows none.
            max_zeroes: u64,
            /// Sectors that requests are multiples of: its block size.
            unit: u64,
            /// The area's first sector.
            first: u64,
            /// The area's sectors.
            sectors: u64,
            /// The virtio features in use.
            features: Hex,
            /// What reading one of its registers takes on average, ns.
            register_ns: u64,
        },
        /// The work begins.
        Ready "ready" {
            /// Disks.
            devices: u64,
            /// How it waits.
            wait: Wait,
            /// Frequency of the TSC that the guest goes by, in kHz.
            tsc_khz: u64,
        },
        /// In mode `fill`: the area is written and flushed.
        Filled "filled" {
            /// The disk.
            device: u64,
            /// Sectors.
            sectors: u64,
            /// µs since the start.
            took_us: u64,
        },
        /// How it goes: every `interval=`, and as an answer to [`command::STATUS`]. Requests are
        /// counted when they have succeeded.
        Status "status" {
            /// The disk.
            device: u64,
            /// Reads.
            reads: u64,
            /// Writes.
            writes: u64,
            /// Flushes.
            flushes: u64,
            /// Discards.
            discards: u64,
            /// Writes of zeroes.
            zeroes: u64,
            /// Sectors that were read and right.
            verified: u64,
            /// Sectors that were read and of which nothing was known.
            unchecked: u64,
            /// Sectors that were still right in a kept buffer.
            kept: u64,
            /// Requests in flight now.
            in_flight: u64,
            /// The longest request since the last status, µs.
            longest_us: u64,
            /// Wrong sectors so far.
            errors: u64,
            /// Failed requests so far.
            io_errors: u64,
            /// Times that a request was done for a second, and no interrupt came.
            lost_interrupts: u64,
        },
        /// The answer to [`command::VERIFY`].
        Verified "verified" {
            /// The disk.
            device: u64,
            /// The seed of its sectors.
            seed: u64,
            /// The area's first sector.
            first: u64,
            /// The area's sectors.
            sectors: u64,
            /// Of them, those that the guest wrote.
            written: u64,
            /// Of them, those that are to read as zeros.
            zero: u64,
            /// Of them, those of which nothing is known.
            unknown: u64,
            /// The sum of `block::digest` over those that the guest wrote.
            digest: Hex,
            /// µs that it took.
            took_us: u64,
            /// Wrong sectors since the start.
            errors: u64,
            /// Failed requests since the start.
            io_errors: u64,
        },
        /// What a request read is wrong; this is of the first wrong sector of it. From then on
        /// nothing is known of the wrong sectors.
        Error "error" {
            /// The disk.
            device: u64,
            /// The sector.
            sector: u64,
            /// What is wrong.
            kind: Kind,
            /// Where it was found.
            place: Place,
            /// What it should hold.
            expected: Held,
            /// What it says it holds.
            found: Held,
            /// Which sector it says it is.
            found_sector: Maybe<u64>,
            /// Whose it says it is.
            found_seed: Maybe<u64>,
            /// The sectors before it in the request that wrote what is found.
            found_position: Maybe<u64>,
            /// The first sector of the request that read it.
            request: u64,
            /// Its sectors.
            request_sectors: u64,
            /// Of them, those that are wrong.
            wrong_sectors: u64,
            /// The sector's first bytes, as a little-endian number.
            bytes: Hex,
        },
        /// The device failed a request.
        IoError "io_error" {
            /// The disk.
            device: u64,
            /// The request.
            op: Op,
            /// Its first sector.
            sector: u64,
            /// Its sectors.
            sectors: u64,
            /// virtio's: 1 error, 2 not supported; 255: the device has not written any.
            status: u64,
        },
        /// The device says it wrote another number of bytes than the request has.
        Length "length" {
            /// The disk.
            device: u64,
            /// The request.
            op: Op,
            /// Its first sector.
            sector: u64,
            /// What the device should say.
            expected: u64,
            /// What it says.
            found: u64,
        },
        /// A request was done for a second, and no interrupt came. The guest goes on.
        LostInterrupt "lost_interrupt" {
            /// The disk.
            device: u64,
            /// Interrupts that did come so far.
            interrupts: u64,
        },
        /// What was measured.
        Bench "bench" {
            /// The disk.
            device: u64,
            /// What.
            op: Bench,
            /// Bytes of a request.
            bs: Size,
            /// Requests in flight.
            depth: u64,
            /// Requests done.
            requests: u64,
            /// ms that it took.
            took_ms: u64,
            /// KiB in a second.
            kib_s: u64,
            /// Requests in a second.
            iops: u64,
            /// The median of the latency, ns.
            p50_ns: u64,
            /// What nine of ten don't exceed.
            p90_ns: u64,
            /// What 99 of 100 don't exceed.
            p99_ns: u64,
            /// What 999 of 1000 don't exceed.
            p999_ns: u64,
            /// The longest.
            max_ns: u64,
            /// Times that the device was told of requests: a write to one of its registers.
            notifications: u64,
            /// What one took on average, ns.
            notify_ns: u64,
            /// Requests that failed.
            io_errors: u64,
        },
    }
}

#[cfg(test)]
mod tests {
    extern crate std;
    use std::string::ToString;

    use super::*;

    #[test]
    fn options_read_back_as_written() {
        let options = Options {
            mode: Mode::Fill,
            holds: Holds::Zero,
            area: Size(1 << 30),
            rate: Rate::PerSecond(100),
            wait: Wait::Irq,
            bench: Bench::RandWrite,
            event_idx: false,
            corrupt: Maybe(Some(5)),
            ..Options::default()
        };
        let line = options.to_string();
        assert_eq!(
            line,
            "mode=fill holds=zero area=1G rate=100 wait=irq event_idx=false bench=randwrite corrupt=5"
        );
        assert_eq!(Options::parse(&line), Ok(options));
    }

    #[test]
    fn a_wrong_sector_reads_back_as_written() {
        let report = Report::Error {
            device: 1,
            sector: 77,
            kind: Kind::Stale,
            place: Place::Disk,
            expected: Held::Generation(9),
            found: Held::Zero,
            found_sector: Maybe(None),
            found_seed: Maybe(Some(3)),
            found_position: Maybe(None),
            request: 70,
            request_sectors: 8,
            wrong_sectors: 2,
            bytes: Hex(0),
        };
        let line = report.to_string();
        assert!(line.starts_with("error device=1 sector=77 kind=stale place=disk expected=9 found=zero found_sector=- "), "{line}");
        assert_eq!(Report::parse(&line), Some(report));
    }
}
