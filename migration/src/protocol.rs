//! Which frame may follow which: the state machine of a migration, the same at both ends.
//!
//! Each side moves its own copy with every frame that it sends or receives. Frames cross on the
//! way, so the two are not always in the same phase; what a frame may follow is chosen so that a
//! peer that keeps to the protocol is never refused for it.

use crate::frame::Kind;

/// The oldest version of the protocol that this build speaks.
pub const OLDEST_VERSION: u16 = 1;
/// The newest version of the protocol that this build speaks.
pub const NEWEST_VERSION: u16 = 1;

/// How far a migration has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Phase {
    /// Connected.
    Start,
    /// HELLO is there; the destination has not answered.
    Offered,
    /// Accepted: blobs may come.
    Blobs,
    /// Disks and memory come.
    Ram,
    /// What is missing is told, to be sent after the guest has moved.
    Switching,
    /// State sections come.
    State,
    /// END is there; the destination loads.
    Ended,
    /// The destination is ready; the source has not handed over.
    Ready,
    /// GO is there.
    Going,
    /// The guest runs at the destination, and what is missing of its memory comes.
    Late,
    /// All of it has come; the source has not said that it knows.
    Closing,
    /// The fault channel.
    Faults,
    /// A connection that carries pages beside the first one.
    Data,
    /// A migration in post-copy is being resumed: the destination tells what has arrived.
    Resuming,
    /// All of that is told; the source has not agreed.
    Resumed,
    /// Over, well or badly.
    Over,
}

/// A frame that may not come in that phase.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the peer broke the protocol: {} is not allowed in phase {phase:?}", .kind.name())]
pub struct OutOfOrder {
    /// The frame.
    pub kind: Kind,
    /// The phase.
    pub phase: Phase,
}

impl Phase {
    /// The phase after a frame of that kind.
    pub fn after(self, kind: Kind) -> Result<Self, OutOfOrder> {
        use Phase::{
            Blobs, Closing, Data, Ended, Faults, Going, Late, Offered, Over, Ram, Ready, Resumed,
            Resuming, Start, State, Switching,
        };
        Ok(match (self, kind) {
            (Start, Kind::Hello) => Offered,
            (Offered, Kind::Accept) => Blobs,
            (Start | Offered, Kind::Refuse) => Over,
            (Blobs, Kind::Blob) => Blobs,
            (Blobs | Ram, Kind::Pages | Kind::Zero | Kind::Sync) => Ram,
            (Blobs | Ram, Kind::Compressed | Kind::Xbzrle) => Ram,
            (Ram, Kind::Barrier) => Ram,
            (Blobs | Ram, Kind::Blocks | Kind::Flush) => Ram,
            (Ram, Kind::Flushed) => Ram,
            (Blobs | Ram | Switching, Kind::Missing) => Switching,
            (Switching, Kind::Sync | Kind::Blocks | Kind::Flush | Kind::Flushed) => Switching,
            (Switching, Kind::Late) => State,
            (Ram | Switching | State | Ended, Kind::SyncAck) => self,
            (Ram | State, Kind::State) => State,
            (Ram | State, Kind::End) => Ended,
            (Ended, Kind::Ready) => Ready,
            (Ready, Kind::Go) => Going,
            (Going, Kind::Running) => Over,
            (Offered | Blobs | Ram | Switching | State | Ended | Ready, Kind::Cancel) => Over,
            (Offered | Blobs | Ram | Switching | State | Ended | Ready | Going, Kind::Failed) => {
                Over
            }
            (Late, Kind::Pages | Kind::Zero | Kind::Pushed) => Late,
            (Late, Kind::Complete) => Closing,
            (Closing, Kind::Done) => Over,
            (Late, Kind::Gone) => Over,
            (Start, Kind::Join) => Faults,
            (Faults, Kind::Request | Kind::Pages | Kind::Zero) => Faults,
            (Start, Kind::Channel) => Data,
            (Data, Kind::Pages | Kind::Zero | Kind::Compressed | Kind::Barrier) => Data,
            (Start, Kind::Resume) => Resuming,
            (Resuming, Kind::Arrived) => Resuming,
            (Resuming, Kind::Left) => Resumed,
            (Resumed, Kind::Continue) => Late,
            (Resuming | Resumed, Kind::Refuse | Kind::Cancel) => Over,
            _ => return Err(OutOfOrder { kind, phase: self }),
        })
    }
}

/// The newest version that both ranges have, if any.
pub fn common_version(ours: (u16, u16), theirs: (u16, u16)) -> Option<u16> {
    let newest = ours.1.min(theirs.1);
    (newest >= ours.0 && newest >= theirs.0).then_some(newest)
}

#[cfg(test)]
mod tests {
    use super::*;
    use Phase::*;

    const PHASES: [Phase; 16] = [
        Start, Offered, Blobs, Ram, Switching, State, Ended, Ready, Going, Late, Closing, Faults,
        Data, Resuming, Resumed, Over,
    ];

    fn run(kinds: &[Kind]) -> Result<Phase, OutOfOrder> {
        kinds
            .iter()
            .try_fold(Start, |phase, &kind| phase.after(kind))
    }

