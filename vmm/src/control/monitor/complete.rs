//! What the word that is being typed could become.

use super::commands::{self, COMMANDS, Completion};
use super::info::TOPICS;
use super::migrate::PARAMETERS;
use crate::control::command::MigrationCapability;

/// Completes the last word of `line` (what stands before the cursor): where in it that word
/// begins, in bytes, and what it could be.
pub fn complete(line: &str) -> (usize, Vec<String>) {
    let start = line.rfind(char::is_whitespace).map_or(0, |at| {
        at.saturating_add(
            line.get(at..)
                .and_then(|rest| rest.chars().next())
                .map_or(1, char::len_utf8),
        )
    });
    let (before, word) = line.split_at_checked(start).unwrap_or((line, ""));
    let mut words = before.split_whitespace();
    let names = || {
        COMMANDS
            .iter()
            .filter_map(|command| command.names.first().copied())
    };
    let candidates: Vec<&str> = match words.next() {
        None => names().collect(),
        Some(name) => {
            // Options do not move what follows them.
            let position = words.filter(|word| !word.starts_with('-')).count();
            match (
                commands::find(name).map(|command| command.completion),
                position,
            ) {
                (Some(Completion::Commands), 0) => names().collect(),
                (Some(Completion::Topics), 0) => TOPICS.iter().map(|topic| topic.name).collect(),
                (Some(Completion::Address), 0) => vec!["file:", "tcp:", "unix:"],
                (Some(Completion::Parameters), 0) => PARAMETERS.to_vec(),
                (Some(Completion::Capabilities), 0) => {
                    MigrationCapability::ALL.map(|c| c.as_str()).to_vec()
                }
                (Some(Completion::Capabilities), 1) => vec!["on", "off"],
                _ => Vec::new(),
            }
        }
    };
    let fitting = candidates
        .into_iter()
        .filter(|candidate| candidate.starts_with(word));
    (start, fitting.map(str::to_owned).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_word_before_the_cursor_is_completed() {
        for (line, start, words) in [
            ("sy", 0, vec!["system_powerdown", "system_reset"]),
            (
                "info migrate_",
                5,
                vec!["migrate_capabilities", "migrate_parameters"],
            ),
            ("help inf", 5, vec!["info"]),
            ("migrate -d t", 11, vec!["tcp:"]),
            ("migrate_set_parameter d", 22, vec!["downtime-limit"]),
            ("migrate_set_capability events o", 30, vec!["on", "off"]),
            ("migrate_set_capability p", 23, vec!["postcopy-ram"]),
            (
                "migrate_set_parameter x-postcopy-after",
                22,
                vec!["x-postcopy-after-rounds", "x-postcopy-after-time"],
            ),
            ("stop ", 5, vec![]),
            ("nonsense x", 9, vec![]),
            ("\u{3000}qui", 3, vec!["quit"]),
        ] {
            let (at, found) = complete(line);
            assert_eq!(
                (at, found),
                (start, words.into_iter().map(String::from).collect()),
                "{line}"
            );
        }
        assert_eq!(complete("").1.len(), COMMANDS.len());
    }
}
