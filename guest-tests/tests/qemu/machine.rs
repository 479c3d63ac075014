//! A QEMU process with one of the guests.

use std::path::{Path, PathBuf};
use std::time::Duration;

use guest_tests::driver::process::Process;
use guest_tests::driver::qmp::Client;
use guest_tests::driver::serial::Watcher;
use guest_tests::driver::skip;
use guest_tests::fault::{Fault, PANIC};
use tempfile::TempDir;

/// Far longer than anything takes; it ends a test that hangs.
pub(crate) const PATIENCE: Duration = Duration::from_secs(60);

/// Returns from a test that this machine can't run, saying so.
macro_rules! require_qemu {
    () => {
        match $crate::machine::qemu() {
            Some(path) => path,
            None => return,
        }
    };
}
pub(crate) use require_qemu;

/// QEMU's program, if it and KVM are there.
pub(crate) fn qemu() -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let program = std::env::split_paths(&path)
        .map(|directory| directory.join("qemu-system-x86_64"))
        .find(|program| program.is_file());
    if program.is_none() {
        skip("no qemu-system-x86_64 in PATH: install the package qemu-system-x86");
    }
    let kvm = std::fs::File::options()
        .read(true)
        .write(true)
        .open("/dev/kvm");
    if let Err(err) = &kvm {
        skip(&format!("/dev/kvm can't be opened: {err}"));
    }
    program.filter(|_| kvm.is_ok())
}

/// A directory for a test's sockets and files. Short: the path of a Unix socket has at most 107
/// bytes.
pub(crate) fn scratch() -> TempDir {
    tempfile::Builder::new()
        .prefix("guests-")
        .tempdir()
        .unwrap()
}

/// A running QEMU. Killed when dropped.
pub(crate) struct Qemu {
    pub(crate) process: Process,
    pub(crate) serial: Watcher,
    pub(crate) qmp: Client,
}

/// Starts a guest; `name` tells the files of several machines of a test apart.
pub(crate) fn start(
    program: &Path,
    dir: &Path,
    name: &str,
    image: &[u8],
    append: &str,
    more: &[String],
) -> Qemu {
    let at = |what: &str| dir.join(format!("{name}.{what}"));
    std::fs::write(at("kernel"), image).unwrap();
    let mut arguments: Vec<String> = [
        "-M",
        "microvm,rtc=off,acpi=off",
        "-accel",
        "kvm",
        "-nodefaults",
        "-no-user-config",
        "-display",
        "none",
        "-m",
        "128",
        "-global",
        "virtio-mmio.force-legacy=false",
    ]
    .map(str::to_owned)
    .to_vec();
    arguments.extend(["-kernel".to_owned(), at("kernel").display().to_string()]);
    arguments.extend(["-append".to_owned(), append.to_owned()]);
    // The guest waits for `cont`, so that none of its words is missed.
    arguments.push("-S".to_owned());
    for (option, socket) in [("-serial", "serial"), ("-qmp", "qmp")] {
        let path = at(socket).display().to_string();
        arguments.extend([option.to_owned(), format!("unix:{path},server=on,wait=off")]);
    }
    arguments.extend_from_slice(more);
    let mut process = Process::spawn(program, &arguments, &at("log")).unwrap();
    let qmp = Client::connect(&at("qmp"), PATIENCE).unwrap_or_else(|err| {
        panic!("{err}; {:?}: {}", process.try_wait(), process.output());
    });
    Qemu {
        serial: Watcher::connect(&at("serial"), PATIENCE).unwrap(),
        qmp,
        process,
    }
}

impl Qemu {
    /// Lets the guest run.
    pub(crate) fn cont(&mut self) {
        self.qmp.execute("cont", serde_json::Value::Null).unwrap();
    }

    /// The next line that `parse` takes. A guest that breaks before is not waited for.
    pub(crate) fn wait_for<T>(&self, mut parse: impl FnMut(&str) -> Option<T>) -> T {
        let found = self.serial.wait_for(PATIENCE, |line| match parse(line) {
            None if line.starts_with(PANIC) || Fault::parse(line).is_some() => panic!("{line}"),
            found => found,
        });
        match found {
            Ok((found, _)) => found,
            Err(err) => panic!("{err}; QEMU: {}", self.process.output()),
        }
    }
}
