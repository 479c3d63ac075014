//! Guests for testing VMMs, as images, and what a host needs to run them.
//!
//! Each image is a static ELF file that a VMM boots as a kernel. All have a PVH note, but
//! [`BOOT_LINUX64`]. Per guest there is a module with its options, whose `Display` is the command
//! line to boot it with, and its reports, to be read with `Report::parse`:
//!
//! ```
//! use guest_tests::dirtier::{Options, Rate, Report};
//! use guest_tests::{Event, Reader, Size};
//!
//! let command_line = Options { fill: Size(64 << 20), rate: Rate::Max, ..Options::default() }.to_string();
//! assert_eq!(command_line, "fill=64M rate=max");
//!
//! // What comes out of the serial port of the guest:
//! let output = b"...\nverified pages=16384 generations_sum=99 took_us=7 errors=0\n.";
//! for event in Reader::default().read(output) {
//!     match event {
//!         Event::Heartbeat => {}
//!         Event::Line(line) => {
//!             assert!(matches!(Report::parse(&line), Some(Report::Verified { errors: 0, .. })));
//!         }
//!     }
//! }
//! ```
//!
//! What each guest does, and how to add one, is in `docs/guests.md`.

pub mod driver;
pub mod image;
mod serial;

pub use guests::{
    Hex, Malformed, Maybe, Name, Size, block, boot, clock, dirtier, disk, echo, fault, mmio, net,
    page, state, virtio,
};
pub use serial::{Event, MAX_LINE, Reader};

macro_rules! image {
    ($name:literal) => {
        include_bytes!(concat!(env!("GUEST_IMAGES"), "/", $name))
    };
}

/// Fills memory, goes on rewriting a part of it, checks all of it: see [`dirtier`].
pub const DIRTIER: &[u8] = image!("dirtier");
/// Keeps known values in every register: see [`state`].
pub const STATE: &[u8] = image!("state");
/// Watches its clocks: see [`clock`].
pub const CLOCK: &[u8] = image!("clock");
/// Echoes what it receives: see [`echo`].
pub const ECHO: &[u8] = image!("echo");
/// Writes virtio-blk disks and verifies what it wrote, or measures them: see [`disk`].
pub const DISK: &[u8] = image!("disk");
/// Answers ARP, pings and UDP, and sends numbered datagrams: see [`net`].
pub const NET: &[u8] = image!("net");
/// Uses a virtio-rng, a virtio-console and a virtio-balloon: see [`virtio`].
pub const VIRTIO: &[u8] = image!("virtio");
/// Says how it was booted: see [`boot`].
pub const BOOT: &[u8] = image!("boot");
/// The same without a PVH note, for the 64-bit boot protocol of Linux.
pub const BOOT_LINUX64: &[u8] = image!("boot-linux64");

#[cfg(test)]
mod tests {
    use super::*;

    /// Types of the program headers of a 64-bit little-endian ELF file, and its entry point.
    fn headers(image: &[u8]) -> (Vec<u32>, u64) {
        let number = |at: usize, bytes: usize| -> u64 {
            image[at..at + bytes]
                .iter()
                .rev()
                .fold(0, |value, &byte| value << 8 | u64::from(byte))
        };
        assert_eq!(image[..6], *b"\x7fELF\x02\x01");
        assert_eq!(number(18, 2), 62, "for x86-64");
        let (start, size, count) = (number(32, 8), number(54, 2), number(56, 2));
        let types = (0..count).map(|index| number((start + index * size) as usize, 4) as u32);
        (types.collect(), number(24, 8))
    }

    const NOTE: u32 = 4;
    const INTERPRETER: u32 = 3;
    const DYNAMIC: u32 = 2;

    #[test]
    fn images_are_static_and_have_a_note_if_they_should() {
        for (image, note) in [
            (DIRTIER, true),
            (STATE, true),
            (CLOCK, true),
            (ECHO, true),
            (DISK, true),
            (NET, true),
            (VIRTIO, true),
            (BOOT, true),
            (BOOT_LINUX64, false),
        ] {
            let (types, entry) = headers(image);
            assert_eq!(types.contains(&NOTE), note);
            assert!(!types.contains(&INTERPRETER) && !types.contains(&DYNAMIC));
            assert!((0x10_0000..0x20_0000).contains(&entry), "{entry:#x}");
        }
    }

    #[test]
    fn a_pvh_note_comes_with_an_entry_point() {
        // Name size, descriptor size, XEN_ELFNOTE_PHYS32_ENTRY, name; then the address.
        let note = b"\x04\0\0\0\x08\0\0\0\x12\0\0\0Xen\0";
        let at = |image: &[u8]| image.windows(note.len()).position(|window| window == note);
        let address = at(BOOT)
            .map(|at| &BOOT[at + note.len()..at + note.len() + 8])
            .unwrap();
        let address = u64::from_le_bytes(address.try_into().unwrap());
        assert!((0x10_0000..0x20_0000).contains(&address), "{address:#x}");
        assert_eq!(at(BOOT_LINUX64), None);
    }
}
