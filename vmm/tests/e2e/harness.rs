//! Real `ferry` processes with real guests, for the tests of this folder.

use std::fmt::Display;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use guest_tests::dirtier::{Options, Rate, Report, command};
use guest_tests::driver::process::Process;
use guest_tests::driver::qmp::{Client, QmpError};
use guest_tests::driver::serial::Watcher;
pub use guest_tests::driver::skip;
use guest_tests::{Size, fault};
use serde_json::{Value, json};
use tempfile::TempDir;

/// How long anything may take before a test gives up: far longer than it ever takes, as these
/// tests don't measure.
pub const PATIENCE: Duration = Duration::from_secs(120);

/// How long to wait between two looks at something that changes by itself.
pub const LOOK: Duration = Duration::from_millis(5);

/// Ends the calling test, loudly, if this machine has no KVM that may be used.
macro_rules! require_kvm {
    () => {
        if let Err(err) = vmm::kvm::Kvm::open() {
            $crate::harness::skip(&format!("{err}"));
            return;
        }
    };
}
pub(crate) use require_kvm;

/// A directory for a test's sockets and files.
pub fn scratch() -> TempDir {
    // Short: the path of a Unix socket has at most 107 bytes.
    tempfile::Builder::new().prefix("ferry").tempdir().unwrap()
}

/// A guest to start.
pub struct Guest<'a> {
    pub image: &'a [u8],
    pub append: String,
    pub memory: &'a str,
    pub smp: u32,
}

impl<'a> Guest<'a> {
    /// A guest with these options on its command line, and one vCPU.
    pub fn new(image: &'a [u8], memory: &'a str, options: impl Display) -> Self {
        Self {
            image,
            append: options.to_string(),
            memory,
            smp: 1,
        }
    }

    /// The dirtier with these options.
    pub fn dirtier(memory: &'a str, options: Options) -> Self {
        Self::new(guest_tests::DIRTIER, memory, options)
    }
}

/// A small dirtier that has something to do in every round.
pub fn busy() -> Options {
    Options {
        fill: Size(64 << 20),
        ws: Size(8 << 20),
        rate: Rate::PerSecond(5_000),
        heartbeat: 1_000,
        ..Options::default()
    }
}

/// A dirtier that no loopback keeps up with: it never converges under a limit of a millisecond.
pub fn furious() -> Options {
    Options {
        fill: Size(128 << 20),
        ws: Size(128 << 20),
        rate: Rate::Max,
        heartbeat: 1_000,
        ..Options::default()
    }
}

/// A running `ferry`.
pub struct Ferry {
    pub process: Process,
    pub qmp: Client,
    pub serial: Watcher,
    name: String,
}

impl Ferry {
    /// Starts a process with these arguments besides those of its sockets.
    pub fn start(dir: &Path, name: &str, arguments: &[&str]) -> Self {
        Self::start_by(&[], dir, name, arguments)
    }

    /// The same by a launcher, a command that gets the program and its arguments as its last ones,
    /// and becomes it.
    pub fn start_by(launcher: &[&str], dir: &Path, name: &str, arguments: &[&str]) -> Self {
        let (process, qmp, serial) = Self::spawn(launcher, dir, name, arguments);
        let serial = Watcher::connect(&serial, PATIENCE)
            .unwrap_or_else(|err| panic!("{name}: serial port: {err}\n{}", process.output()));
        let qmp = Client::connect(&qmp, PATIENCE)
            .unwrap_or_else(|err| panic!("{name}: {err}\n{}", process.output()));
        Self {
            process,
            qmp,
            serial,
            name: name.to_owned(),
        }
    }

    fn spawn(
        launcher: &[&str],
        dir: &Path,
        name: &str,
        arguments: &[&str],
    ) -> (Process, PathBuf, PathBuf) {
        let qmp = dir.join(format!("{name}.qmp"));
        let serial = dir.join(format!("{name}.serial"));
        let qmp_option = format!("unix:{}", qmp.display());
        let serial_option = format!("unix:{}", serial.display());
        let mut all = launcher.to_vec();
        all.extend([
            ferry().to_str().unwrap(),
            "run",
            "--name",
            name,
            "--monitor",
            "none",
            "--qmp",
            &qmp_option,
            "--serial",
            &serial_option,
        ]);
        all.extend_from_slice(arguments);
        let log = dir.join(format!("{name}.log"));
        let process = Process::spawn(Path::new(all[0]), &all[1..], &log).unwrap();
        (process, qmp, serial)
    }

