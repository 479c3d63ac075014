//! What must be done at CPL 0: a few routines in `traps.s`, reached through its gate.
//!
//! Everything else runs at CPL 3, where all memory and the ports up to 0xfff are accessible too.
//! That is how most of a real guest runs, and the only way that is fast on a KVM that interprets
//! CPL 0.
#![allow(unsafe_code, reason = "privileged instructions")]

use core::arch::asm;

// SAFETY: `traps.s` defines them. They take their arguments in registers, as `call` passes them,
// and nothing here calls one directly.
unsafe extern "C" {
    fn privileged_gate();
    fn privileged_rdmsr();
    fn privileged_wrmsr();
    fn privileged_read_msr();
    fn privileged_write_msr();
    fn privileged_rdtsc();
    fn privileged_read_control();
    fn privileged_write_debug();
    fn privileged_cpuid();
    fn privileged_interrupts();
    fn privileged_wait();
    fn privileged_stop();
    fn privileged_triple_fault();
    fn privileged_breakpoint();
    fn privileged_popcnt();
    fn privileged_undefined();
    fn privileged_spin();
    fn privileged_port_spin();
}

/// Runs a routine of `traps.s` at CPL 0.
///
/// # Safety
/// The routine must take these arguments and do no harm with them.
pub(crate) unsafe fn call(
    routine: unsafe extern "C" fn(),
    first: u64,
    second: u64,
    third: u64,
) -> u64 {
    let result;
    // SAFETY: the gate changes what a C function may change, and memory as the caller vouches.
    unsafe {
        asm!(
            "call {gate}",
            gate = sym privileged_gate,
            inlateout("rax") routine as *const () as u64 => result,
            inlateout("rdi") first => _,
            inlateout("rsi") second => _,
            inlateout("rdx") third => _,
            lateout("rcx") _, lateout("r8") _, lateout("r9") _, lateout("r10") _, lateout("r11") _,
        );
    }
    result
}

/// Reads an MSR that surely exists.
#[must_use]
pub fn rdmsr(msr: u32) -> u64 {
    // SAFETY: reading changes nothing.
    unsafe { call(privileged_rdmsr, msr.into(), 0, 0) }
}

/// Writes an MSR that surely exists.
///
/// # Safety
/// The value must not pull the rug from under the guest.
pub unsafe fn wrmsr(msr: u32, value: u64) {
    // SAFETY: the caller vouches for it.
    unsafe { call(privileged_wrmsr, msr.into(), value, 0) };
}

/// Reads an MSR; `None` if it does not exist.
#[must_use]
pub fn read_msr(msr: u32) -> Option<u64> {
    let mut value = 0u64;
    // SAFETY: the routine writes to `value` only.
    let exists = unsafe { call(privileged_read_msr, msr.into(), &raw mut value as u64, 0) };
    (exists == 1).then_some(value)
}

/// Writes an MSR; false if it does not exist or refuses the value.
///
/// # Safety
/// The value must not pull the rug from under the guest.
pub unsafe fn write_msr(msr: u32, value: u64) -> bool {
    // SAFETY: the caller vouches for it.
    unsafe { call(privileged_write_msr, msr.into(), value, 0) == 1 }
}

/// The TSC as CPL 0 reads it: where CPL 0 is interpreted, an offset that the VMM sets may apply
/// here only.
#[must_use]
pub fn rdtsc() -> u64 {
    // SAFETY: no memory is touched.
    unsafe { call(privileged_rdtsc, 0, 0, 0) }
}

/// The registers that only CPL 0 can read; `traps.s` fills it in.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct Control {
    /// CR0, CR3, CR4, CR8.
    pub cr: [u64; 4],
    /// DR0 to DR3, DR6, DR7.
    pub dr: [u64; 6],
    /// Limit and base, in ten bytes.
    pub gdtr: [u64; 2],
    /// Limit and base, in ten bytes.
    pub idtr: [u64; 2],
    /// The selector.
    pub tr: u32,
    /// The selector.
    pub ldtr: u32,
}

/// Reads them.
#[must_use]
pub fn control() -> Control {
    let mut control = Control::default();
    // SAFETY: the routine writes to `control` only.
    unsafe { call(privileged_read_control, &raw mut control as u64, 0, 0) };
    control
}

/// Sets DR0 to DR3 and DR7.
///
/// # Safety
/// DR7 must enable no breakpoint that nobody handles.
pub unsafe fn write_debug(registers: &[u64; 5]) {
    // SAFETY: the caller vouches for it.
    unsafe { call(privileged_write_debug, registers.as_ptr() as u64, 0, 0) };
}

/// EAX, EBX, ECX and EDX of a CPUID leaf, as the VMM gives them: an interpreted CPUID obeys the
/// VMM where a native one would show the host's.
#[must_use]
pub fn cpuid(leaf: u32, subleaf: u32) -> [u32; 4] {
    let mut registers = [0; 4];
    // SAFETY: the routine writes to `registers` only.
    unsafe {
        call(
            privileged_cpuid,
            leaf.into(),
            subleaf.into(),
            registers.as_mut_ptr() as u64,
        )
    };
    registers
}

/// Switches interrupts at CPL 3 on or off.
pub fn interrupts(on: bool) {
    // SAFETY: every vector has a handler.
    unsafe { call(privileged_interrupts, if on { 0x200 } else { 0 }, 0, 0) };
}

/// Halts until an interrupt, unless the counter has moved on from `seen`.
pub fn wait(counter: *const u64, seen: u64) {
    // SAFETY: the counter is only read; every vector has a handler.
    unsafe { call(privileged_wait, counter as u64, seen, 0) };
}

/// Halts for good, with interrupts off.
pub fn stop() -> ! {
    forever(privileged_stop)
}

/// Makes the processor shut down by a fault that it can't deliver.
pub fn triple_fault() -> ! {
    forever(privileged_triple_fault)
}

/// Loops at CPL 0.
pub fn spin() -> ! {
    forever(privileged_spin)
}

/// Writes to port 0x80 at CPL 0 as fast as it goes.
pub fn port_spin() -> ! {
    forever(privileged_port_spin)
}

fn forever(routine: unsafe extern "C" fn()) -> ! {
    loop {
        // SAFETY: these routines touch no memory; they don't return.
        unsafe { call(routine, 0, 0, 0) };
    }
}

/// `int3` at CPL 0.
pub fn breakpoint() {
    // SAFETY: the handler counts it and returns.
    unsafe { call(privileged_breakpoint, 0, 0, 0) };
}

/// The address after that `int3`.
#[must_use]
pub fn after_breakpoint() -> u64 {
    // `int3` is one byte, at the routine's beginning.
    privileged_breakpoint as *const () as u64 + 1
}

/// `popcnt` at CPL 0, which some KVMs can't interpret.
#[must_use]
pub fn popcnt(value: u64) -> u64 {
    // SAFETY: no memory is touched.
    unsafe { call(privileged_popcnt, value, 0, 0) }
}

/// `ud2` at CPL 0: ends in an exception report.
pub fn undefined() {
    // SAFETY: the handler reports it and powers off.
    unsafe { call(privileged_undefined, 0, 0, 0) };
}
