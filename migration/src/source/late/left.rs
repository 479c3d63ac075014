//! Which pages are left to be sent after the guest has moved.

use std::sync::{Mutex, MutexGuard, PoisonError};

use crate::bitmap::{PageBitmap, PageRun};

/// The pages that neither of the two threads has taken yet, the one that pushes and the one that
/// answers requests.
#[derive(Debug)]
pub(super) struct Left(Mutex<State>);

#[derive(Debug)]
struct State {
    pages: PageBitmap,
    count: u64,
    /// Where to go on.
    next: u64,
}

impl Left {
    pub(super) fn new(pages: PageBitmap) -> Self {
        Self(Mutex::new(State {
            count: pages.count(),
            pages,
            next: 0,
        }))
    }

    /// How many there are.
    pub(super) fn count(&self) -> u64 {
        self.state().count
    }

    /// Those that `arrived` has though they were never taken, if any.
    pub(super) fn first_unsent_in(&self, arrived: &PageBitmap) -> Option<u64> {
        let state = self.state();
        let all = state.pages.pages();
        let mut runs = state.pages.runs(0, all, u64::MAX);
        runs.find_map(|run| arrived.next_set_before(run.first, run.end()))
    }

    /// Takes the next run, of at most `most` pages.
    pub(super) fn take_next(&self, most: u64) -> Option<PageRun> {
        let mut state = self.state();
        let first = state.pages.next_set(state.next);
        let first = first.or_else(|| state.pages.next_set(0))?;
        let end = first.saturating_add(most).min(state.pages.pages());
        let end = state.pages.next_clear_before(first, end).unwrap_or(end);
        Some(state.take(PageRun {
            first,
            count: end - first,
        }))
    }

    /// Takes what a request asks for, and as much of what follows as is left, at most `ahead`
    /// pages; what is pushed next comes after it. Of what was asked for all is given, even if it
    /// was taken before: it may be on its way in the stream, where it is late.
    pub(super) fn take_wanted(&self, wanted: PageRun, ahead: u64) -> PageRun {
        let mut state = self.state();
        let end = wanted.end().saturating_add(ahead).min(state.pages.pages());
        let end = state
            .pages
            .next_clear_before(wanted.end(), end)
            .unwrap_or(end);
        let end = end.max(wanted.end());
        state.take(PageRun {
            first: wanted.first,
            count: end - wanted.first,
        })
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    fn take(&mut self, run: PageRun) -> PageRun {
        self.count -= self.pages.count_range(run.first, run.count);
        self.pages.clear_range(run.first, run.count);
        self.next = run.end();
        run
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(first: u64, count: u64) -> PageRun {
        PageRun { first, count }
    }

    #[test]
    fn what_follows_a_request_is_next_and_all_is_taken_once() {
        let mut pages = PageBitmap::full(300);
        pages.clear_range(100, 20);
        let left = Left::new(pages);
        assert_eq!(left.take_next(64), Some(run(0, 64)));
        assert_eq!(left.take_wanted(run(200, 1), 7), run(200, 8));
        assert_eq!(left.take_next(64), Some(run(208, 64)));
        assert_eq!(left.take_next(64), Some(run(272, 28)));
        // Around the end; what is not in the set is left out.
        assert_eq!(left.take_next(64), Some(run(64, 36)));
        assert_eq!(left.take_next(u64::MAX), Some(run(120, 80)));
        assert_eq!((left.take_next(64), left.count()), (None, 0));
        assert_eq!(left.take_wanted(run(299, 1), 7), run(299, 1));
        assert_eq!(left.take_wanted(run(5, 2), 7), run(5, 2));
    }

    #[test]
    fn what_was_never_sent_cannot_have_arrived() {
        let left = Left::new(PageBitmap::full(200));
        left.take_next(70);
        let mut arrived = PageBitmap::new(200);
        arrived.set_range(0, 70);
        assert_eq!(left.first_unsent_in(&arrived), None);
        arrived.set(130);
        assert_eq!(left.first_unsent_in(&arrived), Some(130));
    }
}
