//! Network namespaces without names: the kernel clears them up, however their owner ends.
#![allow(unsafe_code, reason = "only so can a thread have a namespace")]

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd};
use std::path::PathBuf;
use std::process::Command;
use std::thread;

use rustix::thread::{LinkNameSpaceType, UnshareFlags, move_into_link_name_space, unshare_unsafe};

/// Why there is no namespace, or why it is not as it should be.
#[derive(Debug, thiserror::Error)]
pub enum NamespaceError {
    /// It can't be made.
    #[error("no network namespace (this takes root): {0}")]
    New(#[source] io::Error),
    /// A program can't be run there.
    #[error("{program}, in a network namespace: {source} (is package iproute2 installed?)")]
    Program {
        /// Which one.
        program: String,
        /// What the kernel said.
        source: io::Error,
    },
    /// A program failed there.
    #[error("{command}, in a network namespace: {said}")]
    Failed {
        /// With its arguments.
        command: String,
        /// What it printed.
        said: String,
    },
}

/// A network namespace. It is gone with this and the processes in it.
#[derive(Debug)]
pub struct Namespace(File);

impl Namespace {
    /// Makes one; its loopback is down. Needs CAP_SYS_ADMIN.
    pub fn new() -> Result<Self, NamespaceError> {
        let made = thread::scope(|scope| {
            let inside = scope.spawn(|| {
                // SAFETY: no file descriptor is concerned.
                unsafe { unshare_unsafe(UnshareFlags::NEWNET) }?;
                File::open("/proc/thread-self/ns/net")
            });
            inside
                .join()
                .unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        });
        made.map(Self).map_err(NamespaceError::New)
    }

    /// What `ip` can call it by.
    pub fn path(&self) -> PathBuf {
        format!("/proc/{}/fd/{}", std::process::id(), self.0.as_raw_fd()).into()
    }

    /// Runs this on a thread in the namespace: processes that it starts and sockets that it opens
    /// are there, too.
    pub fn within<T: Send>(&self, run: impl FnOnce() -> T + Send) -> io::Result<T> {
        thread::scope(|scope| {
            let inside = scope.spawn(|| {
                let network = Some(LinkNameSpaceType::Network);
                move_into_link_name_space(self.0.as_fd(), network)?;
                Ok(run())
            });
            inside
                .join()
                .unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        })
    }

    /// Runs a program there, with arguments that have no spaces; what it printed.
    pub fn run(&self, command: &str) -> Result<String, NamespaceError> {
        let mut words = command.split(' ');
        let program = words.next().unwrap_or_default();
        let output = self.within(|| Command::new(program).args(words).output());
        let output = output.flatten().map_err(|source| NamespaceError::Program {
            program: program.to_owned(),
            source,
        })?;
        if output.status.success() {
            return Ok(String::from_utf8_lossy(&output.stdout).into_owned());
        }
        Err(NamespaceError::Failed {
            command: command.to_owned(),
            said: String::from_utf8_lossy(&output.stderr).trim().to_owned(),
        })
    }
}
