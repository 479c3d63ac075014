//! The secret that both hosts know.

use std::fmt;
use std::path::Path;

use crate::error::Error;

/// How short it may be: 128 random bits in hexadecimal have 32 letters, in base64 22.
const SHORTEST: usize = 16;

/// How long.
const LONGEST: usize = 1024;

/// A random secret, without which an agent does nothing.
#[derive(Clone)]
pub struct Token(String);

impl Token {
    /// Reads it from a file; white space around it doesn't count.
    pub fn read(path: &Path) -> Result<Self, Error> {
        let what = format!("the token's file {}", path.display());
        let text = std::fs::read_to_string(path).map_err(Error::io(&what))?;
        Self::new(text.trim()).ok_or_else(|| {
            Error::Wrong(format!(
                "{what}: a token has {SHORTEST} to {LONGEST} bytes; `head -c 32 /dev/urandom | \
                 base64` makes one"
            ))
        })
    }

    /// `None` if it is too short to be a secret, or too long.
    pub fn new(text: &str) -> Option<Self> {
        let fits = (SHORTEST..=LONGEST).contains(&text.len());
        fits.then(|| Self(text.to_owned()))
    }

    pub(super) fn reveal(&self) -> &str {
        &self.0
    }

    /// Whether it is that one. How long that takes tells nothing but the lengths.
    pub(super) fn is(&self, other: &str) -> bool {
        let pairs = self.0.bytes().zip(other.bytes());
        let difference = pairs.fold(0, |sum, (one, other)| {
            std::hint::black_box(sum | (one ^ other))
        });
        self.0.len() == other.len() && difference == 0
    }
}

/// Never the secret itself.
impl fmt::Debug for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Token")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_whole_token_will_do() {
        let token = Token::new("0123456789abcdef").unwrap();
        assert!(token.is("0123456789abcdef"));
        for wrong in [
            "",
            "0123456789abcdeg",
            "0123456789abcde",
            "0123456789abcdef0",
        ] {
            assert!(!token.is(wrong), "{wrong}");
        }
        assert!(Token::new("0123456789abcde").is_none());
        assert_eq!(format!("{token:?}"), "Token");
    }
}
