//! Lists of the host's CPUs and nodes, as the kernel and people write them: `0-3,8`.

/// The highest number that a list may have: far above what Linux supports (8191 CPUs).
pub const HIGHEST: usize = 65_535;

/// Reads a list of numbers and ranges behind commas; the result is ascending.
pub fn parse_list(text: &str) -> Result<Vec<usize>, String> {
    let mut list = Vec::new();
    for part in text.split(',') {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        let number = |text: &str| {
            let digits = text.bytes().all(|byte| byte.is_ascii_digit());
            let number: Option<usize> = text.parse().ok().filter(|_| digits);
            let number = number.filter(|number| *number <= HIGHEST);
            number.ok_or_else(|| format!("'{part}' is no number or range such as 0-3"))
        };
        let (first, last) = (number(first)?, number(last)?);
        if first > last {
            return Err(format!("the range '{part}' ends before it begins"));
        }
        list.extend(first..=last);
    }
    list.sort_unstable();
    match list.windows(2).find(|pair| pair.first() == pair.last()) {
        Some([twice, ..]) => Err(format!("{twice} is given twice")),
        _ => Ok(list),
    }
}

/// Writes such a list, with ranges.
pub fn format_list(list: &[usize]) -> String {
    let mut ranges: Vec<(usize, usize)> = Vec::new();
    for &number in list {
        match ranges.last_mut() {
            Some((_, last)) if *last + 1 == number => *last = number,
            _ => ranges.push((number, number)),
        }
    }
    let parts = ranges.iter().map(|&(first, last)| {
        if first == last {
            first.to_string()
        } else {
            format!("{first}-{last}")
        }
    });
    parts.collect::<Vec<_>>().join(",")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lists_read_back_as_written() {
        for (text, list, written) in [
            ("0", vec![0], "0"),
            ("0-3,8", vec![0, 1, 2, 3, 8], "0-3,8"),
            ("8,2,1,0-0", vec![0, 1, 2, 8], "0-2,8"),
        ] {
            assert_eq!(parse_list(text).unwrap(), list);
            assert_eq!(format_list(&list), written);
        }
    }

    #[test]
    fn what_is_no_list_is_refused() {
        for (text, part) in [
            ("", "'' is no number"),
            ("1,", "'' is no number"),
            ("+1", "'+1' is no number"),
            ("a-b", "'a-b' is no number"),
            ("-1", "'-1' is no number"),
            ("3-1", "ends before it begins"),
            ("0-2,1", "1 is given twice"),
            ("0-99999999", "'0-99999999' is no number"),
            ("99999999999999999999999", "is no number"),
        ] {
            let error = parse_list(text).unwrap_err();
            assert!(error.contains(part), "{text}: {error}");
        }
    }
}
