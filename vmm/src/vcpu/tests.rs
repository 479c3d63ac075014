//! vCPUs with tiny guests on a real KVM.

use std::time::{Duration, Instant};

use kvm_bindings::{KVM_MP_STATE_HALTED, kvm_msr_entry};
use vm_memory::{Bytes, GuestAddress};

use super::*;
use crate::kvm::tests::kvm_or_skip;
use crate::test_guest::{CODE, Machine};

/// For what must come, but not how fast.
const LONG: Duration = Duration::from_secs(10);

fn event(machine: &Machine) -> (u32, VcpuEvent) {
    machine.events.recv_timeout(LONG).unwrap()
}

fn next_write(machine: &Machine) -> (u16, Vec<u8>) {
    machine
        .writes
        .recv_timeout(LONG)
        .unwrap_or_else(|_| panic!("no write came; events: {:?}", machine.events.try_recv()))
}

fn regs(machine: &mut Machine, vcpu: usize) -> kvm_bindings::kvm_regs {
    let call = machine.threads[vcpu].call(|vcpu| vcpu.fd().get_regs().unwrap());
    call.wait().unwrap()
}

#[test]
fn a_pvh_guest_runs_reads_ports_and_powers_off() {
    let Some(kvm) = kvm_or_skip() else { return };
    let mut machine = Machine::new(&kvm, 1);
    machine.boot(&[
        0xe4, 0x77, // in al, 0x77
        0xe6, 0x80, // out 0x80, al
        0x66, 0xb8, 0x34, 0x12, // mov ax, 0x1234
        0x66, 0xe7, 0x82, // out 0x82, ax
        0xa0, 0x50, 0x05, 0x00, 0xd0, // mov al, [0xd0000550]: not RAM
        0xa2, 0x10, 0x06, 0x00, 0xd0, // mov [0xd0000610], al
        0x66, 0xba, 0x04, 0x06, // mov dx, 0x604
        0xee, // out dx, al
        0xf4, // hlt: not reached
    ]);
    machine.run();
    let writes: Vec<_> = (0..4).map(|_| next_write(&machine)).collect();
    assert_eq!(
        writes,
        [
            (0x80, vec![0x77]),
            (0x82, vec![0x34, 0x12]),
            (0x0061, vec![0x55]),
            (0x604, vec![0x55])
        ]
    );
    assert_eq!(event(&machine), (0, VcpuEvent::Shutdown));
    let stopped = VcpuStatus::Paused {
        event: Some(VcpuEvent::Shutdown),
    };
    assert_eq!(machine.threads[0].wait_paused(), stopped);
    // The access that stopped it is finished: RIP is behind it.
    assert_eq!(regs(&mut machine, 0).rip, CODE + 26);
}

#[test]
fn string_instructions_reach_the_device_item_by_item() {
    let Some(kvm) = kvm_or_skip() else { return };
    let mut machine = Machine::new(&kvm, 1);
    let text = GuestAddress(0x20_0000);
    machine.ram().write_slice(b"ferry!", text).unwrap();
    machine.boot(&[
        0xbe, 0x00, 0x00, 0x20, 0x00, // mov esi, 0x200000
        0xb9, 0x03, 0x00, 0x00, 0x00, // mov ecx, 3
        0x66, 0xba, 0x80, 0x00, // mov dx, 0x80
        0xf3, 0x66, 0x6f, // rep outsw
        0xe6, 0x64, // out 0x64, al
    ]);
    machine.run();
    let writes: Vec<_> = (0..3).map(|_| next_write(&machine).1).collect();
    assert_eq!(writes, [b"fe".to_vec(), b"rr".to_vec(), b"y!".to_vec()]);
    assert_eq!(event(&machine), (0, VcpuEvent::Reset));
}

