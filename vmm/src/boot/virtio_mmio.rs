//! Where virtio-mmio devices are, and how kernels without ACPI are told: by words of the command
//! line, which Linux takes (`drivers/virtio/virtio_mmio.c`) and QEMU's microvm gives, too.
//!
//! Others don't get the words. A Linux that knows both ways finds each device twice, and says that
//! the second one fails; one whose virtio-mmio driver is a module says that it doesn't know the word.

use std::borrow::Cow;

use super::BootError;

/// Where the first slot's registers are: in the hole below 4 GiB.
const FIRST_ADDR: u64 = 0xd000_0000;
/// The interrupts of the slots, in their order: first those that a PC leaves free, then the I/O
/// APIC's that no PIC has.
const GSIS: [u32; 16] = [5, 6, 7, 10, 11, 12, 14, 15, 16, 17, 18, 19, 20, 21, 22, 23];

/// A place for a virtio-mmio device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct VirtioMmioSlot {
    /// The guest physical address of its registers, [`Self::LEN`] bytes.
    pub addr: u64,
    /// Its interrupt: the pin of the I/O APIC; edge-triggered.
    pub gsi: u32,
}

impl VirtioMmioSlot {
    /// Bytes of address space that a device has.
    pub const LEN: u64 = 0x1000;

    /// The most devices that a machine can have: each has an interrupt of its own.
    pub const MAX: usize = GSIS.len();

    /// The slot of that number, from 0; `None` from [`Self::MAX`] on.
    pub fn of(number: usize) -> Option<Self> {
        let gsi = *GSIS.get(number)?;
        let addr = FIRST_ADDR + number as u64 * Self::LEN;
        Some(Self { addr, gsi })
    }

    /// What the command line says of it.
    fn word(&self) -> String {
        let Self { addr, gsi } = self;
        format!("virtio_mmio.device={}K@{addr:#x}:{gsi}", Self::LEN >> 10)
    }
}

/// The command line that the guest gets: the user's, with a word for every slot. What is behind a
/// word `--` is for the guest's init, so they come before that.
pub(super) fn command_line<'a>(
    given: &'a str,
    slots: &[VirtioMmioSlot],
    most: usize,
) -> Result<Cow<'a, str>, BootError> {
    if let Some(at) = given.find('\0') {
        return Err(BootError::CommandLineZero(at));
    }
    let mut line = Cow::Borrowed(given);
    if !slots.is_empty() {
        let words: Vec<_> = slots.iter().map(VirtioMmioSlot::word).collect();
        let words = words.join(" ");
        let (kernels, inits) = given.split_at(end_of_kernels(given));
        let parts = [kernels.trim_end(), &words, inits];
        let parts = parts.into_iter().filter(|part| !part.is_empty());
        line = Cow::Owned(parts.collect::<Vec<_>>().join(" "));
    }
    if line.len() > most {
        return Err(BootError::CommandLineTooLong {
            len: line.len(),
            devices: line.len() - given.len(),
            most,
        });
    }
    Ok(line)
}

/// Whether the command line tells the kernel not to use ACPI.
pub(super) fn acpi_is_off(line: &str) -> bool {
    let (kernels, _) = line.split_at(end_of_kernels(line));
    kernels
        .split_ascii_whitespace()
        .any(|word| word == "acpi=off")
}

/// Where the words for the kernel end: at the word `--`, which quotes may hide, or at the end.
fn end_of_kernels(line: &str) -> usize {
    let mut quoted = false;
    let mut word = 0;
    for (at, byte) in line.bytes().enumerate() {
        match byte {
            b'"' => quoted = !quoted,
            b' ' | b'\t' | b'\n' if !quoted => {
                if line.get(word..at) == Some("--") {
                    return word;
                }
                word = at + 1;
            }
            _ => {}
        }
    }
    match line.get(word..) {
        Some("--") => word,
        _ => line.len(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn slots(count: usize) -> Vec<VirtioMmioSlot> {
        (0..count).filter_map(VirtioMmioSlot::of).collect()
    }

    #[test]
    fn slots_have_places_and_interrupts_of_their_own() {
        let all = slots(100);
        assert_eq!(all.len(), 16);
        assert_eq!((all[0].addr, all[0].gsi), (0xd000_0000, 5));
        assert_eq!((all[15].addr, all[15].gsi), (0xd000_f000, 23));
        for gsi in [0, 1, 2, 3, 4, 8, 9, 13] {
            assert!(all.iter().all(|slot| slot.gsi != gsi), "GSI {gsi} is taken");
        }
    }

    #[test]
    fn the_kernel_is_told_of_every_slot_and_init_of_none() {
        const FIRST: &str = "virtio_mmio.device=4K@0xd0000000:5";
        const BOTH: &str = "virtio_mmio.device=4K@0xd0000000:5 virtio_mmio.device=4K@0xd0001000:6";
        for (given, count, expected) in [
            ("", 0, String::new()),
            ("quiet -- a", 0, "quiet -- a".to_owned()),
            ("", 1, FIRST.to_owned()),
            ("quiet", 2, format!("quiet {BOTH}")),
            ("quiet  -- single", 1, format!("quiet {FIRST} -- single")),
            ("--", 1, format!("{FIRST} --")),
            ("a=\"b -- c\" d", 1, format!("a=\"b -- c\" d {FIRST}")),
            (
                "virtio_mmio.device=4K@0xfe000000:9",
                1,
                format!("virtio_mmio.device=4K@0xfe000000:9 {FIRST}"),
            ),
        ] {
            assert_eq!(command_line(given, &slots(count), 100).unwrap(), expected);
        }
    }

    #[test]
    fn a_line_that_the_words_make_too_long_says_so() {
        let given = "x".repeat(50);
        let line = |given, count, most| {
            let line = command_line(given, &slots(count), most);
            line.map(|_| ()).map_err(|error| error.to_string())
        };
        assert_eq!(line(&given, 1, 85), Ok(()));
        assert_eq!(
            line(&given, 1, 84).unwrap_err(),
            "the kernel command line has 85 bytes, 35 of them to name the virtio devices; this \
             kernel takes at most 84"
        );
        assert_eq!(
            line(&given, 0, 49).unwrap_err(),
            "the kernel command line has 50 bytes; this kernel takes at most 49"
        );
    }
}
