//! The arriving disks.

use crate::channel::Channel;
use crate::destination::DestinationError;
use crate::disk::{DestinationDisk, Disk};
use crate::frame::Kind;
use crate::message::{BlockRun, RunKind, decode_blocks};
use crate::progress;
use crate::vm::{DestinationVm, Offer, VmError};

use super::vm;

/// What is wrong with what came for a disk, or with the disk.
#[derive(Debug, thiserror::Error)]
pub enum DiskError {
    /// A disk that was not offered.
    #[error("blocks came for disk {index}, but {disks} disks were offered")]
    Index {
        /// The index that came.
        index: u16,
        /// How many there are.
        disks: usize,
    },
    /// Past the end.
    #[error(
        "{len} bytes at offset {offset} came for the disk '{name}', which has {capacity} bytes"
    )]
    Outside {
        /// The disk.
        name: String,
        /// Where the part begins.
        offset: u64,
        /// Its length.
        len: u64,
        /// The disk's size.
        capacity: u64,
    },
    /// The first pass has a gap, or an overlap.
    #[error("offset {offset} of the disk '{name}' came where {expected} was due")]
    Order {
        /// The disk.
        name: String,
        /// Where the part begins.
        offset: u64,
        /// Where it should.
        expected: u64,
    },
    /// A part that came before is said to be absent.
    #[error(
        "offset {offset} of the disk '{name}' was told as absent after the disk had come whole"
    )]
    Absent {
        /// The disk.
        name: String,
        /// Where the part begins.
        offset: u64,
    },
    /// The data doesn't match its checksum.
    #[error("{len} bytes at offset {offset} of the disk '{name}' were damaged on the way")]
    Damaged {
        /// The disk.
        name: String,
        /// Where.
        offset: u64,
        /// How many.
        len: u64,
    },
    /// The disk says no.
    #[error("cannot write {len} bytes at offset {offset} of the disk '{name}': {error}")]
    Write {
        /// The disk.
        name: String,
        /// Where.
        offset: u64,
        /// How many.
        len: u64,
        /// Why.
        error: VmError,
    },
    /// What was written is perhaps not on the disk.
    #[error("cannot flush the disk '{name}': {error}")]
    Flush {
        /// The disk.
        name: String,
        /// Why.
        error: VmError,
    },
    /// END came too early.
    #[error("only {came} of {capacity} bytes of the disk '{name}' came")]
    Incomplete {
        /// The disk.
        name: String,
        /// How much came, holes included.
        came: u64,
        /// The disk's size.
        capacity: u64,
    },
}

struct Arriving {
    info: Disk,
    disk: Box<dyn DestinationDisk>,
    /// Up to where the first pass has come.
    next: u64,
    /// Whether anything was changed since the last flush. At first, what opening it has changed.
    unflushed: bool,
}

/// The disks of the arriving guest.
pub(super) struct Disks {
    disks: Vec<Arriving>,
    runs: Vec<BlockRun>,
    data: Vec<u8>,
    counts: progress::Disk,
}

impl Disks {
    pub(super) fn open(
        machine: &mut dyn DestinationVm,
        offer: &Offer,
    ) -> Result<Self, DestinationError> {
        let mut disks = Vec::new();
        for (index, info) in offer.disks.iter().enumerate() {
            disks.push(Arriving {
                info: info.clone(),
                disk: machine.open_disk(index).map_err(vm("opening a disk"))?,
                next: 0,
                unflushed: true,
            });
        }
        let total = disks.iter().map(|disk| disk.info.capacity).sum();
        Ok(Self {
            disks,
            runs: Vec::new(),
            data: Vec::new(),
            counts: progress::Disk {
                total,
                remaining: total,
                ..progress::Disk::default()
            },
        })
    }

    /// What has come; `None` if no disks travel.
    pub(super) fn counts(&self) -> Option<progress::Disk> {
        (!self.disks.is_empty()).then_some(self.counts)
    }

