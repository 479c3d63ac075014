//! The entropy device (section 5.4): the guest's buffers are filled with random bytes of the
//! host's.

use std::io;
use std::sync::Arc;

use rustix::rand::{GetRandomFlags, getrandom};
use tracing::error;

use super::activation::Activation;
use super::chain::Chain;
use super::worker::{Handler, Worker};
use super::{DeviceKind, VirtioDevice};
use crate::state::SaveRestore;

const NAME: &str = "virtio-rng";
const QUEUE: usize = 0;
const QUEUE_SIZE: u16 = 64;
/// The most bytes that one request is given; a driver that wants more asks again.
const MOST: usize = 64 << 10;

/// An entropy device.
#[derive(Debug)]
pub struct Rng {
    worker: Worker,
}

impl Rng {
    /// A device as after power-on.
    pub fn new() -> io::Result<Self> {
        Ok(Self {
            worker: Worker::spawn(NAME, &[QUEUE], Source)?,
        })
    }
}

impl VirtioDevice for Rng {
    fn kind(&self) -> DeviceKind {
        DeviceKind::Rng
    }

    fn name(&self) -> &str {
        NAME
    }

    fn features(&self) -> u64 {
        0
    }

    fn worker(&self) -> &Worker {
        &self.worker
    }

    fn queue_sizes(&self) -> Vec<u16> {
        vec![QUEUE_SIZE]
    }

    fn read_config(&self, _offset: u64, data: &mut [u8]) {
        data.fill(0);
    }

    fn reset(&self) {
        self.worker.deactivate();
    }

    fn saved_state(&self) -> Option<&dyn SaveRestore> {
        // Nothing but its queue.
        None
    }

    fn migration_blocker(&self) -> Option<String> {
        None
    }
}

/// What fills the buffers.
struct Source;

impl Source {
    fn fill(activation: &Activation, chain: &Chain) -> u32 {
        let len = chain.writable_len().min(MOST as u64) as usize;
        let mut bytes = vec![0; len];
        let mut filled = 0;
        while let Some(rest) = bytes.get_mut(filled..).filter(|rest| !rest.is_empty()) {
            match getrandom(rest, GetRandomFlags::empty()) {
                Ok(count) => filled += count,
                Err(rustix::io::Errno::INTR) => {}
                Err(err) => {
                    error!(%err, "{NAME}: no random bytes from the host");
                    break;
                }
            }
        }
        bytes.truncate(filled);
        chain.write(activation.memory(), 0, &bytes) as u32
    }
}

impl Handler for Source {
    fn start(&mut self, activation: &Arc<Activation>) {
        self.queue_notified(activation, QUEUE);
    }

    fn queue_notified(&mut self, activation: &Arc<Activation>, queue: usize) {
        activation.serve(queue, |chain| Self::fill(activation, chain));
    }

    fn drain(&mut self, _activation: &Arc<Activation>) {
        // Each request is finished when the next is taken.
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::virtio::test_driver::TestDriver;

    #[test]
    fn buffers_are_filled_with_bytes_that_differ() {
        let driver = TestDriver::new(Arc::new(Rng::new().unwrap()));
        driver.start(0);
        driver.run();
        let mut seen = Vec::new();
        for len in [1, 64, 4096] {
            let used = driver.request(QUEUE, &[], &[len]);
            assert_eq!(used.written, len);
            seen.push(used.data);
        }
        let all: std::collections::HashSet<u8> = seen.concat().into_iter().collect();
        assert!(
            all.len() > 200,
            "4161 random bytes have few values: {}",
            all.len()
        );
    }
}
