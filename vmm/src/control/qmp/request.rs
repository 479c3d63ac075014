//! The envelope of a command: `execute`, `arguments`, `id`.

use serde_json::{Map, Value, json};

use super::arguments::Arguments;
use crate::control::command::{CommandError, CommandResult};

/// A command as it arrived.
#[derive(Debug)]
pub struct Request {
    /// The client's own mark, returned with the answer.
    pub id: Option<Value>,
    /// The command's name and arguments, or what is wrong with them.
    pub command: CommandResult<(String, Arguments)>,
}

impl Request {
    /// Takes a message apart.
    pub fn parse(message: Value) -> Self {
        match message {
            Value::Object(mut members) => {
                let id = members.shift_remove("id");
                Self {
                    id,
                    command: parse_command(members),
                }
            }
            _ => Self {
                id: None,
                command: error("QMP input must be a JSON object"),
            },
        }
    }
}

fn error<T>(desc: impl Into<String>) -> CommandResult<T> {
    Err(CommandError::generic(desc))
}

fn parse_command(members: Map<String, Value>) -> CommandResult<(String, Arguments)> {
    let mut name = None;
    let mut arguments = Map::new();
    for (member, value) in members {
        match (member.as_str(), value) {
            ("execute", Value::String(command)) => name = Some(command),
            ("execute", _) => return error("QMP input member 'execute' must be a string"),
            ("arguments", Value::Object(members)) => arguments = members,
            ("arguments", _) => return error("QMP input member 'arguments' must be an object"),
            // Out-of-band execution is a capability that the greeting does not offer.
            ("exec-oob", _) => return error("QMP input member 'exec-oob' is not supported"),
            _ => return error(format!("QMP input member '{member}' is unexpected")),
        }
    }
    match name {
        Some(name) => Ok((name, Arguments::new(arguments))),
        None => error("QMP input lacks member 'execute'"),
    }
}

/// The message that answers a command.
pub fn answer(id: Option<Value>, result: CommandResult<Value>) -> Value {
    let mut message = match result {
        Ok(value) => json!({ "return": value }),
        Err(error) => json!({ "error": error }),
    };
    if let (Some(id), Some(members)) = (id, message.as_object_mut()) {
        members.insert("id".to_owned(), id);
    }
    message
}
