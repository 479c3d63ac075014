//! What a machine's devices use of the host. It is opened before the machine is built, and never
//! travels: each side of a migration has its own.

use std::io;
use std::sync::Arc;

use devices::disk::Disk;
use devices::image::{self, Image, ImageConfig};
use devices::virtio::blk::errors::ErrorSink;
use devices::virtio::net::tap::{Tap, TapError};
use devices::virtio::net::{MacAddress, NetConfig, USUAL_MTU};

use super::config::{BlockConfig, DiskOptions, Given, VirtioConfig};
use crate::console::Console;

/// Why something of the host can't be used.
#[derive(Debug, thiserror::Error)]
pub enum BackendError {
    /// A disk image.
    #[error("disk '{id}': {source}")]
    Image {
        /// The disk.
        id: String,
        /// Why.
        source: image::Error,
    },
    /// A tap.
    #[error("--net: {0}")]
    Tap(#[from] TapError),
    /// No random numbers for a MAC address.
    #[error("cannot choose a MAC address: {0}")]
    Mac(#[source] io::Error),
}

/// The host's side of a network card.
pub(super) struct NetBackend {
    /// How commands call the card.
    pub(super) id: String,
    /// Where its packets go.
    pub(super) tap: Arc<Tap>,
    /// Its address, given or random, if the guest is started here.
    mac: MacAddress,
}

/// The host's side of the devices.
pub struct Backends {
    /// The disks, in the order of the command line.
    disks: Vec<Arc<Disk>>,
    /// The network cards', in the order of the command line.
    pub(super) nets: Vec<NetBackend>,
    /// Where disks' errors are told.
    pub(super) errors: Arc<dyn ErrorSink>,
    /// What the virtio console is connected to; without one its output is thrown away.
    pub console: Option<Arc<Console>>,
}

impl Backends {
    /// Opens what the command line names. Disk images are not locked: see [`lock`].
    pub fn open(given: &Given, errors: Arc<dyn ErrorSink>) -> Result<Self, BackendError> {
        Self::open_for(given, errors, |_| None, &[])
    }

    /// As [`open`](Self::open), but for a disk for which `opened` has an image it takes that one,
    /// and of the network cards the first ones take `taps`.
    pub fn open_for(
        given: &Given,
        errors: Arc<dyn ErrorSink>,
        mut opened: impl FnMut(&str) -> Option<Image>,
        taps: &[Arc<Tap>],
    ) -> Result<Self, BackendError> {
        let mut disks = Vec::new();
        for (index, options) in given.disks.iter().enumerate() {
            let id = options.id(index);
            let disk = match opened(&id) {
                Some(image) => Disk::new(id, image),
                None => open_disk(id, options)?,
            };
            disks.push(Arc::new(disk));
        }
        let mut nets = Vec::new();
        for (index, options) in given.net.iter().enumerate() {
            nets.push(NetBackend {
                id: options.id_at(index),
                tap: match taps.get(index) {
                    Some(tap) => Arc::clone(tap),
                    None => Arc::new(Tap::open(&options.ifname)?),
                },
                mac: match options.mac {
                    Some(mac) => mac,
                    None => MacAddress::random().map_err(BackendError::Mac)?,
                },
            });
        }
        Ok(Self {
            disks,
            nets,
            errors,
            console: None,
        })
    }

    /// The disks.
    pub fn disks(&self) -> &[Arc<Disk>] {
        &self.disks
    }

    /// The network cards of a machine that is started here: what their guest sees of the taps.
    pub(super) fn net_configs(&self) -> impl Iterator<Item = VirtioConfig> {
        self.nets.iter().map(|net| {
            let mtu = Some(net.tap.mtu()).filter(|&mtu| mtu != USUAL_MTU);
            VirtioConfig::Net(NetConfig { mac: net.mac, mtu })
        })
    }

    /// The disk of a device.
    pub(super) fn disk(&self, config: &BlockConfig) -> Option<&Arc<Disk>> {
        self.disks.iter().find(|disk| disk.id() == config.id)
    }
}

fn open_disk(id: String, options: &DiskOptions) -> Result<Disk, BackendError> {
    let config = ImageConfig {
        path: options.file.clone(),
        format: options.format,
        readonly: options.readonly,
        cache: options.cache,
    };
    match Image::open(&config) {
        Ok(image) => Ok(Disk::new(id, image)),
        Err(source) => Err(BackendError::Image { id, source }),
    }
}

/// Takes the locks of all images, or of none.
pub fn lock(disks: &[Arc<Disk>]) -> Result<(), BackendError> {
    for disk in disks {
        if let Err(source) = disk.image().lock() {
            // What the first ones hold is of no use without the rest.
            if let Err(error) = unlock(disks) {
                tracing::error!("{error}");
            }
            return Err(image_error(disk, source));
        }
    }
    Ok(())
}

/// Gives the locks of all images away, with all that was written on the disk. On failure some may
/// still be held.
pub fn unlock(disks: &[Arc<Disk>]) -> Result<(), BackendError> {
    for disk in disks {
        let unlocked = disk.image().unlock();
        unlocked.map_err(|source| image_error(disk, source))?;
    }
    Ok(())
}

/// Makes all that was written durable.
pub fn flush(disks: &[Arc<Disk>]) -> Result<(), BackendError> {
    for disk in disks.iter().filter(|disk| !disk.image().readonly()) {
        let flushed = disk.image().flush();
        flushed.map_err(|source| image_error(disk, source))?;
    }
    Ok(())
}

fn image_error(disk: &Disk, source: image::Error) -> BackendError {
    BackendError::Image {
        id: disk.id().to_owned(),
        source,
    }
}
