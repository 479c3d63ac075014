//! Post-copy at the destination, until the guest runs. See docs/design.md.

use std::sync::Arc;
use std::time::Instant;

use super::faults::FaultThread;
use super::late::LateMemory;
use super::recovery::Rendezvous;
use super::rest::tell_memory;
use super::{Destination, DestinationError, Job};
use crate::cancel::Cancel;
use crate::channel::{Channel, ChannelError};
use crate::frame::Kind;
use crate::link::Link;
use crate::listener::{Awaited, ListenError, Listener};
use crate::message::{Hello, Id, Missing, POSTCOPY, decode_bits};
use crate::placement::Placement;
use crate::postcopy::Control;
use crate::userfault::Userfault;

/// A migration that may go over into post-copy.
pub(super) struct Late {
    pub(super) rendezvous: Rendezvous,
    /// Breaks the connection in use.
    pub(super) breaker: Cancel,
    /// The fault channel until memory is missing.
    joined: Option<Channel>,
    switched: Option<Switched>,
}

/// What there is once the destination knows that memory will be missing.
struct Switched {
    memory: Arc<LateMemory>,
    faults: FaultThread,
}

impl Late {
    /// Checks whether post-copy is possible here, if the source may want it.
    pub(super) fn check(hello: &Hello, job: &Job) -> Result<Option<Control<Listener>>, String> {
        if hello.required & POSTCOPY == 0 {
            return Ok(None);
        }
        let Some(control) = job.postcopy.clone() else {
            return Err(
                "the source may go over into post-copy, which is not enabled here: set the \
                 capability postcopy-ram at both sides"
                    .to_owned(),
            );
        };
        Userfault::probe().map_err(|error| format!("post-copy is not possible here: {error}"))?;
        Ok(Some(control))
    }

    /// Checks that single pages of guest memory can come late here, and that it can be dropped, as
    /// it will be at the switch, while nothing is in it yet.
    pub(super) fn check_memory(placement: &Placement) -> Result<(), String> {
        Userfault::check(placement.memory()).map_err(|error| {
            format!(
                "post-copy is not possible in the memory that the guest would have here: {error}; \
                 choose other memory at the destination (--memory), or switch the capability \
                 postcopy-ram off at both sides"
            )
        })?;
        placement.drop_all().map_err(|error| {
            format!(
                "post-copy is not possible here: {error}; unlock it, or switch the capability \
                 postcopy-ram off at both sides"
            )
        })
    }

    /// Waits for the fault channel, which the source connects once it is accepted. If
    /// data connections may come as well, they stay with the listener.
    pub(super) fn join(
        control: Control<Listener>,
        id: Id,
        (listener, multifd): (Option<&mut Listener>, bool),
        main: &mut Channel,
        destination: &Destination<'_>,
    ) -> Result<Self, DestinationError> {
        let job = destination.job;
        let listener = listener.ok_or(ListenError::Nobody)?;
        let awaited = Awaited {
            kind: Kind::Join,
            id,
            attempts: 0..=0,
            until: Some(Instant::now() + job.deadlines.handshake),
            beside: Some(main.fd()),
            over: None,
            later: multifd.then_some(Kind::Channel),
        };
        let returned = listener.accept_returning(awaited, &job.cancel, &job.deadlines);
        if let Err(ListenError::Nobody) = returned {
            // The source may have said why.
            main.try_receive()?;
        }
        let returned = returned?;
        let breaker = Cancel::new().map_err(DestinationError::Resources)?;
        let link = Link::new(returned.stream, breaker.clone(), &job.deadlines)
            .map_err(ChannelError::from)?;
        let channel = Channel::returned(link, Arc::clone(&destination.clock), Kind::Join)
            .map_err(ChannelError::from)?;
        Ok(Self {
            rendezvous: Rendezvous {
                id,
                control,
                attempt: 0,
                clock: Arc::clone(&destination.clock),
                deadlines: job.deadlines.clone(),
            },
            breaker,
            joined: Some(channel),
            switched: None,
        })
    }

    /// Whether memory is missing.
    pub(super) fn is_switched(&self) -> bool {
        self.switched.is_some()
    }

    /// MISSING: drops the pages that it names.
    pub(super) fn drop_missing(&self, channel: &Channel) -> Result<(), DestinationError> {
        if let Some(memory) = self.memory() {
            let (first, words) = channel.decode(Kind::Missing, |body| {
                decode_bits(body, memory.memory().layout().pages())
            })?;
            memory.drop_pages(first, &words)?;
        }
        Ok(())
    }

    /// LATE: what is missing is what the source has told, and nothing was damaged.
    pub(super) fn check_told(&self, told: Missing) -> Result<(), DestinationError> {
        if let Some(memory) = self.memory() {
            memory.check_suspects()?;
            let (ours, theirs) = (memory.missing(), told.pages);
            if ours != theirs {
                return Err(DestinationError::Disagreement { ours, theirs });
            }
        }
        Ok(())
    }

    /// Fails if the fault channel broke: whoever waited for memory has been let go without it.
    pub(super) fn check_connected(&self) -> Result<(), DestinationError> {
        match self.breaker.cancelled() {
            Some(reason) => Err(DestinationError::Broken(reason.to_owned())),
            None => Ok(()),
        }
    }

    /// From here on whoever waits for memory waits until it comes. A connection that is broken
    /// already is no reason to fail: the source has handed over, and can be asked again. But nobody
    /// may have been let go without the memory that they waited for.
    pub(super) fn guest_runs(&self, job: &Job) -> Result<(), DestinationError> {
        if let Some(switched) = &self.switched {
            if !switched.faults.guest_runs() {
                let reason = self.breaker.cancelled().unwrap_or_default();
                return Err(DestinationError::Broken(reason.to_owned()));
            }
            switched.memory.guest_runs();
            tell_memory(&switched.memory, job);
        }
        Ok(())
    }

    /// It will not run after all: whoever waits for memory is let go without it.
    pub(super) fn guest_never_runs(&self) {
        if let Some(switched) = &self.switched {
            switched.memory.guest_never_runs();
        }
    }

    pub(super) fn memory(&self) -> Option<&Arc<LateMemory>> {
        self.switched.as_ref().map(|switched| &switched.memory)
    }

    /// Of no more use; what there was to find its source again.
    pub(super) fn end(self) -> Rendezvous {
        self.rendezvous.clone()
    }

    pub(super) fn faults(&self) -> Option<&FaultThread> {
        self.switched.as_ref().map(|switched| &switched.faults)
    }

    /// The first MISSING: from here on what is not there is waited for.
    pub(super) fn switch(
        &mut self,
        placement: Placement,
        destination: &Destination<'_>,
    ) -> Result<(), DestinationError> {
        let (memory, missing, suspect) = placement.into_parts();
        let threads = destination.vm.vcpu_threads();
        let memory = Arc::new(LateMemory::new(
            memory,
            missing,
            suspect,
            &threads,
            Arc::clone(&destination.clock),
        )?);
        let clock = Arc::clone(&destination.clock);
        let patience = destination.job.deadlines.progress;
        let faults = FaultThread::start(Arc::clone(&memory), clock, patience)
            .map_err(DestinationError::Resources)?;
        if let Some(channel) = self.joined.take() {
            faults.attach(channel, self.breaker.clone());
        }
        self.switched = Some(Switched { memory, faults });
        Ok(())
    }
}

impl Drop for Late {
    fn drop(&mut self) {
        let _ = self.breaker.cancel("the migration is over");
        if let Some(switched) = self.switched.take() {
            switched.faults.end();
        }
    }
}
