//! A guest of a few bytes of code: it writes one byte to the serial port and halts. Its byte shows when
//! the first instruction of a guest ran.

/// What it writes.
pub const BYTE: u8 = b'!';

/// Where it is loaded and entered.
const ADDRESS: u32 = 0x10_0000;

/// In 32-bit protected mode, as PVH enters it: mov dx, 0x3f8; mov al, '!'; out dx, al; cli; hlt; jmp -3.
const CODE: [u8; 11] = [
    0x66, 0xba, 0xf8, 0x03, 0xb0, BYTE, 0xee, 0xfa, 0xf4, 0xeb, 0xfd,
];

const HEADER_LEN: u64 = 64;
const SEGMENT_LEN: u16 = 56;
const NOTE_LEN: u64 = 20;

/// The guest as a 64-bit ELF file: file header, two program headers (the code, the PVH note), then
/// the note and the code. Layouts are those of elf(5); the note is the one of Xen's PVH entry.
pub fn image() -> Vec<u8> {
    let note_at = HEADER_LEN + 2 * u64::from(SEGMENT_LEN);
    let code_at = note_at + NOTE_LEN;
    let mut image = b"\x7fELF\x02\x01\x01".to_vec();
    image.resize(16, 0);
    let mut put = |bytes: &[u8]| image.extend_from_slice(bytes);
    // ET_EXEC, EM_X86_64, version.
    put(&2u16.to_le_bytes());
    put(&62u16.to_le_bytes());
    put(&1u32.to_le_bytes());
    // Entry, program headers, no section headers.
    for number in [u64::from(ADDRESS), HEADER_LEN, 0] {
        put(&number.to_le_bytes());
    }
    put(&0u32.to_le_bytes());
    for number in [HEADER_LEN as u16, SEGMENT_LEN, 2, 64, 0, 0] {
        put(&number.to_le_bytes());
    }
    // Type, flags, offset, virtual and physical address, size in the file and in memory, alignment.
    let code_len = CODE.len() as u64;
    let address = u64::from(ADDRESS);
    for (kind, flags, numbers) in [
        (
            1u32,
            5u32,
            [code_at, address, address, code_len, code_len, 1],
        ),
        (4, 4, [note_at, 0, 0, NOTE_LEN, NOTE_LEN, 4]),
    ] {
        put(&kind.to_le_bytes());
        put(&flags.to_le_bytes());
        for number in numbers {
            put(&u64::to_le_bytes(number));
        }
    }
    // XEN_ELFNOTE_PHYS32_ENTRY: sizes of name and descriptor, type, name, descriptor.
    for number in [4, 4, 18] {
        put(&u32::to_le_bytes(number));
    }
    put(b"Xen\0");
    put(&ADDRESS.to_le_bytes());
    put(&CODE);
    image
}
