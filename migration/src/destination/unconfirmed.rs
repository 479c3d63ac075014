//! A guest that is here as a whole, and whose source may not know.

use super::DestinationError;
use super::recovery::{Here, Rendezvous, Returning};
use crate::channel::{Channel, ChannelError};
use crate::codec::Reader;
use crate::frame::Kind;
use crate::protocol::OutOfOrder;

/// What is left of a migration in post-copy whose source has not said that it knows that all has
/// arrived: it may be paused, and wait to be recovered.
#[must_use = "the source may wait for ever"]
pub struct Unconfirmed {
    pub(super) rendezvous: Rendezvous,
    /// The guest's pages.
    pub(super) pages: u64,
}

impl Unconfirmed {
    pub(super) fn new(rendezvous: Rendezvous, pages: u64, reason: &str) -> Self {
        let unconfirmed = Self { rendezvous, pages };
        unconfirmed.pause(reason);
        unconfirmed
    }

    /// Waits for the source to come back, if the migration's user has it do so, and tells it.
    /// Returns when it knows, or nobody waits any more. The guest is not needed for it.
    pub fn serve(mut self) {
        while let Some(returning) = self.rendezvous.meet(&Here::Whole(self.pages)) {
            match tell(returning) {
                Ok(()) => {
                    self.rendezvous.control.finish();
                    tracing::info!(id = ?self.rendezvous.id, "the source knows that all has arrived");
                    return;
                }
                Err(error) => self.pause(&error.to_string()),
            }
        }
    }

    fn pause(&self, reason: &str) {
        let description = Here::Whole(self.pages).describe(reason);
        tracing::warn!(id = ?self.rendezvous.id, "{description}");
        self.rendezvous.control.paused(description);
    }
}

impl std::fmt::Debug for Unconfirmed {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Unconfirmed")
            .field("id", &self.rendezvous.id)
            .finish_non_exhaustive()
    }
}

/// There is nothing to be sent, which the source says, too.
fn tell(returning: Returning) -> Result<(), DestinationError> {
    let Returning {
        mut main, faults, ..
    } = returning;
    main.link().set_until(None);
    let kind = main.receive()?.kind;
    if kind != Kind::Pushed {
        let phase = main.phase();
        return Err(ChannelError::from(OutOfOrder { kind, phase }).into());
    }
    main.decode(kind, |body| Reader::new(body).end())?;
    main.send(Kind::Complete, &[])?;
    confirm(&mut main)?;
    // Not before: the source would take it for a break.
    drop(faults);
    Ok(())
}

/// After COMPLETE: waits until the source says that it has read it. That it closes the connection
/// would not be enough: so does a source that is killed before.
pub(super) fn confirm(main: &mut Channel) -> Result<(), ChannelError> {
    // No other may come.
    main.receive()?;
    main.decode(Kind::Done, |body| Reader::new(body).end())
}
