//! Post-copy at the source: the guest is at the destination, or about to be, and its memory
//! follows. See docs/design.md.

mod left;
mod pages;
mod push;
mod resume;
mod serve;

use std::io;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use self::left::Left;
use self::pages::Frames;
use self::push::Over;
use self::serve::{Requests, Server};
use super::{Contents, Source, SourceError};
use crate::bitmap::PageBitmap;
use crate::cancel::Cancel;
use crate::channel::{Channel, ChannelError};
use crate::connect::connect;
use crate::frame::Kind;
use crate::guest_io::GuestPages;
use crate::link::Link;
use crate::message::{Gone, MAX_BIT_PAGES, Missing, Preamble, Return, UNCHECKED, encode_bits};
use crate::postcopy::Control;
use crate::session::Session;
use crate::uri::Uri;

/// What is told of dirty pages before the stop ends when no more than this are new: telling and
/// dropping them takes well below a millisecond.
const FEW: u64 = 512;

/// It ends after so many looks in any case.
const MOST_LOOKS: u32 = 4;

/// A migration that may go over into post-copy: it has its fault channel.
pub(super) struct Late {
    control: Control<Uri>,
    /// Breaks the connection in use.
    breaker: Cancel,
    /// The fault channel until it is served.
    faults: Option<Channel>,
    server: Option<Server>,
    counts: Arc<Requests>,
    /// The pages that the destination was told are missing.
    told: PageBitmap,
    pages: Arc<GuestPages>,
    left: Arc<Left>,
    /// Whether each page goes with its checksum.
    checked: bool,
    /// Counts the connections.
    attempt: u32,
    /// The destination has said that the guest is there.
    confirmed: bool,
    /// When the guest moved.
    began: Duration,
    /// Bytes sent before.
    precopy_bytes: u64,
    /// Bytes sent since, on connections that are gone.
    sent_before: u64,
    /// Bytes that the connection in use had sent before.
    base: u64,
}

/// How post-copy ended.
pub(super) enum LateEnd {
    /// All of the guest's memory is at the destination.
    Complete,
    /// The guest has ended there or is lost, and needs no more.
    Gone(Gone),
    /// Nobody waits any more.
    Abandoned(String),
}

