//! Finds JSON values in a stream. They follow each other with or without white space between.

use serde_json::Value;

/// The longest message in bytes. The longest command known has a few hundred.
pub const MAX_MESSAGE: usize = 256 << 10;

/// How deep arrays and objects nest at most; serde_json's own limit is above it.
pub const MAX_DEPTH: usize = 100;

/// Why there is no value.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum FrameError {
    /// This is not JSON; what follows may be.
    #[error("JSON parse error, {0}")]
    Syntax(String),
    /// The message has no end; the stream cannot be followed any more.
    #[error("JSON parse error, message longer than {MAX_MESSAGE} bytes")]
    TooLong,
    /// The message nests without end; the stream cannot be followed any more.
    #[error("JSON parse error, nesting deeper than {MAX_DEPTH}")]
    TooDeep,
}

impl FrameError {
    /// Whether the client must be given up.
    pub fn is_fatal(&self) -> bool {
        !matches!(self, Self::Syntax(_))
    }
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Inside {
    /// Nothing, or an array or object that is open.
    #[default]
    Plain,
    /// A string.
    String,
    /// A string, after a backslash.
    Escape,
    /// A number or keyword that is a message of its own.
    Scalar,
}

/// Splits a stream of JSON values.
#[derive(Debug, Default)]
pub struct JsonStream {
    buffer: Vec<u8>,
    /// Where in the buffer the message begins.
    start: usize,
    /// How long it is so far.
    len: usize,
    inside: Inside,
    /// The brackets that are still to come, the innermost last.
    open: Vec<u8>,
}

impl JsonStream {
    /// Takes what a client has sent. To bound memory, feed a little, then take all
    /// [values](Self::next_value).
    pub fn feed(&mut self, bytes: &[u8]) {
        self.buffer.extend_from_slice(bytes);
    }

    /// The next whole value, or what is wrong with it. `None` if more must be fed first. After
    /// an error that is not [fatal](FrameError::is_fatal) the stream goes on behind it.
    pub fn next_value(&mut self) -> Option<Result<Value, FrameError>> {
        while let Some(&byte) = self.buffer.get(self.start.saturating_add(self.len)) {
            let step = self.step(byte);
            if !matches!(step, Ok(Step::EndsBefore)) {
                self.len = self.len.saturating_add(1);
            }
            match step {
                Ok(Step::Skip) => _ = self.take_message(),
                Ok(Step::More) if self.len > MAX_MESSAGE => return Some(Err(FrameError::TooLong)),
                Ok(Step::More) => {}
                Ok(Step::EndsHere | Step::EndsBefore) => {
                    let value = serde_json::from_slice(self.take_message());
                    return Some(value.map_err(|error| FrameError::Syntax(error.to_string())));
                }
                Err(error) => {
                    self.take_message();
                    return Some(Err(error));
                }
            }
        }
        self.buffer.drain(..self.start);
        self.start = 0;
        None
    }

    fn step(&mut self, byte: u8) -> Result<Step, FrameError> {
        let space = matches!(byte, b' ' | b'\t' | b'\r' | b'\n');
        let stray = match self.inside {
            Inside::String | Inside::Escape => byte < b' ',
            Inside::Plain | Inside::Scalar => !space && !byte.is_ascii_graphic(),
        };
        if stray {
            // Never valid here, so a client that did not finish a message can use it to begin
            // afresh.
            return Err(FrameError::Syntax(format!("stray byte 0x{byte:02x}")));
        }
        match (self.inside, byte) {
            (Inside::Escape, _) => self.inside = Inside::String,
            (Inside::String, b'\\') => self.inside = Inside::Escape,
            (Inside::String, b'"') => {
                self.inside = Inside::Plain;
                if self.open.is_empty() {
                    return Ok(Step::EndsHere);
                }
            }
            (Inside::String, _) => {}
            (Inside::Scalar, b'{' | b'}' | b'[' | b']' | b'"' | b',' | b':') => {
                return Ok(Step::EndsBefore);
            }
            (Inside::Scalar, _) if space => return Ok(Step::EndsBefore),
            (Inside::Scalar, _) => {}
            (Inside::Plain, b'"') => self.inside = Inside::String,
            (Inside::Plain, b'{' | b'[') => {
                if self.open.len() >= MAX_DEPTH {
                    return Err(FrameError::TooDeep);
                }
                self.open.push(if byte == b'{' { b'}' } else { b']' });
            }
            (Inside::Plain, b'}' | b']') => {
                if self.open.pop() != Some(byte) {
                    return Err(FrameError::Syntax(format!(
                        "unexpected '{}'",
                        char::from(byte)
                    )));
                }
                if self.open.is_empty() {
                    return Ok(Step::EndsHere);
                }
            }
            (Inside::Plain, _) if !self.open.is_empty() => {}
            (Inside::Plain, _) if space => return Ok(Step::Skip),
            (Inside::Plain, b'0'..=b'9' | b'-' | b'a'..=b'z' | b'A'..=b'Z') => {
                self.inside = Inside::Scalar;
            }
            (Inside::Plain, _) => {
                return Err(FrameError::Syntax(format!("stray '{}'", char::from(byte))));
            }
        }
        Ok(Step::More)
    }

