//! Reading, writing and flushing the disk.

use std::io::{self, IoSlice, IoSliceMut};
use std::sync::PoisonError;

use imago::StorageExt;
use imago::io_buffers::{IoVector, IoVectorMut};

use super::file::total;
use super::probe::{self, PROBED};
use super::{Error, Image, Result, State};

impl Image {
    /// Fills the buffers from the disk, beginning at `offset` bytes. They may be the guest's
    /// memory: data is read straight into them.
    ///
    /// Without the locks ([`Image::lock`]) the data may be older than what another process has
    /// written.
    pub fn read_at(&self, bufs: &mut [IoSliceMut<'_>], offset: u64) -> Result<()> {
        let len = total(bufs);
        self.check_range("read", offset, len)?;
        let result = match &self.state().qcow2 {
            Some(qcow2) => qcow2.readv(reborrow(bufs), offset),
            None => {
                let file = &self.top()?.file;
                match file.align.request {
                    1 => file.0.read(bufs, offset),
                    _ => file.readv(reborrow(bufs), offset),
                }
            }
        };
        result.map_err(|source| self.failed("read", offset, len, source))
    }

    /// Writes the buffers to the disk, beginning at `offset` bytes. They may be the guest's
    /// memory. Durable after the next [`Image::flush`].
    pub fn write_at(&self, bufs: &[IoSlice<'_>], offset: u64) -> Result<()> {
        let len = total(bufs);
        let state = self.writable("write", offset, len)?;
        if self.guessed_raw && offset < PROBED as u64 && len > 0 {
            return self.write_guarded(&state, bufs, offset);
        }
        self.write(&state, bufs, offset)
    }

    pub(super) fn write(&self, state: &State, bufs: &[IoSlice<'_>], offset: u64) -> Result<()> {
        let result = match &state.qcow2 {
            Some(qcow2) => qcow2.writev(IoVector::from(bufs.to_vec()), offset),
            None => {
                let file = &self.top()?.file;
                match file.align.request {
                    1 => file.0.write(bufs, offset),
                    _ => file.writev(IoVector::from(bufs.to_vec()), offset),
                }
            }
        };
        result.map_err(|source| self.failed("write", offset, total(bufs), source))
    }

    /// A write that touches sector 0 of an image whose format was guessed. The sector is copied
    /// first: a guest may change its memory while it is looked at.
    fn write_guarded(&self, state: &State, bufs: &[IoSlice<'_>], offset: u64) -> Result<()> {
        let _guard = self
            .sector_zero
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        let mut sector = [0; PROBED];
        let file = &self.top()?.file;
        let read = StorageExt::read(file, &mut sector[..], 0);
        read.map_err(|source| self.failed("read", 0, PROBED as u64, source))?;

        let mut rest = bufs.to_vec();
        let mut rest = rest.as_mut_slice();
        let room = sector.get_mut(offset as usize..).unwrap_or_default();
        let mut copied = 0;
        while let Some(first) = rest.first().filter(|_| copied < room.len()) {
            let len = first.len().min(room.len() - copied);
            for (to, from) in room.iter_mut().skip(copied).zip(first.iter()) {
                *to = *from;
            }
            copied += len;
            IoSlice::advance_slices(&mut rest, len);
        }
        if let Some(format) = probe::recognise(&sector) {
            return Err(Error::ForeignHeader {
                path: self.path.clone(),
                format,
            });
        }
        let head = sector
            .get(offset as usize..)
            .and_then(|room| room.get(..copied));
        self.write(state, &[IoSlice::new(head.unwrap_or_default())], offset)?;
        self.write(state, rest, offset + copied as u64)
    }

    /// Makes everything written so far durable: data, and the metadata that is needed to find it.
    pub fn flush(&self) -> Result<()> {
        self.flush_state(&self.state())
    }

    pub(super) fn flush_state(&self, state: &State) -> Result<()> {
        if !state.locked || self.readonly {
            // Nothing has been written.
            return Ok(());
        }
        let result = match &state.qcow2 {
            Some(qcow2) => qcow2.flush().and_then(|()| qcow2.sync()),
            None => self.top()?.file.0.sync(),
        };
        result.map_err(|source| Error::whole(&self.path, "flush", source))
    }

    pub(super) fn writable(
        &self,
        op: &'static str,
        offset: u64,
        len: u64,
    ) -> Result<std::sync::RwLockReadGuard<'_, State>> {
        let state = self.state();
        self.check_writable(&state, op, offset, len)?;
        Ok(state)
    }

    pub(super) fn check_writable(
        &self,
        state: &State,
        op: &'static str,
        offset: u64,
        len: u64,
    ) -> Result<()> {
        if self.readonly {
            return Err(Error::ReadOnly {
                path: self.path.clone(),
                op,
            });
        }
        self.check_range(op, offset, len)?;
        if !state.locked {
            return Err(Error::NotLocked {
                path: self.path.clone(),
                op,
            });
        }
        Ok(())
    }

    pub(super) fn check_range(&self, op: &'static str, offset: u64, len: u64) -> Result<()> {
        let capacity = self.capacity;
        if offset.checked_add(len).is_none_or(|end| end > capacity) {
            return Err(Error::OutOfRange {
                path: self.path.clone(),
                op,
                offset,
                len,
                capacity,
            });
        }
        Ok(())
    }

    pub(super) fn failed(
        &self,
        op: &'static str,
        offset: u64,
        len: u64,
        source: io::Error,
    ) -> Error {
        Error::Io {
            path: self.path.clone(),
            op,
            offset,
            len,
            source,
        }
    }
}

/// The same buffers for imago, which wants a list of its own.
fn reborrow<'a>(bufs: &'a mut [IoSliceMut<'_>]) -> IoVectorMut<'a> {
    let list: Vec<_> = bufs.iter_mut().map(|buf| IoSliceMut::new(buf)).collect();
    IoVectorMut::from(list)
}
