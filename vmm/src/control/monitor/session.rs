//! One conversation with a person.

use std::fmt::Write;
use std::sync::Arc;

use super::commands::{self, Failure, Reply};
use super::line;
use crate::control::command::{CommandError, CommandResult, Control, Work};

/// What a line led to.
#[derive(Debug, PartialEq, Eq)]
pub enum Outcome {
    /// It is done; this is the answer, empty or ending in a line feed.
    Done(String),
    /// A migration has begun that the person waits for:
    /// [follow](super::progress::follow) it.
    Migrating,
    /// Something goes on that is soon over: [`Session::finished`] has the answer.
    Working,
}

/// What a line led to where no migration is waited for.
#[derive(Debug, PartialEq, Eq)]
pub enum Detached {
    /// See [`Outcome::Done`].
    Done(String),
    /// See [`Outcome::Working`].
    Working,
}

/// A conversation: the machine, and what was said before that matters.
pub struct Session {
    machine: Arc<dyn Control>,
    cpu: u32,
    /// What the last line began.
    work: Option<Work>,
}

impl Session {
    /// A new conversation.
    pub fn new(machine: Arc<dyn Control>) -> Self {
        Self {
            machine,
            cpu: 0,
            work: None,
        }
    }

    /// The machine that it is about.
    pub fn machine(&self) -> &Arc<dyn Control> {
        &self.machine
    }

    /// The vCPU that `info registers` shows.
    pub fn cpu(&self) -> u32 {
        self.cpu
    }

    /// Chooses the vCPU that `info registers` shows.
    pub fn select_cpu(&mut self, index: u64) -> CommandResult<()> {
        match self
            .machine
            .cpus()
            .iter()
            .find(|cpu| u64::from(cpu.index) == index)
        {
            Some(cpu) => {
                self.cpu = cpu.index;
                Ok(())
            }
            None => Err(CommandError::generic(format!("there is no vCPU {index}"))),
        }
    }

    /// Carries a line out.
    pub fn execute(&mut self, line: &str) -> Outcome {
        match self.run(line) {
            Ok(Reply::Text(text)) => Outcome::Done(text),
            Ok(Reply::Migrating) => Outcome::Migrating,
            Ok(Reply::Working(work)) => {
                self.work = Some(work);
                Outcome::Working
            }
            Err(text) => Outcome::Done(text),
        }
    }

    /// Waits for what the last line began; returns its answer.
    pub async fn finished(&mut self) -> String {
        let result = match self.work.take() {
            Some(work) => work.wait().await,
            None => Ok(()),
        };
        match result {
            Ok(()) => String::new(),
            Err(error) => failure_text(error.into(), None),
        }
    }

    /// Carries a line out where nobody can wait for a migration: it goes on in the background.
    pub fn execute_detached(&mut self, line: &str) -> Detached {
        match self.execute(line) {
            Outcome::Done(text) => Detached::Done(text),
            Outcome::Migrating => Detached::Done(
                "a migration cannot be waited for here, continuing detached (see info migrate)\n"
                    .to_owned(),
            ),
            Outcome::Working => Detached::Working,
        }
    }

    fn run(&mut self, line: &str) -> Result<Reply, String> {
        let mut words = line::split(line).map_err(|failure| failure_text(failure, None))?;
        let Some(name) = (!words.is_empty()).then(|| words.remove(0)) else {
            return Ok(Reply::nothing());
        };
        let Some(command) = commands::find(&name) else {
            return Err(format!("unknown command: '{name}'\n"));
        };
        (command.run)(self, line::Words::new(words))
            .map_err(|failure| failure_text(failure, Some(command)))
    }
}

fn failure_text(failure: Failure, command: Option<&commands::Command>) -> String {
    match (failure, command) {
        (Failure::Usage(text), Some(command)) => {
            let mut message = format!("{}: {text}\n", command.names.join("|"));
            if let Some(name) = command.names.first() {
                let _ = writeln!(message, "Try \"help {name}\" for more information");
            }
            message
        }
        (Failure::Usage(text), None) => format!("Error: {text}\n"),
        (Failure::Unknown(what), _) => format!("unknown command: '{what}'\n"),
        (Failure::Command(error), _) => format!("Error: {error}\n"),
    }
}

/// Whether an answer says that the command failed. Answers are made for people; this is for a
/// program that has nothing else.
pub fn is_failure(answer: &str) -> bool {
    answer.starts_with("unknown command: '")
        || answer
            .lines()
            .any(|line| line.starts_with("Error: ") || line.starts_with("Try \"help "))
}