    /// The message so far; the next one begins behind it.
    fn take_message(&mut self) -> &[u8] {
        let end = self.start.saturating_add(self.len);
        let message = self.buffer.get(self.start..end).unwrap_or_default();
        self.start = end;
        self.len = 0;
        self.inside = Inside::Plain;
        self.open.clear();
        message
    }
}

enum Step {
    /// The byte belongs to nothing.
    Skip,
    /// The byte belongs to a value that goes on.
    More,
    /// The byte is the last of a value.
    EndsHere,
    /// The byte before was the last of a value.
    EndsBefore,
}

#[cfg(test)]
mod tests {
    use super::*;

    fn all(stream: &mut JsonStream) -> Vec<String> {
        let mut found = Vec::new();
        while let Some(next) = stream.next_value() {
            let fatal = next.as_ref().is_err_and(FrameError::is_fatal);
            found.push(next.map_or_else(|error| error.to_string(), |value| value.to_string()));
            if fatal {
                break;
            }
        }
        found
    }

    fn split(bytes: &[u8]) -> Vec<String> {
        let mut whole = JsonStream::default();
        whole.feed(bytes);
        let whole = all(&mut whole);
        let mut pieces = JsonStream::default();
        let mut found = Vec::new();
        for byte in bytes {
            pieces.feed(&[*byte]);
            found.extend(all(&mut pieces));
        }
        assert_eq!(whole, found, "the result depends on how the stream was cut");
        whole
    }

    #[test]
    fn values_need_no_separator() {
        assert_eq!(
            split(br#"{"a":1}{"b":[2,{}]} [3]"x"5 true "#),
            [
                r#"{"a":1}"#,
                r#"{"b":[2,{}]}"#,
                "[3]",
                r#""x""#,
                "5",
                "true"
            ]
        );
    }

    #[test]
    fn brackets_in_strings_do_not_count() {
        assert_eq!(split(br#"{"a":"}\"]\\"}"#), [r#"{"a":"}\"]\\"}"#]);
    }

    #[test]
    fn an_unfinished_value_is_waited_for() {
        assert!(split(br#"{"a":"#).is_empty());
        assert!(split(b"12").is_empty());
        assert!(split(b" \r\n\t").is_empty());
    }

    #[test]
    fn the_stream_goes_on_after_an_error() {
        for garbage in [
            &b"nul "[..],
            b"}",
            b"[}",
            b"\xff",
            b"{\"a\xff\xfe\": \xff",
            b"{\"a\n",
            b"{\"a\\\0",
            b",",
            b"{\"a\" 5}",
            b"'",
        ] {
            let found = split(&[garbage, b"{\"a\":1}"].concat());
            assert_eq!(found.last().unwrap(), r#"{"a":1}"#, "{found:?}");
            assert!(found[0].starts_with("JSON parse error, "), "{found:?}");
        }
    }

    #[test]
    fn size_and_depth_are_bounded() {
        let mut endless = vec![b'"'];
        endless.resize(MAX_MESSAGE + 2, b'a');
        let mut stream = JsonStream::default();
        stream.feed(&endless);
        assert_eq!(stream.next_value(), Some(Err(FrameError::TooLong)));
        assert_eq!(
            split(&[b'['; MAX_DEPTH + 1]),
            [FrameError::TooDeep.to_string()]
        );
        let deepest = [[b'['; MAX_DEPTH], [b']'; MAX_DEPTH]].concat();
        assert_eq!(split(&deepest), [String::from_utf8(deepest).unwrap()]);
    }

    #[test]
    fn white_space_takes_no_memory() {
        let mut stream = JsonStream::default();
        for _ in 0..10 {
            stream.feed(&[b' '; 1000]);
            assert_eq!(stream.next_value(), None);
            assert!(stream.buffer.is_empty());
        }
    }
}
