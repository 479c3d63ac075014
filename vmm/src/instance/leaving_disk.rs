//! Disks whose contents leave with the guest: `migrate -b` and `migrate -i`.

use std::io::IoSliceMut;
use std::sync::{Arc, Mutex, PoisonError};

use devices::disk::{Disk, LOG_BLOCK, WriteLog};
use devices::image::{self, Scope};
use migration::bitmap::BlockBitmap;
use migration::disk::{BLOCK_SIZE, Extent, ExtentKind, SourceDisk};
use migration::vm::VmError;

use super::offer::{BackingIdentity, MovingDisk};
use crate::control::command::StorageCopy;

const _: () = assert!(LOG_BLOCK == BLOCK_SIZE);

/// A guest's disk as the engine reads it.
pub(super) struct LeavingDisk {
    disk: Arc<Disk>,
    /// Only what is above the backing file travels.
    incremental: bool,
    log: Mutex<Option<Arc<WriteLog>>>,
}

/// Which disks travel: those that the guest can write. Incrementally, a disk without a backing
/// file travels as a whole.
pub(super) fn leaving(disks: &[Arc<Disk>], copy: StorageCopy) -> image::Result<Vec<MovingDisk>> {
    let writable = disks.iter().filter(|disk| !disk.image().readonly());
    match copy {
        StorageCopy::None => Ok(Vec::new()),
        StorageCopy::Full => writable.map(|disk| describe(disk, false)).collect(),
        StorageCopy::Incremental => writable.map(|disk| describe(disk, true)).collect(),
    }
}

fn describe(disk: &Disk, incremental: bool) -> image::Result<MovingDisk> {
    let image = disk.image();
    let backing = if incremental { image.backing()? } else { None };
    let backing = backing
        .map(|backing| backing.fingerprint().map(BackingIdentity::from))
        .transpose()?;
    Ok(MovingDisk {
        id: disk.id().to_owned(),
        format: image.format().into(),
        allocated: image.allocated()?,
        backing,
    })
}

impl LeavingDisk {
    pub(super) fn new(disk: Arc<Disk>, incremental: bool) -> Self {
        Self {
            disk,
            incremental,
            log: Mutex::new(None),
        }
    }

    fn log(&self) -> std::sync::MutexGuard<'_, Option<Arc<WriteLog>>> {
        self.log.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl SourceDisk for LeavingDisk {
    fn start_log(&self) -> Result<(), VmError> {
        *self.log() = Some(self.disk.start_log());
        Ok(())
    }

    fn harvest_dirty(&self, dirty: &mut BlockBitmap) {
        if let Some(log) = &*self.log() {
            log.harvest(|block| dirty.set(block));
        }
    }

    fn stop_log(&self) {
        *self.log() = None;
        self.disk.stop_log();
    }

    fn extent(&self, offset: u64) -> Result<Extent, VmError> {
        let image = self.disk.image();
        let scope = if self.incremental {
            Scope::Image
        } else {
            Scope::Chain
        };
        let rest = image.capacity().saturating_sub(offset);
        let extent = image.extent(offset, rest, scope)?;
        let kind = match extent.kind {
            image::ExtentKind::Data => ExtentKind::Data,
            image::ExtentKind::Zero => ExtentKind::Zero,
            image::ExtentKind::Absent => ExtentKind::Absent,
        };
        Ok(Extent {
            kind,
            len: extent.len,
        })
    }

    fn read(&self, offset: u64, data: &mut [u8]) -> Result<(), VmError> {
        let image = self.disk.image();
        Ok(image.read_at(&mut [IoSliceMut::new(data)], offset)?)
    }
}
