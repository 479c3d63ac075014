//! Putting late pages in place, each by one thread and once.

use super::stats::Counts;
use super::{LateError, LateMemory};
use crate::bitmap::PageRun;
use crate::layout::PAGE_SIZE;
use crate::userfault::UserfaultError;

/// Which way pages came.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Via {
    /// In the source's own order.
    Stream,
    /// In answer to a request.
    FaultChannel,
}

/// A run of pages to be put in place.
#[derive(Clone, Copy, Debug)]
struct Piece {
    run: PageRun,
    /// How many of the pages that came with it are before it.
    at: u64,
}

/// Few enough pages for the lock to be held while each is looked at.
const PAGES_PER_CLAIM: u64 = 4096;

impl LateMemory {
    /// Puts pages in place: those of `runs`, with their contents in `data` and the CRC32 of each in
    /// `crcs`, which is empty if they come without. If one doesn't match, none is placed. Pages that
    /// have come are left alone.
    pub fn place(
        &self,
        runs: &[PageRun],
        data: &[u8],
        crcs: &[u32],
        via: Via,
    ) -> Result<(), LateError> {
        let pages = self.check(runs)?;
        let checksums = if self.checked { pages } else { 0 };
        if data.len() as u64 != pages * PAGE_SIZE || crcs.len() as u64 != checksums {
            return Err(LateError::Uneven {
                pages,
                bytes: data.len(),
                checksums: crcs.len(),
            });
        }
        let numbers = runs.iter().flat_map(|run| run.first..run.end());
        let contents = data.chunks_exact(PAGE_SIZE as usize);
        for ((page, contents), &crc) in numbers.zip(contents).zip(crcs) {
            if crc32fast::hash(contents) != crc {
                let address = self.address(page);
                return Err(LateError::Damaged { address });
            }
        }
        let add = match via {
            Via::Stream => |counts: &mut Counts, pages| counts.from_stream += pages,
            Via::FaultChannel => |counts: &mut Counts, pages| counts.from_requests += pages,
        };
        self.fill(runs, add, |run, at| {
            let from = (at * PAGE_SIZE) as usize;
            let len = (run.count * PAGE_SIZE) as usize;
            let contents = data.get(from..from + len).unwrap_or_default();
            self.userfault.copy(&self.memory, run, contents)
        })
    }

    /// Makes the pages of `runs` zero that have not come.
    pub fn zero(&self, runs: &[PageRun]) -> Result<(), LateError> {
        self.check(runs)?;
        let add = |counts: &mut Counts, pages| counts.zero += pages;
        for &(mut run) in runs {
            while run.count > 0 {
                let now = PageRun {
                    first: run.first,
                    count: run.count.min(PAGES_PER_CLAIM),
                };
                self.fill(&[now], add, |run, _| self.userfault.zero(&self.memory, run))?;
                run.first += now.count;
                run.count -= now.count;
            }
        }
        Ok(())
    }

    /// Checks that the runs are guest memory, and counts their pages.
    fn check(&self, runs: &[PageRun]) -> Result<u64, LateError> {
        let pages = self.memory.layout().pages();
        for run in runs {
            if run.end() > pages {
                return Err(LateError::Outside {
                    first: run.first,
                    end: run.end(),
                    pages,
                });
            }
        }
        Ok(runs.iter().map(|run| run.count).sum())
    }

    /// Puts what is missing of `runs` in place with `put`, which is told a run and how many pages
    /// of `runs` are before it, and returns as [`Userfault::copy`].
    fn fill(
        &self,
        runs: &[PageRun],
        add: impl Fn(&mut Counts, u64),
        put: impl Fn(PageRun, u64) -> Result<u64, UserfaultError>,
    ) -> Result<(), LateError> {
        let pieces = self.claim(runs);
        for (index, piece) in pieces.iter().enumerate() {
            let mut result = Ok(());
            let mut there = 0;
            let mut at = piece.at;
            let mut left = piece.run;
            while left.count > 0 && result.is_ok() {
                let run = self.memory.within_region(left);
                let mut placed = 0;
                result = put(run, at).and_then(|count| {
                    placed = count;
                    if placed < run.count {
                        // The page after them is there, though it was missing.
                        let first = run.first + placed;
                        self.userfault
                            .wake(&self.memory, PageRun { first, count: 1 })?;
                        placed += 1;
                        there += 1;
                    }
                    Ok(())
                });
                at += placed;
                left.first += placed;
                left.count -= placed;
            }
            let done = PageRun {
                first: piece.run.first,
                count: piece.run.count - left.count,
            };
            let now = self.clock.now();
            let mut state = self.lock();
            state.arrive(done, now);
            add(&mut state.counts, done.count - there);
            state.counts.duplicates += there;
            if state.left == 0 {
                self.complete.notify_all();
            }
            if let Err(error) = result {
                for piece in &pieces[index..] {
                    state.placing.clear_range(piece.run.first, piece.run.count);
                }
                return Err(error.into());
            }
        }
        Ok(())
    }

    /// The missing pages of `runs` that no other thread is placing, now claimed by this one.
    fn claim(&self, runs: &[PageRun]) -> Vec<Piece> {
        let mut pieces: Vec<Piece> = Vec::new();
        let mut state = self.lock();
        let pages = runs.iter().flat_map(|run| run.first..run.end());
        for (at, page) in (0..).zip(pages) {
            if !state.missing.test(page) || state.placing.test(page) {
                state.counts.duplicates += 1;
                continue;
            }
            state.placing.set(page);
            match pieces.last_mut() {
                Some(last) if last.run.end() == page && last.at + last.run.count == at => {
                    last.run.count += 1;
                }
                _ => pieces.push(Piece {
                    run: PageRun {
                        first: page,
                        count: 1,
                    },
                    at,
                }),
            }
        }
        pieces
    }
}
