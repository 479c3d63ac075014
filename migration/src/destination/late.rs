//! Memory of a guest that runs here already while some of it is still at the source: which pages
//! have come, who waits for the others, and putting them in place.
//!
//! A page is put in place by one thread only, which claims it first, and never where one has
//! come: what the guest has written since is not lost to a copy that comes twice. The lock is held
//! over the sets of pages only, never over a system call.

mod error;
mod latency;
mod place;
mod stale;
mod stats;
#[cfg(test)]
mod tests;

use std::os::fd::{AsFd, BorrowedFd};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

pub use self::error::LateError;
pub use self::latency::{BUCKETS, Latency};
pub use self::place::Via;
pub use self::stats::LateStats;

use self::latency::Waits;
use self::stats::Counts;
use crate::bitmap::{PageBitmap, PageRun};
use crate::clock::Clock;
use crate::frame::MAX_PAGES;
use crate::guest_io::GuestPages;
use crate::userfault::{Fault, Userfault};

/// What is to be done about a fault.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FaultAction {
    /// The page with this number is to be asked for.
    Request(u64),
    /// The page has been asked for, or is being placed.
    Nothing,
    /// The page is there, or was zero and is there now; who waited goes on.
    Served,
}

/// The memory of a guest that runs, or is about to. Dropped before [`Self::guest_runs`] or after
/// [`Self::finish`] it lets go of the memory; pages that are missing then read as zeroes.
pub struct LateMemory {
    memory: GuestPages,
    userfault: Arc<Userfault>,
    clock: Arc<dyn Clock>,
    checked: bool,
    state: Mutex<State>,
    complete: Condvar,
}

struct State {
    /// Pages that have not come, or are stale.
    missing: PageBitmap,
    /// How many of them.
    left: u64,
    /// Pages that some thread is putting in place.
    placing: PageBitmap,
    /// Pages that somebody waits for; among the missing.
    asked: PageBitmap,
    /// Pages whose last copy, before the switch, didn't match its checksum; `None` if pages come
    /// without checksums.
    suspect: Option<PageBitmap>,
    waits: Waits,
    counts: Counts,
    finished: bool,
    /// When the guest began to run, if it does or may.
    began: Option<Duration>,
    /// When the last page came.
    ended: Option<Duration>,
}

impl LateMemory {
    /// Watches all of `memory`, of which the pages `missing` never came, and `suspect` came but
    /// may be damaged; it is `None` if pages come without checksums, also from here on.
    /// `vcpu_threads` are the vCPUs' threads in their order, as gettid(2) has them.
    pub fn new(
        memory: GuestPages,
        missing: PageBitmap,
        suspect: Option<PageBitmap>,
        vcpu_threads: &[u32],
        clock: Arc<dyn Clock>,
    ) -> Result<Self, LateError> {
        let pages = memory.layout().pages();
        let userfault = Arc::new(Userfault::open()?);
        for run in regions(&memory, whole(pages)) {
            userfault.register(&memory, run)?;
        }
        Ok(Self {
            memory,
            userfault,
            clock,
            checked: suspect.is_some(),
            state: Mutex::new(State {
                left: missing.count(),
                missing,
                placing: PageBitmap::new(pages),
                asked: PageBitmap::new(pages),
                suspect,
                waits: Waits::new(vcpu_threads),
                counts: Counts::default(),
                finished: false,
                began: None,
                ended: None,
            }),
            complete: Condvar::new(),
        })
    }

    /// The guest is about to run.
    pub fn guest_runs(&self) {
        let now = self.clock.now();
        self.lock().began = Some(now);
    }

    /// How long the guest has run without all of its memory, or did.
    pub fn late_time(&self) -> Duration {
        let now = self.clock.now();
        let state = self.lock();
        let began = state.began.unwrap_or(now);
        state.ended.unwrap_or(now).saturating_sub(began)
    }

    /// It does not run after all, and never will.
    pub fn guest_never_runs(&self) {
        self.lock().began = None;
    }

    /// The memory, by page number.
    pub fn memory(&self) -> &GuestPages {
        &self.memory
    }

    /// Whether pages come with their checksums.
    pub fn is_checked(&self) -> bool {
        self.checked
    }

    /// How many pages have not come yet.
    pub fn missing(&self) -> u64 {
        self.lock().left
    }

    /// Adds the faults that nobody has read yet to `faults`; each is for [`Self::fault`]. Doesn't
    /// wait: the descriptor of [`AsFd`] is readable when there are any.
    pub fn read_faults(&self, faults: &mut Vec<Fault>) -> Result<(), LateError> {
        Ok(self.userfault.read_faults(faults)?)
    }