impl Source<'_> {
    /// Connects the fault channel, at the beginning.
    pub(super) fn join(
        &mut self,
        session: &Session,
        uri: Option<&Uri>,
    ) -> Result<Option<Late>, SourceError> {
        let Some(control) = self.job.postcopy.clone() else {
            return Ok(None);
        };
        let Some(uri) = uri else {
            return Err(SourceError::NoAddress);
        };
        let cancel = self.job.cancel.clone();
        let returning = Return {
            id: self.id,
            attempt: 0,
        };
        let faults = self.open(uri, &cancel, Kind::Join, returning)?;
        let pages = GuestPages::new(self.vm.ram())?;
        let count = pages.layout().pages();
        Ok(Some(Late {
            control,
            breaker: Cancel::new().map_err(SourceError::Breaker)?,
            faults: Some(faults),
            server: None,
            counts: Arc::default(),
            told: PageBitmap::new(count),
            pages: Arc::new(pages),
            left: Arc::new(Left::new(PageBitmap::new(count))),
            checked: !session.picked(UNCHECKED),
            attempt: 0,
            confirmed: false,
            began: Duration::ZERO,
            precopy_bytes: 0,
            sent_before: 0,
            base: 0,
        }))
    }

    /// A connection of a migration that the destination knows.
    fn open(
        &self,
        uri: &Uri,
        cancel: &Cancel,
        kind: Kind,
        returning: Return,
    ) -> Result<Channel, SourceError> {
        let stream = connect(uri, cancel, &self.job.deadlines)?;
        let link =
            Link::new(stream, cancel.clone(), &self.job.deadlines).map_err(ChannelError::from)?;
        let mut channel = Channel::new(link, Arc::clone(&self.clock), kind == Kind::Resume);
        let mut body = Vec::new();
        returning.encode(&mut body);
        channel.send_raw(&Preamble::OURS.encode())?;
        channel.send(kind, &body)?;
        Ok(channel)
    }

    /// Tells the destination what it will not have when the guest moves, while the guest still
    /// runs: dropping what is stale takes time there.
    pub(super) fn tell_missing(
        &mut self,
        session: &mut Session,
        guest: &mut Contents,
        late: &mut Late,
        round: u64,
    ) -> Result<(), SourceError> {
        for look in 0..MOST_LOOKS {
            self.harvest(guest)?;
            let new = late.tell_new(&guest.memory.pending, &mut session.channel, look == 0)?;
            let mark = session.mark(round)?;
            session.wait_for(mark)?;
            tracing::debug!(look, new, told = late.told.count(), "told what is missing");
            if new <= FEW {
                break;
            }
        }
        Ok(())
    }

    /// Tells what has become dirty since, with the guest stopped; from here on the destination's
    /// requests are answered.
    pub(super) fn tell_late(
        &mut self,
        session: &mut Session,
        guest: &mut Contents,
        late: &mut Late,
    ) -> Result<(), SourceError> {
        let channel = &mut session.channel;
        late.tell_new(&guest.memory.pending, channel, false)?;
        let mut body = Vec::new();
        let pages = late.told.count();
        Missing { pages }.encode(&mut body);
        channel.send(Kind::Late, &body)?;
        late.left = Arc::new(Left::new(late.told.clone()));
        if let Some(faults) = late.faults.take() {
            late.serve(faults).map_err(SourceError::Breaker)?;
        }
        Ok(())
    }

    /// Sends the rest of the guest's memory, over as many connections as it takes. `broken` is why
    /// the first one is of no more use already.
    pub(super) fn run_late(
        &mut self,
        main: Channel,
        late: &mut Late,
        broken: Option<SourceError>,
    ) -> LateEnd {
        late.began = self.clock.now();
        late.precopy_bytes = self.job.progress.snapshot().ram.transferred;
        late.base = main.sent_bytes();
        late.confirmed = broken.is_none();
        self.tell_late_progress(&main, late);
        let mut why = broken.map(|error| error.to_string());
        let mut main = Some(main);
        loop {
            if let (Some(channel), None) = (&mut main, &why) {
                channel.enter_late();
                channel.link().set_until(None);
                channel.link().set_cancel(late.breaker.clone());
                late.control.activate(late.breaker.clone());
                match self.push(channel, late) {
                    Ok(over) => {
                        late.control.finish();
                        if let Over::Complete = over {
                            // It has read all there was, so this needs no waiting; and nothing can
                            // break any more.
                            channel.link().ignore_cancel();
                            channel.send_now(Kind::Done, &[]);
                        }
                        channel.link().finish();
                        late.stop_serving("post-copy is over");
                        return match over {
                            Over::Complete => LateEnd::Complete,
                            Over::Gone(gone) => LateEnd::Gone(gone),
                        };
                    }
                    Err(error) => why = Some(error.to_string()),
                }
            }
            let reason = why.take().unwrap_or_default();
            late.stop_serving(&reason);
            if let Some(channel) = main.take() {
                channel.shut_down();
                late.sent_before += channel.sent_bytes() - std::mem::take(&mut late.base);
            }
            if let Some(ended) = late.control.ended() {
                return LateEnd::Abandoned(ended.reason);
            }
            let where_it_is = if late.confirmed {
                "The guest is at the destination; recover with migrate_recover there and migrate \
                 -r here. If the destination is dead, the guest is lost, and its memory of before \
                 is kept here"
            } else {
                "The destination has not confirmed that the guest runs there. If it does, recover \
                 with migrate_recover there and migrate -r here; if you know that it does not, \
                 'cont' runs it here"
            };
            let left = late.left.count();
            tracing::error!(id = ?self.id, left, "post-copy is paused: {reason}. {where_it_is}");
            late.control.paused(reason);
            let Some((uri, breaker)) = late.control.wait() else {
                let ended = late.control.ended();
                return LateEnd::Abandoned(ended.map_or_else(String::new, |ended| ended.reason));
            };
            late.breaker = breaker;
            match self.resume(&uri, late) {
                Ok(channel) => {
                    tracing::info!(id = ?self.id, left = late.left.count(), "post-copy goes on");
                    self.job.progress.update(|snapshot| snapshot.error = None);
                    main = Some(channel);
                }
                Err(error) => why = Some(format!("cannot recover by '{uri}': {error}")),
            }
        }
    }

    fn tell_late_progress(&self, channel: &Channel, late: &Late) {
        let left = late.left.count();
        let (requests, by_request) = (
            late.counts.requests.load(Ordering::Relaxed),
            late.counts.bytes.load(Ordering::Relaxed),
        );
        let bytes = late.sent_before + channel.sent_bytes() - late.base + by_request;
        let phase_time = self.clock.now().saturating_sub(late.began);
        self.job.progress.update(|snapshot| {
            snapshot.ram.remaining = left * crate::layout::PAGE_SIZE;
            snapshot.ram.transferred = late.precopy_bytes + bytes;
            let postcopy = snapshot.postcopy.get_or_insert_default();
            postcopy.phase_time = phase_time;
            postcopy.requests = requests;
            postcopy.requested_pages = late.counts.pages.load(Ordering::Relaxed);
            postcopy.bytes = bytes;
            postcopy.missing_pages = left;
            postcopy.confirmed = late.confirmed;
        });
    }
}

