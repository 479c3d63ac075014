//! Telling the network where a guest is now.

use super::mac::MacAddress;
use super::spec::header;

/// The shortest Ethernet frame, in bytes, without its checksum.
const SHORTEST_FRAME: usize = 60;

/// A frame that asks for the IP address of `mac` (RARP, RFC 903), behind the header of a packet
/// without offloads. Nobody needs to answer: switches learn from its sender where the address is.
pub(super) fn rarp(mac: MacAddress) -> [u8; header::LEN + SHORTEST_FRAME] {
    let MacAddress(mac) = mac;
    let parts: [&[u8]; 8] = [
        // To all, from the card, EtherType RARP.
        &[0xff; 6],
        &mac,
        &[0x80, 0x35],
        // Ethernet and IPv4 with addresses of 6 and 4 bytes; "request reverse".
        &[0, 1, 8, 0, 6, 4, 0, 3],
        // The sender's hardware address, its IP address unknown; the same of whom it is about.
        &mac,
        &[0; 4],
        &mac,
        &[0; 4],
    ];
    let mut packet = [0; header::LEN + SHORTEST_FRAME];
    for (to, from) in packet
        .iter_mut()
        .skip(header::LEN)
        .zip(parts.into_iter().flatten())
    {
        *to = *from;
    }
    packet
}