/// Pauses and continues a guest that counts on a port, and returns how long each pause took.
#[test]
fn a_pause_in_port_access_neither_loses_nor_repeats_one() {
    let Some(kvm) = kvm_or_skip() else { return };
    let mut machine = Machine::new(&kvm, 1);
    machine.boot(&[
        0x31, 0xdb, // xor ebx, ebx
        0x43, // again: inc ebx
        0x88, 0xd8, // mov al, bl
        0xe6, 0x80, // out 0x80, al
        0xe4, 0x77, // in al, 0x77
        0x3c, 0x77, // cmp al, 0x77
        0x74, 0xf5, // je again
        0xe6, 0x64, // out 0x64, al: the read was lost
    ]);
    let mut expected = 1u8;
    for _ in 0..200 {
        machine.run();
        // At least one write in each run, and none out of order.
        assert_eq!(next_write(&machine), (0x80, vec![expected]));
        expected = expected.wrapping_add(1);
        machine.pause();
        while let Ok(write) = machine.writes.try_recv() {
            assert_eq!(write, (0x80, vec![expected]));
            expected = expected.wrapping_add(1);
        }
        let regs = regs(&mut machine, 0);
        let written = expected.wrapping_sub(1);
        let before_out = (CODE + 3..=CODE + 5).contains(&regs.rip);
        assert_eq!(
            (regs.rbx as u8).wrapping_sub(u8::from(before_out)),
            written,
            "at {:#x}, the access is either not begun or finished",
            regs.rip
        );
    }
    assert!(machine.events.try_recv().is_err());
}

#[test]
fn a_guest_is_paused_whatever_it_does() {
    let Some(kvm) = kvm_or_skip() else { return };
    let mut pauses = Vec::new();
    let mut pause_often = |machine: &mut Machine, what: &str| {
        let mut worst = Duration::ZERO;
        for _ in 0..50 {
            machine.run();
            assert!(machine.threads[0].wait_entered().is_some());
            let asked = Instant::now();
            machine.pause();
            worst = worst.max(asked.elapsed());
            let thread = &machine.threads[0];
            assert_eq!(thread.status(), VcpuStatus::Paused { event: None });
            assert!(thread.last_left() >= thread.wait_entered());
        }
        pauses.push(format!("{what} {worst:?}"));
    };
    let mut machine = Machine::new(&kvm, 1);
    machine.boot(&[0xfa, 0xf4]); // cli; hlt
    pause_often(&mut machine, "halted");
    let mut machine = Machine::new(&kvm, 1);
    machine.boot(&[0xe6, 0x80, 0xeb, 0xfc]); // again: out 0x80, al; jmp again
    pause_often(&mut machine, "port access");
    let mut machine = Machine::new(&kvm, 1);
    machine.boot(&[0xeb, 0xfe]); // again: jmp again
    pause_often(&mut machine, "CPL 0");
    let mut machine = Machine::new(&kvm, 1);
    machine.enter_user_mode(&[0xeb, 0xfe]);
    pause_often(&mut machine, "CPL 3");
    // A vCPU that waits for its INIT.
    let mut machine = Machine::new(&kvm, 2);
    machine.threads.remove(0);
    pause_often(&mut machine, "waiting for INIT");
    eprintln!("worst pauses: {}", pauses.join(", "));
}

#[test]
fn a_pause_that_comes_before_the_run_begins_is_not_lost() {
    let Some(kvm) = kvm_or_skip() else { return };
    let mut machine = Machine::new(&kvm, 1);
    machine.enter_user_mode(&[0xeb, 0xfe]);
    for _ in 0..500 {
        machine.run();
        machine.threads[0].request_pause();
        assert_eq!(
            machine.threads[0].wait_paused(),
            VcpuStatus::Paused { event: None }
        );
    }
    // Asked for before it runs at all, it is forgotten: the run counts.
    machine.threads[0].request_pause();
    machine.run();
    assert!(machine.threads[0].wait_entered().is_some());
    assert_eq!(machine.threads[0].status(), VcpuStatus::Running);
}

#[test]
fn a_pause_can_be_taken_back_at_any_moment() {
    let Some(kvm) = kvm_or_skip() else { return };
    let mut machine = Machine::new(&kvm, 1);
    machine.boot(&[0xe6, 0x80, 0xeb, 0xfc]); // again: out 0x80, al; jmp again
    machine.run();
    for _ in 0..200 {
        machine.threads[0].request_pause();
        // Before it is out, or after.
        let _ = machine.threads[0].wait_paused_until(Instant::now());
        machine.run();
        // It goes on, beyond what was under way.
        while machine.writes.try_recv().is_ok() {}
        for _ in 0..3 {
            next_write(&machine);
        }
    }
    machine.pause();
    assert_eq!(
        machine.threads[0].status(),
        VcpuStatus::Paused { event: None }
    );
}

