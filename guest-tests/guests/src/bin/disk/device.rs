//! A virtio-blk device (virtio 1.2, 5.2): its limits, and requests in flight. The crate's own driver
//! knows no discards, no writes of zeroes and no data in several pieces.

use alloc::boxed::Box;
use alloc::vec::Vec;
use core::ptr::NonNull;

use guests::bare::tsc;
use guests::bare::virtio::{
    DESCRIPTORS, Device, Queue, Transport, acknowledge, feature, negotiate,
};
use guests::block;
use guests::disk::{Op, Options};
use virtio_drivers::transport::Transport as _;

use crate::buffer::Buffer;

const SIZE_MAX: u64 = 1 << 1;
const SEG_MAX: u64 = 1 << 2;
const RO: u64 = 1 << 5;
const BLK_SIZE: u64 = 1 << 6;
const FLUSH: u64 = 1 << 9;
const DISCARD: u64 = 1 << 13;
const WRITE_ZEROES: u64 = 1 << 14;

/// What the device can do, in sectors.
#[derive(Clone, Copy)]
pub(crate) struct Limits {
    pub(crate) capacity: u64,
    pub(crate) readonly: bool,
    pub(crate) flush: bool,
    /// 0: no discards.
    pub(crate) max_discard: u32,
    /// What discards are multiples of.
    pub(crate) discard_unit: u32,
    /// 0: no writes of zeroes.
    pub(crate) max_zeroes: u32,
    /// Whether those may give the space back.
    pub(crate) may_unmap: bool,
    /// What requests are multiples of.
    pub(crate) unit: u32,
    /// Pieces of a request's data.
    max_segments: u32,
    /// Bytes of a piece.
    max_segment: u32,
    pub(crate) features: u64,
}

/// A request, before, while and after the device has it.
pub(crate) struct Request {
    pub(crate) op: Op,
    pub(crate) sector: u64,
    pub(crate) sectors: u32,
    pub(crate) generation: u32,
    /// Pieces of its data.
    pub(crate) segments: u32,
    /// Whether a write of zeroes may give the space back.
    pub(crate) unmap: bool,
    /// When it was submitted, by the TSC.
    pub(crate) begun: u64,
    pub(crate) buffer: Buffer,
    control: Box<Control>,
}

/// What the device sees besides the data.
#[repr(C, align(64))]
struct Control {
    header: [u8; 16],
    range: [u8; 16],
    status: u8,
}

/// The device has not written a status.
const NO_STATUS: u8 = 0xff;

impl Request {
    pub(crate) fn new(max_sectors: u32) -> Self {
        Self {
            op: Op::Flush,
            sector: 0,
            sectors: 0,
            generation: 0,
            segments: 1,
            unmap: false,
            begun: 0,
            buffer: Buffer::new(max_sectors as usize),
            control: Box::new(Control {
                header: [0; 16],
                range: [0; 16],
                status: NO_STATUS,
            }),
        }
    }

    fn prepare(&mut self) {
        let (kind, sector) = match self.op {
            Op::Read => (0u32, self.sector),
            Op::Write => (1, self.sector),
            Op::Flush => (4, 0),
            Op::Discard => (11, 0),
            Op::WriteZeroes => (13, 0),
        };
        self.control.header[..4].copy_from_slice(&kind.to_le_bytes());
        self.control.header[8..].copy_from_slice(&sector.to_le_bytes());
        self.control.range[..8].copy_from_slice(&self.sector.to_le_bytes());
        self.control.range[8..12].copy_from_slice(&self.sectors.to_le_bytes());
        let flags = u32::from(self.unmap && self.op == Op::WriteZeroes);
        self.control.range[12..].copy_from_slice(&flags.to_le_bytes());
        self.control.status = NO_STATUS;
    }

    /// Bytes that the device writes.
    pub(crate) fn written_bytes(&self) -> u64 {
        let data = if self.op == Op::Read { self.sectors } else { 0 };
        u64::from(data) * block::BYTES as u64 + 1
    }