    /// Somebody waits for a page, since `now`.
    pub fn fault(&self, fault: Fault, now: Duration) -> Result<FaultAction, LateError> {
        let page = self
            .memory
            .page_at_host_address(fault.address)
            .ok_or(LateError::NotGuestMemory(fault.address))?;
        {
            let mut state = self.lock();
            if state.missing.test(page) {
                state.waits.begin(page, fault.thread, now);
                let known = state.asked.test(page) || state.placing.test(page);
                // One that is being placed counts as asked for too, in case placing fails.
                state.asked.set(page);
                if known {
                    return Ok(FaultAction::Nothing);
                }
                state.counts.requested += 1;
                return Ok(FaultAction::Request(page));
            }
        }
        // It has come. If nothing is mapped there, it came as zeroes and was never touched, or the
        // guest has given it up since.
        let run = PageRun {
            first: page,
            count: 1,
        };
        let placed = self.userfault.zero(&self.memory, run).and_then(|placed| {
            if placed == 0 {
                self.userfault.wake(&self.memory, run)?;
            }
            Ok(placed)
        });
        let mut state = self.lock();
        match placed {
            Ok(placed) => state.counts.served_here += placed,
            // Memory that isn't watched any more has nobody waiting.
            Err(_) if state.finished => {}
            Err(error) => return Err(error.into()),
        }
        Ok(FaultAction::Served)
    }

    /// The pages that somebody waits for and that have not come, in runs that a request can ask
    /// for: after a new connection they are to be asked for again.
    pub fn outstanding(&self) -> Vec<PageRun> {
        let state = self.lock();
        let runs = state.asked.runs(0, state.asked.pages(), MAX_PAGES);
        runs.flat_map(|run| regions(&self.memory, run)).collect()
    }

    /// Whether somebody waits for a page.
    pub fn is_waited_for(&self) -> bool {
        self.lock().asked.next_set(0).is_some()
    }

    /// The pages that have come.
    pub fn arrived(&self) -> PageBitmap {
        let missing = self.lock().missing.clone();
        let mut arrived = PageBitmap::full(missing.pages());
        for run in missing.runs(0, missing.pages(), u64::MAX) {
            arrived.clear_range(run.first, run.count);
        }
        arrived
    }

    /// Whether all pages have come.
    pub fn is_complete(&self) -> bool {
        self.missing() == 0
    }

    /// Waits until all pages have come, or for `timeout`; returns whether they have.
    pub fn wait_complete(&self, timeout: Duration) -> bool {
        let (state, _) = self
            .complete
            .wait_timeout_while(self.lock(), timeout, |state| state.left > 0)
            .unwrap_or_else(PoisonError::into_inner);
        state.left == 0
    }

    /// Lets go of the memory, all of which has come: from now on it is like any other.
    pub fn finish(&self) -> Result<(), LateError> {
        {
            let mut state = self.lock();
            if state.left > 0 {
                return Err(LateError::Unfinished(state.left));
            }
            state.finished = true;
        }
        for run in regions(&self.memory, whole(self.memory.layout().pages())) {
            self.userfault.unregister(&self.memory, run)?;
        }
        Ok(())
    }

    /// How it goes.
    pub fn stats(&self) -> LateStats {
        let now = self.clock.now();
        let state = self.lock();
        let Counts {
            requested,
            from_stream,
            from_requests,
            zero,
            duplicates,
            served_here,
        } = state.counts;
        LateStats {
            missing: state.left,
            requested,
            from_stream,
            from_requests,
            zero,
            duplicates,
            served_here,
            latency: state.waits.latency().clone(),
            vcpu_block_time: state.waits.vcpu_block_time(now),
            block_time: state.waits.block_time(now),
        }
    }

    fn address(&self, page: u64) -> u64 {
        let run = PageRun {
            first: page,
            count: 1,
        };
        self.memory.addresses(run).address
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    /// The claimed pages of a run are in place.
    fn arrive(&mut self, run: PageRun, now: Duration) {
        self.missing.clear_range(run.first, run.count);
        self.placing.clear_range(run.first, run.count);
        self.left -= run.count;
        if self.left == 0 {
            self.ended = Some(now);
        }
        for page in run.first..run.end() {
            if self.asked.test(page) {
                self.asked.clear(page);
                self.waits.end(page, now);
            }
        }
    }
}

impl Drop for LateMemory {
    /// A guest that runs and has not got all of its memory must never find zeroes in its place,
    /// which it could write to its disks: whoever waits, waits until the process ends.
    fn drop(&mut self) {
        let state = self.lock();
        if state.began.is_some() && !state.finished {
            std::mem::forget(Arc::clone(&self.userfault));
        }
    }
}

impl AsFd for LateMemory {
    /// What is readable when there are faults to read.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.userfault.as_fd()
    }
}

fn whole(pages: u64) -> PageRun {
    PageRun {
        first: 0,
        count: pages,
    }
}

/// The parts of a run that are each within one region.
fn regions(memory: &GuestPages, run: PageRun) -> impl Iterator<Item = PageRun> {
    let mut left = run;
    std::iter::from_fn(move || {
        let part = (left.count > 0).then(|| memory.within_region(left))?;
        left.first += part.count;
        left.count -= part.count;
        Some(part)
    })
}