impl Late {
    /// Tells of the pages in `pending` that were not told yet; returns how many. The first time
    /// with at least one frame.
    fn tell_new(
        &mut self,
        pending: &PageBitmap,
        channel: &mut Channel,
        first_time: bool,
    ) -> Result<u64, ChannelError> {
        let mut new = pending.clone();
        new.remove(&self.told);
        self.told.or(&new);
        let mut body = Vec::new();
        let mut any = false;
        for first in (0..new.pages()).step_by(MAX_BIT_PAGES as usize) {
            if encode_bits(&new, first, &mut body) {
                channel.send(Kind::Missing, &body)?;
                any = true;
            }
        }
        if first_time && !any {
            // The destination prepares when the first one comes.
            body.clear();
            body.extend([0; 16]);
            channel.send(Kind::Missing, &body)?;
        }
        Ok(new.count())
    }

    /// Whether the destination was told what comes after the guest.
    pub(super) fn is_switched(&self) -> bool {
        self.server.is_some()
    }

    /// Fails if the fault channel is gone, or nobody would send the rest.
    pub(super) fn check_connected(&self) -> Result<(), SourceError> {
        if let Some(ended) = self.control.ended() {
            return Err(SourceError::Cancelled(ended.reason));
        }
        match self.breaker.cancelled() {
            Some(reason) => Err(SourceError::Broken(reason.to_owned())),
            None => Ok(()),
        }
    }

    fn serve(&mut self, faults: Channel) -> io::Result<()> {
        let server = Server::start(
            faults,
            self.breaker.clone(),
            Arc::clone(&self.pages),
            Arc::clone(&self.left),
            Arc::clone(&self.counts),
            Frames::new(self.checked),
        )?;
        self.server = Some(server);
        Ok(())
    }

    fn stop_serving(&mut self, reason: &str) {
        let _ = self.breaker.cancel(reason);
        if let Some(server) = self.server.take() {
            server.join();
        }
    }
}

impl Drop for Late {
    fn drop(&mut self) {
        self.stop_serving("the migration is over");
    }
}

/// Why a connection of a post-copy is of no more use.
#[derive(Debug, thiserror::Error)]
enum LateError {
    #[error(transparent)]
    Channel(#[from] ChannelError),
    #[error("the destination says that all has arrived, but {0} pages were never sent")]
    TooEarly(u64),
}
