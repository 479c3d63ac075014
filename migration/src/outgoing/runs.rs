//! Single pages, in order, as runs.

use crate::bitmap::PageRun;
use crate::guest_io::GuestPages;
use crate::message::AddressRun;

/// Pages in as few runs as there can be, each within one region.
#[derive(Debug, Default)]
pub(super) struct Runs {
    runs: Vec<PageRun>,
    addresses: Vec<AddressRun>,
}

impl Runs {
    pub(super) fn add(&mut self, memory: &GuestPages, page: u64) {
        if let Some(last) = self.runs.last_mut() {
            let longer = PageRun {
                first: last.first,
                count: last.count + 1,
            };
            // Regions that touch in the guest need not touch in this process.
            if last.end() == page && memory.within_region(longer) == longer {
                *last = longer;
                return;
            }
        }
        self.runs.push(PageRun {
            first: page,
            count: 1,
        });
    }

    pub(super) fn as_slice(&self) -> &[PageRun] {
        &self.runs
    }

    /// The same on the wire.
    pub(super) fn addresses(&mut self, memory: &GuestPages) -> &[AddressRun] {
        self.addresses.clear();
        let addresses = self.runs.iter().map(|run| memory.addresses(*run));
        self.addresses.extend(addresses);
        &self.addresses
    }

    pub(super) fn clear(&mut self) {
        self.runs.clear();
    }
}
