use std::io::Read;

use super::*;
use crate::memory::{self, MIN_RAM};
use crate::test_guest::{CODE, file, pvh_kernel};

fn ram(bytes: u64) -> GuestRam {
    memory::map(&memory::layout(bytes).unwrap(), &Default::default()).unwrap()
}

fn boot(
    ram: &GuestRam,
    kernel: &[u8],
    initrd: Option<&[u8]>,
    line: &str,
) -> Result<BootState, BootError> {
    let kernel = file(kernel);
    let initrd = initrd.map(file);
    load(
        ram,
        &BootSource {
            kernel: &kernel,
            initrd: initrd.as_ref(),
            command_line: line,
            virtio_mmio: &[],
        },
        2,
    )
}

fn error(kernel: &[u8]) -> String {
    boot(&ram(MIN_RAM), kernel, None, "")
        .unwrap_err()
        .to_string()
}

fn u32_at(ram: &GuestRam, addr: u64) -> u32 {
    ram.read_obj(GuestAddress(addr)).unwrap()
}

fn u64_at(ram: &GuestRam, addr: u64) -> u64 {
    ram.read_obj(GuestAddress(addr)).unwrap()
}

fn bytes_at(ram: &GuestRam, addr: u64, len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    ram.read_slice(&mut bytes, GuestAddress(addr)).unwrap();
    bytes
}

/// A bzImage with nothing in it, for boot protocol 2.15: `setup_sects` 1, 4 KiB of kernel.
fn bzimage() -> Vec<u8> {
    let mut image = vec![0; 1024 + 4096];
    image[0x1f1] = 1;
    image[0x1fe..0x200].copy_from_slice(&[0x55, 0xaa]);
    image[0x200..0x202].copy_from_slice(&[0xeb, 0x6a]); // A jump to 0x26c.
    image[0x202..0x206].copy_from_slice(b"HdrS");
    image[0x206..0x208].copy_from_slice(&0x020fu16.to_le_bytes());
    image[0x211] = 1; // LOADED_HIGH
    image[0x22c..0x230].copy_from_slice(&0x7fff_ffffu32.to_le_bytes()); // initrd_addr_max
    image[0x230..0x234].copy_from_slice(&0x20_0000u32.to_le_bytes()); // kernel_alignment
    image[0x234] = 1; // relocatable
    image[0x236] = 1; // XLF_KERNEL_64
    image[0x238..0x23c].copy_from_slice(&255u32.to_le_bytes()); // cmdline_size
    image[0x258..0x260].copy_from_slice(&0x20_0000u64.to_le_bytes()); // pref_address
    image[0x260..0x264].copy_from_slice(&0x40_0000u32.to_le_bytes()); // init_size
    image[1024 + 0x200] = 0xf4;
    image
}

#[test]
fn a_pvh_kernel_finds_its_start_info() {
    let ram = ram((3 << 30) + (64 << 20));
    let initrd = vec![7; 10_000];
    let state = boot(
        &ram,
        &pvh_kernel(&[0xf4; 10]),
        Some(&initrd),
        "console=ttyS0",
    )
    .unwrap();
    let BootState::Pvh { entry, start_info } = state else {
        panic!("{state:?}")
    };
    assert_eq!(entry, CODE as u32);
    assert_eq!(bytes_at(&ram, CODE, 10), [0xf4; 10]);
    // struct hvm_start_info, by its offsets.
    let info = u64::from(start_info);
    assert_eq!(u32_at(&ram, info), 0x336e_c578);
    assert_eq!(u32_at(&ram, info + 4), 1, "version");
    assert_eq!(u32_at(&ram, info + 12), 1, "modules");
    let module = u64_at(&ram, info + 16);
    let (place, len) = (u64_at(&ram, module), u64_at(&ram, module + 8));
    assert_eq!(len, 10_000);
    assert_eq!(bytes_at(&ram, place, 10_000), initrd);
    assert!(place % 4096 == 0 && place + len <= HOLE_START, "{place:#x}");
    let line = u64_at(&ram, info + 24);
    assert_eq!(bytes_at(&ram, line, 14), b"console=ttyS0\0");
    let (map, entries) = (u64_at(&ram, info + 40), u32_at(&ram, info + 48));
    let map: Vec<_> = (0..u64::from(entries))
        .map(|index| {
            let at = map + index * 24;
            (
                u64_at(&ram, at),
                u64_at(&ram, at + 8),
                u32_at(&ram, at + 16),
            )
        })
        .collect();
    assert_eq!(
        map,
        [
            (0, 0x9_fc00, 1),
            (0x9_fc00, 0x6_0400, 2),
            (0x10_0000, (3 << 30) - 0x10_0000, 1),
            (4 << 30, 64 << 20, 1)
        ]
    );
    assert_eq!(bytes_at(&ram, 0xf_0000, 4), b"_MP_");
}

