//! What comes out of a guest's serial port: heartbeats between lines.

use crate::dirtier::HEARTBEAT;

/// Bytes of a line that are kept; the rest of a longer one is dropped. A guest may send anything.
pub const MAX_LINE: usize = 8192;

/// Something that a guest has said.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    /// One heartbeat.
    Heartbeat,
    /// A whole line, without its end, never empty. Bytes that are no text are replaced.
    Line(String),
}

/// Takes a guest's output apart, in whatever pieces it comes. After a migration the output goes on
/// at the destination, maybe in the middle of a line: go on with the same reader.
#[derive(Debug, Default)]
pub struct Reader {
    line: Vec<u8>,
}

impl Reader {
    /// What these bytes complete.
    pub fn read<'a>(&'a mut self, bytes: &'a [u8]) -> impl Iterator<Item = Event> + 'a {
        bytes.iter().filter_map(|&byte| self.push(byte))
    }

    /// What this byte completes.
    pub fn push(&mut self, byte: u8) -> Option<Event> {
        match byte {
            // Lines begin on a new line and with a letter, so this is none of theirs.
            HEARTBEAT if self.line.is_empty() => Some(Event::Heartbeat),
            b'\n' if self.line.is_empty() => None,
            b'\n' => {
                let line = String::from_utf8_lossy(&self.line).into_owned();
                self.line.clear();
                Some(Event::Line(line))
            }
            b'\r' => None,
            _ => {
                if self.line.len() < MAX_LINE {
                    self.line.push(byte);
                }
                None
            }
        }
    }

    /// Whether a line has begun and not ended.
    #[must_use]
    pub fn is_amid_line(&self) -> bool {
        !self.line.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn line(text: &str) -> Event {
        Event::Line(text.to_owned())
    }

    const OUTPUT: &[u8] = b"..\nready a=1.5\n\nstatus b=2\n.\nerror c=3\n..";

    fn events() -> Vec<Event> {
        let beat = || Event::Heartbeat;
        vec![
            beat(),
            beat(),
            line("ready a=1.5"),
            line("status b=2"),
            beat(),
            line("error c=3"),
            beat(),
            beat(),
        ]
    }

    #[test]
    fn lines_and_heartbeats_are_told_apart() {
        assert_eq!(Reader::default().read(OUTPUT).collect::<Vec<_>>(), events());
    }

    #[test]
    fn it_does_not_matter_where_the_output_is_cut() {
        for cut in 0..=OUTPUT.len() {
            let mut reader = Reader::default();
            let mut found: Vec<_> = reader.read(&OUTPUT[..cut]).collect();
            found.extend(reader.read(&OUTPUT[cut..]));
            assert_eq!(found, events(), "cut at {cut}");
        }
    }

    #[test]
    fn a_line_without_end_stays_bounded() {
        let mut reader = Reader::default();
        assert_eq!(reader.read(&[b'x'; 10 * MAX_LINE]).count(), 0);
        assert!(reader.is_amid_line());
        assert_eq!(reader.push(b'\n'), Some(Event::Line("x".repeat(MAX_LINE))));
        assert_eq!(reader.push(b'.'), Some(Event::Heartbeat));
    }

    #[test]
    fn what_is_no_text_does_no_harm() {
        let found: Vec<_> = Reader::default().read(b"\xff\xfe\r\n.").collect();
        assert_eq!(found, [line("\u{fffd}\u{fffd}"), Event::Heartbeat]);
    }
}
