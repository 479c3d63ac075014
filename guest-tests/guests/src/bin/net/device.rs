//! A virtio-net device (virtio 1.2, 5.1), as smoltcp wants one. The crate's own driver knows no
//! announcements.

use alloc::vec;
use alloc::vec::Vec;

use guests::bare::dma::Dma;
use guests::bare::give_up;
use guests::bare::virtio::{
    DESCRIPTORS, Device, Queue, Transport, acknowledge, feature, negotiate,
};
use guests::net::{Mac, Options};
use smoltcp::phy::{self, DeviceCapabilities, Medium};
use smoltcp::time::Instant;
use virtio_drivers::transport::Transport as _;

const MAC: u64 = 1 << 5;
const STATUS: u64 = 1 << 16;
const CTRL_VQ: u64 = 1 << 17;
const GUEST_ANNOUNCE: u64 = 1 << 21;

/// In the configuration's status: the device asks for an announcement.
const ANNOUNCE: u16 = 2;
/// VIRTIO_NET_CTRL_ANNOUNCE, VIRTIO_NET_CTRL_ANNOUNCE_ACK.
const ACKNOWLEDGE: [u8; 2] = [3, 0];

/// What comes before each frame, without any offload.
const HEADER: usize = 12;
/// With its header.
const FRAME: usize = 2048;
const MTU: usize = 1500;
const ETHERNET: usize = 14;
/// Frames that the device may have, for each direction.
const FRAMES: usize = 64;

fn memory() -> Dma {
    match Dma::new(FRAME) {
        Some(memory) => memory,
        None => give_up(&"not enough free memory for frames"),
    }
}

/// Frames counted by what they are.
#[derive(Default)]
pub(crate) struct Counts {
    pub(crate) received: u64,
    pub(crate) arp: u64,
    pub(crate) icmp: u64,
    pub(crate) udp: u64,
    pub(crate) other: u64,
    pub(crate) sent: u64,
    pub(crate) errors: u64,
}

pub(crate) struct Nic {
    transport: Transport,
    receive: Queue,
    receiving: Vec<Option<Dma>>,
    transmit: Queue,
    /// With the bytes of each.
    transmitting: Vec<Option<(Dma, usize)>>,
    spare: Vec<Dma>,
    control: Option<Queue<16>>,
    /// An acknowledgement that the device has: its token.
    acknowledging: Option<u16>,
    /// What it reads, and what it writes.
    acknowledgement: Dma,
    pub(crate) features: u64,
    pub(crate) mac: Mac,
    pub(crate) counts: Counts,
}

