//! The network device's numbers (sections 5.1.3 to 5.1.6).

/// The queue of what the guest receives.
pub(super) const RECEIVE: usize = 0;
/// The queue of what it sends.
pub(super) const TRANSMIT: usize = 1;
/// The queue of its wishes.
pub(super) const CONTROL: usize = 2;

/// Features.
pub(super) mod feature {
    /// What the guest sends may lack its checksum.
    pub(in super::super) const CSUM: u64 = 1 << 0;
    /// What it receives may.
    pub(in super::super) const GUEST_CSUM: u64 = 1 << 1;
    pub(in super::super) const CTRL_GUEST_OFFLOADS: u64 = 1 << 2;
    pub(in super::super) const MTU: u64 = 1 << 3;
    pub(in super::super) const MAC: u64 = 1 << 5;
    pub(in super::super) const GUEST_TSO4: u64 = 1 << 7;
    pub(in super::super) const GUEST_TSO6: u64 = 1 << 8;
    pub(in super::super) const GUEST_ECN: u64 = 1 << 9;
    pub(in super::super) const HOST_TSO4: u64 = 1 << 11;
    pub(in super::super) const HOST_TSO6: u64 = 1 << 12;
    pub(in super::super) const HOST_ECN: u64 = 1 << 13;
    pub(in super::super) const MRG_RXBUF: u64 = 1 << 15;
    pub(in super::super) const STATUS: u64 = 1 << 16;
    pub(in super::super) const CTRL_VQ: u64 = 1 << 17;
    pub(in super::super) const GUEST_ANNOUNCE: u64 = 1 << 21;
    pub(in super::super) const CTRL_MAC_ADDR: u64 = 1 << 23;
    pub(in super::super) const GUEST_USO4: u64 = 1 << 54;
    pub(in super::super) const GUEST_USO6: u64 = 1 << 55;
    pub(in super::super) const HOST_USO: u64 = 1 << 56;

    /// What concerns packets that the guest receives: the driver may switch them.
    pub(in super::super) const GUEST_OFFLOADS: u64 =
        GUEST_CSUM | GUEST_TSO4 | GUEST_TSO6 | GUEST_ECN | GUEST_USO4 | GUEST_USO6;
    /// Those of them by which a packet may be longer than the MTU.
    pub(in super::super) const GUEST_SEGMENTS: u64 =
        GUEST_TSO4 | GUEST_TSO6 | GUEST_USO4 | GUEST_USO6;
}

/// The features that depend on the host, by the specification's names.
pub(super) const OFFLOAD_NAMES: [(u64, &str); 12] = [
    (feature::CSUM, "VIRTIO_NET_F_CSUM"),
    (feature::GUEST_CSUM, "VIRTIO_NET_F_GUEST_CSUM"),
    (feature::GUEST_TSO4, "VIRTIO_NET_F_GUEST_TSO4"),
    (feature::GUEST_TSO6, "VIRTIO_NET_F_GUEST_TSO6"),
    (feature::GUEST_ECN, "VIRTIO_NET_F_GUEST_ECN"),
    (feature::HOST_TSO4, "VIRTIO_NET_F_HOST_TSO4"),
    (feature::HOST_TSO6, "VIRTIO_NET_F_HOST_TSO6"),
    (feature::HOST_ECN, "VIRTIO_NET_F_HOST_ECN"),
    (feature::GUEST_USO4, "VIRTIO_NET_F_GUEST_USO4"),
    (feature::GUEST_USO6, "VIRTIO_NET_F_GUEST_USO6"),
    (feature::HOST_USO, "VIRTIO_NET_F_HOST_USO"),
    (feature::MTU, "VIRTIO_NET_F_MTU"),
];

/// Bits of the status in the configuration space.
pub(super) mod status {
    pub(in super::super) const LINK_UP: u16 = 1 << 0;
    /// The driver is asked to announce the guest.
    pub(in super::super) const ANNOUNCE: u16 = 1 << 1;
}

/// The header of each packet, struct virtio_net_hdr_v1 (section 5.1.6).
pub(super) mod header {
    /// Its length in bytes.
    pub(in super::super) const LEN: usize = 12;
    /// Where the number of merged buffers is.
    pub(in super::super) const NUM_BUFFERS: u64 = 10;

    pub(in super::super) const FLAG_NEEDS_CSUM: u8 = 1 << 0;
    pub(in super::super) const GSO_NONE: u8 = 0;
    pub(in super::super) const GSO_TCPV4: u8 = 1;
    pub(in super::super) const GSO_TCPV6: u8 = 4;
    pub(in super::super) const GSO_UDP_L4: u8 = 5;
    pub(in super::super) const GSO_ECN: u8 = 0x80;
}

/// An Ethernet header with a VLAN tag, in bytes.
pub(super) const ETHERNET_HEADER: usize = 18;
/// The longest packet, in bytes: IP's 64 KiB.
pub(super) const LONGEST_PACKET: usize = 65_535 + ETHERNET_HEADER;
/// The shortest: an Ethernet header.
pub(super) const SHORTEST_PACKET: usize = 14;

/// Commands on the control queue (section 5.1.6.5).
pub(super) mod control {
    pub(in super::super) const OK: u8 = 0;
    pub(in super::super) const ERR: u8 = 1;

    pub(in super::super) const MAC: u8 = 1;
    pub(in super::super) const MAC_ADDR_SET: u8 = 1;
    pub(in super::super) const ANNOUNCE: u8 = 3;
    pub(in super::super) const ANNOUNCE_ACK: u8 = 0;
    pub(in super::super) const GUEST_OFFLOADS: u8 = 5;
    pub(in super::super) const GUEST_OFFLOADS_SET: u8 = 0;
}
