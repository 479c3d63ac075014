//! Which of the host's CPUs threads run on: see sched_setaffinity(2).
//!
//! A thread inherits the CPUs of the one that starts it, so that a role is chosen where its first
//! thread begins: the process itself is `io`, which its devices' threads inherit, and each
//! migration's first thread is `migration`.

use std::collections::BTreeMap;
use std::io;

use rustix::thread::{CpuSet, Pid, sched_getaffinity, sched_setaffinity};

use crate::host_list::format_list;

/// `--cpu-affinity`. What is not in it may run on all CPUs.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Affinity {
    /// The CPUs of each vCPU, by its index.
    pub vcpus: BTreeMap<u32, Vec<usize>>,
    /// `io`: those of the process's other threads, devices among them.
    pub io: Option<Vec<usize>>,
    /// `migration`: those of the threads of migrations and snapshots.
    pub migration: Option<Vec<usize>>,
}

/// Why threads can't run where they should.
#[derive(Debug, thiserror::Error)]
pub enum AffinityError {
    /// A CPU that this process hasn't.
    #[error(
        "--cpu-affinity: {who} can't run on CPU {cpu}: this process may use {}",
        format_list(.usable)
    )]
    NoCpu {
        /// Whom it was given to.
        who: String,
        /// Its number.
        cpu: usize,
        /// Those that it has.
        usable: Vec<usize>,
    },
    /// A vCPU that the guest hasn't.
    #[error("--cpu-affinity names vCPU {index}, but the guest has {vcpus} (from 0 on)")]
    NoVcpu {
        /// Its index.
        index: u32,
        /// How many there are.
        vcpus: u32,
    },
    /// The kernel.
    #[error("--cpu-affinity: cannot choose the CPUs of {who}: {error}")]
    Refused {
        /// Of which threads.
        who: String,
        /// Why.
        error: io::Error,
    },
}

/// Puts threads on their CPUs. The default leaves all as they are.
#[derive(Clone, Debug, Default)]
pub struct Threads(Option<Sets>);

#[derive(Clone, Debug)]
struct Sets {
    /// What the process had at its start.
    all: CpuSet,
    vcpus: BTreeMap<u32, CpuSet>,
    io: Option<CpuSet>,
    migration: Option<CpuSet>,
}

impl Threads {
    /// Checks that this process has the CPUs.
    pub fn new(affinity: &Affinity) -> Result<Self, AffinityError> {
        let Affinity {
            vcpus,
            io,
            migration,
        } = affinity;
        if *affinity == Affinity::default() {
            return Ok(Self(None));
        }
        let all = sched_getaffinity(None).map_err(|error| refused("this process", error))?;
        let pinned = vcpus
            .iter()
            .map(|(&index, cpus)| Ok((index, set(&vcpu(index), cpus, &all)?)));
        let role = |name: &str, cpus: &Option<Vec<usize>>| {
            let cpus = cpus.as_deref();
            cpus.map(|cpus| set(name, cpus, &all)).transpose()
        };
        Ok(Self(Some(Sets {
            all,
            vcpus: pinned.collect::<Result<_, _>>()?,
            io: role("io", io)?,
            migration: role("migration", migration)?,
        })))
    }

    /// Makes this thread, and those that it will start, one of `io`.
    pub fn begin_io(&self) -> Result<(), AffinityError> {
        match &self.0 {
            Some(sets) => sets.put_this("io", sets.io.as_ref()),
            None => Ok(()),
        }
    }

    /// Makes this thread, and those that it will start, one of `migration`. It works elsewhere too.
    pub fn begin_migration(&self) {
        if let Some(sets) = &self.0
            && let Err(error) = sets.put_this("migration", sets.migration.as_ref())
        {
            tracing::warn!("{error}");
        }
    }

    /// Does `work`, whose new threads are of `io` whatever this one is.
    pub fn starting_io<T, E: From<AffinityError>>(
        &self,
        work: impl FnOnce() -> Result<T, E>,
    ) -> Result<T, E> {
        let before = match &self.0 {
            Some(_) => Some(sched_getaffinity(None).map_err(|error| refused("io", error))?),
            None => None,
        };
        self.begin_io()?;
        let result = work();
        if let Some(before) = before {
            sched_setaffinity(None, &before).map_err(|error| refused("this thread", error))?;
        }
        result
    }

