//! Repair of a qcow2 image's reference counts, as `qemu-img check -r all` does it.
//!
//! A process that was killed leaves counts on the disk that are behind the tables (see `dirty`):
//! imago keeps them in memory until a flush, but writes a new L2 table and the L1 entry that
//! points to it at once. The tables are right, and the counts follow from them: they are counted
//! anew and put right in place.
//!
//! Everything is looked at before anything is written. What is not understood, or can't be put
//! right without moving something, is refused, and the image is as it was: what is not counted here
//! would be taken for free. A crash in between does no harm: the image is still dirty, and counts
//! are raised, and entries told that a cluster is shared, before any count is lowered.

mod blocks;
mod copied;
mod layout;
mod references;

use std::time::{Duration, Instant};

use self::blocks::Blocks;
use self::copied::Flags;
use self::layout::Layout;
use self::references::References;
use super::storage::FileStorage;
use super::{Error, dirty};

/// What has been put right.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Mended {
    /// Counts that were too low.
    raised: u64,
    /// Counts that were too high: clusters that were lost to the image.
    lowered: u64,
    /// Entries of L1 and L2 tables whose flag that nobody shares the cluster (COPIED) was wrong.
    flags: u64,
}

/// Why counts were not put right.
enum Refusal {
    /// Not possible here; nothing has been written.
    Unmendable(String),
    /// The host failed.
    Failed(Error),
}

impl From<Error> for Refusal {
    fn from(error: Error) -> Self {
        Refusal::Failed(error)
    }
}

/// Puts the counts of an image right that was not closed properly. It must be locked, and its
/// header checked.
///
/// Version 2 has no dirty bit that would tell, so each such image is counted. Nothing is known to
/// be wrong with it, so one that can't be put right is used as it is.
pub(super) fn repair(file: &FileStorage) -> Result<(), Error> {
    let marks = dirty::has_features(file)?;
    if marks && !dirty::is_dirty(file)? {
        return Ok(());
    }
    let began = Instant::now();
    match (mend(file), marks) {
        (Ok(mended), false) if mended == Mended::default() => Ok(()),
        (Ok(mended), _) => {
            log(file, &mended, began.elapsed());
            Ok(())
        }
        (Err(Refusal::Failed(error)), _) => Err(error),
        (Err(Refusal::Unmendable(reason)), true) => Err(Error::format(
            &file.path,
            format!(
                "the qcow2 image was not closed properly and its reference counts may be wrong \
                 (dirty), and can't be put right here: {reason}; repair it with `qemu-img check -r all`"
            ),
        )),
        (Err(Refusal::Unmendable(reason)), false) => {
            tracing::warn!(
                "{}: its reference counts can't be verified: {reason}; `qemu-img check` says more",
                file.path.display()
            );
            Ok(())
        }
    }
}

fn log(file: &FileStorage, mended: &Mended, took: Duration) {
    let Mended {
        raised,
        lowered,
        flags,
    } = mended;
    tracing::warn!(
        image = %file.path.display(),
        raised,
        lowered,
        flags,
        ms = took.as_secs_f64() * 1e3,
        "the qcow2 image was not closed properly; its reference counts have been put right"
    );
}

fn mend(file: &FileStorage) -> Result<Mended, Refusal> {
    let layout = Layout::read(file)?;
    let mut references = References::count(file, &layout)?;
    let blocks = Blocks::compare(file, &layout, &mut references)?;
    let flags = Flags::compare(file, &layout, &references)?;

    let mended = Mended {
        raised: blocks.raised,
        lowered: blocks.lowered,
        flags: flags.wrong,
    };
    if mended == Mended::default() {
        return Ok(mended);
    }
    // From here on only the host can fail.
    blocks.raise(file, &references)?;
    sync(file)?;
    flags.write(file, &references)?;
    sync(file)?;
    blocks.lower(file, &references)?;
    sync(file)?;
    Ok(mended)
}

fn sync(file: &FileStorage) -> Result<(), Error> {
    let synced = file.0.sync();
    synced.map_err(|source| Error::whole(&file.path, "flush", source))
}

fn unmendable<T>(reason: impl Into<String>) -> Result<T, Refusal> {
    Err(Refusal::Unmendable(reason.into()))
}