#[test]
fn a_triple_fault_and_an_instruction_that_cannot_be_executed_are_told() {
    let Some(kvm) = kvm_or_skip() else { return };
    let mut machine = Machine::new(&kvm, 1);
    machine.boot(&[0x0f, 0x0b]); // ud2, without an IDT
    machine.run();
    assert_eq!(event(&machine), (0, VcpuEvent::TripleFault));

    let mut machine = Machine::new(&kvm, 1);
    machine.boot(&[0x9b, 0xe6, 0x64]); // fwait; out 0x64, al
    machine.run();
    match event(&machine) {
        // Hardware executes it.
        (0, VcpuEvent::Reset) => {}
        (0, VcpuEvent::InternalError(message)) => {
            assert!(message.contains("bytes 9b e6 64"), "{message}");
            assert!(message.contains("RIP 0x100000"), "{message}");
        }
        other => panic!("{other:?}"),
    }
}

#[test]
fn int3_in_the_kernel_goes_to_its_handler_and_back_behind_it() {
    let Some(kvm) = kvm_or_skip() else { return };
    let mut machine = Machine::new(&kvm, 1);
    machine.boot(&[
        0x0f, 0x01, 0x1d, 0x00, 0x00, 0x20, 0x00, // lidt [0x200000]
        0xbc, 0x00, 0x00, 0x30, 0x00, // mov esp, 0x300000
        0xcc, // int3
        0xb0, 0x02, // mov al, 2
        0xe6, 0x80, // out 0x80, al
        0xe6, 0x64, // out 0x64, al
        0xb0, 0x01, // handler, at 19: mov al, 1
        0xe6, 0x80, // out 0x80, al
        // Not iretd, which a software KVM may not know in protected mode.
        0x58, 0xff, 0xe0, // pop eax; jmp eax
    ]);
    let idt = GuestAddress(0x20_0010);
    let handler = CODE as u32 + 19;
    let gate =
        u64::from(handler & 0xffff) | 0x10 << 16 | 0x8e00 << 32 | u64::from(handler >> 16) << 48;
    let ram = machine.ram();
    ram.write_obj(gate, idt.0.checked_add(3 * 8).map(GuestAddress).unwrap())
        .unwrap();
    let limit_and_base = [0x7f, 0, 0x10, 0, 0x20, 0];
    ram.write_slice(&limit_and_base, GuestAddress(0x20_0000))
        .unwrap();
    machine.run();
    assert_eq!(next_write(&machine), (0x80, vec![1]), "the handler");
    assert_eq!(next_write(&machine), (0x80, vec![2]), "behind int3");
    assert_eq!(event(&machine), (0, VcpuEvent::Reset));
}

#[test]
fn a_second_vcpu_waits_for_the_first_to_start_it() {
    let Some(kvm) = kvm_or_skip() else { return };
    let mut machine = Machine::new(&kvm, 2);
    machine.boot(&[
        0xb0, 0x05, 0xe6, 0x80, // mov al, 5; out 0x80, al
        // mov dword [0xfee00300], INIT to all others
        0xc7, 0x05, 0x00, 0x03, 0xe0, 0xfe, 0x00, 0x45, 0x0c, 0x00,
        // mov dword [0xfee00300], SIPI to all others, vector 8
        0xc7, 0x05, 0x00, 0x03, 0xe0, 0xfe, 0x08, 0x46, 0x0c, 0x00, //
        0xf4, 0xeb, 0xfd, // hlt; jmp to it
    ]);
    let real_mode = [0xb0, 0x07, 0xe6, 0x90, 0xfa, 0xf4]; // mov al, 7; out 0x90, al; cli; hlt
    let start = GuestAddress(0x8000);
    machine.ram().write_slice(&real_mode, start).unwrap();
    machine.run();
    assert_eq!(next_write(&machine), (0x80, vec![5]));
    assert_eq!(next_write(&machine), (0x90, vec![7]));
    machine.pause();
}

