//! Ethernet addresses.

use std::fmt;
use std::str::FromStr;

use rustix::rand::{GetRandomFlags, getrandom};
use serde::{Deserialize, Serialize};

/// The address of a network card.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MacAddress(pub [u8; 6]);

impl MacAddress {
    /// A random address with QEMU's prefix, 52:54:00, which is for those who administer their
    /// network themselves.
    pub fn random() -> std::io::Result<Self> {
        let mut tail = [0; 3];
        // So few bytes come at once or not at all (getrandom(2)).
        getrandom(&mut tail, GetRandomFlags::empty())?;
        let [a, b, c] = tail;
        Ok(Self([0x52, 0x54, 0x00, a, b, c]))
    }

    /// Whether it is one card's: not a group's, and not all zeroes.
    pub fn is_unicast(self) -> bool {
        self.0[0] & 1 == 0 && self.0 != [0; 6]
    }
}

impl fmt::Display for MacAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}

/// Reads `52:54:00:12:34:56`; also with dashes.
impl FromStr for MacAddress {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let expected = || format!("'{text}' is no MAC address such as 52:54:00:12:34:56");
        let mut bytes = [0; 6];
        let mut parts = text.split([':', '-']);
        for byte in &mut bytes {
            let part = parts.next().filter(|part| (1..=2).contains(&part.len()));
            let digits = part.filter(|part| part.bytes().all(|c| c.is_ascii_hexdigit()));
            *byte = digits
                .and_then(|digits| u8::from_str_radix(digits, 16).ok())
                .ok_or_else(expected)?;
        }
        if parts.next().is_some() {
            return Err(expected());
        }
        let address = Self(bytes);
        if !address.is_unicast() {
            return Err(format!(
                "'{text}' can't be a card's MAC address: it is a group's, or zero"
            ));
        }
        Ok(address)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_read_and_shown() {
        let address: MacAddress = "52:54:0:AB-cd:01".parse().unwrap();
        assert_eq!(address.to_string(), "52:54:00:ab:cd:01");
        for bad in [
            "",
            "52:54:00:12:34",
            "52:54:00:12:34:56:78",
            "52:54:00:12:34:+5",
        ] {
            let error = bad.parse::<MacAddress>().unwrap_err();
            assert!(error.contains("is no MAC address"), "{bad}: {error}");
        }
        for bad in ["01:00:5e:00:00:01", "00:00:00:00:00:00"] {
            let error = bad.parse::<MacAddress>().unwrap_err();
            assert!(error.contains("can't be a card's"), "{bad}: {error}");
        }
    }

    #[test]
    fn random_addresses_differ() {
        let one = MacAddress::random().unwrap();
        assert_eq!(one.0[..3], [0x52, 0x54, 0x00]);
        assert!((0..8).any(|_| MacAddress::random().unwrap() != one));
    }
}
