//! Running the guest on a vCPU until it has to be left: exits, and what is done about each.

use std::io;
use std::ops::ControlFlow;
use std::sync::atomic::{AtomicBool, Ordering};

use kvm_bindings::{
    KVM_EXIT_INTERNAL_ERROR, KVM_SYSTEM_EVENT_CRASH, KVM_SYSTEM_EVENT_RESET,
    KVM_SYSTEM_EVENT_SHUTDOWN,
};
use kvm_ioctls::VcpuExit;
use migration::clock::{Clock, MonotonicClock};

use super::io::{IoBus, IoOutcome, VcpuEvent};
use super::kick::Kickable;
use super::throttle::Turns;
use super::{Left, Vcpu};
use crate::kvm::ioctl::{self, InternalError};
use crate::software_kvm;

/// What to do after an exit: go on, or leave the guest because of an event.
type Next = ControlFlow<VcpuEvent>;

/// An exit, freed from the borrow of the vCPU where its details are to be had elsewhere.
enum Exit {
    /// Interrupted by a signal, or by the state of the vCPU (EAGAIN: an application processor got
    /// its INIT or SIPI): look around and re-enter.
    Interrupted,
    Handled(IoOutcome),
    Port,
    Stop(VcpuEvent),
    InternalError,
    Unexpected(String),
}

impl Vcpu {
    /// Runs the guest until `pause` is asked for, or something happens that ends the run. On
    /// return the access that the vCPU was in is finished: its state can be read.
    pub(super) fn run(
        &mut self,
        kickable: &Kickable,
        bus: &dyn IoBus,
        pause: &AtomicBool,
        turns: &mut Turns<'_>,
    ) -> Left {
        let mut at = MonotonicClock.now();
        let mut event = None;
        while event.is_none() && !pause.load(Ordering::SeqCst) {
            if !turns.may_enter(pause) {
                continue;
            }
            let exit = self.enter(bus, &mut at);
            // Before the request is looked at again: see `kick`.
            kickable.set_immediate_exit(false);
            event = self.finish(exit, bus).break_value();
        }
        // KVM finishes a port or memory access (the value read reaches its register, the
        // instruction pointer moves on) at the beginning of the next KVM_RUN.
        if let Err(error) = self.complete_access(kickable, bus) {
            event.get_or_insert(error);
        }
        Left { at, event }
    }

    /// Enters the guest without executing anything in it. Each part of an access that KVM makes
    /// in several is handled as it comes; EINTR says that there is no more.
    fn complete_access(&mut self, kickable: &Kickable, bus: &dyn IoBus) -> Result<(), VcpuEvent> {
        let mut event = Ok(());
        loop {
            kickable.set_immediate_exit(true);
            let mut ignored = Default::default();
            let exit = self.enter(bus, &mut ignored);
            let interrupted = matches!(exit, Exit::Interrupted);
            if let ControlFlow::Break(stop) = self.finish(exit, bus) {
                event = event.and(Err(stop));
            }
            if interrupted || event.is_err() {
                kickable.set_immediate_exit(false);
                return event;
            }
        }
    }

    fn enter(&mut self, bus: &dyn IoBus, left_at: &mut std::time::Duration) -> Exit {
        let result = self.fd.run();
        *left_at = MonotonicClock.now();
        match result {
            Ok(VcpuExit::IoIn(..) | VcpuExit::IoOut(..)) => Exit::Port,
            Ok(VcpuExit::MmioRead(addr, data)) => {
                bus.mmio_read(addr, data);
                Exit::Handled(IoOutcome::Continue)
            }
            Ok(VcpuExit::MmioWrite(addr, data)) => Exit::Handled(bus.mmio_write(addr, data)),
            Ok(VcpuExit::Shutdown) => Exit::Stop(VcpuEvent::TripleFault),
            Ok(VcpuExit::SystemEvent(KVM_SYSTEM_EVENT_SHUTDOWN, _)) => {
                Exit::Stop(VcpuEvent::Shutdown)
            }
            Ok(VcpuExit::SystemEvent(KVM_SYSTEM_EVENT_RESET, _)) => Exit::Stop(VcpuEvent::Reset),
            Ok(VcpuExit::SystemEvent(KVM_SYSTEM_EVENT_CRASH, data)) => {
                Exit::Unexpected(format!("the guest crashed and told KVM {data:#x?}"))
            }
            Ok(VcpuExit::SystemEvent(kind, data)) => {
                Exit::Unexpected(format!("unknown system event {kind} with data {data:#x?}"))
            }
            Ok(VcpuExit::Intr | VcpuExit::IrqWindowOpen | VcpuExit::IoapicEoi(_)) => {
                Exit::Interrupted
            }
            // With the local APICs in KVM, HLT waits there.
            Ok(VcpuExit::Hlt) => Exit::Unexpected(
                "HLT left KVM, though the local APICs are in KVM and should wait".into(),
            ),
            Ok(VcpuExit::FailEntry(reason, cpu)) => Exit::Unexpected(format!(
                "the processor refused to enter the guest: hardware reason {reason:#x} on host \
                 CPU {cpu} (an invalid guest state; 0x80000021 on Intel)"
            )),
            Ok(VcpuExit::MemoryFault { flags, gpa, size }) => Exit::Unexpected(format!(
                "KVM cannot access guest memory at {gpa:#x}, {size} bytes (flags {flags:#x})"
            )),
            Ok(VcpuExit::InternalError) => Exit::InternalError,
            Ok(other) => Exit::Unexpected(format!("unexpected exit {other:?}")),
            Err(error) if matches!(error.errno(), libc::EINTR | libc::EAGAIN) => Exit::Interrupted,
            Err(error) => Exit::Unexpected(format!("KVM_RUN failed: {}", io::Error::from(error))),
        }
    }

