//! Pages that don't go as they are: the parameter `multifd-compression`, and the figures.

use std::fmt;
use std::str::FromStr;

use serde::Serialize;

use super::command::{CommandError, CommandResult};

/// QAPI's `MultiFDCompression`, as far as Ferry has it, and lz4. It is for pages on any
/// connection, with or without the capability `multifd`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum MultifdCompression {
    /// Pages go as they are.
    #[default]
    None,
    /// Ours: LZ4.
    Lz4,
    /// Zstandard, with the level `multifd-zstd-level`.
    Zstd,
}

impl MultifdCompression {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::None, Self::Lz4, Self::Zstd];

    /// The name in QMP and in the monitor.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::None => "none",
            Self::Lz4 => "lz4",
            Self::Zstd => "zstd",
        }
    }
}

impl fmt::Display for MultifdCompression {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl FromStr for MultifdCompression {
    type Err = CommandError;

    fn from_str(name: &str) -> CommandResult<Self> {
        let known = Self::ALL.into_iter().find(|known| known.as_str() == name);
        known.ok_or_else(|| {
            CommandError::generic(format!(
                "Parameter 'multifd-compression' does not accept value '{name}': it is none, lz4 \
                 (fast), or zstd (smaller)"
            ))
        })
    }
}

/// QAPI's `XBZRLECacheStats`: pages that go as differences to what was sent before.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct XbzrleCacheStats {
    /// Bytes that the cache may hold.
    pub cache_size: u64,
    /// Bytes sent as differences.
    pub bytes: u64,
    /// Pages sent as differences.
    pub pages: u64,
    /// Pages that were not in the cache.
    pub cache_miss: u64,
    /// How many of the last round's pages were not, from 0 to 1.
    pub cache_miss_rate: f64,
    /// How many times larger the last round's pages were than their differences.
    pub encoding_rate: f64,
    /// Pages in the cache that had changed too much.
    pub overflow: u64,
}

/// What went compressed: ours, in `x-ferry`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct CompressionInfo {
    /// Whether pages are compressed at present: only where that is faster than sending them as
    /// they are.
    pub active: bool,
    /// Pages that went compressed.
    pub pages: u64,
    /// Bytes that they took.
    pub bytes: u64,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_method_has_one_name_everywhere() {
        for method in MultifdCompression::ALL {
            assert_eq!(serde_json::to_value(method).unwrap(), method.as_str());
            assert_eq!(method.as_str().parse(), Ok(method));
        }
        let error = "zlib".parse::<MultifdCompression>().unwrap_err();
        assert!(error.desc.contains("'zlib'"), "{error}");
        assert!(error.desc.contains("zstd"), "{error}");
    }
}
