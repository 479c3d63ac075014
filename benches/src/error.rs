//! What can go wrong with a measurement.

use std::time::Duration;

use guest_tests::driver::namespace::NamespaceError;
use guest_tests::driver::qmp::QmpError;
use guest_tests::driver::serial::WaitError;

use crate::report::plot::PlotError;
use crate::vmm::Vmm;

/// How long anything may take before a measurement is given up.
pub const PATIENCE: Duration = Duration::from_secs(120);

/// Why there is no figure.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A file, a socket or a process.
    #[error("{what}: {source}")]
    Io {
        /// What was done.
        what: String,
        /// What the kernel said.
        source: std::io::Error,
    },
    /// The VMM's control socket.
    #[error("{name}: {source}\n{output}")]
    Qmp {
        /// Which process.
        name: String,
        /// What happened.
        source: QmpError,
        /// What the process has printed.
        output: String,
    },
    /// The guest does not answer.
    #[error("{name}: {source}")]
    Guest {
        /// Which process.
        name: String,
        /// What came instead.
        source: WaitError,
    },
    /// The agent on the other host.
    #[error("the agent at {address}: {reason}")]
    Agent {
        /// Where it listens.
        address: String,
        /// What happened there.
        reason: String,
        /// Whether a VMM there has refused a command, and is otherwise well.
        refused: bool,
    },
    /// The network between the two processes.
    #[error(transparent)]
    Network(#[from] NamespaceError),
    /// A picture of the figures.
    #[error(transparent)]
    Plot(#[from] PlotError),
    /// A signal.
    #[error("ended by signal {signal}")]
    Interrupted {
        /// Its number.
        signal: i32,
    },
    /// A figure makes no sense, or something failed that must not.
    #[error("{0}")]
    Wrong(String),
}

impl Error {
    /// To be given to `map_err`.
    pub fn io(what: impl Into<String>) -> impl FnOnce(std::io::Error) -> Self {
        let what = what.into();
        move |source| Self::Io { what, source }
    }

    /// Whether a VMM has refused a command, and is otherwise well.
    pub fn is_refusal(&self) -> bool {
        match self {
            Self::Qmp { source, .. } => matches!(source, QmpError::Command { .. }),
            Self::Agent { refused, .. } => *refused,
            _ => false,
        }
    }

    /// A build is to have its memory before the guest comes, and can't.
    pub fn no_prealloc(vmm: &dyn Vmm) -> Self {
        Self::Wrong(format!(
            "{} ({}) doesn't know `--memory SIZE,prealloc=on`: say --without-prealloc, or measure a \
             build that does",
            vmm.name(),
            vmm.program().display()
        ))
    }
}
