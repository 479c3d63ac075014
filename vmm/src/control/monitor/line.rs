//! A command line, cut into words.

use super::commands::Failure;

/// The words of a line behind the command.
#[derive(Debug)]
pub struct Words {
    words: std::vec::IntoIter<String>,
}

/// Cuts a line into words. White space separates; in double quotes it does not, and there a
/// backslash takes its meaning from a quote or a backslash.
pub fn split(line: &str) -> Result<Vec<String>, Failure> {
    let mut words = Vec::new();
    let mut rest = line.chars().peekable();
    loop {
        while rest.next_if(|c| c.is_whitespace()).is_some() {}
        if rest.peek().is_none() {
            return Ok(words);
        }
        let mut word = String::new();
        if rest.next_if_eq(&'"').is_some() {
            loop {
                match rest.next() {
                    Some('"') => break,
                    Some('\\') => match rest.next() {
                        Some(c @ ('"' | '\\' | '\'')) => word.push(c),
                        Some('n') => word.push('\n'),
                        Some('r') => word.push('\r'),
                        Some(c) => {
                            return Err(Failure::usage(format!(
                                "unsupported escape code: '\\{c}'"
                            )));
                        }
                        None => return Err(Failure::usage("unterminated string")),
                    },
                    Some(c) => word.push(c),
                    None => return Err(Failure::usage("unterminated string")),
                }
            }
        } else {
            while let Some(c) = rest.next_if(|c| !c.is_whitespace()) {
                word.push(c);
            }
        }
        words.push(word);
    }
}

impl Words {
    /// The words given.
    pub fn new(words: Vec<String>) -> Self {
        Self {
            words: words.into_iter(),
        }
    }

    /// The options at the beginning, single letters behind a dash, each one of `known`.
    pub fn options(&mut self, known: &str) -> Result<String, Failure> {
        let mut found = String::new();
        while let Some(word) = self.words.as_slice().first() {
            let Some(letters) = word.strip_prefix('-').filter(|rest| !rest.is_empty()) else {
                break;
            };
            match letters.chars().find(|letter| !known.contains(*letter)) {
                Some(letter) => {
                    return Err(Failure::usage(format!("unsupported option -{letter}")));
                }
                None => found.push_str(letters),
            }
            self.words.next();
        }
        Ok(found)
    }

    /// The next word, if there is one.
    pub fn optional(&mut self) -> Option<String> {
        self.words.next()
    }

    /// The next word.
    pub fn required(&mut self) -> Result<String, Failure> {
        self.words
            .next()
            .ok_or_else(|| Failure::usage("string expected"))
    }

    /// Refuses further words.
    pub fn finish(mut self) -> Result<(), Failure> {
        match self.words.next() {
            None => Ok(()),
            Some(_) => Err(Failure::usage("extraneous characters at the end of line")),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_are_separated_by_space_outside_quotes() {
        assert_eq!(
            split("  migrate\t-d  unix:/a ").unwrap(),
            ["migrate", "-d", "unix:/a"]
        );
        assert_eq!(
            split(r#"x "a b" "" "\"\\""#).unwrap(),
            ["x", "a b", "", r#""\"#]
        );
        assert!(split("  ").unwrap().is_empty());
    }

    #[test]
    fn broken_quotes_are_refused() {
        assert!(split(r#"x "a"#).is_err());
        assert!(split(r#"x "a\"#).is_err());
        assert!(split(r#"x "\z""#).is_err());
    }
}
