//! The arriving blobs.

use std::io::Write;

use super::{DestinationError, vm};
use crate::message::BlobChunk;
use crate::vm::{DestinationVm, Offer};

/// The blobs: each comes whole, in order.
#[derive(Default)]
pub(super) struct Blobs {
    pub(super) done: usize,
    writer: Option<Box<dyn Write + Send>>,
    offset: u64,
}

impl Blobs {
    pub(super) fn complete(&self, offer: &Offer) -> bool {
        self.done == offer.blobs.len()
    }

    pub(super) fn write(
        &mut self,
        machine: &mut dyn DestinationVm,
        offer: &Offer,
        chunk: BlobChunk,
        data: &[u8],
    ) -> Result<(), DestinationError> {
        let wrong = |expected: String| DestinationError::Blob {
            index: chunk.index,
            offset: chunk.offset,
            expected,
        };
        let index = self.done;
        let Some(blob) = offer.blobs.get(index) else {
            return Err(wrong("all blobs were there".to_owned()));
        };
        if usize::from(chunk.index) != index || chunk.offset != self.offset {
            return Err(wrong(format!("blob {index} at {} was due", self.offset)));
        }
        let len = data.len() as u64;
        if len > blob.len - self.offset || len == 0 && blob.len > 0 {
            return Err(wrong(format!(
                "{} bytes of it were due",
                blob.len - self.offset
            )));
        }
        let mut writer = match self.writer.take() {
            Some(writer) => writer,
            None => machine.create_blob(index).map_err(vm("creating a blob"))?,
        };
        self.offset += len;
        let done = self.offset == blob.len;
        writer
            .write_all(data)
            .and_then(|()| if done { writer.flush() } else { Ok(()) })
            .map_err(|error| DestinationError::BlobWrite {
                name: blob.name.clone(),
                error,
            })?;
        if done {
            self.done += 1;
            self.offset = 0;
        } else {
            self.writer = Some(writer);
        }
        Ok(())
    }
}
