//! The block device (section 5.2), on a [`Disk`].
//!
//! A request is decoded by `request`, which carries it out on the disk's image, straight from and
//! to the guest's memory (`guest_slices`); `engine` decides on which thread. When the machine
//! stops, requests that have begun are finished, and those that have not are held, as are those
//! for which the host had no space: they go with the saved state, and are done when it runs on.

mod config;
mod engine;
pub mod errors;
mod guest_slices;
mod request;
mod saved;
#[cfg(test)]
mod tests;

use std::io;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use self::engine::{Engine, Server};
use self::errors::ErrorSink;
use super::activation::Activation;
use super::worker::Worker;
use super::{DeviceKind, VirtioDevice, read_config_bytes};
use crate::disk::Disk;
use crate::state::SaveRestore;

/// The most characters of a serial number, in bytes.
pub const SERIAL_LEN: usize = 20;

const QUEUE: usize = 0;
const QUEUE_SIZE: u16 = 256;

/// The unit of places and sizes in requests, in bytes.
const SECTOR: u64 = 512;

const F_SEG_MAX: u64 = 1 << 2;
const F_RO: u64 = 1 << 5;
const F_BLK_SIZE: u64 = 1 << 6;
const F_FLUSH: u64 = 1 << 9;
const F_TOPOLOGY: u64 = 1 << 10;
const F_CONFIG_WCE: u64 = 1 << 11;
const F_DISCARD: u64 = 1 << 13;
const F_WRITE_ZEROES: u64 = 1 << 14;

/// A serial number that is too long.
#[derive(Debug, thiserror::Error)]
#[error("the serial number {0:?} has more than {SERIAL_LEN} bytes")]
pub struct SerialTooLong(pub String);

/// A block device.
pub struct Block {
    name: String,
    engine: Arc<Engine>,
    worker: Worker,
}

impl Block {
    /// A device as after power-on. `serial` has at most [`SERIAL_LEN`] bytes; `errors` is told of
    /// the disk's errors.
    pub fn new(disk: Arc<Disk>, serial: &str, errors: Arc<dyn ErrorSink>) -> io::Result<Self> {
        let mut bytes = [0; SERIAL_LEN];
        bytes
            .get_mut(..serial.len())
            .ok_or_else(|| io::Error::other(SerialTooLong(serial.to_owned())))?
            .copy_from_slice(serial.as_bytes());
        let name = format!("virtio-blk.{}", disk.id());
        let engine = Arc::new(Engine::new(disk, bytes, errors));
        let worker = Worker::spawn("virtio-blk", &[QUEUE], Server(Arc::clone(&engine)))?;
        Ok(Self {
            name,
            engine,
            worker,
        })
    }
}

impl Drop for Block {
    fn drop(&mut self) {
        // The threads hold the engine, which is waited for here.
        self.worker.deactivate();
        self.engine.end();
    }
}

impl VirtioDevice for Block {
    fn kind(&self) -> DeviceKind {
        DeviceKind::Block
    }

    fn name(&self) -> &str {
        &self.name
    }

    fn features(&self) -> u64 {
        let always = F_SEG_MAX | F_BLK_SIZE | F_FLUSH | F_TOPOLOGY | F_CONFIG_WCE;
        if self.engine.disk.image().readonly() {
            always | F_RO
        } else {
            always | F_DISCARD | F_WRITE_ZEROES
        }
    }

    fn worker(&self) -> &Worker {
        &self.worker
    }

    fn queue_sizes(&self) -> Vec<u16> {
        vec![QUEUE_SIZE]
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let capacity = self.engine.disk.image().capacity();
        let writeback = self.engine.writeback.load(Ordering::Relaxed);
        read_config_bytes(&config::space(capacity, writeback), offset, data);
    }

    fn write_config(&self, offset: u64, data: &[u8]) {
        if let (config::WRITEBACK, &[value]) = (offset, data) {
            self.engine.writeback.store(value != 0, Ordering::Relaxed);
        }
    }

    fn activate(&self, activation: Arc<Activation>) {
        if !activation.has(F_FLUSH) && !activation.has(F_CONFIG_WCE) {
            // A driver that can't flush expects what it wrote to be there.
            self.engine.writeback.store(false, Ordering::Relaxed);
        }
        self.worker.activate(activation);
    }

    fn reset(&self) {
        self.worker.deactivate();
        self.engine.set_held(Vec::new());
        self.engine.writeback.store(true, Ordering::Relaxed);
    }

    fn saved_state(&self) -> Option<&dyn SaveRestore> {
        Some(self)
    }

    fn migration_blocker(&self) -> Option<String> {
        None
    }
}
