//! Telling a file's format by its beginning.

use super::header::read;
use super::storage::FileStorage;
use super::{Error, Format, Result};

/// How much of the beginning tells the format.
pub(super) const PROBED: usize = 512;

pub(super) const QCOW2_MAGIC: &[u8] = b"QFI\xfb";

/// Formats that QEMU recognises by their beginning: offset, magic and name.
const MAGICS: [(usize, &[u8], &str); 11] = [
    (0, QCOW2_MAGIC, "qcow2"),
    (0, b"QED\0", "qed"),
    (0, b"KDMV", "vmdk"),
    (0, b"COWD", "vmdk"),
    (0, b"# Disk DescriptorFile", "vmdk"),
    (0, b"vhdxfile", "vhdx"),
    (0, b"conectix", "vpc"),
    (0, b"LUKS\xba\xbe", "luks"),
    (0, b"WithoutFreeSpace", "parallels"),
    (0, b"WithouFreSpacExt", "parallels"),
    (64, &[0x7f, 0x10, 0xda, 0xbe], "vdi"),
];

/// The format that the beginning of a file says it has, none for a raw image.
pub(super) fn recognise(start: &[u8]) -> Option<&'static str> {
    let known = MAGICS.iter().find(|(offset, magic, _)| {
        start
            .get(*offset..)
            .is_some_and(|bytes| bytes.starts_with(magic))
    });
    known.map(|(_, _, name)| *name)
}

/// [`recognise`] for an open file.
pub(super) fn recognise_file(file: &FileStorage) -> Result<Option<&'static str>> {
    Ok(recognise(&read(file, 0, PROBED)?))
}

/// The format of a file of which nobody has said it: raw or qcow2. Other formats are refused: a
/// guest that took one for a raw disk would destroy it.
pub(super) fn probe(file: &FileStorage) -> Result<Format> {
    match recognise_file(file)? {
        None => Ok(Format::Raw),
        Some("qcow2") => Ok(Format::Qcow2),
        Some(other) => Err(Error::format(
            &file.path,
            format!(
                "is a {other} image; Ferry knows raw and qcow2: convert it, or give format=raw to use its \
                 bytes as a disk"
            ),
        )),
    }
}
