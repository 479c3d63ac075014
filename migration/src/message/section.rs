//! Sections, in STATE and in HELLO.

use crate::codec::{DecodeError, Reader, put_name};
use crate::frame::MAX_SECTION;
use crate::section::Section;

pub(crate) fn put_section(section: &Section, out: &mut Vec<u8>) -> Result<(), DecodeError> {
    put_name(&section.name, out)?;
    out.extend(section.version.to_le_bytes());
    let len = section.body.len();
    DecodeError::within("bytes of a section", len as u64, MAX_SECTION as u64)?;
    out.extend((len as u32).to_le_bytes());
    out.extend(&section.body);
    Ok(())
}

pub(crate) fn take_section(reader: &mut Reader<'_>) -> Result<Section, DecodeError> {
    let name = reader.name()?;
    let version = reader.u32()?;
    let len = reader.u32()?;
    DecodeError::within("bytes of a section", u64::from(len), MAX_SECTION as u64)?;
    Ok(Section {
        name,
        version,
        body: reader.take(len as usize)?.to_vec(),
    })
}

/// STATE: a section.
pub fn encode_state(section: &Section, out: &mut Vec<u8>) -> Result<(), DecodeError> {
    out.clear();
    put_section(section, out)
}

/// Decodes and checks a STATE body.
pub fn decode_state(body: &[u8]) -> Result<Section, DecodeError> {
    let mut reader = Reader::new(body);
    let section = take_section(&mut reader)?;
    reader.end()?;
    Ok(section)
}
