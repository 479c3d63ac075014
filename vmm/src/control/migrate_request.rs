//! What a migration is asked for with.

use migration::uri::Uri;

/// What a migration is asked for with.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MigrateRequest {
    /// Where to.
    pub address: Uri,
    /// Whether it goes on with the migration that is paused in post-copy, and begins none.
    pub resume: bool,
    /// What of the disks is copied.
    pub copy: StorageCopy,
}

/// Whether the contents of disks travel with the guest.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum StorageCopy {
    /// No: both hosts see the same storage.
    #[default]
    None,
    /// All that is on them (`migrate -b`).
    Full,
    /// What is above their backing files, which the destination has, too (`migrate -i`).
    Incremental,
}

impl StorageCopy {
    /// From the two switches of QEMU's `migrate`, of which the second narrows the first.
    pub fn of(full: bool, incremental: bool) -> Self {
        match (full, incremental) {
            (_, true) => Self::Incremental,
            (true, false) => Self::Full,
            (false, false) => Self::None,
        }
    }
}
