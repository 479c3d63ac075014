//! Dropping what came before the switch and is stale.

use super::{LateError, LateMemory, regions};
use crate::bitmap::{PageBitmap, PageRun};
use crate::placement::Incomplete;

impl LateMemory {
    /// Drops the pages whose bits are set in `words`, of which bit 0 is the page `first`, a
    /// multiple of 64: they are stale, or never came, and count as missing from now on. To be
    /// called before the first page is placed, and before anybody touches memory.
    pub fn drop_pages(&self, first: u64, words: &[u64]) -> Result<(), LateError> {
        let pages = self.memory.layout().pages();
        if !first.is_multiple_of(64) {
            return Err(LateError::Unaligned(first));
        }
        let told = words.len() as u64 * 64;
        let count = told.min(pages.saturating_sub(first));
        let excess = words.last().map_or(0, |word| match count % 64 {
            0 => 0,
            used => word >> used,
        });
        if told.saturating_sub(count) >= 64 || excess != 0 {
            return Err(LateError::Outside {
                first,
                end: first.saturating_add(told),
                pages,
            });
        }
        let set = |words: &[u64]| {
            let mut set = PageBitmap::new(count);
            set.or_words(0, words);
            set
        };
        let told_pages = set(words);
        let (mut fresh, mut absent) = (Vec::new(), Vec::new());
        {
            let mut state = self.lock();
            let known = state.missing.words(first, count).unwrap_or_default();
            for (&told, &known) in words.iter().zip(known) {
                fresh.push(told & !known);
                absent.push(told | known);
            }
            state.missing.or_words(first, words);
            for run in told_pages.runs(0, count, count) {
                if let Some(suspect) = &mut state.suspect {
                    suspect.clear_range(first + run.first, run.count);
                }
            }
            state.left += set(&fresh).count();
        }
        // Also what never came: a huge page that the kernel gave to a neighbour is there, as
        // zeroes that the guest would take for its own. And pages that are missing anyway join
        // the runs.
        for run in set(&absent).runs(0, count, count) {
            if told_pages.count_range(run.first, run.count) > 0 {
                let run = PageRun {
                    first: first + run.first,
                    count: run.count,
                };
                for run in regions(&self.memory, run) {
                    self.memory.discard(run)?;
                }
            }
        }
        Ok(())
    }

    /// Whether some page was damaged on the way before the switch, and was not dropped since.
    pub fn check_suspects(&self) -> Result<(), Incomplete> {
        let state = self.lock();
        let Some(suspect) = &state.suspect else {
            return Ok(());
        };
        match suspect.next_set(0) {
            None => Ok(()),
            Some(page) => Err(Incomplete::Damaged {
                count: suspect.count(),
                address: self.address(page),
            }),
        }
    }
}
