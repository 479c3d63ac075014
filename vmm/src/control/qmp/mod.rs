//! QMP, QEMU's protocol for programs, on a Unix socket.
//!
//! [`server`] talks with a client, [`framing`] finds JSON values in what it sends, [`request`]
//! takes one apart, [`commands`] carries it out with [`arguments`] that it has checked.
//!
//! The protocol is QEMU's `docs/interop/qmp-spec`; the words of errors are QEMU's too, since
//! programs are known to compare them.

pub mod arguments;
pub mod commands;
pub mod framing;
pub mod migrate;
pub mod request;
pub mod server;

#[cfg(test)]
mod tests;

use serde_json::{Value, json};

/// QAPI's `VersionInfo`. Its member `qemu` is the version of QEMU's schema that Ferry follows;
/// `package` is Ferry's own version.
pub fn version() -> Value {
    json!({
        "qemu": { "major": 9, "minor": 1, "micro": 0 },
        "package": concat!("ferry-", env!("CARGO_PKG_VERSION")),
    })
}
