//! The serial port COM1, a 16550 (National Semiconductor PC16550D), by polling.

use core::fmt::{self, Write};
use core::sync::atomic::{AtomicBool, AtomicU8, Ordering};

use super::port;

const DATA: u16 = 0x3f8;
const INTERRUPT_ENABLE: u16 = 0x3f9;
const FIFO_CONTROL: u16 = 0x3fa;
const LINE_CONTROL: u16 = 0x3fb;
const MODEM_CONTROL: u16 = 0x3fc;
const LINE_STATUS: u16 = 0x3fd;

const RECEIVED: u8 = 1;
const TRANSMITTER_EMPTY: u8 = 0x20;
/// What fits once the transmitter is empty.
const FIFO: u8 = 16;

/// Lines of several vCPUs don't mix.
static BUSY: AtomicBool = AtomicBool::new(false);
/// Bytes that surely fit without looking at the status: a look costs as much as a byte.
static ROOM: AtomicU8 = AtomicU8::new(0);

/// Sets the port to 8N1 at 115200 baud, with FIFOs, without interrupts.
pub fn initialize() {
    port::write(INTERRUPT_ENABLE, 0);
    port::write(LINE_CONTROL, 0x80);
    port::write(DATA, 1);
    port::write(INTERRUPT_ENABLE, 0);
    port::write(LINE_CONTROL, 3);
    port::write(FIFO_CONTROL, 7);
    port::write(MODEM_CONTROL, 0xb);
}

/// Switches the interrupt for received bytes (IRQ 4) on.
pub fn enable_receive_interrupt() {
    port::write(INTERRUPT_ENABLE, 1);
}

fn status() -> u8 {
    let status = port::read(LINE_STATUS);
    if status & TRANSMITTER_EMPTY != 0 {
        ROOM.store(FIFO, Ordering::Relaxed);
    }
    status
}

/// Sends a byte as soon as there is room.
pub fn send(byte: u8) {
    while ROOM.load(Ordering::Relaxed) == 0 {
        status();
    }
    send_now(byte);
}

/// Sends a byte if there is room for sure; looks at no status.
pub fn send_now(byte: u8) -> bool {
    let room = ROOM.load(Ordering::Relaxed);
    if room == 0 {
        return false;
    }
    ROOM.store(room - 1, Ordering::Relaxed);
    port::write(DATA, byte);
    true
}

/// A byte that was received.
#[must_use]
pub fn receive() -> Option<u8> {
    (status() & RECEIVED != 0).then(|| port::read(DATA))
}

struct Port;

impl Write for Port {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        text.bytes().for_each(send);
        Ok(())
    }
}

/// Sends a report as a line of its own: a newline before it ends a row of heartbeats.
pub fn line(report: &dyn fmt::Display) {
    while BUSY.swap(true, Ordering::Acquire) {
        core::hint::spin_loop();
    }
    line_at_any_cost(report);
    BUSY.store(false, Ordering::Release);
}

/// As [`line`], even in the middle of another vCPU's line: for faults.
pub fn line_at_any_cost(report: &dyn fmt::Display) {
    // `Port` never fails.
    let _ = writeln!(Port, "\n{report}");
}
