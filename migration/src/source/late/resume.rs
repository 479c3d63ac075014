//! Going on over another connection: both sides agree on what has arrived.

use std::sync::Arc;
use std::time::Instant;

use super::super::{Source, SourceError};
use super::Late;
use super::left::Left;
use crate::bitmap::PageBitmap;
use crate::channel::{Channel, ChannelError};
use crate::frame::Kind;
use crate::message::{Missing, Return, decode_bits};
use crate::uri::Uri;

/// Why a recovery failed; it may be tried again.
#[derive(Debug, thiserror::Error)]
pub(super) enum ResumeError {
    #[error(transparent)]
    Open(#[from] SourceError),
    #[error(transparent)]
    Channel(#[from] ChannelError),
    #[error("no descriptors for another connection: {0}")]
    Resources(std::io::Error),
    #[error("the destination says that page {0} has arrived, which was never sent")]
    NeverSent(u64),
    #[error("the destination misses page {0}, which it had before the guest moved")]
    Lost(u64),
    #[error("the destination says that it misses {said} pages, but {missing} have not arrived")]
    Miscounted { said: u64, missing: u64 },
}

impl Source<'_> {
    /// Connects again. The main channel, past the agreement.
    pub(super) fn resume(&self, uri: &Uri, late: &mut Late) -> Result<Channel, ResumeError> {
        late.attempt += 1;
        let returning = Return {
            id: self.id,
            attempt: late.attempt,
        };
        let deadline = Some(Instant::now() + self.job.deadlines.resume);
        let mut main = self.open(uri, &late.breaker, Kind::Resume, returning)?;
        main.link().set_until(deadline);

        let mut arrived = PageBitmap::new(late.told.pages());
        while main.receive()?.kind == Kind::Arrived {
            let (first, words) =
                main.decode(Kind::Arrived, |body| decode_bits(body, late.told.pages()))?;
            arrived.or_words(first, &words);
        }
        // The order of frames allows nothing else than LEFT.
        let said = main.decode(Kind::Left, Missing::decode)?.pages;
        // Only who has the guest knows of this.
        late.confirmed = true;
        self.job.progress.update(|snapshot| {
            snapshot.postcopy.get_or_insert_default().confirmed = true;
        });
        let missing = check(&arrived, said, late)?;

        let mut faults = self.open(uri, &late.breaker, Kind::Join, returning)?;
        faults.link().set_until(deadline);
        let pages = missing.count();
        late.left = Arc::new(Left::new(missing));
        late.serve(faults).map_err(ResumeError::Resources)?;
        let mut body = Vec::new();
        Missing { pages }.encode(&mut body);
        main.send(Kind::Continue, &body)?;
        Ok(main)
    }
}

/// What is missing, if what the destination says can be.
fn check(arrived: &PageBitmap, said: u64, late: &Late) -> Result<PageBitmap, ResumeError> {
    if let Some(page) = late.left.first_unsent_in(arrived) {
        return Err(ResumeError::NeverSent(page));
    }
    let mut missing = PageBitmap::full(arrived.pages());
    missing.remove(arrived);
    let mut lost = missing.clone();
    lost.remove(&late.told);
    if let Some(page) = lost.next_set(0) {
        return Err(ResumeError::Lost(page));
    }
    match missing.count() {
        missing if missing != said => Err(ResumeError::Miscounted { said, missing }),
        _ => Ok(missing),
    }
}
