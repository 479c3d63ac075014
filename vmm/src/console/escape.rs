//! The commands behind Ctrl-a on a terminal that the guest and the monitor share, as in QEMU.

/// What Ctrl-a is.
const ESCAPE: u8 = 0x01;

/// What there is behind Ctrl-a.
pub const HELP: &str = "\nCtrl-a h        this help\n\
                        Ctrl-a x        end ferry, and the guest with it\n\
                        Ctrl-a c        switch between the guest's serial port and the monitor\n\
                        Ctrl-a b        send a break to the guest\n\
                        Ctrl-a Ctrl-a   send Ctrl-a\n";

/// What a byte from the keyboard leads to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Key {
    /// It is input for whoever has the keyboard.
    Input(u8),
    /// It was the first half of a command, or of none.
    Nothing,
    /// Give the keyboard to the other one.
    Switch,
    /// End the process.
    Quit,
    /// Show the help.
    Help,
    /// Send a break to the guest.
    Break,
}

/// Recognizes the commands.
#[derive(Debug, Default)]
pub struct Escape {
    pending: bool,
}

impl Escape {
    /// Takes a byte from the keyboard.
    pub fn feed(&mut self, byte: u8) -> Key {
        if !std::mem::replace(&mut self.pending, false) {
            self.pending = byte == ESCAPE;
            return if self.pending {
                Key::Nothing
            } else {
                Key::Input(byte)
            };
        }
        match byte {
            ESCAPE => Key::Input(ESCAPE),
            b'c' => Key::Switch,
            b'x' => Key::Quit,
            b'h' | b'?' => Key::Help,
            b'b' => Key::Break,
            _ => Key::Nothing,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn commands_are_behind_ctrl_a() {
        let mut escape = Escape::default();
        let mut feed = |bytes: &[u8]| bytes.iter().map(|b| escape.feed(*b)).collect::<Vec<_>>();
        assert_eq!(
            feed(b"cx\x03"),
            [Key::Input(b'c'), Key::Input(b'x'), Key::Input(3)]
        );
        for (command, key) in [
            (b'c', Key::Switch),
            (b'x', Key::Quit),
            (b'h', Key::Help),
            (b'b', Key::Break),
            (ESCAPE, Key::Input(ESCAPE)),
            (b'z', Key::Nothing),
        ] {
            assert_eq!(feed(&[ESCAPE, command]), [Key::Nothing, key]);
        }
        assert_eq!(feed(b"c"), [Key::Input(b'c')]);
    }
}
