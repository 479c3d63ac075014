//! What the VMM tells the guest at its entry.
#![allow(unsafe_code, reason = "reads the VMM's structures")]

use core::fmt;

use super::memory;

/// How the VMM entered the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Protocol {
    /// PVH (xen/include/public/arch-x86/hvm/start_info.h).
    Pvh,
    /// The 64-bit boot protocol of Linux (Documentation/arch/x86/boot.rst).
    Linux64,
}

/// An entry of the memory map, with the type numbers of E820.
#[derive(Clone, Copy, Debug, Default)]
pub struct Region {
    /// Its first byte.
    pub base: u64,
    /// Its bytes.
    pub size: u64,
    /// 1 is RAM, 2 reserved (ACPI 6.5, table 15.4).
    pub kind: u32,
}

impl Region {
    /// Whether it can be used.
    #[must_use]
    pub fn is_ram(&self) -> bool {
        self.kind == 1
    }
}

const MAX_REGIONS: usize = 64;
const MAX_COMMAND_LINE: usize = 4096;

/// A copy of what the VMM said, so that its memory can be used.
pub struct Boot {
    /// How the guest was entered.
    pub protocol: Protocol,
    /// Where the initrd is and its bytes.
    pub initrd: Option<(u64, u64)>,
    /// Where the ACPI tables begin, if there are any.
    pub rsdp: u64,
    regions: [Region; MAX_REGIONS],
    region_count: usize,
    command_line: [u8; MAX_COMMAND_LINE],
    command_line_bytes: usize,
}

/// Why that could not be read.
#[derive(Clone, Copy, Debug)]
pub enum Unreadable {
    /// The structure doesn't begin as it should; with what is there.
    Magic(Protocol, u32),
    /// No memory map.
    NoMemoryMap,
}

impl fmt::Display for Unreadable {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Magic(protocol, magic) => {
                write!(f, "{protocol:?} boot information begins with {magic:#x}")
            }
            Self::NoMemoryMap => f.write_str("the VMM gave no memory map"),
        }
    }
}

/// Reads a number that the VMM has put anywhere in the first GiB.
///
/// # Safety
/// The address must be mapped.
unsafe fn read<T: Copy>(address: u64) -> T {
    // SAFETY: the caller vouches for the address; T is a plain number.
    unsafe { (address as *const T).read_unaligned() }
}

impl Boot {
    /// Copies the VMM's information at `info`, and maps all memory.
    pub(crate) fn read(protocol: Protocol, info: u64) -> Result<Self, Unreadable> {
        let mut boot = Self {
            protocol,
            initrd: None,
            rsdp: 0,
            regions: [Region::default(); MAX_REGIONS],
            region_count: 0,
            command_line: [0; MAX_COMMAND_LINE],
            command_line_bytes: 0,
        };
        // SAFETY: the protocols put everything that is read before `map` where it is accessible
        // at the entry; the first GiB is mapped.
        unsafe {
            match protocol {
                Protocol::Pvh => boot.read_pvh(info)?,
                Protocol::Linux64 => boot.read_linux(info)?,
            }
        }
        if boot.region_count == 0 {
            return Err(Unreadable::NoMemoryMap);
        }
        Ok(boot)
    }

    /// # Safety
    /// At `info` there must be mapped memory: PVH's information, or anything else without its magic
    /// number.
    unsafe fn read_pvh(&mut self, info: u64) -> Result<(), Unreadable> {
        const MAGIC: u32 = 0x336e_c578;
        // SAFETY: hvm_start_info of version 1, its memory map, and the first module.
        unsafe {
            let magic: u32 = read(info);
            if magic != MAGIC {
                return Err(Unreadable::Magic(Protocol::Pvh, magic));
            }
            let version: u32 = read(info + 4);
            if version >= 1 {
                let (map, entries): (u64, u32) = (read(info + 40), read(info + 48));
                for entry in (0..u64::from(entries)).map(|index| map + index * 24) {
                    self.add(Region {
                        base: read(entry),
                        size: read(entry + 8),
                        kind: read(entry + 16),
                    });
                }
            }
            self.copy_command_line(read(info + 24));
            self.rsdp = read(info + 32);
            memory::map(self.memory());
            let (modules, list): (u32, u64) = (read(info + 12), read(info + 16));
            if modules > 0 {
                self.initrd = Some((read(list), read(list + 8)));
            }
        }
        Ok(())
    }

    /// # Safety
    /// At `params` there must be mapped memory: `boot_params`, or anything else without its magic
    /// number.
    unsafe fn read_linux(&mut self, params: u64) -> Result<(), Unreadable> {
        const HDRS: u32 = 0x5372_6448;
        // SAFETY: boot_params, the "zero page".
        unsafe {
            let magic: u32 = read(params + 0x202);
            if magic != HDRS {
                return Err(Unreadable::Magic(Protocol::Linux64, magic));
            }
            let entries: u8 = read(params + 0x1e8);
            for entry in (0..u64::from(entries)).map(|index| params + 0x2d0 + index * 20) {
                self.add(Region {
                    base: read(entry),
                    size: read(entry + 8),
                    kind: read(entry + 16),
                });
            }
            let wide = |low: u64, high: u64| {
                u64::from(read::<u32>(params + low)) | u64::from(read::<u32>(params + high)) << 32
            };
            self.copy_command_line(wide(0x228, 0x0c8));
            self.rsdp = read(params + 0x070);
            memory::map(self.memory());
            let (image, size) = (wide(0x218, 0x0c0), wide(0x21c, 0x0c4));
            self.initrd = (size > 0).then_some((image, size));
        }
        Ok(())
    }

    fn add(&mut self, region: Region) {
        if let Some(slot) = self.regions.get_mut(self.region_count) {
            *slot = region;
            self.region_count += 1;
        }
    }

    /// # Safety
    /// A string that ends in 0 must be at the address, or the address be 0.
    unsafe fn copy_command_line(&mut self, address: u64) {
        if address == 0 {
            return;
        }
        for (index, byte) in self.command_line.iter_mut().enumerate() {
            // SAFETY: the string goes on until its 0.
            *byte = unsafe { read(address + index as u64) };
            if *byte == 0 {
                break;
            }
            self.command_line_bytes = index + 1;
        }
    }

    /// The memory map, in the VMM's order.
    #[must_use]
    pub fn memory(&self) -> &[Region] {
        &self.regions[..self.region_count]
    }

    /// The command line. What is no text in it is left out at the end.
    #[must_use]
    pub fn command_line(&self) -> &str {
        let bytes = &self.command_line[..self.command_line_bytes];
        match str::from_utf8(bytes) {
            Ok(text) => text,
            Err(error) => str::from_utf8(&bytes[..error.valid_up_to()]).unwrap_or(""),
        }
    }
}
