//! What the engine asks of the two machines: the only way in which it sees a VM.
//!
//! `vmm` implements these traits on KVM; this crate's tests implement them on plain memory. The
//! engine calls the machines from one thread, in the order that the methods are listed in; their
//! disks are seen through the traits of [`disk`](crate::disk).

use std::io::{Read, Write};
use std::sync::Arc;
use std::time::Duration;

use crate::bitmap::{PageBitmap, PageRun};
use crate::disk::{DestinationDisk, Disk, SourceDisk};
use crate::layout::{GuestRam, Layout};
use crate::section::Section;
use crate::throttle::Throttle;

/// Why a machine could not do what the engine asked. The engine adds what it was doing.
pub type VmError = Box<dyn std::error::Error + Send + Sync>;

/// What a source tells about its guest before any page moves.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Offer {
    /// Where the guest's RAM is.
    pub layout: Layout,
    /// The machine's configuration, to be checked by the destination: opaque to the engine.
    pub configuration: Vec<Section>,
    /// Files that the machine needs beside its RAM (the kernel and the initrd, for a later
    /// reset), sent before the first page.
    pub blobs: Vec<Blob>,
    /// The disks whose contents travel with the guest. Empty: both sides see the same storage.
    pub disks: Vec<Disk>,
}

/// A file that travels with the guest.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Blob {
    /// Its stable name, such as `kernel`.
    pub name: String,
    /// Its length in bytes.
    pub len: u64,
}

/// The stop of a guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Pause {
    /// Whether the guest ran before: only then may the destination, or a failed migration, run it.
    pub was_running: bool,
    /// Since when the guest stands still, on the engine's [`Clock`](crate::clock::Clock).
    pub last_instruction: Duration,
}

/// The machine whose guest leaves.
pub trait SourceVm {
    /// Describes the guest. Fails, with every reason, if something in the machine cannot migrate.
    fn offer(&mut self) -> Result<Offer, VmError>;

    /// Opens the blob of that index in [`Offer::blobs`] for reading, from its start.
    fn open_blob(&mut self, index: usize) -> Result<Box<dyn Read + Send>, VmError>;

    /// The disk of that index in [`Offer::disks`].
    fn open_disk(&mut self, index: usize) -> Result<Arc<dyn SourceDisk>, VmError> {
        Err(format!("this machine has no disk {index} that could travel").into())
    }

    /// The guest's memory, which the guest may be writing to at any time.
    fn ram(&self) -> GuestRam;

    /// Starts to log writes. From here on every write by the guest or by the VMM to a page is
    /// seen by a later [`harvest_dirty`](Self::harvest_dirty), provided that the page was
    /// [protected](Self::protect) after the harvest before.
    fn start_dirty_log(&mut self) -> Result<(), VmError>;

    /// Does what [`release`](Self::release) will have to, as far as it can be done while the guest
    /// runs: its images are written back. Called before the harvest of each round; the time that it
    /// takes is what the release is expected to take.
    fn prepare_release(&mut self) -> Result<(), VmError> {
        Ok(())
    }

    /// Adds to `dirty` the pages written since they were last protected. Pages may be reported
    /// that were not written; a page that was written is never left out. What was reported must
    /// be protected before it is read for sending, or it will be reported again.
    fn harvest_dirty(&mut self, dirty: &mut PageBitmap) -> Result<(), VmError>;

    /// Arms the log again for the pages set in `dirty` from `first` for `count` pages, both
    /// multiples of 64 (or up to the end of the RAM). The engine reads them only afterwards, so
    /// that a write in between is caught by the next harvest.
    fn protect(&mut self, dirty: &PageBitmap, first: u64, count: u64) -> Result<(), VmError>;

    /// Pages that need not be sent, as the guest has said since this was asked last: free ones.
    /// Asked while the first round goes on, until the first harvest. A page that is written after
    /// the guest has said so is in the log like any other, without having been protected by the
    /// engine. The default knows none.
    fn free_pages(&mut self) -> Vec<PageRun> {
        Vec::new()
    }

    /// Slows the guest down, or lets it run as it likes again, at once: called while the guest runs,
    /// and with [`Throttle::Off`] whenever it was slowed down, however the migration goes on.
    /// Slowing it down must keep no [`pause`](Self::pause) waiting. The default does nothing.
    fn throttle(&mut self, throttle: Throttle) -> Result<(), VmError> {
        let _ = throttle;
        Ok(())
    }

