//! What a machine's devices use of the host. It is opened before the machine is built, and never
//! travels: each side of a migration has its own.

use std::sync::Arc;

use super::config::Given;
use crate::console::Console;

/// Why something of the host can't be used.
#[derive(Debug, thiserror::Error)]
pub enum BackendError {}

/// The host's side of the devices, in the order of the command line.
#[derive(Debug, Default)]
pub struct Backends {
    /// What the virtio console is connected to; without one its output is thrown away.
    pub console: Option<Arc<Console>>,
}

impl Backends {
    /// Opens what the command line names.
    pub fn open(_given: &Given) -> Result<Self, BackendError> {
        Ok(Self { console: None })
    }
}