#[test]
fn booting_again_restores_the_kernel_and_clears_its_bss() {
    let ram = ram(MIN_RAM);
    let kernel = pvh_kernel(&[1, 2, 3]);
    boot(&ram, &kernel, None, "").unwrap();
    ram.write_slice(&[0xee; 0x1003], GuestAddress(CODE))
        .unwrap();
    boot(&ram, &kernel, None, "").unwrap();
    let mut expected = vec![0; 0x1003];
    expected[..3].copy_from_slice(&[1, 2, 3]);
    assert_eq!(bytes_at(&ram, CODE, 0x1003), expected);
}

#[test]
fn a_bzimage_is_entered_in_64_bit_mode_with_its_boot_parameters() {
    let ram = ram(64 << 20);
    let state = boot(&ram, &bzimage(), Some(&[9; 5000]), "quiet").unwrap();
    let params = 0x7000;
    assert_eq!(
        state,
        BootState::Linux64 {
            entry: 0x10_0200,
            boot_params: params
        }
    );
    assert_eq!(bytes_at(&ram, 0x10_0200, 1), [0xf4]);
    // struct boot_params, by its offsets.
    assert_eq!(bytes_at(&ram, params + 0x202, 4), b"HdrS");
    assert_eq!(bytes_at(&ram, params + 0x210, 1), [0xff], "type_of_loader");
    let (initrd, len) = (u32_at(&ram, params + 0x218), u32_at(&ram, params + 0x21c));
    assert_eq!((initrd, len), ((64 << 20) - 8192, 5000));
    let line = u64::from(u32_at(&ram, params + 0x228));
    assert_eq!(bytes_at(&ram, line, 6), b"quiet\0");
    assert_eq!(bytes_at(&ram, params + 0x1e8, 1), [3], "e820 entries");
    assert_eq!(u64_at(&ram, params + 0x2d0 + 2 * 20), 0x10_0000);
    assert_eq!(u64_at(&ram, params + 0x2d0 + 2 * 20 + 8), 63 << 20);
    // The page tables map the last page below 4 GiB to itself.
    let walk = |table: u64, index: u64| u64_at(&ram, table + index * 8);
    let directory = walk(walk(linux::PAGE_TABLES_ADDR, 0) & !0xfff, 3) & !0xfff;
    assert_eq!(walk(directory, 511), 0xffe0_0083);
}

#[test]
fn a_64_bit_elf_kernel_without_a_note_gets_a_header_of_its_own() {
    let mut kernel = pvh_kernel(&[0xf4]);
    kernel[120] = 0; // PT_NULL instead of PT_NOTE
    let ram = ram(MIN_RAM);
    let state = boot(&ram, &kernel, None, "x").unwrap();
    assert!(matches!(state, BootState::Linux64 { entry: CODE, .. }));
    assert_eq!(bytes_at(&ram, 0x7202, 4), b"HdrS");
}

#[test]
fn registers_are_those_of_the_protocols() {
    let (mut regs, mut sregs) = Default::default();
    BootState::Pvh {
        entry: 0x10_0000,
        start_info: 0x6000,
    }
    .apply(&mut regs, &mut sregs);
    assert_eq!((regs.rip, regs.rbx, regs.rflags), (0x10_0000, 0x6000, 2));
    assert_eq!((sregs.cr0 & 0x8000_0001, sregs.cr4, sregs.efer), (1, 0, 0));
    assert_eq!((sregs.cs.db, sregs.cs.l, sregs.cs.limit), (1, 0, u32::MAX));
    BootState::Linux64 {
        entry: 0x10_0200,
        boot_params: 0x7000,
    }
    .apply(&mut regs, &mut sregs);
    assert_eq!((regs.rip, regs.rsi, regs.rbx), (0x10_0200, 0x7000, 0));
    assert_eq!((sregs.cs.selector, sregs.ds.selector), (0x10, 0x18));
    assert_eq!((sregs.cs.db, sregs.cs.l, sregs.efer), (0, 1, 0x500));
    assert_eq!(sregs.cr0 & 0x8000_0001, 0x8000_0001);
}