    /// Stops the guest; a guest that is stopped already stays so. In-flight device work is
    /// finished when this returns: no more writes to RAM or to a disk until
    /// [`resume`](Self::resume).
    /// After an error it runs on as before.
    ///
    /// A stop that is `brief` is expected to be over in no time: who wants to hear of it is better
    /// told afterwards, by [`resume`](Self::resume) or [`handed_over`](Self::handed_over).
    fn pause(&mut self, brief: bool) -> Result<Pause, VmError>;

    /// The state of everything but RAM. Only while the guest is stopped. As nothing of it changes
    /// after [`pause`](Self::pause), it may have been in the making since then, while the last
    /// pages are sent.
    fn save(&mut self) -> Result<Vec<Section>, VmError>;

    /// Gives up what only one side may hold (image locks). Called last before GO is sent.
    fn release(&mut self) -> Result<(), VmError>;

    /// Undoes [`release`](Self::release) and [`pause`](Self::pause) after a failure before the
    /// hand-over: the guest runs on if `pause.was_running`.
    fn resume(&mut self, pause: Pause) -> Result<(), VmError>;

    /// The guest is at the destination, or may be: it stays stopped here. Called before that is
    /// shown to anyone.
    fn handed_over(&mut self);

    /// Ends logging; called once for every successful start, however the migration ended. If it
    /// comes after [`handed_over`](Self::handed_over), all of the guest is at the destination for
    /// certain.
    fn stop_dirty_log(&mut self);
}

/// When and how a guest begins at the destination.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Start {
    /// Whether to run the guest; otherwise it stays paused, as it was at the source.
    pub run: bool,
    /// How long the guest has been stopped, by the source's clock and the measured round trip:
    /// its clocks are set forward by this. Zero for a guest that was paused by its user.
    pub stopped_for: Duration,
}

/// The machine that a guest arrives in.
pub trait DestinationVm {
    /// Checks the offer against this host and this process's own options, and builds the guest,
    /// not running, with its RAM reading as zeroes. A refusal lists all of its reasons, one a
    /// line. `offer` comes from the peer: nothing in it has been checked but its sizes and that
    /// the layout is well-formed.
    fn prepare(&mut self, offer: &Offer) -> Result<GuestRam, VmError>;

    /// Where to write the blob of that index in [`Offer::blobs`]; the engine writes exactly
    /// [`Blob::len`] bytes and drops the writer.
    fn create_blob(&mut self, index: usize) -> Result<Box<dyn Write + Send>, VmError>;

    /// The disk of that index in [`Offer::disks`], to be filled. The engine drops it, flushed,
    /// before [`load`](Self::load), and before [`abandon`](Self::abandon) after a failure.
    fn open_disk(&mut self, index: usize) -> Result<Box<dyn DestinationDisk>, VmError> {
        Err(format!("this machine has no disk {index} to fill").into())
    }

    /// The ids of the threads that the vCPUs run on, in order: to tell whom a missing page stops.
    fn vcpu_threads(&self) -> Vec<u32> {
        Vec::new()
    }

    /// Loads the state of everything but RAM. Unknown, duplicate, missing, left-over and invalid
    /// sections are errors that name the section. The guest could run when this returns.
    fn load(&mut self, sections: Vec<Section>) -> Result<(), VmError>;

    /// Takes what only one side may hold and lets the guest go: called after GO, and only then.
    /// Returns when the first vCPU has been about to enter the guest, and when that was on the
    /// engine's [`Clock`](crate::clock::Clock): it may be a while ago, as this thread may have had
    /// to wait for a CPU that the vCPU had. `None` is now. An error means that the guest has not
    /// run and never will run here.
    ///
    /// In post-copy memory may be missing. This must neither touch guest memory nor wait for a
    /// vCPU or a device that may: whoever touches a missing page waits until it comes, and if the
    /// connection breaks just then, that is after a recovery, which is the business of the very
    /// thread that calls this. ([`load`](Self::load) may touch it: its faults are served, and if
    /// the connection breaks, it is let go, and the arrival fails.)
    fn start(&mut self, start: Start) -> Result<Option<Duration>, VmError>;

    /// Drops what was built: the guest will never run here. Called before the failure is shown to
    /// anyone, so that whoever waits for another guest then finds the memory free.
    fn abandon(&mut self);
}
