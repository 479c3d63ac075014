//! What the kernel knows: CPU time and resident memory of a process, how busy the machine is.

use serde::{Deserialize, Serialize};

use crate::error::Error;

/// The CPU time that a VMM has used so far, in seconds, user and system, in the resolution of the
/// kernel's clock tick (10 ms as a rule).
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Cpu {
    /// Of the whole process, threads included that have ended.
    pub all: f64,
    /// Of the vCPUs' threads that are there: the guest's work, and exits that their thread handles.
    pub vcpus: f64,
}

/// The CPU time of a process whose vCPUs' threads are named as Ferry or QEMU names them.
pub fn cpu(pid: u32) -> Result<Cpu, Error> {
    let of = |stat: &str| {
        ticks(stat)
            .map(seconds)
            .ok_or_else(|| Error::Wrong(format!("/proc/{pid}/stat has no CPU times: '{stat}'")))
    };
    let tasks = format!("/proc/{pid}/task");
    let mut vcpus = 0.0;
    for task in std::fs::read_dir(&tasks).map_err(Error::io(&tasks))? {
        let task = task.map_err(Error::io(&tasks))?;
        // A thread may end at any time.
        match std::fs::read_to_string(task.path().join("stat")) {
            Ok(stat) if is_vcpu(&stat) => vcpus += of(&stat)?,
            _ => {}
        }
    }
    Ok(Cpu {
        all: of(&read(pid, "stat")?)?,
        vcpus,
    })
}

/// Whether a thread runs a vCPU, by its name: Ferry calls them `vcpu0`, QEMU `CPU 0/KVM` (with
/// `-name debug-threads=on`).
fn is_vcpu(stat: &str) -> bool {
    let name = stat
        .split_once('(')
        .and_then(|(_, rest)| rest.rsplit_once(')'))
        .map_or("", |(name, _)| name);
    let qemu = name
        .strip_prefix("CPU ")
        .and_then(|rest| rest.strip_suffix("/KVM"));
    let number = qemu.or_else(|| name.strip_prefix("vcpu"));
    number.is_some_and(|number| number.parse::<u16>().is_ok())
}

fn seconds(ticks: u64) -> f64 {
    ticks as f64 / rustix::param::clock_ticks_per_second() as f64
}

/// The CPU time that a hypervisor below this machine has given to others so far, in seconds, summed
/// over the CPUs; 0 on hardware.
pub fn stolen_seconds() -> Result<f64, Error> {
    let path = "/proc/stat";
    let stat = std::fs::read_to_string(path).map_err(Error::io(path))?;
    // "cpu user nice system idle iowait irq softirq steal …", see proc_stat(5).
    let steal = stat.split_ascii_whitespace().nth(8);
    Ok(seconds(
        steal.and_then(|ticks| ticks.parse().ok()).unwrap_or(0),
    ))
}

/// utime and stime, the 14th and the 15th field of proc_pid_stat(5). The second one, the program's
/// name in parentheses, may contain anything.
fn ticks(stat: &str) -> Option<u64> {
    let mut fields = stat.rsplit_once(')')?.1.split_ascii_whitespace().skip(11);
    let mut next = || fields.next()?.parse::<u64>().ok();
    Some(next()? + next()?)
}

/// The resident memory of a VMM, in bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Resident {
    /// Of the guest's RAM.
    pub guest: u64,
    /// All the rest, shared libraries included.
    pub own: u64,
}

/// The resident memory of a VMM whose guest has `memory` bytes of RAM: a mapping without a file
/// that is at least a quarter as large is the guest's.
pub fn resident(pid: u32, memory: u64) -> Result<Resident, Error> {
    Ok(split(&read(pid, "smaps")?, memory / 4))
}

/// Sums up proc_pid_smaps(5).
fn split(smaps: &str, least: u64) -> Resident {
    let mut sum = Resident::default();
    let mut guest = false;
    for line in smaps.lines() {
        let mut words = line.split_ascii_whitespace();
        let (Some(first), second) = (words.next(), words.next()) else {
            continue;
        };
        if let Some((start, end)) = first.split_once('-').and_then(|(start, end)| {
            let number = |text| u64::from_str_radix(text, 16).ok();
            Some((number(start)?, number(end)?))
        }) {
            let inode = words.nth(2);
            guest = inode == Some("0") && words.next().is_none() && end - start >= least;
        } else if first == "Rss:" {
            let kib: u64 = second.and_then(|kib| kib.parse().ok()).unwrap_or(0);
            *(if guest { &mut sum.guest } else { &mut sum.own }) += kib << 10;
        }
    }
    sum
}

fn read(pid: u32, file: &str) -> Result<String, Error> {
    let path = format!("/proc/{pid}/{file}");
    std::fs::read_to_string(&path).map_err(Error::io(path))
}

/// The load average of the machine over a minute, as text.
pub fn load() -> String {
    let load = std::fs::read_to_string("/proc/loadavg").unwrap_or_default();
    load.split(' ').next().unwrap_or_default().to_owned()
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use guest_tests::driver::process::Process;

    use super::*;

    #[test]
    fn cpu_times_stand_behind_a_name_of_any_kind() {
        let stat = "7 (a) b) R 1 2 3 4 5 6 7 8 9 10 120 34 0 0 20 0 1";
        assert_eq!(ticks(stat), Some(154));
        assert_eq!(ticks("7 (a"), None);
    }

    #[test]
    fn vcpus_are_known_by_the_names_of_their_threads() {
        let named = |name: &str| is_vcpu(&format!("7 ({name}) R 1 2 3"));
        assert!(named("vcpu0") && named("vcpu12") && named("CPU 3/KVM"));
        assert!(!named("vcpu") && !named("vcpu0 x") && !named("live_migration"));
        assert!(!is_vcpu("7 (ferry"));
    }

    #[test]
    fn the_time_of_vcpus_is_that_of_their_threads_only() {
        use std::sync::atomic::{AtomicBool, Ordering};
        static ENOUGH: AtomicBool = AtomicBool::new(false);
        let vcpu = std::thread::Builder::new().name("vcpu0".to_owned());
        let vcpu = vcpu.spawn(|| {
            while !ENOUGH.load(Ordering::Relaxed) {
                std::hint::spin_loop();
            }
        });
        while cpu(std::process::id()).unwrap().vcpus == 0.0 {
            std::thread::yield_now();
        }
        ENOUGH.store(true, Ordering::Relaxed);
        vcpu.unwrap().join().unwrap();

        let dir = tempfile::tempdir().unwrap();
        let arguments = ["-c", "while :; do :; done"];
        let log = dir.path().join("log");
        let busy = Process::spawn(Path::new("/bin/sh"), arguments, &log).unwrap();
        let mut used = Cpu::default();
        while used.all == 0.0 {
            used = cpu(busy.id()).unwrap();
        }
        assert_eq!(used.vcpus, 0.0);
    }

    #[test]
    fn large_anonymous_mappings_are_the_guests() {
        let smaps = "\
55d0-55d9 r-xp 00000000 08:01 131 /usr/bin/vmm
Rss:                   8 kB
7f0000000000-7f0040000000 rw-p 00000000 00:00 0
Size:            1048576 kB
Rss:                4096 kB
Pss:                4096 kB
7f1000000000-7f1040000000 rw-p 00000000 00:01 99 /memfd:file
Rss:                   2 kB
7f2000000000-7f2000100000 rw-p 00000000 00:00 0 [heap]
Rss:                   1 kB
";
        let resident = split(smaps, 1 << 28);
        assert_eq!(
            resident,
            Resident {
                guest: 4 << 20,
                own: 11 << 10
            }
        );
    }
}
