//! Ending early: a benchmark that is told to (Ctrl-C, SIGTERM, SIGHUP) leaves no VMM, no network and
//! no files behind.

use std::io;
use std::path::Path;
use std::sync::atomic::{AtomicI32, Ordering};
use std::time::Duration;
use std::{fs, thread};

use rustix::process::{Pid, Signal, kill_process};
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use signal_hook::iterator::Signals;

use crate::error::Error;

/// How long what is under way may take to clear up, once its VMMs are gone.
const CLEARING_UP: Duration = Duration::from_secs(3);

/// The signal that came, or 0.
static CAME: AtomicI32 = AtomicI32::new(0);

/// From now on, the first of those signals kills this process' children, so that whatever waits for
/// them fails and clears up. The process ends, at the latest after three seconds or with another signal.
pub fn watch() -> io::Result<()> {
    let mut signals = Signals::new([SIGHUP, SIGINT, SIGTERM])?;
    let watcher = thread::Builder::new().name("signals".to_owned());
    watcher.spawn(move || {
        let mut signals = signals.forever();
        if let Some(signal) = signals.next() {
            CAME.store(signal, Ordering::SeqCst);
            for child in children() {
                // One that has ended meanwhile needs no signal.
                let _ = kill_process(child, Signal::KILL);
            }
            thread::spawn(move || {
                thread::sleep(CLEARING_UP);
                end(signal)
            });
        }
        if let Some(signal) = signals.next() {
            end(signal)
        }
    })?;
    Ok(())
}

/// Fails if such a signal has come. To be asked after a process was started.
pub fn check() -> Result<(), Error> {
    match CAME.load(Ordering::SeqCst) {
        0 => Ok(()),
        signal => Err(Error::Interrupted { signal }),
    }
}

/// As a shell says it.
fn end(signal: i32) -> ! {
    std::process::exit(128 + signal)
}

/// Of all threads. Those of which no list can be had are not in it.
fn children() -> Vec<Pid> {
    let Ok(threads) = fs::read_dir("/proc/self/task") else {
        return vec![];
    };
    let of_thread = |path: &Path| fs::read_to_string(path.join("children")).unwrap_or_default();
    let lists = threads.flatten().map(|thread| of_thread(&thread.path()));
    let lists: Vec<String> = lists.collect();
    let ids = lists.iter().flat_map(|list| list.split_whitespace());
    ids.filter_map(|id| Pid::from_raw(id.parse().ok()?))
        .collect()
}
