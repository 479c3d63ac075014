//! The source's end of the fault channel: pages that the guest waits for.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use super::left::Left;
use super::pages::Frames;
use crate::bitmap::PageRun;
use crate::cancel::Cancel;
use crate::channel::{Channel, ChannelError};
use crate::codec::DecodeError;
use crate::frame::{Kind, MAX_PAGES};
use crate::guest_io::GuestPages;
use crate::message::{AddressRun, Request};
use crate::priority;
use crate::protocol::OutOfOrder;

/// How many pages that follow one that was asked for go with it, if they are left: a guest that
/// goes through its memory then waits once for all of them, and one page more costs little beside
/// the way there and back.
const AHEAD: u64 = 7;

/// A guest may need nothing for any time: how long is not for the channel to judge.
const FOREVER: Duration = Duration::from_secs(u32::MAX as u64);

/// What was asked for, over all connections of a migration.
#[derive(Debug, Default)]
pub(super) struct Requests {
    pub(super) requests: AtomicU64,
    pub(super) pages: AtomicU64,
    pub(super) bytes: AtomicU64,
}

/// The thread that answers. Breaks the connection when it ends for another reason than that.
pub(super) struct Server {
    thread: JoinHandle<()>,
}

struct Serving {
    channel: Channel,
    pages: Arc<GuestPages>,
    left: Arc<Left>,
    counts: Arc<Requests>,
    frames: Frames,
}

impl Server {
    pub(super) fn start(
        mut channel: Channel,
        breaker: Cancel,
        pages: Arc<GuestPages>,
        left: Arc<Left>,
        counts: Arc<Requests>,
        frames: Frames,
    ) -> io::Result<Self> {
        channel.link().set_cancel(breaker.clone());
        channel.link().set_until(None);
        channel.link().set_patience(FOREVER);
        let mut serving = Serving {
            channel,
            pages,
            left,
            counts,
            frames,
        };
        let thread = thread::Builder::new()
            .name("postcopy-serve".to_owned())
            .spawn(move || {
                priority::urgent();
                let Err(error) = serving.serve();
                tracing::debug!("the fault channel ends: {error}");
                let _ = breaker.cancel(&format!("the fault channel broke: {error}"));
            })?;
        Ok(Self { thread })
    }

    /// Waits for its end, once the connection is broken.
    pub(super) fn join(self) {
        let _ = self.thread.join();
    }
}

impl Serving {
    fn serve(&mut self) -> Result<std::convert::Infallible, ChannelError> {
        loop {
            let kind = self.channel.receive()?.kind;
            if kind != Kind::Request {
                let phase = self.channel.phase();
                return Err(OutOfOrder { kind, phase }.into());
            }
            let request = self.channel.decode(kind, Request::decode)?;
            let wanted = self.resolve(request)?;
            let run = self.left.take_wanted(wanted, AHEAD);
            let bytes = self.frames.send(&mut self.channel, &self.pages, run)?;
            self.counts.requests.fetch_add(1, Ordering::Relaxed);
            let pages = request.pages.into();
            self.counts.pages.fetch_add(pages, Ordering::Relaxed);
            self.counts.bytes.fetch_add(bytes, Ordering::Relaxed);
        }
    }

    fn resolve(&self, request: Request) -> Result<PageRun, ChannelError> {
        let run = AddressRun {
            address: request.address,
            pages: request.pages.into(),
        };
        let kind = Kind::Request;
        DecodeError::within("pages in a request", run.pages, MAX_PAGES)
            .map_err(|error| ChannelError::Body { kind, error })?;
        self.pages
            .resolve(run)
            .map_err(|error| ChannelError::Request(error.to_string()))
    }
}
