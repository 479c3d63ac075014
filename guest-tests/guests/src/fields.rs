//! Words of the form `key=value`, of which command lines and reports consist.

use core::fmt;
use core::str::FromStr;

/// Why a command line or a report could not be read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Malformed<'a> {
    /// No such option, or a word without `=`.
    Unknown(&'a str),
    /// The option exists, but can't have this value.
    Value(&'a str),
}

impl fmt::Display for Malformed<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unknown(word) => write!(f, "unknown option: {word}"),
            Self::Value(word) => write!(f, "impossible value: {word}"),
        }
    }
}

/// A number of bytes; a multiple of a KiB, MiB or GiB is written with `K`, `M` or `G`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Size(pub u64);

impl fmt::Display for Size {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (suffix, shift) in [('G', 30), ('M', 20), ('K', 10)] {
            if self.0 != 0 && self.0.trailing_zeros() >= shift {
                return write!(f, "{}{suffix}", self.0 >> shift);
            }
        }
        write!(f, "{}", self.0)
    }
}

impl FromStr for Size {
    type Err = ();

    fn from_str(text: &str) -> Result<Self, ()> {
        let (digits, unit) = match text.as_bytes().last() {
            Some(b'G') => (text.len() - 1, 1 << 30),
            Some(b'M') => (text.len() - 1, 1 << 20),
            Some(b'K') => (text.len() - 1, 1 << 10),
            _ => (text.len(), 1u64),
        };
        let number: u64 = text
            .get(..digits)
            .and_then(|digits| digits.parse().ok())
            .ok_or(())?;
        number.checked_mul(unit).map(Self).ok_or(())
    }
}

/// A number in hexadecimal, with `0x`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Hex(pub u64);

impl fmt::Display for Hex {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#x}", self.0)
    }
}

impl FromStr for Hex {
    type Err = ();

    fn from_str(text: &str) -> Result<Self, ()> {
        let digits = text.strip_prefix("0x").ok_or(())?;
        u64::from_str_radix(digits, 16).map(Self).map_err(|_| ())
    }
}

/// A value that may be missing, written as `-`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Maybe<T>(pub Option<T>);

impl<T: fmt::Display> fmt::Display for Maybe<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.0 {
            Some(value) => value.fmt(f),
            None => f.write_str("-"),
        }
    }
}

impl<T: FromStr> FromStr for Maybe<T> {
    type Err = ();

    fn from_str(text: &str) -> Result<Self, ()> {
        match text {
            "-" => Ok(Self(None)),
            _ => text.parse().map(|value| Self(Some(value))).map_err(|_| ()),
        }
    }
}

/// A short name, at most 24 bytes without blanks; what is longer is cut off.
#[derive(Clone, Copy, Default, PartialEq, Eq)]
pub struct Name {
    bytes: [u8; 24],
    length: usize,
}

impl Name {
    /// The name that these arguments make.
    #[must_use]
    pub fn of(arguments: fmt::Arguments<'_>) -> Self {
        let mut name = Self::default();
        // Writing to it never fails.
        let _ = fmt::write(&mut name, arguments);
        name
    }

    /// As text.
    #[must_use]
    pub fn as_str(&self) -> &str {
        self.bytes
            .get(..self.length)
            .and_then(|bytes| str::from_utf8(bytes).ok())
            .unwrap_or("")
    }
}

impl fmt::Write for Name {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        for character in text.chars() {
            let end = self.length + character.len_utf8();
            if let Some(place) = self.bytes.get_mut(self.length..end) {
                character.encode_utf8(place);
                self.length = end;
            }
        }
        Ok(())
    }
}

impl fmt::Display for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl fmt::Debug for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(self.as_str(), f)
    }
}

impl FromStr for Name {
    type Err = ();

    fn from_str(text: &str) -> Result<Self, ()> {
        let name = Self::of(format_args!("{text}"));
        if name.as_str() == text {
            Ok(name)
        } else {
            Err(())
        }
    }
}

/// The value of `key` among the words of `text`.
pub(crate) fn value<'a>(text: &'a str, key: &str) -> Option<&'a str> {
    let mut pairs = text
        .split_ascii_whitespace()
        .filter_map(|word| word.split_once('='));
    pairs.find(|(name, _)| *name == key).map(|(_, value)| value)
}

