//! Zeroing and discarding parts of the disk.

use std::io::{self, IoSlice};
use std::sync::PoisonError;

use imago::{FormatAccess, ShallowMapping, StorageExt};

use super::storage::FileStorage;
use super::{Format, Image, Result, State};

/// Zeroes that are written one by one where the host has no better way come in pieces of this.
const ZEROES: u64 = 64 << 10;
/// How much is discarded while all other requests wait.
const TURN: u64 = 64 << 20;

impl Image {
    /// Makes a part of the disk read as zeroes. With `may_unmap` its space is given back to the
    /// host where possible; otherwise it stays allocated where the host can do that.
    pub fn write_zeroes(&self, offset: u64, len: u64, may_unmap: bool) -> Result<()> {
        let op = "write zeroes over";
        let result = match self.format {
            Format::Qcow2 => self.in_turns(op, offset, len, may_unmap, |qcow2, offset, len| {
                if may_unmap {
                    qcow2.discard_to_zero(offset, len)
                } else {
                    qcow2.write_zeroes(offset, len)
                }
            })?,
            Format::Raw => {
                let _state = self.writable(op, offset, len)?;
                self.zero_file(offset, len, may_unmap)?
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

    fn zero_file(&self, offset: u64, len: u64, may_unmap: bool) -> Result<io::Result<()>> {
        let file = &self.top()?.file;
        let _guard = file.weak_write_blocker(offset..offset + len);
        if may_unmap {
            match file.punch_hole(offset, len) {
                Err(error) if error.kind() == io::ErrorKind::Unsupported => {}
                result => return Ok(result),
            }
        }
        Ok(file.zero(offset, len))
    }

    fn write_plain_zeroes(&self, state: &State, mut offset: u64, mut len: u64) -> Result<()> {
        let zeroes = vec![0; len.min(ZEROES) as usize];
        while len > 0 {
            let piece = zeroes.get(..len.min(ZEROES) as usize).unwrap_or_default();
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
        let result = match self.format {
            Format::Qcow2 => self.in_turns(op, offset, len, true, |qcow2, offset, len| {
                qcow2.discard_to_any(offset, len)
            })?,
            Format::Raw => {
                let _state = self.writable(op, offset, len)?;
                let file = &self.top()?.file;
                let _guard = file.weak_write_blocker(offset..offset + len);
                file.punch_hole(offset, len)
            }
        };
        match result {
            Err(error) if error.kind() == io::ErrorKind::Unsupported => Ok(()),
            result => result.map_err(|source| self.failed(op, offset, len, source)),
        }
    }

    /// Frees clusters of a qcow2 image or makes them zero, after their data has been taken out of
    /// the file if `punch`. Nobody else may be in a request: it could go on writing to a cluster
    /// that has become someone else's; and where imago makes all of a cluster zero because the rest
    /// of it is zero already, the rest could just be written. So that the others do not wait for
    /// long, this is done piece by piece.
    fn in_turns(
        &self,
        op: &'static str,
        mut offset: u64,
        mut len: u64,
        punch: bool,
        change: impl Fn(&mut FormatAccess<FileStorage>, u64, u64) -> io::Result<()>,
    ) -> Result<io::Result<()>> {
        loop {
            let mut state = self.state.write().unwrap_or_else(PoisonError::into_inner);
            self.check_writable(&state, op, offset, len)?;
            let Some(qcow2) = &mut state.qcow2 else {
                return Ok(Err(unsupported()));
            };
            // Pieces end where clusters do.
            let piece = len.min(TURN - offset % TURN);
            let punched = if punch {
                punch_mapped(qcow2, offset, piece)
            } else {
                Ok(())
            };
            let changed = punched.and_then(|()| change(qcow2, offset, piece));
            (offset, len) = (offset + piece, len - piece);
            if changed.is_err() || len == 0 {
                return Ok(changed);
            }
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