    #[test]
    fn a_whole_migration() {
        use Kind::*;
        let kinds = [
            Hello,
            Accept,
            Blob,
            Blob,
            Sync,
            Blocks,
            Flush,
            Flushed,
            Pages,
            SyncAck,
            Zero,
            Sync,
            Pages,
            Kind::State,
            End,
            SyncAck,
            Ready,
            Go,
            Running,
        ];
        assert_eq!(run(&kinds), Ok(Over));
    }

    #[test]
    fn a_whole_migration_in_post_copy() {
        use Kind::*;
        let first = [
            Hello, Accept, Blob, Sync, Pages, SyncAck, Missing, Missing, Sync, SyncAck, Blocks,
            Flush, Flushed, Missing, Late,
        ];
        assert_eq!(run(&first), Ok(Phase::State));
        let rest = [Kind::State, End, Ready, Go, Running];
        assert_eq!(run(&[&first[..], &rest].concat()), Ok(Over));
        // Then both sides go on.
        let late = |kinds: &[Kind]| {
            kinds
                .iter()
                .try_fold(Phase::Late, |phase, &kind| phase.after(kind))
        };
        assert_eq!(late(&[Pages, Zero, Pushed, Complete, Done]), Ok(Over));
        assert_eq!(late(&[Pages, Gone]), Ok(Over));
        assert_eq!(run(&[Join, Request, Pages, Zero, Request]), Ok(Faults));
        assert_eq!(
            run(&[Resume, Arrived, Arrived, Left, Continue, Pages]),
            Ok(Phase::Late)
        );
        assert_eq!(run(&[Resume, Left, Cancel]), Ok(Over));
    }

    #[test]
    fn what_belongs_to_post_copy_comes_nowhere_else() {
        let allowed = |kind| {
            PHASES
                .into_iter()
                .filter(move |phase| phase.after(kind).is_ok())
        };
        for (kind, phases) in [
            (Kind::Missing, &[Blobs, Ram, Switching][..]),
            (Kind::Late, &[Switching]),
            (Kind::Pushed, &[Late]),
            (Kind::Complete, &[Late]),
            (Kind::Done, &[Closing]),
            (Kind::Gone, &[Late]),
            (Kind::Join, &[Start]),
            (Kind::Resume, &[Start]),
            (Kind::Request, &[Faults]),
            (Kind::Arrived, &[Resuming]),
            (Kind::Left, &[Resuming]),
            (Kind::Continue, &[Resumed]),
        ] {
            assert!(allowed(kind).eq(phases.iter().copied()), "{kind:?}");
        }
        // Once the guest has moved nobody takes it back.
        for phase in [Late, Closing, Resuming, Resumed, Faults] {
            assert!(phase.after(Kind::Failed).is_err() && phase.after(Kind::Go).is_err());
        }
    }

    #[test]
    fn the_guest_is_handed_over_only_after_ready() {
        for phase in PHASES {
            assert_eq!(phase.after(Kind::Go).is_ok(), phase == Ready, "{phase:?}");
            assert_eq!(phase.after(Kind::Running).is_ok(), phase == Going);
        }
    }

    #[test]
    fn nothing_is_cancelled_after_go_and_nothing_follows_the_end() {
        assert!(Going.after(Kind::Cancel).is_err());
        assert_eq!(Going.after(Kind::Failed), Ok(Over));
        for kind in Kind::ALL {
            assert!(Over.after(kind).is_err());
            // A version may be refused before HELLO is understood.
            let first = matches!(
                kind,
                Kind::Hello | Kind::Refuse | Kind::Join | Kind::Channel | Kind::Resume
            );
            assert_eq!(Start.after(kind).is_ok(), first);
        }
    }

    #[test]
    fn no_memory_before_the_offer_is_accepted_or_after_the_state() {
        for kind in [
            Kind::Pages,
            Kind::Zero,
            Kind::Compressed,
            Kind::Xbzrle,
            Kind::Sync,
            Kind::Blob,
            Kind::Blocks,
            Kind::Flush,
            Kind::Flushed,
        ] {
            for phase in [Start, Offered, State, Ended, Ready, Going] {
                assert!(phase.after(kind).is_err(), "{kind:?} in {phase:?}");
            }
        }
        // After the guest has moved pages come as they are.
        for kind in [Kind::Compressed, Kind::Xbzrle] {
            for phase in [Switching, Late, Faults, Resuming, Resumed] {
                assert!(phase.after(kind).is_err(), "{kind:?} in {phase:?}");
            }
        }
        assert!(Ram.after(Kind::Blob).is_err());
    }

    #[test]
    fn other_connections_carry_pages_and_nothing_else() {
        for kind in Kind::ALL {
            let pages = [Kind::Pages, Kind::Zero, Kind::Compressed, Kind::Barrier];
            assert_eq!(Data.after(kind).is_ok(), pages.contains(&kind), "{kind:?}");
        }
        for phase in PHASES {
            assert_eq!(phase.after(Kind::Channel).is_ok(), phase == Start);
            let here = matches!(phase, Ram | Data);
            assert_eq!(phase.after(Kind::Barrier).is_ok(), here, "{phase:?}");
        }
    }

    #[test]
    fn versions_meet_at_the_newest_common_one() {
        assert_eq!(common_version((1, 3), (2, 5)), Some(3));
        assert_eq!(common_version((2, 5), (1, 3)), Some(3));
        assert_eq!(common_version((1, 1), (2, 5)), None);
        assert_eq!(common_version((4, 5), (2, 3)), None);
    }
}
