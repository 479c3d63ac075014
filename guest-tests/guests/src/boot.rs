//! `boot`: says what the VMM told it, then ends in one of several ways. There are two images: one
//! with a PVH note, one for the 64-bit boot protocol of Linux.

use core::fmt;

use crate::Hex;
use crate::fields;

crate::fields::words! {
    /// What to do after the reports.
    Then {
        /// Power off.
        Off "off",
        /// Reset through the keyboard controller.
        Reset "reset",
        /// Triple fault.
        TripleFault "triple",
        /// Halt with interrupts off: nothing but a pause or a reset gets this guest out.
        Halt "halt",
        /// Loop at CPL 3.
        Spin "spin",
        /// Loop at CPL 0.
        Spin0 "spin0",
        /// Write to port 0x80 without end, from CPL 3.
        Ports "ports",
        /// Write to port 0x80 without end, from CPL 0.
        Ports0 "ports0",
        /// `int3` at CPL 0, report `Breakpoint`, power off.
        Int3 "int3",
        /// `popcnt` at CPL 0, report `Popcnt`, power off.
        Popcnt "popcnt",
        /// An undefined instruction at CPL 0: reports an exception with vector 6, powers off.
        Undefined "undefined",
    }
}

/// What the guest is to do. Other words on its command line are left alone: that they arrive is
/// what it is there to show.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Options {
    /// What to do after the reports.
    pub then: Then,
    /// vCPUs to wait for, the first included, for a second at most.
    pub cpus: u64,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            then: Then::Off,
            cpus: 1,
        }
    }
}

impl fmt::Display for Options {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "then={} cpus={}", self.then, self.cpus)
    }
}

impl Options {
    /// Finds the options on a command line; what is missing or impossible has its default.
    #[must_use]
    pub fn find(text: &str) -> Self {
        let default = Self::default();
        Self {
            then: fields::value(text, "then")
                .and_then(|word| word.parse().ok())
                .unwrap_or(default.then),
            cpus: fields::value(text, "cpus")
                .and_then(|word| word.parse().ok())
                .unwrap_or(default.cpus),
        }
    }
}

crate::fields::words! {
    /// How the guest was entered.
    Protocol {
        /// PVH.
        Pvh "pvh",
        /// The 64-bit boot protocol of Linux.
        Linux64 "linux64",
    }
}

crate::fields::words! {
    /// Whether the last page of a RAM region keeps what is written to it.
    Probe {
        /// It does.
        Kept "kept",
        /// It does not.
        Lost "lost",
        /// No RAM, below the guest's image, or beyond 64 GiB.
        Skipped "skipped",
    }
}

crate::fields::reports! {
    /// What the guest says, in this order; [`COMMAND_LINE`] comes second.
    Report {
        /// It runs.
        Entered "entered" {
            /// How.
            protocol: Protocol,
            /// Where the ACPI tables begin; 0 if the VMM names none.
            rsdp: Hex,
        },
        /// An entry of the memory map.
        Region "region" {
            /// Its first byte.
            base: Hex,
            /// Its bytes.
            size: Hex,
            /// 1 is RAM, 2 reserved.
            kind: u64,
            /// Whether it is there.
            probe: Probe,
        },
        /// There is an initrd.
        Initrd "initrd" {
            /// Its first byte.
            address: Hex,
            /// Its bytes.
            size: u64,
            /// Its [`checksum`].
            checksum: Hex,
        },
        /// The vCPUs that run now.
        Vcpus "vcpus" {
            /// The first included.
            running: u64,
        },
        /// A breakpoint handler was called at CPL 0.
        Breakpoint "breakpoint" {
            /// How often.
            count: u64,
            /// Whether the return address was that of the next instruction.
            returned: bool,
        },
        /// `popcnt` at CPL 0 has worked.
        Popcnt "popcnt" {
            /// Of a number with 7 bits set.
            bits: u64,
        },
        /// All is said.
        Done "done" {
            /// What comes now.
            then: Then,
        },
    }
}

/// Begins the line that repeats the command line.
pub const COMMAND_LINE: &str = "command_line ";

/// The command line, if that is what the line repeats. Trailing blanks are lost.
#[must_use]
pub fn command_line(line: &str) -> Option<&str> {
    line.strip_prefix(COMMAND_LINE)
        .or_else(|| (line == COMMAND_LINE.trim_ascii_end()).then_some(""))
}

/// The checksum of an initrd (FNV-1a, 64 bits).
#[must_use]
pub fn checksum(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0xcbf2_9ce4_8422_2325, |hash, &byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x100_0000_01b3)
    })
}

#[cfg(test)]
mod tests {
    extern crate std;
    use std::string::ToString;

    use super::*;

    #[test]
    fn options_are_found_among_other_words() {
        let options = Options {
            then: Then::Ports0,
            cpus: 4,
        };
        let line = std::format!("console=ttyS0 {options} \"quoted words\"");
        assert_eq!(Options::find(&line), options);
        assert_eq!(Options::find("then=dance quiet"), Options::default());
    }

    #[test]
    fn the_command_line_comes_back_whole() {
        assert_eq!(command_line("command_line a=b  c.d"), Some("a=b  c.d"));
        assert_eq!(command_line("command_line"), Some(""));
        assert_eq!(command_line("vcpus running=1"), None);
    }

    #[test]
    fn reports_read_back_as_written() {
        for report in [
            Report::Entered {
                protocol: Protocol::Linux64,
                rsdp: Hex(0),
            },
            Report::Region {
                base: Hex(1 << 20),
                size: Hex(255 << 20),
                kind: 1,
                probe: Probe::Kept,
            },
            Report::Initrd {
                address: Hex(0x1000),
                size: 7,
                checksum: Hex(checksum(b"initrd\n")),
            },
            Report::Breakpoint {
                count: 1,
                returned: true,
            },
            Report::Done { then: Then::Halt },
        ] {
            assert_eq!(Report::parse(&report.to_string()), Some(report));
        }
    }

    #[test]
    fn the_checksum_is_fnv1a() {
        assert_eq!(checksum(b""), 0xcbf2_9ce4_8422_2325);
        assert_eq!(checksum(b"a"), 0xaf63_dc4c_8601_ec8c);
    }
}
