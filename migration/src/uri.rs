//! The addresses of a migration, as in QEMU: `tcp:HOST:PORT`, `unix:PATH` and `file:PATH`.

use std::fmt;
use std::net::Ipv6Addr;
use std::path::PathBuf;
use std::str::FromStr;

/// The longest path of a Unix socket in bytes: `sun_path` without its final zero.
pub const MAX_UNIX_PATH: usize = 107;

/// Where to migrate to, or where to listen.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Uri {
    /// TCP.
    Tcp {
        /// A host name or an address; empty means loopback. `0` and `0.0.0.0` mean all addresses,
        /// `::` all of IPv6; only for listening.
        host: String,
        /// The port; 0 lets the kernel choose one, only for listening.
        port: u16,
    },
    /// A Unix stream socket.
    Unix(PathBuf),
    /// A snapshot's file: see [`snapshot`](crate::snapshot).
    File(PathBuf),
}

/// Why a text is no migration address.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum UriError {
    /// None of the known schemes.
    #[error("'{0}' is no migration address: expected tcp:HOST:PORT, unix:PATH or file:PATH")]
    Scheme(String),
    /// No port, or none that is a number.
    #[error(
        "'{uri}' has no valid port ('{port}'): expected tcp:HOST:PORT with a port from 0 to 65535"
    )]
    Port {
        /// The whole.
        uri: String,
        /// What stands in the port's place.
        port: String,
    },
    /// An IPv6 address without brackets, or brackets around something else.
    #[error(
        "'{0}' has no valid host: expected a name, an IPv4 address, or an IPv6 address in brackets, as in tcp:[::1]:4444"
    )]
    Host(String),
    /// No path, or one that is too long or has a zero byte.
    #[error("'{0}' has no valid path: expected unix:PATH with 1 to {MAX_UNIX_PATH} bytes")]
    Path(String),
    /// No path of a file.
    #[error("'{0}' has no valid path: expected file:PATH")]
    File(String),
    /// QEMU's `file:PATH,offset=N`.
    #[error(
        "'{0}' asks for an offset, which is not supported: a snapshot is a file of its own. Expected file:PATH"
    )]
    Offset(String),
}

impl FromStr for Uri {
    type Err = UriError;

    fn from_str(uri: &str) -> Result<Self, UriError> {
        if let Some(path) = uri.strip_prefix("unix:") {
            if path.is_empty() || path.len() > MAX_UNIX_PATH || path.contains('\0') {
                return Err(UriError::Path(uri.to_owned()));
            }
            return Ok(Self::Unix(path.into()));
        }
        if let Some(path) = uri.strip_prefix("file:") {
            if path.is_empty() || path.contains('\0') {
                return Err(UriError::File(uri.to_owned()));
            }
            if path.contains(",offset=") {
                return Err(UriError::Offset(uri.to_owned()));
            }
            return Ok(Self::File(path.into()));
        }
        let Some(rest) = uri.strip_prefix("tcp:") else {
            return Err(UriError::Scheme(uri.to_owned()));
        };
        let Some((host, port)) = rest.rsplit_once(':') else {
            return Err(UriError::Port {
                uri: uri.to_owned(),
                port: String::new(),
            });
        };
        let port = Some(port)
            .filter(|port| port.bytes().all(|b| b.is_ascii_digit()))
            .and_then(|port| port.parse().ok())
            .ok_or_else(|| UriError::Port {
                uri: uri.to_owned(),
                port: port.to_owned(),
            })?;
        let host = match host.strip_prefix('[') {
            Some(bracketed) => bracketed
                .strip_suffix(']')
                .filter(|address| address.parse::<Ipv6Addr>().is_ok())
                .ok_or_else(|| UriError::Host(uri.to_owned()))?,
            None if host.contains([':', ']', '\0', ' ', '/']) => {
                return Err(UriError::Host(uri.to_owned()));
            }
            None => host,
        };
        Ok(Self::Tcp {
            host: host.to_owned(),
            port,
        })
    }
}

impl fmt::Display for Uri {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tcp { host, port } if host.contains(':') => write!(f, "tcp:[{host}]:{port}"),
            Self::Tcp { host, port } => write!(f, "tcp:{host}:{port}"),
            Self::Unix(path) => write!(f, "unix:{}", path.display()),
            Self::File(path) => write!(f, "file:{}", path.display()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn qemus_spellings() {
        for (uri, host, port) in [
            ("tcp:example.org:4444", "example.org", 4444),
            ("tcp::4444", "", 4444),
            ("tcp:0:1", "0", 1),
            ("tcp:0.0.0.0:0", "0.0.0.0", 0),
            ("tcp:[::1]:65535", "::1", 65535),
        ] {
            let parsed: Uri = uri.parse().unwrap();
            let host = host.to_owned();
            assert_eq!(parsed, Uri::Tcp { host, port });
            assert_eq!(parsed.to_string(), uri);
        }
        let unix: Uri = "unix:/run/a b:c".parse().unwrap();
        assert_eq!(unix, Uri::Unix("/run/a b:c".into()));
        assert_eq!(unix.to_string(), "unix:/run/a b:c");
        let file: Uri = "file:a,b:c".parse().unwrap();
        assert_eq!(file, Uri::File("a,b:c".into()));
        assert_eq!(file.to_string(), "file:a,b:c");
    }

    #[test]
    fn what_is_expected_is_said() {
        let scheme = |uri: &str| UriError::Scheme(uri.to_owned());
        for uri in ["", "tcp", "rdma:host:1", "localhost:4444", "TCP:a:1"] {
            assert_eq!(uri.parse::<Uri>(), Err(scheme(uri)));
        }
        for uri in [
            "tcp:",
            "tcp:host",
            "tcp:host:",
            "tcp:host:65536",
            "tcp:h:+1",
            "tcp:h:x",
        ] {
            let error = uri.parse::<Uri>();
            match uri {
                "tcp:host:" | "tcp:host:65536" | "tcp:h:+1" | "tcp:h:x" | "tcp:" | "tcp:host" => {
                    assert!(
                        matches!(error, Err(UriError::Port { .. })),
                        "{uri}: {error:?}"
                    );
                }
                _ => unreachable!(),
            }
        }
        for uri in ["tcp:::1:4444", "tcp:[::1:4444", "tcp:[host]:1", "tcp:a b:1"] {
            assert_eq!(uri.parse::<Uri>(), Err(UriError::Host(uri.to_owned())));
        }
        let long = format!("unix:{}", "x".repeat(MAX_UNIX_PATH + 1));
        for uri in ["unix:", long.as_str()] {
            assert_eq!(uri.parse::<Uri>(), Err(UriError::Path(uri.to_owned())));
        }
        assert_eq!(
            "udp:x:1".parse::<Uri>().unwrap_err().to_string(),
            "'udp:x:1' is no migration address: expected tcp:HOST:PORT, unix:PATH or file:PATH"
        );
        let file = |uri: &str| UriError::File(uri.to_owned());
        assert_eq!("file:".parse::<Uri>(), Err(file("file:")));
        let error = "file:/a,offset=0x1000".parse::<Uri>().unwrap_err();
        assert!(error.to_string().contains("offset"), "{error}");
    }
}
