//! The serial port COM1: a 16550A (vm-superio) between the guest's ports and a host back end.

use std::io::Write;
use std::ops::RangeInclusive;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use serde::{Deserialize, Serialize};
use tracing::warn;
use vm_superio::serial::{Error as UartError, SerialEvents};
use vm_superio::{SerialState, Trigger};

use crate::InterruptLine;
use crate::bus::{MachineRequest, PortDevice};
use crate::state::{SaveRestore, StateError, decode, encode};

/// The interrupt of COM1.
pub const IRQ: u32 = 4;

const NAME: &str = "serial";
const BASE: u16 = 0x3f8;
/// The receive FIFO of vm-superio's model, in bytes.
const RECEIVE_FIFO: usize = 64;

/// Called, from a vCPU thread, when the guest has read from the receive FIFO: there is room for
/// more input. Must not call back into the serial port.
pub type RoomNotifier = Arc<dyn Fn() + Send + Sync>;

#[derive(Clone)]
struct Line(Arc<dyn InterruptLine>);

impl Trigger for Line {
    type E = std::io::Error;

    fn trigger(&self) -> std::io::Result<()> {
        self.0.pulse()
    }
}

#[derive(Clone)]
struct Events(RoomNotifier);

impl SerialEvents for Events {
    fn buffer_read(&self) {
        (self.0)();
    }
    fn out_byte(&self) {}
    fn tx_lost_byte(&self) {}
    fn in_buffer_empty(&self) {}
}

/// Where the guest's output goes. `write` must return within the bounds that a vCPU may be held
/// up for; see the back ends of the VMM.
pub type Output = Box<dyn Write + Send>;

type Uart = vm_superio::Serial<Line, Events, Output>;

/// The serial port.
pub struct Serial {
    uart: Mutex<Uart>,
    line: Line,
    events: Events,
}

impl Serial {
    /// A serial port as after power-on, which interrupts on `line` and writes to `output`.
    pub fn new(line: Arc<dyn InterruptLine>, output: Output, on_room: RoomNotifier) -> Self {
        let line = Line(line);
        let events = Events(on_room);
        Self {
            uart: Mutex::new(Uart::with_events(line.clone(), events.clone(), output)),
            line,
            events,
        }
    }

    /// The number of bytes that the receive FIFO has room for.
    pub fn room(&self) -> usize {
        self.uart().fifo_capacity()
    }

    /// Gives input to the guest and returns how many bytes of it were taken: fewer than offered
    /// when the FIFO is full, or none while the guest has the port in loopback mode.
    pub fn receive(&self, input: &[u8]) -> usize {
        match self.uart().enqueue_raw_bytes(input) {
            Ok(taken) => taken,
            Err(UartError::FullFifo) => 0,
            Err(err) => {
                // The bytes are in the FIFO; only the interrupt for them failed.
                warn!(%err, "serial port: can't interrupt the guest");
                input.len()
            }
        }
    }

    /// Interrupts again if a reason for it is pending. Input comes while the machine stands still,
    /// too: what arrives between the saves of the interrupt controllers and of the port is in the
    /// FIFO at the destination, but its interrupt is not. A driver that has seen it ignores this.
    pub fn raise_again(&self) {
        let uart = self.uart();
        if uart.state().interrupt_identification & IIR_NONE == 0
            && let Err(err) = self.line.0.pulse()
        {
            warn!(%err, "serial port: can't interrupt the guest");
        }
    }

    fn uart(&self) -> MutexGuard<'_, Uart> {
        self.uart.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn replace(&self, state: &SerialState) -> Result<(), UartError<std::io::Error>> {
        let mut uart = self.uart();
        let fresh = |output: Output| {
            Uart::from_state(state, self.line.clone(), self.events.clone(), output)
        };
        // Build the new port around a sink first: if it fails, the old one keeps its output.
        let mut new = fresh(Box::new(std::io::sink()))?;
        std::mem::swap(new.writer_mut(), uart.writer_mut());
        *uart = new;
        Ok(())
    }
}

impl PortDevice for Serial {
    fn name(&self) -> &'static str {
        NAME
    }

    fn ports(&self) -> RangeInclusive<u16> {
        BASE..=BASE + 7
    }

    fn read(&self, port: u16) -> u8 {
        self.uart().read(register(port))
    }

    fn write(&self, port: u16, value: u8) -> Option<MachineRequest> {
        if let Err(err) = self.uart().write(register(port), value) {
            warn!(%err, "serial port: a write by the guest failed");
        }
        None
    }

    fn reset(&self) {
        if let Err(err) = self.replace(&SerialState::default()) {
            warn!(%err, "serial port: reset failed");
        }
    }

    fn saved_state(&self) -> Option<&dyn SaveRestore> {
        Some(self)
    }
}

