//! Reading and writing the disk.

use std::io::{self, IoSlice, IoSliceMut};
use std::sync::PoisonError;

use imago::io_buffers::{IoVector, IoVectorMut};
use imago::{FormatAccess, ShallowMapping, StorageExt};

use super::file::total;
use super::header::{self, PROBED};
use super::storage::FileStorage;
use super::{Error, Image, Result, State};

/// Zeroes that are written one by one where the host has no better way come in pieces of this.
const ZEROES: usize = 64 << 10;

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

    fn write(&self, state: &State, bufs: &[IoSlice<'_>], offset: u64) -> Result<()> {
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
        if let Some(format) = header::recognise(&sector) {
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

    /// Makes a part of the disk read as zeroes. With `may_unmap` its space is given back to the
    /// host where possible; otherwise it stays allocated where the host can do that.
    pub fn write_zeroes(&self, offset: u64, len: u64, may_unmap: bool) -> Result<()> {
        let op = "write zeroes over";
        let state = self.writable(op, offset, len)?;
        let result = match &state.qcow2 {
            Some(_) if may_unmap => {
                drop(state);
                self.exclusively(op, offset, len, |qcow2| {
                    punch_mapped(qcow2, offset, len)?;
                    qcow2.discard_to_zero(offset, len)
                })?
            }
            Some(qcow2) => qcow2.write_zeroes(offset, len),
            None => {
                let file = &self.top()?.file;
                let _guard = file.weak_write_blocker(offset..offset + len);
                let hole = if may_unmap {
                    file.punch_hole(offset, len)
                } else {
                    Err(unsupported())
                };
                hole.or_else(|error| match error.kind() {
                    io::ErrorKind::Unsupported => file.zero(offset, len),
                    _ => Err(error),
                })
            }
        };
        match result {
            Err(error) if error.kind() == io::ErrorKind::Unsupported => {
                let state = self.writable(op, offset, len)?;
                self.write_plain_zeroes(&state, offset, len)
            }
            result => result.map_err(|source| self.failed(op, offset, len, source)),
        }
    }

    fn write_plain_zeroes(&self, state: &State, mut offset: u64, mut len: u64) -> Result<()> {
        let zeroes = vec![0; usize::try_from(len).unwrap_or(ZEROES).min(ZEROES)];
        while len > 0 {
            let piece = zeroes
                .get(..len.min(ZEROES as u64) as usize)
                .unwrap_or_default();
            self.write(state, &[IoSlice::new(piece)], offset)?;
            offset += piece.len() as u64;
            len -= piece.len() as u64;
        }
        Ok(())
    }

    /// Tells that the contents of a part of the disk are no longer needed. Its space is given back
    /// to the host where possible; what it reads as afterwards is not defined (in practice zeroes,
    /// or what it was).
    pub fn discard(&self, offset: u64, len: u64) -> Result<()> {
        let op = "discard";
        let state = self.writable(op, offset, len)?;
        let result = if state.qcow2.is_some() {
            drop(state);
            self.exclusively(op, offset, len, |qcow2| {
                punch_mapped(qcow2, offset, len)?;
                qcow2.discard_to_any(offset, len)
            })?
        } else {
            let file = &self.top()?.file;
            let _guard = file.weak_write_blocker(offset..offset + len);
            file.punch_hole(offset, len)
        };
        match result {
            Err(error) if error.kind() == io::ErrorKind::Unsupported => Ok(()),
            result => result.map_err(|source| self.failed(op, offset, len, source)),
        }
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

    /// Frees clusters of a qcow2 image. Nobody else may be in a request: it could go on writing to
    /// a cluster that has become someone else's.
    fn exclusively(
        &self,
        op: &'static str,
        offset: u64,
        len: u64,
        change: impl FnOnce(&mut FormatAccess<FileStorage>) -> io::Result<()>,
    ) -> Result<io::Result<()>> {
        let mut state = self.state.write().unwrap_or_else(PoisonError::into_inner);
        self.check_writable(&state, op, offset, len)?;
        Ok(state
            .qcow2
            .as_mut()
            .map_or_else(|| Err(unsupported()), change))
    }

    fn writable(
        &self,
        op: &'static str,
        offset: u64,
        len: u64,
    ) -> Result<std::sync::RwLockReadGuard<'_, State>> {
        let state = self.state();
        self.check_writable(&state, op, offset, len)?;
        Ok(state)
    }

    fn check_writable(&self, state: &State, op: &'static str, offset: u64, len: u64) -> Result<()> {
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

/// imago frees clusters for its own use only. The part's data is taken out of the file first, so
/// that the host gets the space back; a crash in between leaves zeroes there, which is right.
fn punch_mapped(
    qcow2: &FormatAccess<FileStorage>,
    mut offset: u64,
    mut len: u64,
) -> io::Result<()> {
    while len > 0 {
        let (mapping, run) = qcow2.get_shallow_mapping(offset, len)?;
        // What is shared with a snapshot is not writable.
        if let ShallowMapping::Raw {
            storage,
            offset: at,
            writable: true,
            ..
        } = mapping
        {
            match storage.discard(at, run) {
                Err(error) if error.kind() != io::ErrorKind::Unsupported => return Err(error),
                _ => {}
            }
        }
        if run == 0 {
            break;
        }
        (offset, len) = (offset + run, len - run);
    }
    Ok(())
}

fn unsupported() -> io::Error {
    io::ErrorKind::Unsupported.into()
}

/// The same buffers for imago, which wants a list of its own.
fn reborrow<'a>(bufs: &'a mut [IoSliceMut<'_>]) -> IoVectorMut<'a> {
    let list: Vec<_> = bufs.iter_mut().map(|buf| IoSliceMut::new(buf)).collect();
    IoVectorMut::from(list)
}
