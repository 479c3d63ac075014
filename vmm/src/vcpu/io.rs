//! What a vCPU thread asks of the rest of the machine, and what it tells it.

/// What a vCPU does after a device took a write.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[must_use]
pub enum IoOutcome {
    /// Runs on.
    #[default]
    Continue,
    /// Stops: the guest asked for a reset of the machine.
    Reset,
    /// Stops: the guest asked to be powered off.
    Shutdown,
}

/// The machine's devices, as the vCPUs reach them. Called on the vCPUs' threads, several at once.
///
/// A call must not wait for anything that waits for a vCPU to pause.
pub trait IoBus: Send + Sync {
    /// The guest reads `data.len()` (1, 2 or 4) bytes from a port. What no device answers reads
    /// as all ones.
    fn port_read(&self, port: u16, data: &mut [u8]);
    /// The guest writes `data` (1, 2 or 4 bytes) to a port.
    fn port_write(&self, port: u16, data: &[u8]) -> IoOutcome;
    /// The guest reads `data.len()` (1 to 8) bytes at a guest physical address that is not RAM.
    fn mmio_read(&self, addr: u64, data: &mut [u8]);
    /// The guest writes `data` (1 to 8 bytes) to an address that is not RAM.
    fn mmio_write(&self, addr: u64, data: &[u8]) -> IoOutcome;
}

/// Why a vCPU left the guest for good, until the machine decides what to do. Its thread is paused.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum VcpuEvent {
    /// The guest asked for a reset.
    Reset,
    /// The guest asked to be powered off.
    Shutdown,
    /// The guest's processor shut down: an exception while delivering a double fault. A PC resets.
    TripleFault,
    /// The vCPU can't run on. The text says what happened, where, and what to do.
    InternalError(String),
}

/// Where vCPU threads report to. Called on the vCPU's thread: must not block, and above all not
/// wait for that vCPU. When it is called, the vCPU executes no further instruction.
pub trait EventSink: Send + Sync {
    /// The vCPU of that index has stopped by itself.
    fn vcpu_stopped(&self, vcpu: u32, event: VcpuEvent);
}

impl<F: Fn(u32, VcpuEvent) + Send + Sync> EventSink for F {
    fn vcpu_stopped(&self, vcpu: u32, event: VcpuEvent) {
        self(vcpu, event);
    }
}