impl Nic {
    pub(crate) fn start(device: Device, options: &Options) -> Result<Self, &'static str> {
        let mut transport = device.transport;
        let mut wanted = MAC | STATUS;
        for (feature, chosen) in [
            (CTRL_VQ | GUEST_ANNOUNCE, options.announce),
            (feature::INDIRECT, options.indirect),
            (feature::EVENT_IDX, options.event_idx),
        ] {
            wanted |= if chosen { feature } else { 0 };
        }
        let features = negotiate(&mut transport, wanted)?;
        let mut queue = |index| {
            Queue::new(&mut transport, index, features)
                .map_err(|_| "a network device has no queue of 128 descriptors")
        };
        let (receive, transmit) = (queue(0)?, queue(1)?);
        let control = if features & (CTRL_VQ | GUEST_ANNOUNCE) == CTRL_VQ | GUEST_ANNOUNCE {
            let control = Queue::new(&mut transport, 2, features);
            Some(control.map_err(|_| "a network device has no control queue")?)
        } else {
            None
        };
        let mac = if features & MAC != 0 {
            transport
                .read_consistent(|| transport.read_config_space::<[u8; 6]>(0))
                .map_err(|_| "a network device's configuration is too short")?
        } else {
            [0x52, 0x54, 0, 0, 0, 1]
        };
        transport.finish_init();
        let mut nic = Self {
            transport,
            receive,
            receiving: (0..DESCRIPTORS).map(|_| None).collect(),
            transmit,
            transmitting: (0..DESCRIPTORS).map(|_| None).collect(),
            spare: (0..FRAMES).map(|_| memory()).collect(),
            control,
            acknowledging: None,
            acknowledgement: memory(),
            features,
            mac: Mac(mac),
            counts: Counts::default(),
        };
        for _ in 0..FRAMES {
            nic.offer(memory());
        }
        nic.receive.notify(&mut nic.transport);
        Ok(nic)
    }

    /// Whether the device can ask for announcements.
    pub(crate) fn announces(&self) -> bool {
        self.control.is_some()
    }

    /// Gives the device memory for a frame.
    fn offer(&mut self, mut memory: Dma) {
        // SAFETY: the memory stays in `receiving` until the device gives it back.
        let token = unsafe { self.receive.add(&[], &mut [memory.bytes()]) };
        if let Some(slot) = token.and_then(|token| self.receiving.get_mut(usize::from(token))) {
            *slot = Some(memory);
        }
    }

    /// A frame that has come; its memory goes back to the device.
    fn next_frame(&mut self) -> Option<Vec<u8>> {
        let token = self.receive.done()?;
        let mut memory = self.receiving.get_mut(usize::from(token))?.take()?;
        // SAFETY: the same memory as was added with this token.
        let length = unsafe { self.receive.take(token, &[], &mut [memory.bytes()]) };
        let frame = length
            .ok()
            .and_then(|length| memory.bytes().get(HEADER..length as usize))
            .map(<[u8]>::to_vec);
        self.offer(memory);
        self.receive.notify(&mut self.transport);
        let Some(frame) = frame.filter(|frame| frame.len() >= ETHERNET) else {
            self.counts.errors += 1;
            return Some(Vec::new());
        };
        self.count(&frame);
        Some(frame)
    }

    fn count(&mut self, frame: &[u8]) {
        let counts = &mut self.counts;
        counts.received += 1;
        let kind = match (frame.get(12..14), frame.get(23)) {
            (Some([8, 6]), _) => &mut counts.arp,
            (Some([8, 0]), Some(1)) => &mut counts.icmp,
            (Some([8, 0]), Some(17)) => &mut counts.udp,
            _ => &mut counts.other,
        };
        *kind += 1;
    }

    /// Takes back what the device has sent.
    fn reap(&mut self) {
        while let Some(token) = self.transmit.done() {
            let slot = self.transmitting.get_mut(usize::from(token));
            let Some((mut memory, length)) = slot.and_then(Option::take) else {
                give_up(&"the device gives back a frame that it doesn't have");
            };
            // SAFETY: the same memory as was added with this token.
            let taken = unsafe {
                self.transmit
                    .take(token, &[&memory.bytes()[..length]], &mut [])
            };
            if taken.is_ok() {
                self.spare.push(memory);
            }
        }
    }

    /// Sends a frame, if the device has room; the frame is what `fill` writes.
    pub(crate) fn send<R>(&mut self, length: usize, fill: impl FnOnce(&mut [u8]) -> R) -> R {
        self.reap();
        let Some(mut memory) = self.spare.pop() else {
            return fill(&mut vec![0; length]);
        };
        let total = (HEADER + length).min(FRAME);
        let (header, rest) = memory.bytes().split_at_mut(HEADER);
        header.fill(0);
        let result = fill(&mut rest[..total - HEADER]);
        // SAFETY: the memory stays in `transmitting` until the device gives it back.
        let token = unsafe { self.transmit.add(&[&memory.bytes()[..total]], &mut []) };
        match token.and_then(|token| self.transmitting.get_mut(usize::from(token))) {
            Some(slot) => {
                *slot = Some((memory, total));
                self.counts.sent += 1;
                self.transmit.notify(&mut self.transport);
            }
            None => self.spare.push(memory),
        }
        result
    }

    /// Frames that the device has to send.
    pub(crate) fn in_flight(&self) -> usize {
        self.transmitting.iter().flatten().count()
    }

    /// Whether a frame has come, without taking it.
    pub(crate) fn has_frame(&self) -> bool {
        self.receive.done().is_some()
    }

    /// Lowers the interrupt line; whether the configuration has changed.
    pub(crate) fn acknowledge_interrupt(&mut self) -> bool {
        acknowledge(&mut self.transport)
    }

    /// For guests that look anyway; configuration changes still interrupt.
    pub(crate) fn refuse_interrupts(&mut self) {
        self.receive.want_interrupts(false);
        self.transmit.want_interrupts(false);
    }

    /// Whether the device asks for an announcement. A look at its registers.
    pub(crate) fn wants_announcement(&mut self) -> bool {
        if let (Some(control), Some(token)) = (&mut self.control, self.acknowledging) {
            if control.done() == Some(token) {
                let (out, back) = self.acknowledgement.bytes().split_at_mut(64);
                // SAFETY: the same memory as in `acknowledge_announcement`.
                let _ = unsafe { control.take(token, &[&out[..2]], &mut [&mut back[..1]]) };
                self.acknowledging = None;
            }
            return false;
        }
        let asked = |status: u16| status & ANNOUNCE != 0;
        self.announces() && self.transport.read_config_space(6).is_ok_and(asked)
    }

    /// Tells the device that the announcement was made.
    pub(crate) fn acknowledge_announcement(&mut self) {
        let Some(control) = &mut self.control else {
            return;
        };
        let (out, back) = self.acknowledgement.bytes().split_at_mut(64);
        out[..2].copy_from_slice(&ACKNOWLEDGE);
        // SAFETY: the memory stays, and is left alone until the device is done with it.
        self.acknowledging = unsafe { control.add(&[&out[..2]], &mut [&mut back[..1]]) };
        control.notify(&mut self.transport);
    }
}

pub(crate) struct Received(Vec<u8>);

impl phy::RxToken for Received {
    fn consume<R, F: FnOnce(&[u8]) -> R>(self, f: F) -> R {
        f(&self.0)
    }
}

pub(crate) struct Sending<'a>(&'a mut Nic);

impl phy::TxToken for Sending<'_> {
    fn consume<R, F: FnOnce(&mut [u8]) -> R>(self, length: usize, f: F) -> R {
        self.0.send(length, f)
    }
}

impl phy::Device for Nic {
    type RxToken<'a> = Received;
    type TxToken<'a> = Sending<'a>;

    fn receive(&mut self, _: Instant) -> Option<(Received, Sending<'_>)> {
        self.reap();
        // An answer must have room.
        if self.spare.is_empty() {
            return None;
        }
        let frame = self.next_frame()?;
        Some((Received(frame), Sending(self)))
    }

    fn transmit(&mut self, _: Instant) -> Option<Sending<'_>> {
        self.reap();
        (!self.spare.is_empty()).then_some(Sending(self))
    }

    fn capabilities(&self) -> DeviceCapabilities {
        let mut capabilities = DeviceCapabilities::default();
        capabilities.medium = Medium::Ethernet;
        capabilities.max_transmission_unit = MTU + ETHERNET;
        capabilities
    }
}
