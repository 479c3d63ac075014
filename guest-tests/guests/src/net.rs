//! `net`: answers ARP, pings and UDP datagrams on a virtio-net device, and may send numbered
//! datagrams by itself.

use core::fmt;
use core::str::FromStr;

use crate::mmio::Wait;
use crate::{Hex, Maybe};

/// An IPv4 address.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Address(pub [u8; 4]);

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d] = self.0;
        write!(f, "{a}.{b}.{c}.{d}")
    }
}

impl FromStr for Address {
    type Err = ();

    fn from_str(text: &str) -> Result<Self, ()> {
        let mut bytes = [0; 4];
        let mut parts = text.split('.');
        for byte in &mut bytes {
            *byte = parts.next().and_then(|part| part.parse().ok()).ok_or(())?;
        }
        parts.next().is_none().then_some(Self(bytes)).ok_or(())
    }
}

/// An address with the length of its network's prefix: `10.0.0.2/24`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Network {
    /// The address.
    pub address: Address,
    /// 0 to 32.
    pub prefix: u8,
}

impl fmt::Display for Network {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.address, self.prefix)
    }
}

impl FromStr for Network {
    type Err = ();

    fn from_str(text: &str) -> Result<Self, ()> {
        let (address, prefix) = text.split_once('/').ok_or(())?;
        let prefix = prefix.parse().ok().filter(|&prefix| prefix <= 32);
        Ok(Self {
            address: address.parse()?,
            prefix: prefix.ok_or(())?,
        })
    }
}

/// An address with a port: `10.0.0.1:9000`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Endpoint {
    /// The address.
    pub address: Address,
    /// The UDP port.
    pub port: u16,
}

impl fmt::Display for Endpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.address, self.port)
    }
}

impl FromStr for Endpoint {
    type Err = ();

    fn from_str(text: &str) -> Result<Self, ()> {
        let (address, port) = text.split_once(':').ok_or(())?;
        Ok(Self {
            address: address.parse()?,
            port: port.parse().ok().filter(|&port| port > 0).ok_or(())?,
        })
    }
}

/// An Ethernet address.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Mac(pub [u8; 6]);

impl fmt::Display for Mac {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}

impl FromStr for Mac {
    type Err = ();

    fn from_str(text: &str) -> Result<Self, ()> {
        let mut bytes = [0; 6];
        let mut parts = text.split(':');
        for byte in &mut bytes {
            let hexadecimal = |part: &&str| part.bytes().all(|byte| byte.is_ascii_hexdigit());
            let part = parts.next().filter(|part| part.len() == 2);
            let part = part.filter(hexadecimal).ok_or(())?;
            *byte = u8::from_str_radix(part, 16).map_err(|_| ())?;
        }
        parts.next().is_none().then_some(Self(bytes)).ok_or(())
    }
}

crate::fields::options! {
    /// What the guest is to do.
    Options {
        /// Its address.
        ip: Network = Network { address: Address([10, 0, 0, 2]), prefix: 24 },
        /// The UDP port on which it sends back what it receives.
        port: u16 = 7,
        /// Where to send numbered datagrams, in its own network.
        to: Maybe<Endpoint> = Maybe(None),
        /// µs from one of them to the next.
        every: u64 = 10_000,
        /// Bytes of each, 24 to 1400.
        bytes: u64 = 64,
        /// How to wait for the device.
        wait: Wait = Wait::Poll,
        /// Whether to use VIRTIO_NET_F_GUEST_ANNOUNCE, where offered.
        announce: bool = true,
        /// Whether to use VIRTIO_F_INDIRECT_DESC, where offered.
        indirect: bool = true,
        /// Whether to use VIRTIO_F_EVENT_IDX, where offered.
        event_idx: bool = true,
        /// µs from one heartbeat to the next; 0 is none at all.
        heartbeat: u64 = 1_000,
        /// ms from one `status` to the next; 0: only if asked.
        interval: u64 = 1_000,
        /// Frequency of the TSC in kHz; 0: the guest finds out.
        tsc_khz: u64 = 0,
    }
}

/// What the guest does when it receives a byte. It looks for one every few milliseconds.
pub mod command {
    /// Answer with `Status`.
    pub const STATUS: u8 = b's';
    /// Power off.
    pub const QUIT: u8 = b'q';
    /// Reset the machine through the keyboard controller.
    pub const RESET: u8 = b'r';
}

/// What a numbered datagram begins with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Numbered {
    /// From 1 on, without a gap at the guest.
    pub number: u64,
    /// The guest's time, in µs since its start.
    pub sent_us: u64,
}

impl Numbered {
    /// Its bytes.
    pub const BYTES: usize = 24;
    const MAGIC: [u8; 8] = *b"FerryNum";

