//! `state`: vCPUs that keep known values in every register that a guest has, and say so when one
//! changes.

use crate::{Hex, Name};

crate::fields::words! {
    /// What to change on purpose, a second after the start, to test the test.
    Spoil {
        /// Nothing.
        Nothing "nothing",
        /// A general register.
        General "general",
        /// A vector register.
        Vector "vector",
        /// An MSR.
        Msr "msr",
        /// A debug register.
        Debug "debug",
        /// The local APIC's timer is stopped.
        Lapic "lapic",
        /// The PIT is stopped.
        Pit "pit",
        /// The PICs' masks.
        Pic "pic",
        /// An entry of the I/O APIC.
        IoApic "ioapic",
        /// A register of the serial port.
        Serial "serial",
    }
}

crate::fields::options! {
    /// What the guest is to do.
    Options {
        /// vCPUs, the first included.
        cpus: u64 = 2,
        /// ms from one `Ok` report of a vCPU to the next.
        interval: u64 = 1000,
        /// What to change on purpose, on the first vCPU.
        spoil: Spoil = Spoil::Nothing,
        /// Frequency of the TSC in kHz; 0: the guest finds out.
        tsc_khz: u64 = 0,
    }
}

/// What the guest does when it receives a byte.
pub mod command {
    /// Power off.
    pub const QUIT: u8 = b'q';
}

crate::fields::words! {
    /// The widest vector registers that are kept.
    Vectors {
        /// XMM0 to XMM15.
        Sse "sse",
        /// YMM0 to YMM15.
        Avx "avx",
        /// ZMM0 to ZMM31, K0 to K7.
        Avx512 "avx512",
    }
}

crate::fields::reports! {
    /// What the guest says. Lines of several vCPUs come in any order, but whole.
    Report {
        /// All vCPUs keep their values.
        Ready "ready" {
            /// How many vCPUs.
            cpus: u64,
            /// The widest vector registers.
            vectors: Vectors,
            /// Frequency of the TSC that the guest goes by, in kHz.
            tsc_khz: u64,
        },
        /// Something is not there, or doesn't keep what is written to it, before any migration.
        Skipped "skipped" {
            /// The vCPU.
            cpu: u64,
            /// What.
            name: Name,
        },
        /// A vCPU is still at it, whether or not something has changed.
        Ok "ok" {
            /// Which.
            cpu: u64,
            /// Rounds since the start: loading, keeping, comparing the registers.
            rounds: u64,
            /// Times that the registers of CPL 0 and the devices were compared.
            checks: u64,
            /// Interrupts of its local APIC's timer.
            lapic_ticks: u64,
            /// Interrupts of the PIT; the first vCPU takes them.
            pit_ticks: u64,
            /// µs of the longest round since the last report: what it has felt of a stop.
            longest_round_us: u64,
            /// Values that have changed since the start.
            changed: u64,
        },
        /// A value has changed. Each name is reported once per vCPU.
        Changed "changed" {
            /// The vCPU.
            cpu: u64,
            /// What.
            name: Name,
            /// As it was set; of a vector register the first 64-bit lane that differs. For ticks: as
            /// many as the TSC makes expect.
            expected: Hex,
            /// As it is.
            found: Hex,
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
            cpus: 1,
            interval: 100,
            spoil: Spoil::IoApic,
            tsc_khz: 5,
        };
        assert_eq!(Options::parse(&options.to_string()), Ok(options));
        let name = Name::of(format_args!("zmm{}", 31));
        let report = Report::Changed {
            cpu: 1,
            name,
            expected: Hex(u64::MAX),
            found: Hex(0),
        };
        assert_eq!(
            report.to_string(),
            "changed cpu=1 name=zmm31 expected=0xffffffffffffffff found=0x0"
        );
        assert_eq!(Report::parse(&report.to_string()), Some(report));
    }
}
