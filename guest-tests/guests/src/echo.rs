//! `echo`: sends back every byte that it receives, by interrupt; it halts in between.

crate::fields::words! {
    /// Which interrupt controller brings the serial port's interrupt.
    Controller {
        /// The two 8259s, through the local APIC's LINT0.
        Pic "pic",
        /// The I/O APIC.
        IoApic "ioapic",
    }
}

crate::fields::options! {
    /// What the guest is to do.
    Options {
        /// Where the interrupt comes from.
        via: Controller = Controller::Pic,
    }
}

/// Bytes that are not echoed.
pub mod command {
    /// Answer with `Count`.
    pub const COUNT: u8 = 0x05;
    /// Power off.
    pub const QUIT: u8 = 0x04;
}

crate::fields::reports! {
    /// What the guest says.
    Report {
        /// It listens.
        Ready "ready" {
            /// Where the interrupt comes from.
            via: Controller,
        },
        /// The answer to [`command::COUNT`].
        Count "count" {
            /// Bytes received so far, commands included.
            bytes: u64,
            /// Interrupts so far.
            interrupts: u64,
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
            via: Controller::IoApic,
        };
        assert_eq!(Options::parse(&options.to_string()), Ok(options));
        let report = Report::Count {
            bytes: 12,
            interrupts: 3,
        };
        assert_eq!(Report::parse(&report.to_string()), Some(report));
    }
}
