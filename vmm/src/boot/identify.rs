//! What kind of file a kernel is, or is not.

use std::fs::File;
use std::io::{Read, Seek, SeekFrom};

use super::BootError;
use super::elf::ElfKernel;
use super::linux::BzImageHeader;

/// A kernel that can be booted.
#[derive(Clone, Debug)]
pub enum KernelKind {
    /// An ELF file with a PVH note, which says where its 32-bit entry point is.
    Pvh(ElfKernel),
    /// A 64-bit ELF file without one: entered as Linux is, in 64-bit mode.
    Elf64(ElfKernel),
    /// A Linux bzImage with a 64-bit entry point.
    BzImage(BzImageHeader),
}

/// How Linux calls the root of the devices that ACPI describes (`ACPI_SYSTEM_HID`): a kernel in
/// which these bytes are reads the tables.
const LINUX_ACPI_ROOT: &[u8] = b"LNXSYSTM";

const START: u64 = 4096;

impl KernelKind {
    /// Whether the kernel finds its devices in ACPI tables. A bzImage is compressed, so it isn't
    /// looked at: those are distributions' kernels, and they do.
    pub(super) fn has_acpi(&self, file: &File) -> Result<bool, BootError> {
        match self {
            Self::Pvh(elf) | Self::Elf64(elf) => elf.contains(file, LINUX_ACPI_ROOT),
            Self::BzImage(_) => Ok(true),
        }
    }
}

/// Finds out what kind of kernel a file is, and reads its headers. A file that isn't one is an
/// error that says what it is.
pub fn identify(mut file: &File) -> Result<KernelKind, BootError> {
    let len = file.seek(SeekFrom::End(0)).map_err(BootError::ReadKernel)?;
    file.seek(SeekFrom::Start(0))
        .map_err(BootError::ReadKernel)?;
    let mut start = Vec::new();
    file.take(START)
        .read_to_end(&mut start)
        .map_err(BootError::ReadKernel)?;
    let not_a_kernel = |found: String| Err(BootError::NotAKernel { found });
    if start.starts_with(b"\x7fELF") {
        if let Some(found) = wrong_elf(&start) {
            return not_a_kernel(found);
        }
        let elf = ElfKernel::read(file, &start, len)?;
        return if elf.pvh_entry.is_some() {
            Ok(KernelKind::Pvh(elf))
        } else if elf.has_interpreter {
            not_a_kernel("a program for an operating system (it needs a dynamic linker)".into())
        } else {
            Ok(KernelKind::Elf64(elf))
        };
    }
    if start.get(0x202..0x206) == Some(b"HdrS") {
        return match BzImageHeader::read(&start, len)? {
            Ok(header) => Ok(KernelKind::BzImage(header)),
            Err(found) => not_a_kernel(found),
        };
    }
    not_a_kernel(other(&start))
}

/// What kind of ELF file it is, unless it is one for 64-bit x86.
fn wrong_elf(start: &[u8]) -> Option<String> {
    let byte = |at: usize| start.get(at).copied().unwrap_or(0);
    let little = byte(5) == 1;
    let machine = if little {
        u16::from_le_bytes([byte(18), byte(19)])
    } else {
        u16::from_be_bytes([byte(18), byte(19)])
    };
    // ELF specification, e_machine.
    let architecture = match machine {
        3 => "x86",
        8 => "MIPS",
        20 | 21 => "PowerPC",
        22 => "S/390",
        40 => "Arm",
        62 => "x86-64",
        183 => "AArch64",
        243 => "RISC-V",
        258 => "LoongArch",
        _ => "another architecture",
    };
    let bits = match byte(4) {
        1 => "32",
        2 => "64",
        _ => return Some("an ELF file of unknown class".into()),
    };
    (machine != 62 || bits != "64" || !little)
        .then(|| format!("a {bits}-bit ELF file for {architecture}"))
}

/// What a file is that is neither an ELF file nor a bzImage, by its first bytes.
fn other(start: &[u8]) -> String {
    const KNOWN: &[(&[u8], &str)] = &[
        (b"\x1f\x8b", "compressed with gzip (decompress it first)"),
        (b"\xfd7zXZ\0", "compressed with xz (decompress it first)"),
        (
            b"\x28\xb5\x2f\xfd",
            "compressed with zstd (decompress it first)",
        ),
        (b"BZh", "compressed with bzip2 (decompress it first)"),
        (
            b"\x04\x22\x4d\x18",
            "compressed with lz4 (decompress it first)",
        ),
        (
            b"\x02\x21\x4c\x18",
            "compressed with lz4 (decompress it first)",
        ),
        (b"\x5d\0\0", "compressed with lzma (decompress it first)"),
        (b"#!", "a script"),
        (b"070701", "a cpio archive, as an initrd is"),
        (b"070702", "a cpio archive, as an initrd is"),
        (b"QFI\xfb", "a qcow2 disk image"),
        (b"PK\x03\x04", "a zip archive"),
        (b"!<arch>\n", "a static library"),
    ];
    if start.is_empty() {
        return "an empty file".into();
    }
    if start.starts_with(b"MZ") {
        return match start.get(56..60) {
            Some(b"ARM\x64") => "a Linux kernel image for AArch64".into(),
            Some(b"RSC\x05") => "a Linux kernel image for RISC-V".into(),
            _ => "an EFI or Windows program".into(),
        };
    }
    if let Some((_, found)) = KNOWN.iter().find(|(magic, _)| start.starts_with(magic)) {
        return (*found).into();
    }
    if start.get(510..512) == Some(b"\x55\xaa") {
        return "a disk image with a boot sector".into();
    }
    if start
        .iter()
        .all(|byte| matches!(byte, b'\t' | b'\n' | b'\r' | b' '..=b'~'))
    {
        return "a text file".into();
    }
    let shown: Vec<_> = start.iter().take(8).map(|b| format!("{b:02x}")).collect();
    format!(
        "no kind of file that is known (it starts with {})",
        shown.join(" ")
    )
}
