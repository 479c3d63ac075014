//! What the device's thread does with the queues.

use std::fmt::Display;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Instant;

use rustix::event::PollFlags;
use tracing::warn;

use super::discard::{DiscardError, discard};
use super::stats::{self, GuestStats};
use super::{F_FREE_PAGE_HINT, F_PAGE_REPORTING, F_STATS_VQ, NAME, PAGE, QUEUES, Shared, lock};
use crate::virtio::activation::Activation;
use crate::virtio::chain::Chain;
use crate::virtio::worker::Handler;

/// The most pages that are taken from one request to inflate: 16 MiB. Linux sends 256.
const MOST_PAGES: usize = 4096;
/// The most buffers that are taken from one report or hint. Linux reports 32.
const MOST_BUFFERS: usize = 1024;
/// How many buffers with statistics are looked at in a row. There should be one.
const MOST_STATS: usize = 8;

/// What a queue is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Role {
    Inflate,
    Deflate,
    Stats,
    Hints,
    Reports,
}

/// Serves the queues.
pub(super) struct Server {
    shared: Arc<Shared>,
    /// By the queue's number.
    roles: [Option<Role>; QUEUES],
    /// The buffer with statistics that is kept until newer ones are wanted.
    stats_buffer: Option<u16>,
    /// Whether that buffer has been given back unused for a pause: its figures are known.
    stats_known: bool,
    warned: bool,
}

impl Server {
    pub(super) fn new(shared: Arc<Shared>) -> Self {
        Self {
            shared,
            roles: [None; QUEUES],
            stats_buffer: None,
            stats_known: false,
            warned: false,
        }
    }

    /// In the specification a queue has its number whether or not those before it are used; most
    /// versions of Linux's driver leave no gaps. Either way they come in this order, and a driver
    /// sets up only those that it uses.
    fn assign_roles(&mut self, activation: &Activation) {
        let optional = [
            (F_STATS_VQ, Role::Stats),
            (F_FREE_PAGE_HINT, Role::Hints),
            (F_PAGE_REPORTING, Role::Reports),
        ];
        let mut optional = optional
            .into_iter()
            .filter_map(|(feature, role)| activation.has(feature).then_some(role));
        for (queue, slot) in self.roles.iter_mut().enumerate() {
            *slot = match queue {
                0 => Some(Role::Inflate),
                1 => Some(Role::Deflate),
                _ if activation.notifier(queue).is_some() => optional.next(),
                _ => None,
            };
        }
    }

    fn inflate(&mut self, activation: &Activation, chain: &Chain) {
        let len = chain.readable_len().min(4 * MOST_PAGES as u64) as usize;
        if chain.readable_len() > len as u64 {
            self.complain(&format_args!(
                "a request names more than {MOST_PAGES} pages: the rest is not given back"
            ));
        }
        let mut bytes = vec![0; len];
        let len = chain.read(activation.memory(), 0, &mut bytes);
        bytes.truncate(len);
        let (numbers, _) = bytes.as_chunks();
        let mut pages: Vec<u64> = numbers
            .iter()
            .map(|number| u32::from_le_bytes(*number).into())
            .collect();
        // Drivers name neighbours one by one, often downwards.
        pages.sort_unstable();
        pages.dedup();
        for run in pages.chunk_by(|a, b| a + 1 == *b) {
            if let Some(first) = run.first() {
                let dropped = discard(activation.memory(), first * PAGE, run.len() as u64 * PAGE);
                self.check(dropped);
            }
        }
    }

    fn report(&mut self, activation: &Activation, chain: &Chain) {
        if self.shared.poisons(activation) {
            return;
        }
        for buffer in chain.writable.iter().take(MOST_BUFFERS) {
            let dropped = discard(activation.memory(), buffer.address.0, buffer.len.into());
            self.check(dropped);
        }
    }

    fn hint(&mut self, activation: &Activation, chain: &Chain) {
        let mut hints = lock(&self.shared.hints);
        if chain.readable_len() > 0 {
            let mut number = [0; 4];
            if chain.read(activation.memory(), 0, &mut number) == number.len() {
                hints.command(u32::from_le_bytes(number));
            }
        }
        for buffer in chain.writable.iter().take(MOST_BUFFERS) {
            hints.add(buffer.address.0, buffer.len.into());
        }
    }

    /// Reads the buffer with statistics, and keeps it.
    fn take_stats(&mut self, activation: &Activation, queue: usize) {
        for _ in 0..MOST_STATS {
            let Some(chain) = activation.pop(queue) else {
                if activation.want_notifications(queue, true) {
                    continue;
                }
                return;
            };
            let mut bytes = [0; stats::MOST];
            let len = chain.read(activation.memory(), 0, &mut bytes);
            let mut stats = lock(&self.shared.stats);
            if !std::mem::take(&mut self.stats_known) || stats.is_none() {
                let bytes = bytes.get(..len).unwrap_or_default();
                *stats = Some(GuestStats::parse(bytes, Instant::now()));
                self.shared.stats_wanted.store(false, Ordering::SeqCst);
            }
            drop(stats);
            if let Some(older) = self.stats_buffer.replace(chain.head) {
                activation.complete(queue, older, 0);
                activation.notify(queue);
            }
        }
        // Later, after a look at whether something else is wanted.
        if let Some(notifier) = activation.notifier(queue) {
            notifier.notify();
        }
    }

    fn check(&mut self, result: Result<(), DiscardError>) {
        if let Err(err) = result {
            self.complain(&err);
        }
    }

    /// Once is enough: a guest could fill the log.
    fn complain(&mut self, what: &dyn Display) {
        if !std::mem::replace(&mut self.warned, true) {
            warn!("{NAME}: {what} (told once)");
        }
    }
}

impl Handler for Server {
    fn start(&mut self, activation: &Arc<Activation>) {
        self.assign_roles(activation);
        for queue in 0..QUEUES {
            self.queue_notified(activation, queue);
        }
    }

    fn queue_notified(&mut self, activation: &Arc<Activation>, queue: usize) {
        let Some(role) = self.roles.get(queue).copied().flatten() else {
            return;
        };
        if role == Role::Stats {
            return self.take_stats(activation, queue);
        }
        activation.serve(queue, |chain| {
            match role {
                Role::Inflate => self.inflate(activation, chain),
                Role::Hints => self.hint(activation, chain),
                Role::Reports => self.report(activation, chain),
                // Dropped pages come back by themselves when they are touched.
                Role::Deflate | Role::Stats => {}
            }
            0
        });
    }

    fn drain(&mut self, activation: &Arc<Activation>) {
        let stats = self
            .roles
            .iter()
            .position(|role| *role == Some(Role::Stats));
        if let (Some(queue), Some(_)) = (stats, self.stats_buffer.take()) {
            activation.put_back(queue);
            self.stats_known = true;
        }
    }

    fn sources(&self) -> Vec<(BorrowedFd<'_>, PollFlags)> {
        vec![(self.shared.wake.as_fd(), PollFlags::IN)]
    }

    /// Newer statistics are wanted.
    fn source_ready(&mut self, activation: &Arc<Activation>, _source: usize) {
        self.shared.wake.consume();
        let stats = self
            .roles
            .iter()
            .position(|role| *role == Some(Role::Stats));
        if self.shared.stats_wanted.load(Ordering::SeqCst)
            && let (Some(queue), Some(buffer)) = (stats, self.stats_buffer.take())
        {
            activation.complete(queue, buffer, 0);
            activation.notify(queue);
        }
    }
}