    /// Starts a guest. It waits for us to be at its serial port, which keeps nothing for those
    /// who come later; with `--paused` it goes on waiting.
    pub fn run(dir: &Path, name: &str, guest: &Guest<'_>, more: &[&str]) -> Self {
        let kernel = dir.join(format!("{name}.elf"));
        std::fs::write(&kernel, guest.image).unwrap();
        let smp = guest.smp.to_string();
        let kernel = kernel.display().to_string();
        let mut arguments = vec![
            "--kernel",
            &kernel,
            "--append",
            &guest.append,
            "--memory",
            guest.memory,
            "--smp",
            &smp,
        ];
        arguments.extend_from_slice(more);
        if more.contains(&"--paused") {
            return Self::start(dir, name, &arguments);
        }
        arguments.push("--paused");
        let mut ferry = Self::start(dir, name, &arguments);
        ferry.execute("cont", Value::Null);
        // That it runs now is nobody's news.
        ferry.qmp.take_events();
        ferry
    }

    /// Starts a dirtier and waits until it works.
    pub fn run_dirtier(dir: &Path, name: &str, memory: &str, options: Options) -> Self {
        let ferry = Self::run(dir, name, &Guest::dirtier(memory, options), &[]);
        ferry.wait_for(|report| matches!(report, Report::Ready { .. }).then_some(()));
        ferry
    }

    /// Starts a destination, moves the guest there, and ends the process here. The guest is not
    /// waited for.
    pub fn move_on(mut self, dir: &Path, name: &str) -> (Self, Value) {
        let (destination, uri) = Self::incoming(dir, name);
        self.migrate(&uri);
        let info = self.wait_migrated("completed");
        self.quit();
        (destination, info)
    }

    /// Ends the process, whatever has become of the guest.
    pub fn quit(mut self) {
        self.execute("quit", Value::Null);
        self.wait_exit();
    }

    /// Starts a destination that listens on a free port of loopback; returns its address too.
    pub fn incoming(dir: &Path, name: &str) -> (Self, String) {
        Self::incoming_with(dir, name, &[])
    }

    /// The same with more arguments.
    pub fn incoming_with(dir: &Path, name: &str, more: &[&str]) -> (Self, String) {
        let arguments = [&["--incoming", "tcp:127.0.0.1:0"], more].concat();
        let mut ferry = Self::start(dir, name, &arguments);
        let uri = ferry.listening_at();
        (ferry, uri)
    }

    /// Where it listens for a guest.
    pub fn listening_at(&mut self) -> String {
        let info = self.execute("query-migrate", Value::Null);
        let address = &info["socket-address"][0];
        format!(
            "tcp:{}:{}",
            address["host"].as_str().unwrap(),
            address["port"].as_str().unwrap()
        )
    }

    pub fn execute(&mut self, command: &str, arguments: Value) -> Value {
        match self.qmp.execute(command, arguments) {
            Ok(value) => value,
            Err(err) => panic!("{}: {err}\n{}", self.name, self.process.output()),
        }
    }

    /// Runs a command that may be refused; then it gives the error's description.
    pub fn attempt(&mut self, command: &str, arguments: Value) -> Result<Value, String> {
        match self.qmp.execute(command, arguments) {
            Ok(answer) => Ok(answer),
            Err(QmpError::Command { desc, .. }) => Err(desc),
            Err(other) => panic!("{}: {command} gave {other:?}", self.name),
        }
    }

    /// Runs a command that must fail; returns the error's description.
    pub fn refused(&mut self, command: &str, arguments: Value) -> String {
        match self.attempt(command, arguments) {
            Err(desc) => desc,
            Ok(answer) => panic!("{}: {command} gave {answer}", self.name),
        }
    }

