//! What the two sides say: a JSON object a line, a question and its answer in turn. The first
//! question is `hello`.

use std::io::{self, BufRead, Read};

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::machine::Machine;

/// The version of all that is below.
pub(super) const VERSION: u32 = 1;

/// How many bytes a line may have: answers have what a VMM has printed.
const LONGEST: u64 = 1 << 20;

/// What the agent is asked for.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "do", rename_all = "kebab-case", deny_unknown_fields)]
pub(super) enum Request {
    /// May we talk? Answered with a [`Welcome`].
    Hello {
        version: u32,
        build: String,
        token: String,
    },
    /// Nanoseconds on the agent's clock.
    Clock,
    /// Start a destination, one of the VMMs named in [`Welcome`], for the guest `dirtier` with these
    /// options, so many bytes of memory and so many vCPUs.
    Start {
        vmm: String,
        guest: String,
        memory: u64,
        vcpus: u8,
        prealloc: bool,
    },
    /// Run a QMP command, one of the few that the agent allows.
    Execute { command: String, arguments: Value },
    /// Listen on a free port; answered with the URI.
    Listen,
    /// A [`crate::proc::Cpu`].
    Cpu,
    /// Bytes of the guest's RAM.
    Resident,
    /// The [`Beats`] so far.
    Heartbeats,
    /// What the guest has [`Worked`].
    Work,
    /// Have the guest verify its memory; answered with the number of pages.
    Verify,
    /// What the process has printed.
    Output,
    /// Kill it.
    Stop,
}

/// What it answers.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(super) enum Answer {
    /// All is well.
    Return(Value),
    /// It is not.
    Error {
        reason: String,
        /// Whether the VMM has refused a command, and is otherwise well.
        refused: bool,
    },
}

/// Who answers.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub(super) struct Welcome {
    /// The host.
    pub(super) machine: Machine,
    /// The VMMs that can be started: name and version.
    pub(super) vmms: Vec<(String, String)>,
}

/// Heartbeats, in nanoseconds of the agent's clock.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(super) struct Beats {
    pub(super) count: u64,
    pub(super) first: Option<u64>,
    pub(super) last: Option<u64>,
    pub(super) longest_gap: u64,
}

/// What the guest has done, and when, in nanoseconds of the agent's clock, it said so.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(super) struct Worked {
    pub(super) at: u64,
    pub(super) written: u64,
    pub(super) turns: u64,
}

/// What both sides must have in common: QEMU compares the guest's image.
pub(super) fn build() -> String {
    let guest = guest_tests::DIRTIER.len();
    format!("{}, guest of {guest} bytes", env!("CARGO_PKG_VERSION"))
}

/// One line.
pub(super) fn line(message: &impl Serialize) -> Result<Vec<u8>, serde_json::Error> {
    let mut line = serde_json::to_vec(message)?;
    line.push(b'\n');
    Ok(line)
}

/// The next message; `None` at the end.
pub(super) fn read<T: DeserializeOwned>(from: &mut impl BufRead) -> io::Result<Option<T>> {
    let mut line = Vec::new();
    from.by_ref().take(LONGEST).read_until(b'\n', &mut line)?;
    if line.is_empty() {
        return Ok(None);
    }
    let wrong = |reason: String| io::Error::new(io::ErrorKind::InvalidData, reason);
    if line.last() != Some(&b'\n') {
        return Err(wrong(format!(
            "a message that does not end within {LONGEST} bytes"
        )));
    }
    serde_json::from_slice(&line)
        .map(Some)
        .map_err(|err| wrong(format!("no message of this protocol: {err}")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_are_lines() {
        let request = Request::Start {
            vmm: "ferry".to_owned(),
            guest: "rate=0".to_owned(),
            memory: 1 << 30,
            vcpus: 2,
            prealloc: true,
        };
        let line = line(&request).unwrap();
        assert_eq!(
            String::from_utf8(line.clone()).unwrap(),
            "{\"do\":\"start\",\"vmm\":\"ferry\",\"guest\":\"rate=0\",\"memory\":1073741824,\
             \"vcpus\":2,\"prealloc\":true}\n"
        );
        let mut two = [line, b"{\"do\":\"clock\"}\n".to_vec()].concat();
        two.extend(b"{\"do\"");
        let mut from = two.as_slice();
        assert_eq!(read(&mut from).unwrap(), Some(request));
        assert_eq!(read(&mut from).unwrap(), Some(Request::Clock));
        assert!(read::<Request>(&mut from).is_err());
        assert!(read::<Request>(&mut from).unwrap().is_none());
    }

    #[test]
    fn a_line_without_end_is_given_up() {
        let mut endless = io::BufReader::new(io::repeat(b' '));
        let error = read::<Request>(&mut endless).unwrap_err().to_string();
        assert!(error.contains("1048576 bytes"), "{error}");
    }

    #[test]
    fn what_is_not_known_is_no_request() {
        for text in ["{\"do\":\"run\",\"program\":\"sh\"}\n", "[]\n", "\n"] {
            assert!(read::<Request>(&mut text.as_bytes()).is_err(), "{text}");
        }
    }
}
