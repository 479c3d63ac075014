//! `dirtier`: fills memory, goes on rewriting a part of it and checks all of it.

use core::fmt;
use core::str::FromStr;

use crate::{Hex, Maybe, Size};

crate::fields::words! {
    /// What the pages hold.
    Data {
        /// Incompressible.
        Random "random",
        /// Words, compressible.
        Text "text",
        /// Zeros, whatever the generation.
        Zero "zero",
    }
}

crate::fields::words! {
    /// In which order the working set is rewritten.
    Pattern {
        /// From its first page to its last, over and over.
        Sequential "sequential",
        /// Any page.
        Random "random",
        /// Nine of ten times a page of its first tenth.
        Hot "hot",
    }
}

/// How fast to do something.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rate {
    /// So many times a second; 0 is never.
    PerSecond(u64),
    /// As fast as it goes.
    Max,
}

impl fmt::Display for Rate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::PerSecond(rate) => rate.fmt(f),
            Self::Max => f.write_str("max"),
        }
    }
}

impl FromStr for Rate {
    type Err = ();

    fn from_str(text: &str) -> Result<Self, ()> {
        match text {
            "max" => Ok(Self::Max),
            _ => text.parse().map(Self::PerSecond).map_err(|_| ()),
        }
    }
}

crate::fields::options! {
    /// What the guest is to do.
    Options {
        /// Memory to fill, in bytes; whole pages count.
        fill: Size = Size(512 << 20),
        /// Of it, from its beginning, the part to rewrite.
        ws: Size = Size(64 << 20),
        /// Where in the guest's memory to begin, at least.
        from: Size = Size(0),
        /// What the pages hold.
        data: Data = Data::Random,
        /// Pages to verify and rewrite in a second.
        rate: Rate = Rate::PerSecond(20_000),
        /// In which order.
        pattern: Pattern = Pattern::Sequential,
        /// Pages to verify in a second besides, going through all that is filled.
        sweep: u64 = 2_000,
        /// µs from one heartbeat to the next; 0 is none at all.
        heartbeat: u64 = 200,
        /// Damages this page once, a second after the start, to test the test.
        corrupt: Maybe<u64> = Maybe(None),
        /// Further vCPUs that compute all the time, and write next to nothing.
        computers: u64 = 0,
        /// Frequency of the TSC in kHz; 0: the guest finds out.
        tsc_khz: u64 = 0,
    }
}

/// A heartbeat is this one byte.
pub const HEARTBEAT: u8 = b'.';

/// What the guest does when it receives a byte. It looks for one every few heartbeats, or every
/// millisecond if there are none.
pub mod command {
    /// Verify every page now, and answer with `Verified`; nothing is rewritten meanwhile.
    pub const VERIFY: u8 = b'v';
    /// Answer with `Status`.
    pub const STATUS: u8 = b's';
    /// Power off.
    pub const QUIT: u8 = b'q';
    /// Reset the machine through the keyboard controller.
    pub const RESET: u8 = b'r';
    /// Reset the machine by a triple fault.
    pub const TRIPLE_FAULT: u8 = b't';
}

crate::fields::reports! {
    /// What the guest says.
    Report {
        /// Everything is filled, the work begins.
        Ready "ready" {
            /// Pages filled, of 4096 bytes.
            pages: u64,
            /// Of them, the pages to rewrite.
            working_set: u64,
            /// Where the first page is.
            address: Hex,
            /// µs that the filling took.
            fill_us: u64,
            /// Frequency of the TSC that the guest goes by, in kHz.
            tsc_khz: u64,
        },
        /// The answer to [`command::STATUS`].
        Status "status" {
            /// Pages rewritten since the start.
            written: u64,
            /// Pages checked in passing since the start.
            swept: u64,
            /// Heartbeats since the start.
            heartbeats: u64,
            /// Turns of the loop since the start, in most of which there is nothing to do: how many
            /// there are in a second is what the guest gets of its CPU.
            turns: u64,
            /// What the further vCPUs have computed since the start, in pieces of the same size.
            computed: u64,
            /// µs of the longest time between two turns of the loop since the last status: what
            /// the guest itself has felt of a stop. Printing reports does not count.
            longest_gap_us: u64,
            /// µs by which the TSC went back, at most, between two turns since the last status.
            longest_back_us: u64,
            /// Damaged pages found since the start.
            errors: u64,
        },
        /// The answer to [`command::VERIFY`].
        Verified "verified" {
            /// Pages compared with what was last written to them.
            pages: u64,
            /// Sum over all pages of the number of times that they were written.
            generations_sum: u64,
            /// µs that it took.
            took_us: u64,
            /// Damaged pages found since the start, now included.
            errors: u64,
        },
        /// A page is not as it was last written. It is written anew, so each damage counts once;
        /// only the first hundred are reported.
        Error "error" {
            /// The number of the page.
            page: u64,
            /// The address of the first wrong word in it.
            address: Hex,
            /// The word as it should be.
            expected: Hex,
            /// The word as it is.
            found: Hex,
            /// The number of times that the page was written.
            generation: u64,
            /// Which earlier generation the page holds, if it is one of the last 64: a lost write.
            found_generation: Maybe<u64>,
        },
    }
}

#[cfg(test)]
mod tests {
    extern crate std;
    use std::string::ToString;

    use super::*;
    use crate::Malformed;

    #[test]
    fn options_read_back_as_written() {
        let options = Options {
            fill: Size(1 << 30),
            ws: Size(1 << 20),
            from: Size(4 << 30),
            data: Data::Text,
            rate: Rate::Max,
            pattern: Pattern::Hot,
            sweep: 0,
            heartbeat: 0,
            corrupt: Maybe(Some(17)),
            computers: 1,
            tsc_khz: 2_596_120,
        };
        assert_eq!(
            options.to_string(),
            "fill=1G ws=1M from=4G data=text rate=max pattern=hot sweep=0 heartbeat=0 corrupt=17 computers=1 tsc_khz=2596120"
        );
        assert_eq!(Options::parse(&options.to_string()), Ok(options));
    }

    #[test]
    fn defaults_need_no_command_line() {
        assert_eq!(Options::default().to_string(), "");
        assert_eq!(Options::parse(""), Ok(Options::default()));
        assert_eq!(
            Options::parse("rate=0").map(|options| options.rate),
            Ok(Rate::PerSecond(0))
        );
    }

    #[test]
    fn a_wrong_word_is_named() {
        assert_eq!(
            Options::parse("fill=64M quick"),
            Err(Malformed::Unknown("quick"))
        );
        assert_eq!(
            Options::parse("speed=1"),
            Err(Malformed::Unknown("speed=1"))
        );
        assert_eq!(
            Options::parse("rate=fast"),
            Err(Malformed::Value("rate=fast"))
        );
    }

    #[test]
    fn reports_read_back_as_written() {
        let error = Report::Error {
            page: 5,
            address: Hex(0x20_5008),
            expected: Hex(1),
            found: Hex(0),
            generation: 9,
            found_generation: Maybe(Some(8)),
        };
        assert_eq!(
            error.to_string(),
            "error page=5 address=0x205008 expected=0x1 found=0x0 generation=9 found_generation=8"
        );
        assert_eq!(Report::parse(&error.to_string()), Some(error));
        assert_eq!(Report::parse("status written=1"), None);
        assert_eq!(Report::parse("hello"), None);
    }
}
