//! Runs of the stopped guest's pages, as frames.

use crate::bitmap::PageRun;
use crate::channel::{Channel, ChannelError};
use crate::frame::{Kind, MAX_PAGES};
use crate::guest_io::GuestPages;
use crate::memory_frames::{PagesFrame, ZeroFrame};

/// Sends runs of pages on one connection; its buffers are reused.
#[derive(Debug)]
pub(super) struct Frames {
    data: PagesFrame,
    zero: ZeroFrame,
}

impl Frames {
    /// Pages that are `checked` go with their checksums.
    pub(super) fn new(checked: bool) -> Self {
        Self {
            data: PagesFrame::new(checked),
            zero: ZeroFrame::default(),
        }
    }

    /// Sends all pages of `run`, those that are zero as such. Returns how many bytes that took.
    pub(super) fn send(
        &mut self,
        channel: &mut Channel,
        pages: &GuestPages,
        run: PageRun,
    ) -> Result<u64, ChannelError> {
        let before = channel.sent_bytes();
        for page in run.first..run.end() {
            if pages.is_zero(page) {
                let one = PageRun {
                    first: page,
                    count: 1,
                };
                self.zero.add(pages, one);
                if self.zero.is_full() {
                    self.send_zero(channel, pages)?;
                }
                continue;
            }
            self.data.add(pages, page);
            if self.data.pages() >= MAX_PAGES {
                self.send_data(channel, pages)?;
            }
        }
        self.send_data(channel, pages)?;
        self.send_zero(channel, pages)?;
        Ok(channel.sent_bytes() - before)
    }

    fn send_data(&mut self, channel: &mut Channel, pages: &GuestPages) -> Result<(), ChannelError> {
        if self.data.pages() > 0 {
            let (body, runs) = self.data.encode(pages);
            channel.send_pages(body, pages, runs)?;
            self.data.clear();
        }
        Ok(())
    }

    fn send_zero(&mut self, channel: &mut Channel, pages: &GuestPages) -> Result<(), ChannelError> {
        match self.zero.take(pages) {
            Some(body) => channel.send(Kind::Zero, body),
            None => Ok(()),
        }
    }
}