/// Defines an enum of words, with `Display` and `FromStr`.
macro_rules! words {
    ($(#[$meta:meta])* $name:ident { $($(#[$variant_meta:meta])* $variant:ident $word:literal),* $(,)? }) => {
        $(#[$meta])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        pub enum $name { $($(#[$variant_meta])* $variant),* }

        impl core::fmt::Display for $name {
            fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
                f.write_str(match self { $(Self::$variant => $word),* })
            }
        }

        impl core::str::FromStr for $name {
            type Err = ();

            fn from_str(text: &str) -> Result<Self, ()> {
                match text {
                    $($word => Ok(Self::$variant),)*
                    _ => Err(()),
                }
            }
        }
    };
}

/// Defines a guest's options: a struct with defaults, `Display` (the command line) and `parse`.
macro_rules! options {
    ($(#[$meta:meta])* $name:ident { $($(#[$field_meta:meta])* $field:ident: $type:ty = $default:expr),* $(,)? }) => {
        $(#[$meta])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        pub struct $name { $($(#[$field_meta])* pub $field: $type),* }

        impl Default for $name {
            fn default() -> Self {
                Self { $($field: $default),* }
            }
        }

        /// The command line: every option that is not at its default.
        impl core::fmt::Display for $name {
            fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
                let default = Self::default();
                let mut separator = "";
                $(if self.$field != default.$field {
                    write!(f, "{separator}{}={}", stringify!($field), self.$field)?;
                    separator = " ";
                })*
                let _ = separator;
                Ok(())
            }
        }

        impl $name {
            /// Reads a command line; what it doesn't name has its default.
            ///
            /// # Errors
            /// A word that is no option of this guest, or an impossible value.
            pub fn parse(text: &str) -> Result<Self, crate::Malformed<'_>> {
                let mut options = Self::default();
                for word in text.split_ascii_whitespace() {
                    // Where the VMM has put its devices: no option of a guest.
                    if word.starts_with(crate::mmio::PREFIX) {
                        continue;
                    }
                    let (key, value) = word.split_once('=').ok_or(crate::Malformed::Unknown(word))?;
                    match key {
                        $(stringify!($field) => {
                            options.$field = value.parse().map_err(|_| crate::Malformed::Value(word))?;
                        })*
                        _ => return Err(crate::Malformed::Unknown(word)),
                    }
                }
                Ok(options)
            }
        }
    };
}

/// Defines a guest's reports: an enum with `Display` (the line) and `parse`. A line is a word that
/// names the report, in lower case, and the fields as `key=value`.
macro_rules! reports {
    ($(#[$meta:meta])* $name:ident {
        $($(#[$variant_meta:meta])* $variant:ident $word:literal { $($(#[$field_meta:meta])* $field:ident: $type:ty),* $(,)? }),* $(,)?
    }) => {
        $(#[$meta])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        pub enum $name { $($(#[$variant_meta])* $variant { $($(#[$field_meta])* $field: $type),* }),* }

        impl core::fmt::Display for $name {
            fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
                match self {
                    $(Self::$variant { $($field),* } => {
                        f.write_str($word)?;
                        $(write!(f, concat!(" ", stringify!($field), "={}"), $field)?;)*
                        Ok(())
                    })*
                }
            }
        }

        impl $name {
            /// Reads a line, if it is one of these reports and complete.
            #[must_use]
            pub fn parse(line: &str) -> Option<Self> {
                let (word, fields) = line.split_once(' ').unwrap_or((line, ""));
                let _ = fields;
                match word {
                    $($word => Some(Self::$variant {
                        $($field: crate::fields::value(fields, stringify!($field))?.parse().ok()?),*
                    }),)*
                    _ => None,
                }
            }
        }
    };
}

pub(crate) use {options, reports, words};

#[cfg(test)]
mod tests {
    extern crate std;
    use std::string::ToString;

    use super::*;

    #[test]
    fn sizes_read_back_as_written() {
        for (size, text) in [
            (0, "0"),
            (4095, "4095"),
            (8192, "8K"),
            (3 << 29, "1536M"),
            (4 << 30, "4G"),
        ] {
            assert_eq!(Size(size).to_string(), text);
            assert_eq!(text.parse(), Ok(Size(size)));
        }
    }

    #[test]
    fn sizes_refuse_nonsense() {
        for text in ["", "M", "12X", "-1", "1.5G", "18446744073709551615K"] {
            assert_eq!(text.parse::<Size>(), Err(()), "{text}");
        }
    }

    #[test]
    fn a_name_that_is_too_long_is_refused() {
        assert_eq!(
            "lapic_lvt_timer"
                .parse::<Name>()
                .map(|name| name.to_string()),
            Ok("lapic_lvt_timer".into())
        );
        assert_eq!("abcdefghijklmnopqrstuvwxyz".parse::<Name>(), Err(()));
        assert_eq!(
            Name::of(format_args!("abcdefghijklmnopqrstuvwxyz")).as_str(),
            "abcdefghijklmnopqrstuvwx"
        );
    }

    #[test]
    fn a_missing_value_is_a_dash() {
        assert_eq!(Maybe::<u64>(None).to_string(), "-");
        assert_eq!("-".parse(), Ok(Maybe::<u64>(None)));
        assert_eq!("7".parse(), Ok(Maybe(Some(7u64))));
        assert_eq!("x".parse::<Maybe<u64>>(), Err(()));
    }
}
