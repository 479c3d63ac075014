//! What any guest says when it breaks. It powers off then, so nobody waits for it.

use crate::Hex;

crate::fields::reports! {
    /// An exception that the guest did not expect.
    Fault {
        /// An exception on a vCPU.
        Exception "exception" {
            /// Its vector (Intel SDM, volume 3, 7.3.1).
            vector: u64,
            /// Its error code, 0 if it has none.
            error: Hex,
            /// Where it happened.
            rip: Hex,
            /// The privilege level there.
            cpl: u64,
            /// CR2, of meaning after a page fault (14).
            cr2: Hex,
            /// The vCPU, in the order in which they started.
            cpu: u64,
        },
    }
}

/// Begins the line that says why a guest gave up: a wrong option, too little memory, a panic.
pub const PANIC: &str = "panic: ";

#[cfg(test)]
mod tests {
    extern crate std;
    use std::string::ToString;

    use super::*;

    #[test]
    fn a_fault_reads_back_as_written() {
        let fault = Fault::Exception {
            vector: 14,
            error: Hex(7),
            rip: Hex(0x10_1234),
            cpl: 3,
            cr2: Hex(u64::MAX),
            cpu: 1,
        };
        assert_eq!(Fault::parse(&fault.to_string()), Some(fault));
    }

    #[test]
    fn half_a_fault_is_none() {
        assert_eq!(Fault::parse("exception vector=14 error=0x7"), None);
    }
}