#[test]
fn what_is_no_kernel_is_named() {
    let elf = |class: u8, data: u8, machine: u16| {
        let mut kernel = pvh_kernel(&[0xf4]);
        (kernel[4], kernel[5]) = (class, data);
        let bytes = if data == 1 {
            machine.to_le_bytes()
        } else {
            machine.to_be_bytes()
        };
        kernel[18..20].copy_from_slice(&bytes);
        kernel
    };
    let mut old = bzimage();
    old[0x206] = 5;
    old[0x207] = 2;
    let mut narrow = bzimage();
    narrow[0x236] = 0;
    let mut program = pvh_kernel(&[0xf4]);
    program[120] = 3; // PT_INTERP
    for (kernel, expected) in [
        (vec![], "an empty file"),
        (b"#!/bin/sh\n".to_vec(), "a script"),
        (b"hello\n".to_vec(), "a text file"),
        (b"\x1f\x8b\x08\0".to_vec(), "compressed with gzip"),
        (b"070701...".to_vec(), "a cpio archive"),
        (b"QFI\xfb\0".to_vec(), "a qcow2 disk image"),
        (b"MZ\x90\0".to_vec(), "an EFI or Windows program"),
        (vec![0xde, 0xad], "it starts with de ad"),
        (elf(1, 1, 3), "a 32-bit ELF file for x86;"),
        (elf(2, 1, 183), "a 64-bit ELF file for AArch64"),
        (elf(2, 2, 22), "a 64-bit ELF file for S/390"),
        (program, "a program for an operating system"),
        (old, "boot protocol 2.05, older than 2.12"),
        (narrow, "a Linux bzImage for 32-bit x86"),
    ] {
        let error = error(&kernel);
        assert!(error.starts_with("the kernel is "), "{error}");
        assert!(error.contains(expected), "{error}");
        assert!(
            error.contains("expected is a kernel for 64-bit x86"),
            "{error}"
        );
    }
}

#[test]
fn a_directory_cannot_be_read_and_says_so() {
    let directory = File::open("/").unwrap();
    let error = identify(&directory).unwrap_err();
    assert!(matches!(error, BootError::ReadKernel(_)), "{error}");
}

#[test]
fn segments_must_lie_in_ram_and_apart() {
    // Program header 0 is at 64; its fields from 72: offset, vaddr, paddr, filesz, memsz.
    let with = |at: usize, value: u64| {
        let mut kernel = pvh_kernel(&[0xf4; 16]);
        kernel[at..at + 8].copy_from_slice(&value.to_le_bytes());
        kernel
    };
    for (kernel, expected) in [
        (with(64 + 24, 0x8000), "link it at 1 MiB or above"),
        (with(64 + 24, MIN_RAM - 4096), "give the guest more memory"),
        (with(64 + 24, u64::MAX - 10), "give the guest more memory"),
        (with(64 + 40, u64::MAX), "give the guest more memory"),
        (with(64 + 40, 3), "more bytes in the file than in memory"),
        (with(64 + 32, 17), "goes past the end of the file"),
        (with(64 + 8, u64::MAX - 3), "goes past the end of the file"),
        (with(64 + 24, 0x20_0000), "entry point 0x100000 is in none"),
        (with(120 + 32, 1 << 40), "bytes of ELF notes"),
        (with(120 + 8, u64::MAX), "past the end of the file"),
        (with(32, u64::MAX - 8), "program headers at file offset"),
        (
            with(54, 0x0000_0002_ffff_0038),
            "ELF program headers; 1 to 128",
        ),
    ] {
        let error = error(&kernel);
        assert!(error.contains(expected), "{expected}: {error}");
    }
    // Two segments, one over the other.
    let mut kernel = pvh_kernel(&[0xf4; 16]);
    kernel.copy_within(64..120, 120);
    assert!(error(&kernel).contains("segments overlap at 0x100000"));
}

#[test]
fn a_kernel_that_is_cut_or_changed_anywhere_never_panics() {
    let ram = ram(MIN_RAM);
    for whole in [pvh_kernel(&[0xf4; 64]), bzimage()] {
        for len in (0..whole.len()).step_by(61) {
            let _ = boot(&ram, &whole[..len], None, "");
        }
        for at in 0..0x290.min(whole.len()) {
            for value in [0, 1, 0x7f, 0x80, 0xff] {
                let mut changed = whole.clone();
                changed[at] = value;
                let _ = boot(&ram, &changed, None, "");
            }
        }
    }
}

