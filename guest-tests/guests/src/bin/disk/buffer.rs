//! Memory for a request's data, sector by sector.

use guests::bare::dma::Dma;
use guests::bare::give_up;
use guests::block::{self, Sector};

pub(crate) struct Buffer(Dma);

impl Buffer {
    pub(crate) fn new(sectors: usize) -> Self {
        match Dma::new(sectors * block::BYTES) {
            Some(memory) => Self(memory),
            None => give_up(&"not enough free memory for depth= and keep="),
        }
    }

    /// The first so many sectors.
    pub(crate) fn bytes(&mut self, sectors: usize) -> &mut [u8] {
        &mut self.0.bytes()[..sectors * block::BYTES]
    }

    /// One of them.
    pub(crate) fn sector(&mut self, index: usize) -> &mut Sector {
        let bytes = &mut self.0.bytes()[index * block::BYTES..][..block::BYTES];
        // SAFETY: as large as a sector, and aligned to its size in a page.
        unsafe { &mut *bytes.as_mut_ptr().cast() }
    }
}
