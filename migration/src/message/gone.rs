//! GONE: the guest needs no more memory.

use super::{decode_reason, encode_reason};
use crate::codec::{DecodeError, Reader};

/// What became of the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum GoneCause {
    /// It has ended by itself: it has shut down.
    Ended = 0,
    /// It is lost: its process ends without all of its memory.
    Lost = 1,
}

/// The body of GONE.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Gone {
    /// What became of the guest.
    pub cause: GoneCause,
    /// Why, for people.
    pub reason: String,
}

impl std::fmt::Display for Gone {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let what = match self.cause {
            GoneCause::Ended => "the guest has ended at the destination",
            GoneCause::Lost => "the guest is lost, as the destination gave it up",
        };
        write!(f, "{what}: {}", self.reason)
    }
}

impl Gone {
    /// Writes the body, replacing what is in `out`. A long reason is cut.
    pub fn encode(&self, out: &mut Vec<u8>) {
        encode_reason(&self.reason, out);
        out.insert(0, self.cause as u8);
    }

    /// Reads it; the reason is safe to print.
    pub fn decode(body: &[u8]) -> Result<Self, DecodeError> {
        let mut reader = Reader::new(body);
        let [cause] = reader.array()?;
        let cause = match cause {
            0 => GoneCause::Ended,
            1 => GoneCause::Lost,
            other => return Err(DecodeError::GoneCause(other)),
        };
        let reason = decode_reason(reader.rest())?;
        Ok(Self { cause, reason })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::frame::{Kind, MAX_REASON};

    #[test]
    fn golden_bytes() {
        let gone = Gone {
            cause: GoneCause::Lost,
            reason: "so".to_owned(),
        };
        let mut body = vec![9; 3];
        gone.encode(&mut body);
        assert_eq!(body, b"\x01so");
        assert_eq!(Gone::decode(&body), Ok(gone));
    }

    #[test]
    fn what_is_said_is_bounded_and_checked() {
        let gone = Gone {
            cause: GoneCause::Ended,
            reason: "x".repeat(2 * MAX_REASON),
        };
        let mut body = Vec::new();
        gone.encode(&mut body);
        assert_eq!(body.len(), Kind::Gone.max_body());
        assert_eq!(Gone::decode(&[2, b'x']), Err(DecodeError::GoneCause(2)));
        assert_eq!(Gone::decode(&[0, 0xff]), Err(DecodeError::NotText));
        assert!(Gone::decode(&[]).is_err());
        let escape = Gone::decode(b"\x00\x1b[2J").unwrap().reason;
        assert!(!escape.contains('\x1b'));
    }
}