    /// Calls `each` with what the device reads and what it writes.
    fn with_buffers<R>(
        &mut self,
        each: impl for<'a> FnOnce(&'a [&'a [u8]], &'a mut [&'a mut [u8]]) -> R,
    ) -> R {
        let (op, sectors, segments) = (self.op, self.sectors as usize, self.segments as usize);
        let Control {
            header,
            range,
            status,
        } = &mut *self.control;
        let data = match op {
            Op::Read | Op::Write => self.buffer.bytes(sectors),
            // These may be about more sectors than a buffer has.
            Op::Flush | Op::Discard | Op::WriteZeroes => self.buffer.bytes(0),
        };
        // Pieces of whole sectors, nearly equal.
        let cut = |index: usize| index * sectors / segments * block::BYTES;
        let mut inputs: Vec<&[u8]> = Vec::with_capacity(segments + 1);
        let mut outputs: Vec<&mut [u8]> = Vec::with_capacity(segments + 1);
        inputs.push(header);
        match op {
            Op::Read => {
                let mut rest = data;
                for index in 0..segments {
                    let (piece, after) = rest.split_at_mut(cut(index + 1) - cut(index));
                    outputs.push(piece);
                    rest = after;
                }
            }
            Op::Write => {
                inputs.extend((0..segments).map(|index| &data[cut(index)..cut(index + 1)]));
            }
            Op::Discard | Op::WriteZeroes => inputs.push(range),
            Op::Flush => {}
        }
        outputs.push(core::slice::from_mut(status));
        each(&inputs, &mut outputs)
    }
}

/// A disk, with the requests that it has.
pub(crate) struct Disk {
    pub(crate) limits: Limits,
    transport: Transport,
    queue: Queue,
    in_flight: Vec<Option<Request>>,
    pub(crate) pending: usize,
}

/// A request that is done.
pub(crate) struct Done {
    pub(crate) request: Request,
    /// virtio's, 0: success.
    pub(crate) status: u8,
    /// Bytes that the device says it wrote.
    pub(crate) length: u64,
}

impl Disk {
    pub(crate) fn start(device: Device, options: &Options) -> Result<Self, &'static str> {
        let mut transport = device.transport;
        let mut wanted = SIZE_MAX | SEG_MAX | RO | BLK_SIZE | FLUSH | DISCARD | WRITE_ZEROES;
        if options.indirect {
            wanted |= feature::INDIRECT;
        }
        if options.event_idx {
            wanted |= feature::EVENT_IDX;
        }
        let features = negotiate(&mut transport, wanted)?;
        let queue = Queue::new(&mut transport, 0, features)
            .map_err(|_| "a disk has no queue of 128 descriptors")?;
        transport.finish_init();
        let limits =
            limits(&transport, features).map_err(|_| "a disk's configuration is too short")?;
        Ok(Self {
            limits,
            transport,
            queue,
            in_flight: (0..DESCRIPTORS).map(|_| None).collect(),
            pending: 0,
        })
    }

    /// Pieces that a request's data may and must be in.
    pub(crate) fn segments(&self, sectors: u32) -> (u32, u32) {
        let least = (u64::from(sectors) * block::BYTES as u64)
            .div_ceil(self.limits.max_segment.max(1).into()) as u32;
        let most = self.limits.max_segments.min(sectors).max(1);
        (least.max(1).min(most), most)
    }

    /// Gives the request to the device; back if there is no room for it.
    pub(crate) fn submit(&mut self, mut request: Request) -> Result<(), Request> {
        request.prepare();
        let queue = &mut self.queue;
        // SAFETY: the request stays in `in_flight`, and its buffers where they are, until `done`.
        let token = request.with_buffers(|inputs, outputs| unsafe { queue.add(inputs, outputs) });
        let Some(slot) = token.and_then(|token| self.in_flight.get_mut(usize::from(token))) else {
            return Err(request);
        };
        *slot = Some(request);
        self.pending += 1;
        Ok(())
    }

    /// Tells the device about what was submitted; whether it was told.
    pub(crate) fn notify(&mut self) -> bool {
        self.queue.notify(&mut self.transport)
    }

    /// Whether a request is done.
    pub(crate) fn is_done(&self) -> bool {
        self.queue.done().is_some()
    }

    /// A request that is done.
    ///
    /// # Errors
    /// The device gives back what it doesn't have.
    pub(crate) fn done(&mut self) -> Result<Option<Done>, u16> {
        let Some(token) = self.queue.done() else {
            return Ok(None);
        };
        let slot = self.in_flight.get_mut(usize::from(token));
        let Some(mut request) = slot.and_then(Option::take) else {
            return Err(token);
        };
        let queue = &mut self.queue;
        let length = request
            .with_buffers(|inputs, outputs| {
                // SAFETY: the request was in the slot of this token, with the same buffers.
                unsafe { queue.take(token, inputs, outputs) }
            })
            .map_err(|_| token)?;
        self.pending -= 1;
        // SAFETY: a byte of our own, that the device wrote behind the compiler's back.
        let status = unsafe { NonNull::from(&request.control.status).read_volatile() };
        Ok(Some(Done {
            request,
            status,
            length: length.into(),
        }))
    }

    /// What reading a register takes on average, in cycles of the TSC.
    pub(crate) fn register_cycles(&self) -> u64 {
        const READS: u64 = 64;
        let begin = tsc::now();
        for _ in 0..READS {
            core::hint::black_box(self.transport.read_config_generation());
        }
        tsc::now().saturating_sub(begin) / READS
    }

    /// The requests that the device has.
    pub(crate) fn in_flight(&self) -> impl Iterator<Item = &Request> {
        self.in_flight.iter().flatten()
    }

    /// Lowers the interrupt line, so that it can rise again.
    pub(crate) fn acknowledge(&mut self) {
        acknowledge(&mut self.transport);
    }

    /// For guests that look anyway.
    pub(crate) fn refuse_interrupts(&mut self) {
        self.queue.want_interrupts(false);
    }
}

/// Reads the configuration space (virtio 1.2, 5.2.4).
fn limits(transport: &Transport, features: u64) -> Result<Limits, virtio_drivers::Error> {
    let has = |feature: u64| features & feature != 0;
    let word = |offset: usize| transport.read_config_space::<u32>(offset);
    let if_has = |feature: u64, offset: usize, otherwise: u32| {
        if has(feature) {
            word(offset)
        } else {
            Ok(otherwise)
        }
    };
    let capacity = transport.read_consistent(|| {
        let (low, high) = (
            transport.read_config_space::<u32>(0)?,
            transport.read_config_space::<u32>(4)?,
        );
        Ok(u64::from(low) | u64::from(high) << 32)
    })?;
    let unit = (if_has(BLK_SIZE, 20, 512)? / 512).clamp(1, block::MAX_SECTORS);
    let may_unmap = has(WRITE_ZEROES) && transport.read_config_space::<u8>(56)? != 0;
    Ok(Limits {
        capacity,
        readonly: has(RO),
        flush: has(FLUSH),
        max_discard: if_has(DISCARD, 36, 0)?,
        discard_unit: if_has(DISCARD, 44, 1)?.max(unit),
        max_zeroes: if_has(WRITE_ZEROES, 48, 0)?,
        may_unmap,
        unit,
        max_segments: if_has(SEG_MAX, 12, 1)?.max(1),
        max_segment: if_has(SIZE_MAX, 8, u32::MAX)?,
        features,
    })
}
