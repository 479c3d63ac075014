//! The address of a migration, as QMP shows it.

use std::fmt;

use migration::uri::{Uri, UriError};
use serde::ser::{Serialize, SerializeMap, Serializer};

use super::command::CommandError;

/// QAPI's `SocketAddress`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SocketAddress(Uri);

impl SocketAddress {
    /// Where a destination listens; `None` if it reads a file, which QAPI's type can't say.
    pub fn of(uri: &Uri) -> Option<Self> {
        (!matches!(uri, Uri::File(_))).then(|| Self(uri.clone()))
    }
}

impl fmt::Display for SocketAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl Serialize for SocketAddress {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut map = serializer.serialize_map(None)?;
        match &self.0 {
            Uri::Tcp { host, port } => {
                map.serialize_entry("type", "inet")?;
                map.serialize_entry("host", host)?;
                map.serialize_entry("port", &port.to_string())?;
            }
            Uri::Unix(path) => {
                map.serialize_entry("type", "unix")?;
                map.serialize_entry("path", &path.to_string_lossy())?;
            }
            // None is made of a file.
            Uri::File(_) => {}
        }
        map.end()
    }
}

impl From<UriError> for CommandError {
    fn from(error: UriError) -> Self {
        Self::generic(error.to_string())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_looks_as_in_qmp() {
        let of = |uri: &str| SocketAddress::of(&uri.parse().unwrap());
        let json = |uri: &str| serde_json::to_string(&of(uri).unwrap()).unwrap();
        assert_eq!(json("tcp:h:1"), r#"{"type":"inet","host":"h","port":"1"}"#);
        assert_eq!(json("unix:/a"), r#"{"type":"unix","path":"/a"}"#);
        assert_eq!(of("file:/a"), None);
    }
}
