//! The machine that was measured on.

use serde::{Deserialize, Serialize};

use crate::proc;

/// What is known of it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Machine {
    /// The processor's name.
    pub processor: String,
    /// How many of them the benchmark may use.
    pub cpus: usize,
    /// Memory in bytes.
    pub memory: u64,
    /// The kernel's release.
    pub kernel: String,
    /// When transparent huge pages are used: the host's setting, or `forbidden`.
    pub huge_pages: String,
    /// What is measured: name, then what the program says of its version.
    pub vmms: Vec<(String, String)>,
    /// The load average before and after.
    pub load: [String; 2],
}

impl Machine {
    /// This one.
    pub fn this() -> Self {
        let read = |path: &str| std::fs::read_to_string(path).unwrap_or_default();
        let load = proc::load();
        Self {
            processor: field(&read("/proc/cpuinfo"), "model name").to_owned(),
            cpus: std::thread::available_parallelism().map_or(0, usize::from),
            memory: kib(field(&read("/proc/meminfo"), "MemTotal")) << 10,
            kernel: read("/proc/sys/kernel/osrelease").trim().to_owned(),
            huge_pages: chosen(&read("/sys/kernel/mm/transparent_hugepage/enabled")).to_owned(),
            vmms: vec![],
            load: [load.clone(), load],
        }
    }
}

/// The value of the first line `name : value`.
fn field<'a>(text: &'a str, name: &str) -> &'a str {
    let mut lines = text.lines().filter_map(|line| line.split_once(':'));
    lines
        .find(|(key, _)| key.trim() == name)
        .map_or("", |(_, value)| value.trim())
}

fn kib(text: &str) -> u64 {
    let number = text.split_ascii_whitespace().next();
    number.and_then(|kib| kib.parse().ok()).unwrap_or(0)
}

/// The word in brackets.
fn chosen(text: &str) -> &str {
    let inside = text
        .split_once('[')
        .and_then(|(_, rest)| rest.split_once(']'));
    inside.map_or("", |(word, _)| word)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kernels_files_are_read() {
        assert_eq!(
            field("a : 1\nmodel name\t: EPYC: x\n", "model name"),
            "EPYC: x"
        );
        assert_eq!(kib(field("MemTotal:   24 kB\n", "MemTotal")), 24);
        assert_eq!(chosen("always [madvise] never\n"), "madvise");
        assert_eq!(chosen("nothing"), "");
    }
}