fn register(port: u16) -> u8 {
    // The bus gives only the device's own ports.
    (port.wrapping_sub(BASE) & 7) as u8
}

/// Version 1 of the saved state: the registers of the 16550A and its receive FIFO.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct SavedSerial {
    divisor_low: u8,
    divisor_high: u8,
    interrupt_enable: u8,
    interrupt_identification: u8,
    line_control: u8,
    line_status: u8,
    modem_control: u8,
    modem_status: u8,
    scratch: u8,
    receive_fifo: Vec<u8>,
}

impl From<SerialState> for SavedSerial {
    fn from(state: SerialState) -> Self {
        let SerialState {
            baud_divisor_low,
            baud_divisor_high,
            interrupt_enable,
            interrupt_identification,
            line_control,
            line_status,
            modem_control,
            modem_status,
            scratch,
            in_buffer,
        } = state;
        Self {
            divisor_low: baud_divisor_low,
            divisor_high: baud_divisor_high,
            interrupt_enable,
            interrupt_identification,
            line_control,
            line_status,
            modem_control,
            modem_status,
            scratch,
            receive_fifo: in_buffer,
        }
    }
}

/// The bit of the interrupt identification register that says that nothing is pending.
const IIR_NONE: u8 = 1;

/// The data-ready bit of the line status register.
const LSR_DATA_READY: u8 = 1;

impl TryFrom<SavedSerial> for SerialState {
    type Error = StateError;

    fn try_from(saved: SavedSerial) -> Result<Self, StateError> {
        let SavedSerial {
            divisor_low,
            divisor_high,
            interrupt_enable,
            interrupt_identification,
            line_control,
            line_status,
            modem_control,
            modem_status,
            scratch,
            receive_fifo,
        } = saved;
        let field =
            |name, value, valid, expected| StateError::unless(valid, NAME, name, value, expected);
        field(
            "interrupt_enable",
            interrupt_enable.into(),
            interrupt_enable <= 0x0f,
            "bits 0 to 3",
        )?;
        field(
            "interrupt_identification",
            interrupt_identification.into(),
            interrupt_identification <= 0x07,
            "bits 0 to 2",
        )?;
        field(
            "line_status",
            line_status.into(),
            line_status & !LSR_DATA_READY == 0x60,
            "transmitter empty and idle (0x60), and data ready",
        )?;
        field(
            "receive_fifo",
            receive_fifo.len() as u64,
            receive_fifo.len() <= RECEIVE_FIFO,
            "at most 64 bytes",
        )?;
        field(
            "line_status",
            line_status.into(),
            (line_status & LSR_DATA_READY != 0) != receive_fifo.is_empty(),
            "data ready if the receive FIFO has bytes",
        )?;
        Ok(Self {
            baud_divisor_low: divisor_low,
            baud_divisor_high: divisor_high,
            interrupt_enable,
            interrupt_identification,
            line_control,
            line_status,
            modem_control,
            modem_status,
            scratch,
            in_buffer: receive_fifo,
        })
    }
}

impl SaveRestore for Serial {
    fn version(&self) -> u32 {
        1
    }

    fn save(&self) -> Result<Vec<u8>, StateError> {
        encode(NAME, &SavedSerial::from(self.uart().state()))
    }

    fn restore(&self, _version: u32, body: &[u8]) -> Result<(), StateError> {
        let saved: SavedSerial = decode(NAME, body)?;
        self.replace(&saved.try_into()?)
            .map_err(|err| StateError::Restore {
                device: NAME.to_owned(),
                source: std::io::Error::other(err.to_string()),
            })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicUsize, Ordering};

    #[derive(Clone, Default)]
    struct Counter(Arc<AtomicUsize>);

    impl InterruptLine for Counter {
        fn pulse(&self) -> std::io::Result<()> {
            self.0.fetch_add(1, Ordering::Relaxed);
            Ok(())
        }
    }

    #[derive(Clone, Default)]
    struct Sink(Arc<Mutex<Vec<u8>>>);

    impl Write for Sink {
        fn write(&mut self, data: &[u8]) -> std::io::Result<usize> {
            self.0.lock().unwrap().extend(data);
            Ok(data.len())
        }
        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }

