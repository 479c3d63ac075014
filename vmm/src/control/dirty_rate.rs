//! The types of the commands that measure how much a guest writes, as in QEMU's
//! `qapi/migration.json`.

use std::fmt;
use std::str::FromStr;

use serde::Serialize;

use super::command::{CommandError, CommandResult};

/// QAPI's `DirtyRateMeasureMode`, as far as Ferry has it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum DirtyRateMode {
    /// Some pages are compared with what they were.
    #[default]
    PageSampling,
    /// The dirty log tells, which slows the guest down a little.
    DirtyBitmap,
}

impl DirtyRateMode {
    /// All of them.
    pub const ALL: [Self; 2] = [Self::PageSampling, Self::DirtyBitmap];

    /// The name in QMP and in the monitor.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::PageSampling => "page-sampling",
            Self::DirtyBitmap => "dirty-bitmap",
        }
    }

    /// Why there is not QEMU's third one.
    pub fn no_dirty_ring() -> CommandError {
        CommandError::generic(
            "mode dirty-ring is not enabled, use other method instead: dirty-bitmap tells the \
             rates of the vCPUs as well, where the host can say who writes",
        )
    }
}

impl fmt::Display for DirtyRateMode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl FromStr for DirtyRateMode {
    type Err = CommandError;

    fn from_str(name: &str) -> CommandResult<Self> {
        if name == "dirty-ring" {
            return Err(Self::no_dirty_ring());
        }
        let known = Self::ALL.into_iter().find(|known| known.as_str() == name);
        known.ok_or_else(|| {
            CommandError::generic(format!(
                "Parameter 'mode' does not accept value '{name}': it is page-sampling or \
                 dirty-bitmap"
            ))
        })
    }
}

/// What `calc-dirty-rate` is asked for with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DirtyRateRequest {
    /// How long to measure, in seconds.
    pub calc_time: u64,
    /// How many pages to look at in each GiB.
    pub sample_pages: u64,
    /// How.
    pub mode: DirtyRateMode,
}

impl DirtyRateRequest {
    /// As many pages of a GiB are looked at by default, as in QEMU.
    pub const SAMPLE_PAGES: u64 = 512;

    /// Refuses values out of range, which are QEMU's.
    pub fn check(&self) -> CommandResult<()> {
        if !(1..=60).contains(&self.calc_time) {
            return Err(CommandError::generic(format!(
                "Parameter 'calc-time' expects a value between 1 and 60 s, got {}",
                self.calc_time
            )));
        }
        if !(128..=16384).contains(&self.sample_pages) {
            return Err(CommandError::generic(format!(
                "Parameter 'sample-pages' expects a value between 128 and 16384, got {}",
                self.sample_pages
            )));
        }
        Ok(())
    }
}

/// QAPI's `DirtyRateStatus`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum DirtyRateStatus {
    /// Nobody has asked.
    #[default]
    Unstarted,
    /// It is being measured.
    Measuring,
    /// It is known.
    Measured,
}

impl DirtyRateStatus {
    /// The name in QMP and in the monitor.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Unstarted => "unstarted",
            Self::Measuring => "measuring",
            Self::Measured => "measured",
        }
    }
}

/// QAPI's `DirtyRateVcpu`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct DirtyRateVcpu {
    /// The vCPU's index.
    pub id: u32,
    /// MB that it writes to in a second.
    pub dirty_rate: u64,
}

/// QAPI's `DirtyRateInfo`, what `query-dirty-rate` returns.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct DirtyRateInfo {
    /// MB that the guest writes to in a second, once that is measured.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub dirty_rate: Option<u64>,
    /// Whether it is.
    pub status: DirtyRateStatus,
    /// When the measuring began, in seconds of the host's monotonic clock.
    pub start_time: u64,
    /// How long it takes, in seconds.
    pub calc_time: u64,
    /// Pages looked at in each GiB; 0 in another mode than page-sampling.
    pub sample_pages: u64,
    /// How.
    pub mode: DirtyRateMode,
    /// What each vCPU writes to, once that is measured by the dirty log; `None` if this host doesn't
    /// tell them apart.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub vcpu_dirty_rate: Option<Vec<DirtyRateVcpu>>,
}

impl Default for DirtyRateInfo {
    fn default() -> Self {
        Self {
            dirty_rate: None,
            status: DirtyRateStatus::Unstarted,
            start_time: 0,
            calc_time: 0,
            sample_pages: DirtyRateRequest::SAMPLE_PAGES,
            mode: DirtyRateMode::PageSampling,
            vcpu_dirty_rate: None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mode_has_one_name_everywhere() {
        for mode in DirtyRateMode::ALL {
            assert_eq!(serde_json::to_value(mode).unwrap(), mode.as_str());
            assert_eq!(mode.as_str().parse(), Ok(mode));
        }
        assert!("guess".parse::<DirtyRateMode>().is_err());
        let error = "dirty-ring".parse::<DirtyRateMode>().unwrap_err();
        assert!(error.desc.contains("dirty-bitmap"), "{error}");
    }

    #[test]
    fn ranges_are_qemus() {
        let request = |calc_time, sample_pages| DirtyRateRequest {
            calc_time,
            sample_pages,
            mode: DirtyRateMode::PageSampling,
        };
        request(1, 128).check().unwrap();
        request(60, 16384).check().unwrap();
        assert!(request(0, 512).check().is_err());
        assert!(request(61, 512).check().is_err());
        assert!(request(1, 127).check().is_err());
    }
}