#[test]
fn calls_wait_for_the_pause_and_dropping_ends_a_running_thread() {
    let Some(kvm) = kvm_or_skip() else { return };
    let mut machine = Machine::new(&kvm, 1);
    machine.enter_user_mode(&[0xff, 0xc3, 0xeb, 0xfc]); // again: inc ebx; jmp again
    machine.run();
    machine.threads[0].wait_entered().unwrap();
    let first = machine.threads[0].call(|vcpu| vcpu.index());
    let second = machine.threads[0].call(|vcpu| vcpu.fd().get_regs().unwrap().rip);
    machine.threads[0].request_pause();
    assert_eq!(first.wait().unwrap(), 0);
    assert!((CODE..CODE + 4).contains(&second.wait().unwrap()));
    machine.run();
    drop(machine);
}

#[test]
fn a_reset_brings_back_the_power_on_state() {
    let Some(kvm) = kvm_or_skip() else { return };
    let mut machine = Machine::new(&kvm, 2);
    machine.enter_user_mode(&[0x0f, 0x57, 0xc0, 0xeb, 0xfe]); // xorps xmm0, xmm0; jmp $
    machine.run();
    machine.threads[0].wait_entered();
    machine.pause();
    for thread in &mut machine.threads {
        let (before, after) = thread
            .call(|vcpu| {
                let power_on = vcpu.power_on.clone().unwrap();
                // What a guest may leave behind.
                let star = kvm_msr_entry {
                    index: 0xc000_0081,
                    data: 0x0023_0010_0000_0000,
                    ..Default::default()
                };
                let msrs = kvm_bindings::Msrs::from_entries(&[star]).unwrap();
                assert_eq!(vcpu.fd().set_msrs(&msrs).unwrap(), 1);
                let halted = kvm_bindings::kvm_mp_state {
                    mp_state: KVM_MP_STATE_HALTED,
                };
                vcpu.fd().set_mp_state(halted).unwrap();
                vcpu.reset().unwrap();
                (power_on, vcpu.save().unwrap())
            })
            .wait()
            .unwrap();
        assert_eq!(before, after);
    }
    // And it boots again.
    machine.boot(&[0xe6, 0x64]);
    machine.run();
    assert_eq!(event(&machine), (0, VcpuEvent::Reset));
}

/// A guest that counts in a register.
const COUNT: [u8; 5] = [
    0x48, 0xff, 0xc3, // again: inc rbx
    0xeb, 0xfb, // jmp again
];

/// How far it counts from one look at it to another, in each of which it is paused.
fn counted(machine: &mut Machine, time: Duration) -> u64 {
    let before = regs(machine, 0).rbx;
    machine.run();
    std::thread::sleep(time);
    machine.pause();
    regs(machine, 0).rbx - before
}

#[test]
fn a_throttled_vcpu_does_less_and_then_as_much_as_before() {
    let Some(kvm) = kvm_or_skip() else { return };
    let mut machine = Machine::new(&kvm, 1);
    machine.enter_user_mode(&COUNT);
    let time = Duration::from_millis(500);
    let free = counted(&mut machine, time);
    machine.threads[0].throttle(97);
    let throttled = counted(&mut machine, time);
    machine.threads[0].throttle(0);
    let again = counted(&mut machine, time);
    // Others may use the processors too: what counts is that the difference is large.
    assert!(throttled > 0, "it must get anywhere at all");
    assert!(throttled < free / 3, "{throttled} of {free}");
    assert!(again > throttled * 3, "{again} after {throttled}");
}

/// Every rest would be longer than the guest's own turns.
#[test]
fn a_vcpu_that_rests_is_paused_and_runs_on_any_number_of_times() {
    let Some(kvm) = kvm_or_skip() else { return };
    let mut machine = Machine::new(&kvm, 1);
    machine.enter_user_mode(&COUNT);
    machine.threads[0].throttle(MAX_SHARE);
    for _ in 0..300 {
        machine.run();
        machine.pause();
    }
    // While it is stopped, too, it can be throttled and let go.
    machine.threads[0].throttle(0);
    assert!(counted(&mut machine, Duration::from_millis(50)) > 0);
    assert_eq!(machine.threads[0].throttled(), 0);
}
