//! `ferry run`: one guest, from its start or its arrival to the end of the process.

use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use std::pin::pin;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::sync::Notify;
use vmm::affinity::{AffinityError, Threads};
use vmm::boot::BootError;
use vmm::console::signals::{Terminations, raw_after_stop};
use vmm::console::{Console, SerialBackend};
use vmm::control::command::{Control, ShutdownCause};
use vmm::control::socket::Server;
use vmm::control::{monitor, qmp};
use vmm::instance::{Exit, Instance, Settings, WaitError};
use vmm::kvm::{Kvm, KvmError};
use vmm::machine::config::Given;
use vmm::machine::{BootFiles, MachineError};

use crate::cli::{Incoming, MonitorSpec, QmpSpec, RunOptions, merge_affinity};

/// How long the end waits for whoever reads the serial port or a socket.
const PATIENCE: Duration = Duration::from_secs(1);

/// Why `ferry run` failed.
#[derive(Debug, thiserror::Error)]
pub(crate) enum RunError {
    /// The asynchronous runtime, or signals.
    #[error("cannot start: {0}")]
    Start(io::Error),
    /// The serial port's back end or the terminal.
    #[error("{0}")]
    Console(io::Error),
    /// A socket of a monitor or of QMP.
    #[error("{0}")]
    Socket(io::Error),
    /// A kernel or an initrd.
    #[error("cannot open {path}: {source}")]
    File {
        /// Its path.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The CPUs of threads.
    #[error(transparent)]
    Affinity(#[from] AffinityError),
    /// KVM.
    #[error(transparent)]
    Kvm(#[from] KvmError),
    /// The machine.
    #[error(transparent)]
    Machine(#[from] MachineError),
    /// Listening for a migration.
    #[error(transparent)]
    Wait(#[from] WaitError),
    /// The kernel, the initrd or the command line.
    #[error("cannot boot {kernel}: {source}")]
    Boot {
        /// The kernel's path.
        kernel: PathBuf,
        /// Why.
        source: BootError,
    },
    /// What happened later.
    #[error("{0}")]
    Ended(String),
}

/// Runs until the guest, its user or an error ends it.
pub(crate) fn run(options: &RunOptions) -> Result<ExitCode, RunError> {
    // Before there is any other thread.
    let affinity = merge_affinity(&options.cpu_affinity).map_err(RunError::Ended)?;
    let threads = Threads::new(&affinity)?;
    threads.begin_io()?;
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(RunError::Start)?;
    let result = runtime.block_on(serve(options, threads));
    // Not waiting for a thread that reads from a terminal.
    runtime.shutdown_background();
    result.map(|()| ExitCode::SUCCESS)
}

async fn serve(options: &RunOptions, threads: Threads) -> Result<(), RunError> {
    // Before anything is changed that a signal must undo.
    let mut terminations = Terminations::new().map_err(RunError::Start)?;
    // What can be wrong with the files is said before the terminal changes.
    let files = open_files(options)?;
    let kvm = Kvm::open()?;
    let on_stdio = options.monitor.contains(&MonitorSpec::Stdio);
    // Only one of the two can be on standard input and output.
    let virtio_on_stdio = options.console == Some(SerialBackend::Stdio);
    let serial = options.serial.clone().unwrap_or(if virtio_on_stdio {
        SerialBackend::None
    } else {
        SerialBackend::Stdio
    });
    let console = Console::open(&serial, on_stdio && !virtio_on_stdio);
    let console = Arc::new(console.map_err(RunError::Console)?);
    let virtio_console = options
        .console
        .as_ref()
        .map(|backend| Console::open_as("console", backend, on_stdio && virtio_on_stdio))
        .transpose()
        .map_err(RunError::Console)?
        .map(Arc::new);
    raw_after_stop().map_err(RunError::Start)?;
    for (label, console) in [
        ("serial0", Some(&console)),
        ("console0", virtio_console.as_ref()),
    ] {
        if let Some(path) = console.and_then(|console| console.pty_path()) {
            eprintln!(
                "char device redirected to {} (label {label})",
                path.display()
            );
        }
    }

    let instance = Instance::new(
        settings(options, threads),
        kvm,
        Arc::clone(&console),
        virtio_console.clone(),
    );
    let servers = listen(options, &instance)?;
    let ctrl_a_x = Arc::new(Notify::new());
    if on_stdio {
        let foreground =
            monitor::terminal::spawn(Arc::new(instance.clone())).map_err(RunError::Start)?;
        // Not the instance itself: it holds the console, which would never be dropped then.
        let quit = Arc::clone(&ctrl_a_x);
        let terminal = match &virtio_console {
            Some(virtio_console) if virtio_on_stdio => virtio_console,
            _ => &console,
        };
        terminal.connect_monitor(foreground, Box::new(move || quit.notify_one()));
    }
    match (&options.incoming, files) {
        (Some(Incoming::Defer), _) => instance.wait_for_guest(None, true)?,
        (Some(Incoming::At(address)), _) => {
            instance.wait_for_guest(Some(address), true)?;
        }
        _ if let Some(tag) = &options.loadvm => instance
            .load_snapshot_at_start(tag)
            .map_err(|error| RunError::Ended(error.to_string()))?,
        (None, Some(files)) => instance
            .boot(files)
            .map_err(|error| not_booted(options, error))?,
        // The command line was checked for this.
        (None, None) => return Err(RunError::Ended("there is nothing to run".to_owned())),
    }

    let exit = until_end(&instance, &ctrl_a_x, &mut terminations).await;
    // Off the runtime's thread: ends what a migration thread is waiting for, and waits for it.
    let ending = instance.clone();
    let _ = tokio::task::spawn_blocking(move || ending.shut_down()).await;
    let outputs: Vec<_> = [Some(&console), virtio_console.as_ref()]
        .into_iter()
        .flatten()
        .map(|console| console.output())
        .collect();
    let deadline = Instant::now() + PATIENCE;
    let _ = tokio::task::spawn_blocking(move || {
        outputs.iter().all(|output| output.flush_until(deadline))
    })
    .await;
    for server in servers {
        server.close(PATIENCE).await;
    }
    match exit {
        Exit::Success => Ok(()),
        Exit::Failure(reason) => Err(RunError::Ended(reason)),
    }
}

/// Waits until the guest, its user or an error ends the process. The first request to end it is
/// refused while a guest would be lost that has moved ahead of its memory.
async fn until_end(
    instance: &Instance,
    ctrl_a_x: &Notify,
    terminations: &mut Terminations,
) -> Exit {
    let mut serving = pin!(instance.serve_guest_events());
    let mut refused = false;
    loop {
        let cause = tokio::select! {
            exit = instance.ended() => return exit,
            () = &mut serving => return Exit::Success,
            () = ctrl_a_x.notified() => ShutdownCause::HostUi,
            signal = terminations.next() => {
                tracing::info!(%signal, "ending");
                ShutdownCause::HostSignal
            }
        };
        match instance.quit(cause, refused) {
            Ok(()) => return Exit::Success,
            Err(error) => {
                refused = true;
                terminations.refused();
                tracing::error!("not ended: {error}; asked once more, the process ends");
            }
        }
    }
}

fn settings(options: &RunOptions, threads: Threads) -> Settings {
    let memory = options.memory.clone().unwrap_or_default();
    Settings {
        name: options.name.clone(),
        given: Given {
            memory: memory.size,
            backing: memory.backing,
            vcpus: options.smp,
            cpu: options.cpu.as_ref().map(ToString::to_string),
            command_line: options.append.clone(),
            kernel: options.kernel.clone(),
            initrd: options.initrd.clone(),
            disks: options.disk.clone(),
            rng: options.rng,
            balloon: options.balloon,
            console: options.console.is_some(),
            net: options.net.clone(),
        },
        threads,
        paused: options.paused,
        no_reboot: options.no_reboot,
        no_shutdown: options.no_shutdown,
    }
}

/// The kernel and the initrd, if a kernel was given.
fn open_files(options: &RunOptions) -> Result<Option<BootFiles>, RunError> {
    let open = |path: &Path| {
        File::open(path).map_err(|source| RunError::File {
            path: path.to_owned(),
            source,
        })
    };
    let Some(kernel) = &options.kernel else {
        return Ok(None);
    };
    Ok(Some(BootFiles {
        kernel: open(kernel)?,
        initrd: options.initrd.as_deref().map(open).transpose()?,
    }))
}

fn not_booted(options: &RunOptions, error: MachineError) -> RunError {
    match (error, &options.kernel) {
        (MachineError::Boot(source), Some(kernel)) => RunError::Boot {
            kernel: kernel.clone(),
            source,
        },
        (error, _) => error.into(),
    }
}

/// Opens the sockets of monitors and QMP.
fn listen(options: &RunOptions, instance: &Instance) -> Result<Vec<Server>, RunError> {
    let control = || Arc::new(instance.clone()) as Arc<dyn Control>;
    let mut servers = Vec::new();
    for path in options.qmp.iter().filter_map(QmpSpec::path) {
        servers.push(qmp::server::listen(path, control()).map_err(RunError::Socket)?);
    }
    for path in options.monitor.iter().filter_map(MonitorSpec::path) {
        servers.push(monitor::server::listen(path, control()).map_err(RunError::Socket)?);
    }
    Ok(servers)
}
