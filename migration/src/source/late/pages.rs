//! Runs of the stopped guest's pages, as frames.

use crate::bitmap::PageRun;
use crate::channel::{Channel, ChannelError};
use crate::frame::{Kind, MAX_PAGES};
use crate::guest_io::GuestPages;
use crate::layout::PAGE_SIZE;
use crate::message::{AddressRun, encode_pages, encode_zero};

/// Sends runs of pages; its buffers are reused.
#[derive(Debug, Default)]
pub(super) struct Frames {
    runs: Vec<PageRun>,
    wire: Vec<AddressRun>,
    crcs: Vec<u32>,
    zero: Vec<AddressRun>,
    body: Vec<u8>,
}

impl Frames {
    /// Sends all pages of `run`, those that are zero as such. Returns how many bytes that took.
    pub(super) fn send(
        &mut self,
        channel: &mut Channel,
        pages: &GuestPages,
        run: PageRun,
    ) -> Result<u64, ChannelError> {
        let before = channel.sent_bytes();
        self.zero.clear();
        let mut at = run.first;
        while at < run.end() {
            let count = (run.end() - at).min(MAX_PAGES);
            let part = pages.within_region(PageRun { first: at, count });
            at = part.end();
            self.send_part(channel, pages, part)?;
        }
        if !self.zero.is_empty() {
            encode_zero(&self.zero, &mut self.body);
            channel.send(Kind::Zero, &self.body)?;
        }
        Ok(channel.sent_bytes() - before)
    }

    /// At most [`MAX_PAGES`] pages within one region.
    fn send_part(
        &mut self,
        channel: &mut Channel,
        pages: &GuestPages,
        part: PageRun,
    ) -> Result<(), ChannelError> {
        self.runs.clear();
        self.wire.clear();
        self.crcs.clear();
        for page in part.first..part.end() {
            let one = PageRun {
                first: page,
                count: 1,
            };
            let address = pages.addresses(one);
            if pages.is_zero(page) {
                match self.zero.last_mut() {
                    Some(last) if last.address + last.pages * PAGE_SIZE == address.address => {
                        last.pages += 1;
                    }
                    _ => self.zero.push(address),
                }
                continue;
            }
            self.crcs.push(pages.crc(page));
            match (self.runs.last_mut(), self.wire.last_mut()) {
                (Some(run), Some(wire)) if run.end() == page => {
                    run.count += 1;
                    wire.pages += 1;
                }
                _ => {
                    self.runs.push(one);
                    self.wire.push(address);
                }
            }
        }
        if self.runs.is_empty() {
            return Ok(());
        }
        encode_pages(&self.wire, &self.crcs, &mut self.body);
        channel.send_pages(&self.body, pages, &self.runs)
    }
}
