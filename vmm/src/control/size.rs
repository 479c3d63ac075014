//! Sizes as people write them.

/// Reads a size: a number, perhaps with a fraction, and one of the letters B, k, M, G, T, P, E
/// (powers of 1024, any case). A bare number counts `unit` bytes. Returns bytes.
pub fn parse_size(text: &str, unit: u64) -> Result<u64, SizeError> {
    let error = || SizeError {
        text: text.to_owned(),
    };
    let (number, factor) = match text.char_indices().next_back() {
        Some((at, letter)) if letter.is_ascii_alphabetic() => {
            let power = match letter.to_ascii_uppercase() {
                'B' => 0,
                'K' => 10,
                'M' => 20,
                'G' => 30,
                'T' => 40,
                'P' => 50,
                'E' => 60,
                _ => return Err(error()),
            };
            (text.get(..at).unwrap_or_default(), 1u64 << power)
        }
        _ => (text, unit),
    };
    let (whole, fraction) = number.split_once('.').unwrap_or((number, "0"));
    // Up to nine decimals are exact in the arithmetic below; nobody writes more.
    let digits = |part: &str| !part.is_empty() && part.bytes().all(|byte| byte.is_ascii_digit());
    if !digits(whole) || !digits(fraction) || fraction.len() > 9 {
        return Err(error());
    }
    let whole: u64 = whole.parse().map_err(|_| error())?;
    let denominator = 10u128.pow(u32::try_from(fraction.len()).map_err(|_| error())?);
    let fraction: u128 = fraction.parse().map_err(|_| error())?;
    let part = fraction
        .saturating_mul(u128::from(factor))
        .checked_div(denominator);
    whole
        .checked_mul(factor)
        .zip(part.and_then(|part| u64::try_from(part).ok()))
        .and_then(|(whole, part)| whole.checked_add(part))
        .ok_or_else(error)
}

/// A text that is no size.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "'{text}' is not a size: expected a number below 2^64, with B, k, M, G, T, P or E behind it or nothing"
)]
pub struct SizeError {
    text: String,
}

/// Writes a number of bytes for people: `812.5 MiB`.
pub fn format_size(bytes: u64) -> String {
    const UNITS: [&str; 6] = ["KiB", "MiB", "GiB", "TiB", "PiB", "EiB"];
    if bytes < 1024 {
        return format!("{bytes} B");
    }
    let mut value = bytes as f64 / 1024.0;
    let mut unit = "KiB";
    for next in UNITS.into_iter().skip(1) {
        if value < 1024.0 {
            break;
        }
        value /= 1024.0;
        unit = next;
    }
    format!("{value:.1} {unit}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_read() {
        for (text, bytes) in [
            ("512M", 512 << 20),
            ("2G", 2 << 30),
            ("2g", 2 << 30),
            ("1.5G", 3 << 29),
            ("0.5k", 512),
            ("64", 64 << 20),
            ("4096B", 4096),
            ("0", 0),
            ("15E", 15 << 60),
        ] {
            assert_eq!(parse_size(text, 1 << 20), Ok(bytes), "{text}");
        }
    }

    #[test]
    fn what_is_no_size_is_refused() {
        for text in [
            "", "M", "-1M", "+1", "1.M", ".5M", "1MB", "1 M", "16E", "1e3", "0x10", "1.5.1", "ä",
        ] {
            assert!(parse_size(text, 1 << 20).is_err(), "{text}");
        }
        assert!(parse_size("99999999999999999999", 1).is_err());
        assert!(parse_size("18446744073709551615", 1).is_ok());
    }

    #[test]
    fn sizes_are_written() {
        assert_eq!(format_size(1023), "1023 B");
        assert_eq!(format_size(1536), "1.5 KiB");
        assert_eq!(format_size(u64::MAX), "16.0 EiB");
    }
}