    fn port(sink: &Sink, interrupts: &Counter) -> Serial {
        Serial::new(
            Arc::new(interrupts.clone()),
            Box::new(sink.clone()),
            Arc::new(|| {}),
        )
    }

    #[test]
    fn input_interrupts_and_is_read_in_order() {
        let (sink, interrupts) = <(Sink, Counter)>::default();
        let serial = port(&sink, &interrupts);
        serial.write(BASE + 1, 0x01);
        let input: Vec<u8> = (0..100).collect();
        assert_eq!(serial.receive(&input), 64);
        assert_eq!(serial.room(), 0);
        assert_eq!(serial.receive(&input[64..]), 0);
        assert_eq!(interrupts.0.load(Ordering::Relaxed), 1);
        for expected in 0..64 {
            assert_eq!(serial.read(BASE + 5) & LSR_DATA_READY, 1);
            assert_eq!(serial.read(BASE), expected);
        }
        assert_eq!(serial.read(BASE + 5) & LSR_DATA_READY, 0);
    }

    #[test]
    fn what_is_pending_interrupts_again_when_the_machine_runs_on() {
        let (sink, interrupts) = <(Sink, Counter)>::default();
        let serial = port(&sink, &interrupts);
        serial.write(BASE + 1, 0x01);
        serial.raise_again();
        assert_eq!(interrupts.0.load(Ordering::Relaxed), 0);
        serial.receive(b"x");
        let (_, there) = <(Sink, Counter)>::default();
        let other = port(&sink, &there);
        other.restore(1, &serial.save().unwrap()).unwrap();
        let restored = there.0.load(Ordering::Relaxed);
        other.raise_again();
        assert_eq!(there.0.load(Ordering::Relaxed), restored + 1);
        assert_eq!(other.read(BASE), b'x');
        other.raise_again();
        assert_eq!(there.0.load(Ordering::Relaxed), restored + 1);
    }

    #[test]
    fn a_restored_port_goes_on_where_the_saved_one_stopped() {
        let (sink, interrupts) = <(Sink, Counter)>::default();
        let serial = port(&sink, &interrupts);
        serial.write(BASE + 7, 0x5a);
        serial.write(BASE + 1, 0x01);
        serial.receive(b"xyz");
        assert_eq!(serial.read(BASE), b'x');
        let body = serial.save().unwrap();

        let (other_sink, other_interrupts) = <(Sink, Counter)>::default();
        let other = port(&other_sink, &other_interrupts);
        other.restore(1, &body).unwrap();
        assert_eq!(other.save().unwrap(), body);
        assert_eq!(other.read(BASE + 7), 0x5a);
        assert_eq!(other.read(BASE), b'y');
        assert_eq!(other.read(BASE), b'z');
        other.write(BASE, b'!');
        assert_eq!(*other_sink.0.lock().unwrap(), b"!");
    }

    #[test]
    fn a_state_that_cannot_be_is_refused_and_changes_nothing() {
        let (sink, interrupts) = <(Sink, Counter)>::default();
        let serial = port(&sink, &interrupts);
        serial.write(BASE + 7, 0x77);
        let good = SavedSerial::from(serial.uart().state());
        let refused = |change: &dyn Fn(&mut SavedSerial)| {
            let mut bad = good.clone();
            change(&mut bad);
            let body = encode(NAME, &bad).unwrap();
            serial.restore(1, &body).unwrap_err().to_string()
        };
        assert_eq!(
            refused(&|s| s.interrupt_enable = 0x10),
            "serial: saved field 'interrupt_enable' is 16, expected bits 0 to 3"
        );
        assert!(
            refused(&|s| s.interrupt_identification = 0xff).contains("interrupt_identification")
        );
        assert!(refused(&|s| s.line_status = 0).contains("line_status"));
        assert!(refused(&|s| s.line_status = 0x61).contains("line_status"));
        assert!(refused(&|s| s.receive_fifo = vec![0; 65]).contains("receive_fifo"));
        assert_eq!(SavedSerial::from(serial.uart().state()), good);

        let mut body = serial.save().unwrap();
        body.push(0);
        assert_eq!(
            serial.restore(1, &body).unwrap_err().to_string(),
            "serial: 1 bytes behind the end of the saved state"
        );
        // A FIFO length far beyond the bytes that follow must not be believed.
        let length_at = body.len() - 9;
        body[length_at..].fill(0xff);
        assert!(matches!(
            serial.restore(1, &body),
            Err(StateError::Decode { .. })
        ));
    }
}