    /// Writes it.
    #[must_use]
    pub fn to_bytes(&self) -> [u8; Self::BYTES] {
        let mut bytes = [0; Self::BYTES];
        bytes[..8].copy_from_slice(&Self::MAGIC);
        bytes[8..16].copy_from_slice(&self.number.to_le_bytes());
        bytes[16..].copy_from_slice(&self.sent_us.to_le_bytes());
        bytes
    }

    /// Reads it from the beginning of a datagram.
    #[must_use]
    pub fn parse(datagram: &[u8]) -> Option<Self> {
        let rest = datagram.strip_prefix(&Self::MAGIC)?;
        let (number, rest) = rest.split_first_chunk()?;
        let (sent_us, _) = rest.split_first_chunk()?;
        Some(Self {
            number: u64::from_le_bytes(*number),
            sent_us: u64::from_le_bytes(*sent_us),
        })
    }
}

crate::fields::reports! {
    /// What the guest says.
    Report {
        /// It listens.
        Ready "ready" {
            /// Where the device's registers are.
            address: Hex,
            /// The device's address.
            mac: Mac,
            /// The guest's.
            ip: Network,
            /// Whether the device can ask for announcements.
            announce: bool,
            /// How it waits.
            wait: Wait,
            /// The virtio features in use.
            features: Hex,
            /// Frequency of the TSC that the guest goes by, in kHz.
            tsc_khz: u64,
        },
        /// How it goes: every `interval=`, and as an answer to [`command::STATUS`].
        Status "status" {
            /// Frames received.
            received: u64,
            /// Of them ARP.
            arp: u64,
            /// Of them ICMP.
            icmp: u64,
            /// Of them UDP.
            udp: u64,
            /// Of them anything else.
            other: u64,
            /// Frames sent.
            sent: u64,
            /// Datagrams sent back.
            echoed: u64,
            /// The number of the last numbered datagram.
            numbered: u64,
            /// Numbered datagrams that the stack had no room for; they have no number.
            skipped: u64,
            /// Announcements that the device asked for and that were made.
            announced: u64,
            /// Frames that the device has now.
            in_flight: u64,
            /// Frames that were too short to have a header.
            errors: u64,
            /// Times that a frame was there for a second, and no interrupt came.
            lost_interrupts: u64,
        },
        /// The device asked to announce the guest's address, and that was done.
        Announced "announced" {
            /// How often so far.
            count: u64,
        },
    }
}

#[cfg(test)]
mod tests {
    extern crate std;
    use std::string::ToString;

    use super::*;

    #[test]
    fn options_read_back_as_written() {
        let options = Options {
            ip: "192.168.7.200/16".parse().unwrap(),
            to: Maybe("192.168.7.1:9000".parse().ok()),
            wait: Wait::Irq,
            ..Options::default()
        };
        let line = options.to_string();
        assert_eq!(line, "ip=192.168.7.200/16 to=192.168.7.1:9000 wait=irq");
        assert_eq!(Options::parse(&line), Ok(options));
    }

    #[test]
    fn addresses_refuse_nonsense() {
        for text in ["", "10.0.0", "10.0.0.0.1", "256.0.0.1", "10.0.0.-1"] {
            assert_eq!(text.parse::<Address>(), Err(()), "{text}");
        }
        for text in ["10.0.0.1", "10.0.0.1/33", "10.0.0.1/"] {
            assert_eq!(text.parse::<Network>(), Err(()), "{text}");
        }
        for text in ["10.0.0.1", "10.0.0.1:0", "10.0.0.1:65536"] {
            assert_eq!(text.parse::<Endpoint>(), Err(()), "{text}");
        }
        let mac = Mac([0x52, 0x54, 0, 0, 0, 0x1f]);
        assert_eq!(mac.to_string(), "52:54:00:00:00:1f");
        assert_eq!("52:54:00:00:00:1f".parse(), Ok(mac));
        for text in ["52:54:00:00:00", "52:54:00:00:00:1f:2", "52:54:00:00:00:+f"] {
            assert_eq!(text.parse::<Mac>(), Err(()), "{text}");
        }
    }

    #[test]
    fn numbered_datagrams_read_back_as_written() {
        let numbered = Numbered {
            number: 1 << 40,
            sent_us: 7,
        };
        let mut datagram = [0xff; 64];
        datagram[..Numbered::BYTES].copy_from_slice(&numbered.to_bytes());
        assert_eq!(Numbered::parse(&datagram), Some(numbered));
        assert_eq!(Numbered::parse(&datagram[..23]), None);
        assert_eq!(Numbered::parse(&datagram[1..]), None);
    }
}
