//! The reason in REFUSE, FAILED, CANCEL and GONE.

use crate::codec::DecodeError;
use crate::frame::MAX_REASON;

/// A reason as it goes on the wire: cut at [`MAX_REASON`] bytes.
pub fn encode_reason(reason: &str, out: &mut Vec<u8>) {
    out.clear();
    let end = reason.floor_char_boundary(MAX_REASON);
    out.extend(&reason.as_bytes()[..end]);
}

/// The reason of a REFUSE, FAILED or CANCEL, safe to print: control characters but the line feed
/// are replaced.
pub fn decode_reason(body: &[u8]) -> Result<String, DecodeError> {
    let text = std::str::from_utf8(body).map_err(|_| DecodeError::NotText)?;
    Ok(text
        .chars()
        .map(|c| match c {
            '\n' => c,
            c if c.is_control() => '\u{fffd}',
            c => c,
        })
        .collect())
}