    /// Takes in a BLOCKS frame. Its runs are checked before its data is received, and each run's
    /// data before it is written.
    pub(super) fn receive(
        &mut self,
        channel: &mut Channel,
        payload_len: u32,
    ) -> Result<(), DestinationError> {
        let runs = &mut self.runs;
        let index = channel.decode(Kind::Blocks, |body| decode_blocks(body, payload_len, runs))?;
        let disks = self.disks.len();
        let disk = self
            .disks
            .get_mut(usize::from(index))
            .ok_or(DiskError::Index { index, disks })?;
        let next = disk.check(&self.runs)?;
        channel.receive_data(payload_len as usize, &mut self.data)?;
        disk.place(&self.runs, &self.data)?;
        self.counts.remaining -= next - disk.next;
        disk.next = next;
        for run in &self.runs {
            match run.kind {
                RunKind::Data(_) => {
                    self.counts.normal += 1;
                    self.counts.normal_bytes += run.len;
                }
                RunKind::Zero => self.counts.zero_bytes += run.len,
                RunKind::Absent => self.counts.absent_bytes += run.len,
            }
        }
        self.counts.transferred = channel.received_blocks();
        Ok(())
    }

    /// Flushes the disks that were changed since the last time.
    pub(super) fn flush(&mut self) -> Result<(), DiskError> {
        for disk in self.disks.iter_mut().filter(|disk| disk.unflushed) {
            disk.disk.flush().map_err(|error| DiskError::Flush {
                name: disk.info.name.clone(),
                error,
            })?;
            disk.unflushed = false;
        }
        Ok(())
    }

    /// Whether all of each disk has come.
    pub(super) fn check_complete(&self) -> Result<(), DiskError> {
        match self.disks.iter().find(|disk| !disk.is_whole()) {
            Some(disk) => Err(DiskError::Incomplete {
                name: disk.info.name.clone(),
                came: disk.next,
                capacity: disk.info.capacity,
            }),
            None => Ok(()),
        }
    }
}

impl Arriving {
    fn is_whole(&self) -> bool {
        self.next == self.info.capacity
    }

    /// Checks where the runs are. The first pass is in order and without a gap, so that it is
    /// known to be complete; returns up to where it has then come.
    fn check(&self, runs: &[BlockRun]) -> Result<u64, DiskError> {
        let (name, capacity) = (&self.info.name, self.info.capacity);
        let mut next = self.next;
        for run in runs {
            if run.offset >= capacity || run.len > capacity - run.offset {
                return Err(DiskError::Outside {
                    name: name.clone(),
                    offset: run.offset,
                    len: run.len,
                    capacity,
                });
            }
            if next < capacity {
                if run.offset != next {
                    return Err(DiskError::Order {
                        name: name.clone(),
                        offset: run.offset,
                        expected: next,
                    });
                }
                next = run.end();
            } else if run.kind == RunKind::Absent {
                return Err(DiskError::Absent {
                    name: name.clone(),
                    offset: run.offset,
                });
            }
        }
        Ok(next)
    }

    fn place(&mut self, runs: &[BlockRun], data: &[u8]) -> Result<(), DiskError> {
        self.unflushed |= runs.iter().any(|run| run.kind != RunKind::Absent);
        let mut rest = data;
        let mut runs = runs.iter().peekable();
        while let Some(run) = runs.next() {
            let len = match run.kind {
                RunKind::Absent => continue,
                RunKind::Zero => {
                    let result = self.disk.zero(run.offset, run.len);
                    result.map_err(|error| self.failed(run.offset, run.len, error))?;
                    continue;
                }
                RunKind::Data(_) => {
                    // What follows without a gap is written together with it.
                    let mut end = run.end();
                    self.check_data(run, rest)?;
                    let mut len = run.len;
                    while let Some(more) = runs
                        .next_if(|more| matches!(more.kind, RunKind::Data(_)) && more.offset == end)
                    {
                        self.check_data(more, rest.get(len as usize..).unwrap_or_default())?;
                        len += more.len;
                        end = more.end();
                    }
                    len
                }
            };
            let (now, later) = rest.split_at(rest.len().min(len as usize));
            rest = later;
            let result = self.disk.write(run.offset, now);
            result.map_err(|error| self.failed(run.offset, len, error))?;
        }
        Ok(())
    }

    /// Checks a run whose data is at the beginning of `rest`.
    fn check_data(&self, run: &BlockRun, rest: &[u8]) -> Result<(), DiskError> {
        let crc = rest.get(..run.len as usize).map(crc32fast::hash);
        if crc.map(RunKind::Data) == Some(run.kind) {
            return Ok(());
        }
        Err(DiskError::Damaged {
            name: self.info.name.clone(),
            offset: run.offset,
            len: run.len,
        })
    }

    fn failed(&self, offset: u64, len: u64, error: VmError) -> DiskError {
        DiskError::Write {
            name: self.info.name.clone(),
            offset,
            len,
            error,
        }
    }
}