#[test]
fn what_does_not_fit_says_how_much_there_is() {
    let ram = ram(MIN_RAM);
    let mut kernel = bzimage();
    kernel[0x258..0x260].copy_from_slice(&0x100_0000u64.to_le_bytes());
    let message = error(&kernel);
    assert!(
        message.contains("from 0x1000000 to 0x1400000 (the decompressed kernel)"),
        "{message}"
    );
    let large = vec![0; 15 << 20];
    let message = boot(&ram, &pvh_kernel(&[0xf4]), Some(&large), "").unwrap_err();
    assert!(
        message.to_string().contains("does not fit between"),
        "{message}"
    );
    let message = boot(&ram, &pvh_kernel(&[0xf4]), Some(&[]), "").unwrap_err();
    assert_eq!(message.to_string(), "the initrd is empty");
    let long = "x".repeat(256);
    let message = boot(&ram, &bzimage(), None, &long).unwrap_err().to_string();
    assert!(message.contains("256 bytes; this kernel takes at most 255"));
    boot(&ram, &bzimage(), None, &long[1..]).unwrap();
    let message = boot(&ram, &pvh_kernel(&[0xf4]), None, "a\0b").unwrap_err();
    assert!(message.to_string().contains("zero byte at offset 1"));
    assert!(boot(&ram, &pvh_kernel(&[0xf4]), None, &"x".repeat(2048)).is_err());
}

#[test]
fn the_files_position_does_not_matter() {
    let mut kernel = file(&pvh_kernel(&[0xf4]));
    let mut rest = Vec::new();
    kernel.read_to_end(&mut rest).unwrap();
    let source = BootSource {
        kernel: &kernel,
        initrd: None,
        command_line: "",
        virtio_mmio: &[],
    };
    load(&ram(MIN_RAM), &source, 1).unwrap();
    load(&ram(MIN_RAM), &source, 1).unwrap();
}

#[test]
fn a_kernel_is_told_of_its_virtio_devices_in_the_way_it_knows() {
    let slots: Vec<_> = (0..16).filter_map(VirtioMmioSlot::of).collect();
    let ram = ram(MIN_RAM);
    let mut with_acpi = vec![0xf4; (1 << 20) - 4];
    // Across the border of what is searched at once.
    with_acpi.extend(b"LNXSYSTM and more");
    for (kernel, words) in [
        (pvh_kernel(&[0xf4]), true),
        (pvh_kernel(b"LNXSYST"), true),
        (pvh_kernel(b"LNXSYSTM"), false),
        (pvh_kernel(&with_acpi), false),
        (bzimage(), false),
    ] {
        let kernel = file(&kernel);
        let load = |command_line, slots| {
            let source = BootSource {
                kernel: &kernel,
                initrd: None,
                command_line,
                virtio_mmio: slots,
            };
            load(&ram, &source, 1).unwrap();
            let tables = bytes_at(&ram, acpi::RSDP_ADDR, 0x2000);
            let devices = tables.windows(8).filter(|part| part == b"LNRO0005");
            assert_eq!(devices.count(), slots.len());
            let line = bytes_at(&ram, COMMAND_LINE_ADDR, 300);
            let end = line.iter().position(|&byte| byte == 0).unwrap();
            String::from_utf8(line[..end].to_vec()).unwrap()
        };
        let told = "virtio_mmio.device=4K@0xd0000000:5 \
            virtio_mmio.device=4K@0xd0001000:6 virtio_mmio.device=4K@0xd0002000:7";
        let line = load("quiet -- acpi=off", &slots[..3]);
        if words {
            assert_eq!(line, format!("quiet {told} -- acpi=off"));
        } else {
            assert_eq!(line, "quiet -- acpi=off");
        }
        let line = load("acpi=off quiet -- single", &slots[..3]);
        assert_eq!(line, format!("acpi=off quiet {told} -- single"));
        assert_eq!(load("acpi=off", &[]), "acpi=off");
    }
    // The kernel's limit holds for all of the line: this one takes 255 bytes.
    let kernel = file(&bzimage());
    let source = BootSource {
        kernel: &kernel,
        initrd: None,
        command_line: "acpi=off",
        virtio_mmio: &slots,
    };
    let message = load(&ram, &source, 1).unwrap_err().to_string();
    assert!(message.contains("to name the virtio devices"), "{message}");
}
