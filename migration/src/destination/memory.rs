//! Memory that one connection brings: PAGES, ZERO, COMPRESSED and XBZRLE.

use std::sync::Arc;

use super::{DestinationError, out_of_order};
use crate::bitmap::PageRun;
use crate::channel::{Arrived, Channel};
use crate::frame::Kind;
use crate::guest_io::MemoryError;
use crate::message::{AddressRun, Compressed, Differences, XBZRLE, decode_pages, decode_zero};
use crate::placement::{Placement, Unpacker};

/// Takes the memory of one connection in. Its buffers are used from frame to frame.
pub(super) struct Memory {
    placement: Arc<Placement>,
    picked: u32,
    addresses: Vec<AddressRun>,
    runs: Vec<PageRun>,
    crcs: Vec<u32>,
    /// Pages of a frame that don't match their checksums.
    wrong: Vec<u64>,
    compressed: Compressed,
    differences: Differences,
    unpacker: Unpacker,
    /// A frame's payload, which its kind's limit bounds.
    data: Vec<u8>,
}

impl Memory {
    /// For a source that was told that these capabilities are picked.
    pub(super) fn new(placement: Arc<Placement>, picked: u32) -> Self {
        Self {
            placement,
            picked,
            addresses: Vec::new(),
            runs: Vec::new(),
            crcs: Vec::new(),
            wrong: Vec::new(),
            compressed: Compressed::default(),
            differences: Differences::default(),
            unpacker: Unpacker::new(picked),
            data: Vec::new(),
        }
    }

    pub(super) fn placement(&self) -> &Placement {
        &self.placement
    }

    /// Of no more use.
    pub(super) fn into_placement(self) -> Arc<Placement> {
        self.placement
    }

    /// Receives and places such a frame, whose body has arrived. All of its runs are checked before
    /// the first byte is placed.
    pub(super) fn receive(
        &mut self,
        arrived: Arrived,
        channel: &mut Channel,
    ) -> Result<(), DestinationError> {
        let Arrived { kind, payload_len } = arrived;
        let checked = self.placement.is_checked();
        self.wrong.clear();
        match kind {
            Kind::Pages => {
                let (addresses, crcs) = (&mut self.addresses, &mut self.crcs);
                channel.decode(kind, |body| {
                    decode_pages(body, payload_len, checked, addresses, crcs)
                })?;
                resolve(&self.placement, &self.addresses, &mut self.runs)?;
                self.pages(channel)
            }
            Kind::Zero => {
                channel.decode(kind, |body| decode_zero(body, &mut self.addresses))?;
                resolve(&self.placement, &self.addresses, &mut self.runs)?;
                self.placement.zero(&self.runs);
                Ok(())
            }
            Kind::Compressed => {
                let frame = &mut self.compressed;
                channel.decode(kind, |body| frame.decode(body, payload_len, checked))?;
                resolve(&self.placement, &frame.runs, &mut self.runs)?;
                channel.receive_data(payload_len as usize, &mut self.data)?;
                let (placement, wrong) = (&self.placement, &mut self.wrong);
                let unpacker = &mut self.unpacker;
                Ok(unpacker.compressed(frame, &self.runs, &self.data, placement, wrong)?)
            }
            Kind::Xbzrle if self.picked & XBZRLE != 0 => {
                let frame = &mut self.differences;
                channel.decode(kind, |body| frame.decode(body, payload_len, checked))?;
                resolve(&self.placement, &frame.runs, &mut self.runs)?;
                channel.receive_data(payload_len as usize, &mut self.data)?;
                let (placement, wrong) = (&self.placement, &mut self.wrong);
                let unpacker = &mut self.unpacker;
                Ok(unpacker.differences(frame, &self.runs, &self.data, placement, wrong)?)
            }
            kind => Err(out_of_order(channel, kind)),
        }
    }

    /// Receives the data of a PAGES frame, straight to where it belongs.
    fn pages(&mut self, channel: &mut Channel) -> Result<(), DestinationError> {
        self.placement.populate(&self.runs);
        let memory = self.placement.memory();
        channel.receive_pages(memory, &self.runs)?;
        let pages = self.runs.iter().flat_map(|run| run.first..run.end());
        let wrong = pages
            .zip(&self.crcs)
            .filter(|(page, crc)| memory.crc(*page) != **crc);
        self.wrong.extend(wrong.map(|(page, _)| page));
        self.placement.arrived(&self.runs, &self.wrong);
        Ok(())
    }
}

fn resolve(
    placement: &Placement,
    addresses: &[AddressRun],
    runs: &mut Vec<PageRun>,
) -> Result<(), MemoryError> {
    runs.clear();
    for &run in addresses {
        runs.push(placement.memory().resolve(run)?);
    }
    Ok(())
}