    /// The run state.
    pub fn status(&mut self) -> String {
        let status = self.execute("query-status", Value::Null);
        status["status"].as_str().unwrap().to_owned()
    }

    pub fn query_migrate(&mut self) -> Value {
        self.execute("query-migrate", Value::Null)
    }

    /// Begins a migration.
    pub fn migrate(&mut self, uri: &str) {
        self.execute("migrate", json!({ "uri": uri }));
    }

    /// Waits until what `query-migrate` says satisfies the condition.
    pub fn wait_migration(&mut self, what: &str, until: impl Fn(&Value) -> bool) -> Value {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let info = self.query_migrate();
            if until(&info) {
                return info;
            }
            assert!(
                Instant::now() < deadline,
                "{}: no '{what}': {info:#}\n{}",
                self.name,
                self.process.output()
            );
            std::thread::sleep(LOOK);
        }
    }

    /// Waits for the end of the migration, which must be as said; returns `query-migrate`.
    pub fn wait_migrated(&mut self, expected: &str) -> Value {
        let info = self.wait_migration("end of the migration", |info| {
            matches!(
                info["status"].as_str(),
                Some("completed" | "failed" | "cancelled")
            )
        });
        assert_eq!(
            info["status"],
            expected,
            "{info:#}\n{}",
            self.process.output()
        );
        info
    }

    /// Waits for the run state.
    pub fn wait_status(&mut self, expected: &str) {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let status = self.status();
            if status == expected {
                return;
            }
            assert!(
                Instant::now() < deadline,
                "{}: never '{expected}', but '{status}'\n{}",
                self.name,
                self.process.output()
            );
            std::thread::sleep(LOOK);
        }
    }

    /// Waits for a report of the dirtier; an error or fault that comes first fails the test.
    pub fn wait_for<T>(&self, mut pick: impl FnMut(&Report) -> Option<T>) -> T {
        self.wait_line(|line| match Report::parse(line) {
            Some(Report::Error { .. }) => panic!("{}: the guest says: {line}", self.name),
            Some(report) => pick(&report),
            None => None,
        })
    }

    /// Waits for a line that `parse` takes; a fault or panic of the guest fails the test.
    pub fn wait_line<T>(&self, mut parse: impl FnMut(&str) -> Option<T>) -> T {
        let found = self.serial.wait_for(PATIENCE, |line| {
            if fault::Fault::parse(line).is_some() || line.starts_with(fault::PANIC) {
                panic!("{}: the guest says: {line}", self.name);
            }
            parse(line)
        });
        match found {
            Ok((found, _)) => found,
            Err(err) => panic!("{}: {err}\n{}", self.name, self.process.output()),
        }
    }

    /// Waits for that many more heartbeats: the guest runs, here.
    pub fn wait_heartbeats(&self, more: u64) {
        let enough = self.serial.heartbeats().count + more;
        let deadline = Instant::now() + PATIENCE;
        while self.serial.heartbeats().count < enough {
            assert!(
                Instant::now() < deadline,
                "{}: the guest's heart doesn't beat\n{}",
                self.name,
                self.process.output()
            );
            std::thread::sleep(LOOK);
        }
    }

    /// Has the dirtier verify all of its memory: no error, none since its start.
    pub fn verify(&mut self) {
        self.serial.send(&[command::VERIFY]).unwrap();
        let errors = self.wait_for(|report| match report {
            Report::Verified { errors, .. } => Some(*errors),
            _ => None,
        });
        assert_eq!(errors, 0, "{}: damaged pages", self.name);
    }

    /// Waits for the process to end; returns whether it ended well, and what it printed.
    pub fn wait_exit(&mut self) -> (bool, String) {
        match self.process.wait(PATIENCE).unwrap() {
            Some(status) => (status.success(), self.process.output()),
            None => panic!("{}: does not end\n{}", self.name, self.process.output()),
        }
    }
}

/// The binary under test.
pub fn ferry() -> &'static Path {
    Path::new(env!("CARGO_BIN_EXE_ferry"))
}
