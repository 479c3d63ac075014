//! The arguments of a command: taken by name and type, with QEMU's words for what is wrong.

use serde_json::{Map, Value};

use crate::control::command::{CommandError, CommandResult};

/// An object of which each member is taken once; what is left over at the
/// [end](Self::finish) is an error.
#[derive(Debug)]
pub struct Arguments {
    members: Map<String, Value>,
    /// The way to this object, such as `capabilities[0].`; empty for a command's own arguments.
    path: String,
}

impl Arguments {
    /// The arguments of a command.
    pub fn new(members: Map<String, Value>) -> Self {
        Self {
            members,
            path: String::new(),
        }
    }

    fn take<T>(
        &mut self,
        name: &str,
        expected: &str,
        convert: impl FnOnce(Value) -> Option<T>,
    ) -> CommandResult<Option<T>> {
        let Some(value) = self.members.shift_remove(name) else {
            return Ok(None);
        };
        match convert(value) {
            Some(value) => Ok(Some(value)),
            None => Err(wrong_type(&format!("{}{name}", self.path), expected)),
        }
    }

    /// A string.
    pub fn string(&mut self, name: &str) -> CommandResult<Option<String>> {
        self.take(name, "string", |value| match value {
            Value::String(string) => Some(string),
            _ => None,
        })
    }

    /// A boolean.
    pub fn boolean(&mut self, name: &str) -> CommandResult<Option<bool>> {
        self.take(name, "boolean", |value| value.as_bool())
    }

    /// An integer from 0 to 2^64 - 1 (QAPI's `size` and `uint64`).
    pub fn unsigned(&mut self, name: &str) -> CommandResult<Option<u64>> {
        let number = self.take(name, "integer", |value| match value {
            Value::Number(number) => Some(number),
            _ => None,
        })?;
        match number.map(|number| number.as_u64()) {
            None => Ok(None),
            Some(Some(number)) => Ok(Some(number)),
            Some(None) => Err(CommandError::generic(format!(
                "Parameter '{}{name}' expects uint64",
                self.path
            ))),
        }
    }

    /// An object.
    pub fn object(&mut self, name: &str) -> CommandResult<Option<Self>> {
        let path = format!("{}{name}.", self.path);
        self.take(name, "object", |value| match value {
            Value::Object(members) => Some(Self { members, path }),
            _ => None,
        })
    }

    /// An array of objects.
    pub fn objects(&mut self, name: &str) -> CommandResult<Option<Vec<Self>>> {
        let path = format!("{}{name}", self.path);
        let array = self.take(name, "array", |value| match value {
            Value::Array(array) => Some(array),
            _ => None,
        })?;
        let object = |(index, value)| match value {
            Value::Object(members) => Ok(Self {
                members,
                path: format!("{path}[{index}]."),
            }),
            _ => Err(wrong_type(&format!("{path}[{index}]"), "object")),
        };
        array
            .map(|array| array.into_iter().enumerate().map(object).collect())
            .transpose()
    }

    /// An array of strings.
    pub fn strings(&mut self, name: &str) -> CommandResult<Option<Vec<String>>> {
        let array = self.take(name, "array", |value| match value {
            Value::Array(array) => Some(array),
            _ => None,
        })?;
        let string = |(index, value)| match value {
            Value::String(string) => Ok(string),
            _ => Err(wrong_type(
                &format!("{}{name}[{index}]", self.path),
                "string",
            )),
        };
        array
            .map(|array| array.into_iter().enumerate().map(string).collect())
            .transpose()
    }

    /// A value that must be there.
    pub fn required<T>(&self, name: &str, value: Option<T>) -> CommandResult<T> {
        value.ok_or_else(|| {
            CommandError::generic(format!("Parameter '{}{name}' is missing", self.path))
        })
    }

    /// The error for a string that is none of those expected.
    pub fn not_accepted(&self, name: &str, value: &str) -> CommandError {
        CommandError::generic(format!(
            "Parameter '{}{name}' does not accept value '{value}'",
            self.path
        ))
    }

    /// Refuses what nobody took.
    pub fn finish(self) -> CommandResult<()> {
        match self.members.keys().next() {
            None => Ok(()),
            Some(name) => Err(CommandError::generic(format!(
                "Parameter '{}{name}' is unexpected",
                self.path
            ))),
        }
    }
}

fn wrong_type(name: &str, expected: &str) -> CommandError {
    CommandError::generic(format!(
        "Invalid parameter type for '{name}', expected: {expected}"
    ))
}
