//! Capabilities and parameters of a migration, as a scenario gives them to a VMM.

use std::fmt;
use std::str::FromStr;

use serde::Serialize;
use serde_json::{Value, json};

use crate::end::End;
use crate::error::Error;
use crate::vmm::Kind;

/// A capability or a parameter, by its name in QMP.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Setting {
    /// Such as `multifd-channels`.
    pub name: String,
    /// Its value; a capability's is true or false.
    pub value: Value,
    /// Whether a VMM that doesn't know it can't be measured. Otherwise it is measured without, and
    /// the report says so.
    pub required: bool,
}

/// What is not a `NAME=VALUE`.
#[derive(Debug, thiserror::Error)]
#[error("'{0}' is not NAME=VALUE, such as multifd=on or multifd-channels=2")]
pub struct NoSetting(String);

impl FromStr for Setting {
    type Err = NoSetting;

    /// What a user gives is required.
    fn from_str(text: &str) -> Result<Self, NoSetting> {
        let pair = text.split_once('=').filter(|(name, _)| !name.is_empty());
        let (name, value) = pair.ok_or_else(|| NoSetting(text.to_owned()))?;
        let value = match value {
            "on" | "true" => Value::Bool(true),
            "off" | "false" => Value::Bool(false),
            value => match value.parse::<u64>() {
                Ok(number) => json!(number),
                Err(_) => json!(value),
            },
        };
        Ok(Self {
            name: name.to_owned(),
            value,
            required: true,
        })
    }
}

impl fmt::Display for Setting {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.value {
            Value::Bool(true) => write!(f, "{}=on", self.name),
            Value::Bool(false) => write!(f, "{}=off", self.name),
            Value::String(text) => write!(f, "{}={text}", self.name),
            value => write!(f, "{}={value}", self.name),
        }
    }
}

/// What each kind of VMM is told, on both sides.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Settings {
    /// Builds of Ferry.
    pub ferry: Vec<Setting>,
    /// QEMU.
    pub qemu: Vec<Setting>,
}

impl Settings {
    /// Those for that kind.
    pub fn of(&self, kind: Kind) -> &[Setting] {
        match kind {
            Kind::Ferry => &self.ferry,
            Kind::Qemu => &self.qemu,
        }
    }
}

/// Tells a process its settings; returns those that it doesn't know and that are not required.
pub fn apply(process: &mut dyn End, settings: &[Setting]) -> Result<Vec<String>, Error> {
    if settings.is_empty() {
        return Ok(Vec::new());
    }
    let capabilities = process.execute("query-migrate-capabilities", Value::Null)?;
    let is_capability = |name: &str| {
        let mut known = capabilities.as_array().into_iter().flatten();
        known.any(|known| known["capability"] == name)
    };
    let mut without = Vec::new();
    for setting in settings {
        let Setting { name, value, .. } = setting;
        let (command, arguments) = if is_capability(name) {
            let one = json!({ "capability": name, "state": value });
            ("migrate-set-capabilities", json!({ "capabilities": [one] }))
        } else {
            ("migrate-set-parameters", json!({ name: value }))
        };
        match process.execute(command, arguments) {
            Ok(_) => {}
            Err(error) if setting.required || !error.is_refusal() => return Err(error),
            Err(_) => without.push(setting.to_string()),
        }
    }
    Ok(without)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn settings_read_back_as_written() {
        for text in [
            "multifd=on",
            "xbzrle=off",
            "multifd-channels=4",
            "multifd-compression=zstd",
        ] {
            assert_eq!(text.parse::<Setting>().unwrap().to_string(), text);
        }
        assert_eq!("n=4".parse::<Setting>().unwrap().value, json!(4));
        assert!("multifd".parse::<Setting>().is_err());
        assert!("=on".parse::<Setting>().is_err());
    }
}
