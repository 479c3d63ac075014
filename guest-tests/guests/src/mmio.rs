//! Where the VMM has put its virtio-mmio devices, as it says on the command line.

use core::fmt;
use core::str::FromStr;

use crate::{Hex, Size};

/// Begins each word that names a device: Linux's parameter of its virtio_mmio driver. QEMU's
/// microvm and other VMMs add one per device to the command line.
pub const PREFIX: &str = "virtio_mmio.device=";

/// Begins the line by which a guest says that it leaves a device alone, and why.
pub const IGNORED: &str = "ignored ";

crate::fields::words! {
    /// How a guest waits for its devices.
    Wait {
        /// It looks, all the time.
        Poll "poll",
        /// It halts until an interrupt, through the I/O APIC.
        Irq "irq",
    }
}

/// The registers of a device, and its interrupt: `size@base:irq`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Window {
    /// Its bytes.
    pub size: Size,
    /// The first byte's physical address.
    pub base: Hex,
    /// The pin of the I/O APIC.
    pub irq: u8,
}

impl fmt::Display for Window {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}@{}:{}", self.size, self.base, self.irq)
    }
}

impl FromStr for Window {
    type Err = ();

    fn from_str(text: &str) -> Result<Self, ()> {
        let (size, rest) = text.split_once('@').ok_or(())?;
        let (base, rest) = rest.split_once(':').ok_or(())?;
        // A fourth part is the device's number, which nobody here needs.
        let irq = rest.split_once(':').map_or(rest, |(irq, _)| irq);
        Ok(Self {
            size: size.parse()?,
            base: base.parse()?,
            irq: irq.parse().map_err(|_| ())?,
        })
    }
}

/// The devices that a command line names, in its order; a word that says something else comes as it
/// is.
pub fn windows(command_line: &str) -> impl Iterator<Item = Result<Window, &str>> {
    command_line
        .split_ascii_whitespace()
        .filter_map(|word| word.strip_prefix(PREFIX).map(|text| (word, text)))
        .map(|(word, text)| text.parse().map_err(|()| word))
}

#[cfg(test)]
mod tests {
    extern crate std;
    use std::vec::Vec;

    use super::*;

    const FERRY: Window = Window {
        size: Size(4096),
        base: Hex(0xd000_0000),
        irq: 5,
    };

    #[test]
    fn devices_are_found_among_other_words() {
        let line =
            "seed=3 virtio_mmio.device=512@0xfeb00e00:12 virtio_mmio.device=4K@0xd0000000:5:0";
        let qemu = Window {
            size: Size(512),
            base: Hex(0xfeb0_0e00),
            irq: 12,
        };
        assert_eq!(windows(line).collect::<Vec<_>>(), [Ok(qemu), Ok(FERRY)]);
        assert_eq!("4K@0xd0000000:5".parse(), Ok(FERRY));
    }

    #[test]
    fn what_is_no_device_is_told() {
        for text in [
            "",
            "4K",
            "4K@0xd0000000",
            "4K@5:5",
            "@0x0:5",
            "4K@0xd0000000:256",
            "4K@0x1:-1",
        ] {
            let word = std::format!("{PREFIX}{text}");
            assert_eq!(windows(&word).collect::<Vec<_>>(), [Err(word.as_str())]);
        }
    }

    #[test]
    fn no_guest_takes_a_device_for_an_option() {
        let line = "rate=5 virtio_mmio.device=512@0xfeb00e00:12";
        assert_eq!(
            crate::dirtier::Options::parse(line),
            crate::dirtier::Options::parse("rate=5")
        );
    }
}
