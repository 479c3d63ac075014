//! The devices of a Ferry machine that live on the port bus, and their saved state.
//!
//! Start at [`bus`]: a [`PortDevice`](bus::PortDevice) answers byte accesses to its ports and
//! says what it saves. A device keeps its registers behind its own lock, so that vCPUs and the
//! threads that feed it can reach it at once. The crate knows neither KVM nor migration: an
//! interrupt is an [`InterruptLine`] or a [`LevelLine`], and saved state is versioned bytes
//! ([`SaveRestore`](state::SaveRestore)).

pub mod bus;
pub mod cmos;
pub mod disk;
pub mod i8042;
pub mod image;
pub mod power;
pub mod serial;
pub mod state;
pub mod virtio;

/// An edge-triggered interrupt request line.
pub trait InterruptLine: Send + Sync {
    /// Raises and lowers the line. The edge has reached the interrupt controller when this
    /// returns: an interrupt that is still on its way when the machine's state is saved would be
    /// lost.
    fn pulse(&self) -> std::io::Result<()>;
}

/// A level-triggered interrupt request line of one device.
pub trait LevelLine: Send + Sync {
    /// Asserts the line or not. The interrupt controller knows when this returns, as with
    /// [`InterruptLine::pulse`].
    fn set(&self, asserted: bool) -> std::io::Result<()>;
}
