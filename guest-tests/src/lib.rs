//! Guests for tests, as images.
/// x
pub const DIRTIER: &[u8] = include_bytes!(concat!(env!("GUEST_IMAGES"), "/dirtier"));

pub mod driver;