    /// Does what has to be done about an exit.
    fn finish(&mut self, exit: Exit, bus: &dyn IoBus) -> Next {
        match exit {
            Exit::Interrupted => Next::Continue(()),
            Exit::Handled(outcome) => after(outcome),
            Exit::Port => match self.port_access(bus) {
                Some(outcome) => after(outcome),
                None => self.fail("KVM described a port access that cannot be"),
            },
            Exit::Stop(event) => Next::Break(event),
            Exit::InternalError => self.internal_error(),
            Exit::Unexpected(what) => self.fail(&what),
        }
    }

    /// Makes one port access: one item, or for string instructions several. The first outcome
    /// that stops the vCPU counts, but all items reach the device: KVM can't take them back.
    fn port_access(&mut self, bus: &dyn IoBus) -> Option<IoOutcome> {
        let access = ioctl::port_access(&mut self.fd, self.run_size)?;
        let mut outcome = IoOutcome::Continue;
        for item in access.data.chunks_exact_mut(access.size) {
            if access.is_read {
                bus.port_read(access.port, item);
            } else {
                let this = bus.port_write(access.port, item);
                if outcome == IoOutcome::Continue {
                    outcome = this;
                }
            }
        }
        Some(outcome)
    }

    fn internal_error(&mut self) -> Next {
        debug_assert_eq!(self.fd.get_kvm_run().exit_reason, KVM_EXIT_INTERNAL_ERROR);
        let error = ioctl::internal_error(self.fd.get_kvm_run());
        match software_kvm::emulate(&self.fd, &error) {
            Ok(true) => return Next::Continue(()),
            Ok(false) => {}
            Err(failure) => tracing::error!(%failure, "cannot emulate an instruction"),
        }
        self.fail(&describe(&error))
    }

    /// Ends the run with a message that says where the vCPU was.
    fn fail(&self, what: &str) -> Next {
        let place = match (self.fd.get_regs(), self.fd.get_sregs()) {
            (Ok(regs), Ok(sregs)) => {
                format!(
                    "at RIP {:#x} (CS base {:#x}, CPL {})",
                    regs.rip, sregs.cs.base, sregs.ss.dpl
                )
            }
            _ => "at an address that KVM does not tell".to_owned(),
        };
        Next::Break(VcpuEvent::InternalError(format!(
            "vCPU {} stopped {place}: {what}",
            self.index
        )))
    }
}

fn after(outcome: IoOutcome) -> Next {
    match outcome {
        IoOutcome::Continue => Next::Continue(()),
        IoOutcome::Reset => Next::Break(VcpuEvent::Reset),
        IoOutcome::Shutdown => Next::Break(VcpuEvent::Shutdown),
    }
}

/// An internal error in words.
fn describe(error: &InternalError) -> String {
    use kvm_bindings::{
        KVM_INTERNAL_ERROR_DELIVERY_EV, KVM_INTERNAL_ERROR_EMULATION, KVM_INTERNAL_ERROR_SIMUL_EX,
        KVM_INTERNAL_ERROR_UNEXPECTED_EXIT_REASON,
    };
    let InternalError {
        suberror,
        instruction,
        data,
    } = error;
    match *suberror {
        KVM_INTERNAL_ERROR_EMULATION if !instruction.is_empty() => {
            let bytes: Vec<_> = instruction.iter().map(|b| format!("{b:02x}")).collect();
            format!(
                "KVM cannot execute the instruction with the bytes {}",
                bytes.join(" ")
            )
        }
        KVM_INTERNAL_ERROR_EMULATION => {
            "KVM cannot execute the instruction there, and does not tell its bytes".to_owned()
        }
        KVM_INTERNAL_ERROR_SIMUL_EX => {
            format!("KVM got exceptions that cannot come together (data {data:#x?})")
        }
        KVM_INTERNAL_ERROR_DELIVERY_EV => {
            format!("KVM could not deliver an event (data {data:#x?})")
        }
        KVM_INTERNAL_ERROR_UNEXPECTED_EXIT_REASON => {
            format!("the processor left the guest for a reason unknown to KVM (data {data:#x?})")
        }
        other => format!("KVM internal error {other} (data {data:#x?})"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_instruction_that_kvm_cannot_execute_is_named_by_its_bytes() {
        let error = InternalError {
            suberror: 1,
            instruction: vec![0x48, 0x0f, 0xc7, 0x0f],
            data: vec![],
        };
        assert_eq!(
            describe(&error),
            "KVM cannot execute the instruction with the bytes 48 0f c7 0f"
        );
    }
}
