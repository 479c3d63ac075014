//! Telling the network, time and again, where a guest is now: switches that have not heard of it
//! send its packets to where it was.

use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread;
use std::time::Duration;

use tracing::warn;

use crate::control::command::AnnounceParameters;
use crate::machine::Machine;

/// An announcement under way. It ends when this is dropped: nothing is sent from then on.
pub(super) struct Announcement(Arc<Shared>);

#[derive(Default)]
struct Shared {
    /// Held while something is sent.
    over: Mutex<bool>,
    changed: Condvar,
}

impl Announcement {
    /// Announces the guest's network cards of these names, or all: at once, and then as often as
    /// the parameters say, on a thread of its own.
    pub(super) fn start(
        guest: &Arc<Machine>,
        interfaces: Option<Vec<String>>,
        parameters: AnnounceParameters,
    ) -> Option<Self> {
        if guest.devices().nets().is_empty() {
            return None;
        }
        let shared = Arc::new(Shared::default());
        let announcing = Arc::clone(&shared);
        let guest = Arc::clone(guest);
        let announce = move || {
            let is_meant = |name: &String| interfaces.as_ref().is_none_or(|i| i.contains(name));
            announcing.run(parameters, || {
                for (_, net) in guest.devices().nets().iter().filter(|(n, _)| is_meant(n)) {
                    net.announce();
                }
            });
        };
        match thread::Builder::new()
            .name("announce".to_owned())
            .spawn(announce)
        {
            Ok(_) => Some(Self(shared)),
            Err(err) => {
                warn!(%err, "the guest can't be announced to the network");
                None
            }
        }
    }
}

impl Drop for Announcement {
    fn drop(&mut self) {
        *self.0.over.lock().unwrap_or_else(PoisonError::into_inner) = true;
        self.0.changed.notify_all();
    }
}

impl Shared {
    fn run(&self, parameters: AnnounceParameters, mut announce: impl FnMut()) {
        let mut over = self.over.lock().unwrap_or_else(PoisonError::into_inner);
        for round in 0..parameters.rounds {
            if *over {
                return;
            }
            announce();
            if round + 1 == parameters.rounds {
                return;
            }
            let delay = Duration::from_millis(parameters.delay(round));
            over = self
                .changed
                .wait_timeout_while(over, delay, |over| !*over)
                .unwrap_or_else(PoisonError::into_inner)
                .0;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parameters(rounds: u64, initial: u64) -> AnnounceParameters {
        AnnounceParameters {
            initial,
            max: initial,
            rounds,
            step: 0,
        }
    }

    #[test]
    fn it_announces_as_often_as_asked() {
        let mut times = 0;
        Shared::default().run(parameters(3, 1), || times += 1);
        assert_eq!(times, 3);
        Shared::default().run(parameters(0, 1), || unreachable!());
    }

    #[test]
    fn nothing_is_announced_after_the_end() {
        let shared = Arc::new(Shared::default());
        let running = Arc::clone(&shared);
        let (announced, announcements) = std::sync::mpsc::channel();
        let thread = thread::spawn(move || {
            // It would take a day.
            running.run(parameters(1000, 86_400), || announced.send(()).unwrap());
        });
        announcements.recv().unwrap();
        drop(Announcement(shared));
        thread.join().unwrap();
        assert!(announcements.recv().is_err(), "it was told once");
    }
}
