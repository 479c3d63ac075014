//! Huge pages for a test, for which the host's pool grows and shrinks again.

use std::fs::{self, File};

const POOL: &str = "/sys/kernel/mm/hugepages/hugepages-2048kB";

/// That many huge pages of 2 MiB, until this is dropped. Tests that have some wait for each other.
#[derive(Debug)]
pub struct HugePages {
    before: u64,
    _lock: File,
}

impl HugePages {
    /// Adds `count` huge pages to the pool; why that can't be done if it can't.
    pub fn reserve(count: u64) -> Result<Self, String> {
        let path = std::env::temp_dir().join("ferry-huge-pages.lock");
        let lock = File::create(&path).and_then(|file| file.lock().map(|()| file));
        let lock = lock.map_err(|error| format!("{}: {error}", path.display()))?;
        let before = read("nr_hugepages")?;
        let this = Self {
            before,
            _lock: lock,
        };
        write(before + count)?;
        let there = read("nr_hugepages")?;
        if there < before + count {
            return Err(format!(
                "the host has only {} huge pages to give",
                there - before
            ));
        }
        Ok(this)
    }

    /// How many of the host's are not in use.
    pub fn free(&self) -> u64 {
        read("free_hugepages").unwrap_or(0)
    }
}

impl Drop for HugePages {
    fn drop(&mut self) {
        let _ = write(self.before);
    }
}

fn read(name: &str) -> Result<u64, String> {
    let path = format!("{POOL}/{name}");
    let text = fs::read_to_string(&path).map_err(|error| format!("{path}: {error}"))?;
    let number = text.trim().parse();
    number.map_err(|_| format!("{path} is no number"))
}

fn write(count: u64) -> Result<(), String> {
    let path = format!("{POOL}/nr_hugepages");
    fs::write(&path, count.to_string()).map_err(|error| format!("{path}: {error}"))
}
