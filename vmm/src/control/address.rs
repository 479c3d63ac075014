//! Where a migration goes to or comes from.

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

use serde::ser::{Serialize, SerializeMap, Serializer};

use super::command::CommandError;

/// The address of a migration: `tcp:HOST:PORT` or `unix:PATH`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Address {
    /// A TCP port.
    Tcp {
        /// A name or a number, IPv6 without brackets. Empty means loopback; `0` means all of this
        /// host's addresses, to listen on.
        host: String,
        /// The port; 0 to listen on means any free one.
        port: u16,
    },
    /// A Unix stream socket.
    Unix {
        /// Its path.
        path: PathBuf,
    },
}

impl Address {
    /// The host to connect to or listen on, with the short forms spelled out: `127.0.0.1` for an
    /// empty one, `0.0.0.0` for `0`. `None` for a Unix socket.
    pub fn tcp_host(&self) -> Option<&str> {
        match self {
            Self::Tcp { host, .. } => Some(match host.as_str() {
                "" => "127.0.0.1",
                "0" => "0.0.0.0",
                host => host,
            }),
            Self::Unix { .. } => None,
        }
    }
}

impl FromStr for Address {
    type Err = CommandError;

    /// Reads QEMU's migration URIs.
    fn from_str(uri: &str) -> Result<Self, CommandError> {
        let wrong = |what: &str| {
            Err(CommandError::generic(format!(
                "invalid address '{uri}': {what}"
            )))
        };
        if uri.contains('\0') {
            return wrong("it contains a NUL character");
        }
        if let Some(path) = uri.strip_prefix("unix:") {
            // sun_path has 108 bytes with the terminating NUL (unix(7)).
            return match path.len() {
                0 => wrong("the path is missing (unix:PATH)"),
                108.. => wrong("the path of a Unix socket has at most 107 bytes"),
                _ => Ok(Self::Unix { path: path.into() }),
            };
        }
        let Some(rest) = uri.strip_prefix("tcp:") else {
            return Err(CommandError::generic(format!(
                "unknown migration protocol: {uri} (expected tcp:HOST:PORT or unix:PATH)"
            )));
        };
        let (host, port) = match rest.strip_prefix('[') {
            Some(v6) => match v6.split_once("]:") {
                Some(parts) => parts,
                None => return wrong("expected tcp:[IPv6]:PORT"),
            },
            None => match rest.rsplit_once(':') {
                Some((host, _)) if host.contains(':') => {
                    return wrong("an IPv6 address goes in brackets (tcp:[::1]:PORT)");
                }
                Some(parts) => parts,
                None => return wrong("the port is missing (tcp:HOST:PORT)"),
            },
        };
        if host.len() > 255 {
            return wrong("the host name is longer than 255 characters");
        }
        if !port.starts_with(|first: char| first.is_ascii_digit()) {
            return wrong(&format!("the port '{port}' is not a number"));
        }
        match port.parse() {
            Ok(port) => Ok(Self::Tcp {
                host: host.to_owned(),
                port,
            }),
            Err(_) => wrong(&format!(
                "the port '{port}' is not a number from 0 to 65535"
            )),
        }
    }
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tcp { host, port } if host.contains(':') => write!(f, "tcp:[{host}]:{port}"),
            Self::Tcp { host, port } => write!(f, "tcp:{host}:{port}"),
            Self::Unix { path } => write!(f, "unix:{}", path.display()),
        }
    }
}

/// As QAPI's `SocketAddress`.
impl Serialize for Address {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut map = serializer.serialize_map(None)?;
        match self {
            Self::Tcp { host, port } => {
                map.serialize_entry("type", "inet")?;
                map.serialize_entry("host", host)?;
                map.serialize_entry("port", &port.to_string())?;
            }
            Self::Unix { path } => {
                map.serialize_entry("type", "unix")?;
                map.serialize_entry("path", &path.to_string_lossy())?;
            }
        }
        map.end()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn uris_are_read_and_written() {
        for uri in [
            "tcp:localhost:4444",
            "tcp::4444",
            "tcp:0:4444",
            "tcp:127.0.0.1:0",
            "tcp:[::1]:65535",
            "unix:/run/a:b,c",
        ] {
            assert_eq!(uri.parse::<Address>().unwrap().to_string(), uri);
        }
    }

    #[test]
    fn short_hosts_are_spelled_out() {
        let host = |uri: &str| {
            uri.parse::<Address>()
                .unwrap()
                .tcp_host()
                .map(str::to_owned)
        };
        assert_eq!(host("tcp::1").as_deref(), Some("127.0.0.1"));
        assert_eq!(host("tcp:0:1").as_deref(), Some("0.0.0.0"));
        assert_eq!(host("tcp:[::]:1").as_deref(), Some("::"));
        assert_eq!(host("unix:/a"), None);
    }

    #[test]
    fn wrong_uris_say_what_is_wrong() {
        for (uri, part) in [
            ("exec:cat", "unknown migration protocol: exec:cat"),
            ("", "unknown migration protocol"),
            ("tcp:host", "the port is missing"),
            ("tcp:::1:4444", "brackets"),
            ("tcp:[::1]4444", "expected tcp:[IPv6]:PORT"),
            ("tcp:host:65536", "0 to 65535"),
            ("tcp:host:+1", "not a number"),
            ("unix:", "the path is missing"),
            (&format!("unix:/{}", "x".repeat(107)), "107 bytes"),
        ] {
            let error = uri.parse::<Address>().unwrap_err().desc;
            assert!(error.contains(part), "{uri}: {error}");
        }
    }

    #[test]
    fn an_address_looks_as_in_qmp() {
        let json = |uri: &str| serde_json::to_string(&uri.parse::<Address>().unwrap()).unwrap();
        assert_eq!(json("tcp:h:1"), r#"{"type":"inet","host":"h","port":"1"}"#);
        assert_eq!(json("unix:/a"), r#"{"type":"unix","path":"/a"}"#);
    }
}