    /// Checks that a guest of `vcpus` vCPUs has those that are named.
    pub fn check_vcpus(&self, vcpus: u32) -> Result<(), AffinityError> {
        let named = self.0.as_ref().and_then(|sets| sets.vcpus.keys().max());
        match named.filter(|&&index| index >= vcpus) {
            Some(&index) => Err(AffinityError::NoVcpu { index, vcpus }),
            None => Ok(()),
        }
    }

    /// Puts the thread of a vCPU, by its gettid(2), where it belongs.
    pub fn put_vcpu(&self, index: u32, thread: i32) -> Result<(), AffinityError> {
        let Some(sets) = &self.0 else {
            return Ok(());
        };
        // 0 would be this thread.
        let Some(thread) = Pid::from_raw(thread) else {
            return Ok(());
        };
        let set = sets.vcpus.get(&index).unwrap_or(&sets.all);
        sched_setaffinity(Some(thread), set).map_err(|error| refused(&vcpu(index), error))
    }
}

impl Sets {
    fn put_this(&self, who: &str, set: Option<&CpuSet>) -> Result<(), AffinityError> {
        let set = set.unwrap_or(&self.all);
        sched_setaffinity(None, set).map_err(|error| refused(who, error))
    }
}

fn vcpu(index: u32) -> String {
    format!("vCPU {index}")
}

fn refused(who: &str, error: rustix::io::Errno) -> AffinityError {
    AffinityError::Refused {
        who: who.to_owned(),
        error: error.into(),
    }
}

/// The CPUs as the kernel takes them, all of them among `all`.
fn set(who: &str, cpus: &[usize], all: &CpuSet) -> Result<CpuSet, AffinityError> {
    let mut set = CpuSet::new();
    for &cpu in cpus {
        if cpu >= CpuSet::MAX_CPU || !all.is_set(cpu) {
            let usable = (0..CpuSet::MAX_CPU).filter(|&cpu| all.is_set(cpu));
            return Err(AffinityError::NoCpu {
                who: who.to_owned(),
                cpu,
                usable: usable.collect(),
            });
        }
        set.set(cpu);
    }
    Ok(set)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cpus_that_are_not_there_are_refused() {
        let affinity = Affinity {
            vcpus: [(2, vec![60_000])].into(),
            ..Affinity::default()
        };
        let error = Threads::new(&affinity).unwrap_err().to_string();
        assert!(error.contains("vCPU 2 can't run on CPU 60000: this process may use"));
        let affinity = Affinity {
            io: Some(vec![CpuSet::MAX_CPU - 1]),
            ..Affinity::default()
        };
        let error = Threads::new(&affinity).unwrap_err().to_string();
        assert!(error.contains("io can't run on CPU 1023"), "{error}");
    }

    #[test]
    fn this_thread_is_where_it_was_when_io_has_begun_elsewhere() {
        let all = sched_getaffinity(None).unwrap();
        let first = (0..CpuSet::MAX_CPU).find(|&cpu| all.is_set(cpu)).unwrap();
        let affinity = Affinity {
            vcpus: [(1, vec![first])].into(),
            io: Some(vec![first]),
            ..Affinity::default()
        };
        let threads = Threads::new(&affinity).unwrap();
        let seen = threads.starting_io(|| {
            let thread = std::thread::spawn(|| sched_getaffinity(None).unwrap());
            Ok::<_, AffinityError>(thread.join().unwrap())
        });
        assert_eq!(seen.unwrap().count(), 1);
        assert_eq!(sched_getaffinity(None).unwrap(), all);
        threads.check_vcpus(2).unwrap();
        let error = threads.check_vcpus(1).unwrap_err().to_string();
        assert!(
            error.contains("names vCPU 1, but the guest has 1"),
            "{error}"
        );
    }
}
