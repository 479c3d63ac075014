use super::*;
use crate::kvm::tests::kvm_or_skip;
use crate::test_guest::{CODE, Machine};
use kvm_bindings::{Msrs, kvm_msr_entry, kvm_xcr};

/// Puts a value of its own into everything that a guest can change without running, and that
/// doesn't depend on what the processor is.
fn scribble(vcpu: &mut Vcpu) {
    let fd = vcpu.fd();
    let mut regs = fd.get_regs().unwrap();
    (regs.rax, regs.rbx, regs.rcx, regs.rdx) = (1, 2, 3, 4);
    (regs.rsi, regs.rdi, regs.rsp, regs.rbp) = (5, 6, 0x7_0000, 8);
    (regs.r8, regs.r9, regs.r10, regs.r11) = (9, 10, 11, 12);
    (regs.r12, regs.r13, regs.r14, regs.r15) = (13, 14, 15, 16);
    regs.rflags = 0xcd7;
    fd.set_regs(&regs).unwrap();
    let mut sregs = fd.get_sregs().unwrap();
    (sregs.cr2, sregs.cr8) = (0xdead_0000, 5);
    (sregs.fs.base, sregs.gs.base) = (0x1111_0000, 0x2222_0000);
    (sregs.gdt.base, sregs.gdt.limit) = (0x9000_0000, 0x77);
    (sregs.idt.base, sregs.idt.limit) = (0xa000_0000, 0xfff);
    fd.set_sregs(&sregs).unwrap();
    let mut debug = fd.get_debug_regs().unwrap();
    (debug.db, debug.dr7) = ([0x1000, 0x2000, 0x3000, 0x4000], 0x400);
    fd.set_debug_regs(&debug).unwrap();
    let mut fpu = fd.get_fpu().unwrap();
    fpu.xmm = std::array::from_fn(|index| [index as u8 + 1; 16]);
    fpu.fpr[0] = [0, 0, 0, 0, 0, 0, 0, 0x80, 0xff, 0x3f, 0, 0, 0, 0, 0, 0]; // 1.0
    fpu.mxcsr = 0x1fa0;
    fpu.fcw = 0x27f;
    fd.set_fpu(&fpu).unwrap();
    let mut xcrs = fd.get_xcrs().unwrap();
    let avx = fd
        .get_cpuid2(256)
        .unwrap()
        .as_slice()
        .iter()
        .any(|entry| entry.function == 0xd && entry.index == 0 && entry.eax & 7 == 7);
    xcrs.xcrs[0] = kvm_xcr {
        xcr: 0,
        value: if avx { 7 } else { 1 },
        ..Default::default()
    };
    fd.set_xcrs(&xcrs).unwrap();
    let msrs = [
        (0x174, 0x10),                        // SYSENTER_CS
        (0x175, 0x6_0000),                    // SYSENTER_ESP
        (0x277, 0x0007_0106_0007_0106),       // PAT
        (0xc000_0081, 0x0023_0010_0000_0000), // STAR
        (0xc000_0082, 0x10_0000),             // LSTAR
        (0xc000_0102, 0x3333_0000),           // KERNEL_GS_BASE
        (0xc000_0103, 3),                     // TSC_AUX
    ];
    for (index, data) in msrs {
        let entry = kvm_msr_entry {
            index,
            data,
            ..Default::default()
        };
        let msrs = Msrs::from_entries(&[entry]).unwrap();
        assert_eq!(fd.set_msrs(&msrs).unwrap(), 1, "MSR {index:#x}");
    }
    // Not listed by KVM; not every KVM has them.
    for (index, data) in [
        (0x200, 0x6),
        (0x258, 0x0606_0606_0606_0606),
        (0x405, 1 << 60),
    ] {
        let entry = kvm_msr_entry {
            index,
            data,
            ..Default::default()
        };
        let written = fd.set_msrs(&Msrs::from_entries(&[entry]).unwrap()).unwrap();
        let kept = vcpu.msr_indices.contains(&index);
        eprintln!("MSR {index:#x}: written {written}, part of the state: {kept}");
        assert!(written == 0 || kept, "MSR {index:#x}");
    }
    let mut lapic = fd.get_lapic().unwrap();
    lapic.regs[0xf1] = 1; // Enabled by software.
    lapic.regs[0x370] = 0x44; // LINT1's vector.
    fd.set_lapic(&lapic).unwrap();
    let mut events = fd.get_vcpu_events().unwrap();
    events.nmi.pending = 1;
    events.nmi.masked = 1;
    events.interrupt.shadow = 1;
    events.flags |= KVM_VCPUEVENT_VALID_NMI_PENDING | KVM_VCPUEVENT_VALID_SHADOW;
    fd.set_vcpu_events(&events).unwrap();
}

#[test]
fn everything_arrives_in_another_vm_as_it_left() {
    let Some(kvm) = kvm_or_skip() else { return };
    let mut source = Machine::new(&kvm, 2);
    let mut destination = Machine::new(&kvm, 2);
    source.enter_user_mode(&[0xeb, 0xfe]);
    source.threads[0].call(scribble).wait().unwrap();
    for index in 0..2 {
        let saved = source.threads[index]
            .call(Vcpu::save)
            .wait()
            .unwrap()
            .unwrap();
        if index == 0 {
            let section = saved.to_section(0).unwrap();
            eprintln!("{} bytes, {} MSRs", section.body.len(), saved.0.msrs.len());
            assert_eq!((saved.rip(), saved.0.regs.r15), (CODE, 16));
            assert_ne!(
                &saved,
                &source.threads[1].call(Vcpu::save).wait().unwrap().unwrap()
            );
        }
        let section = saved.to_section(index as u32).unwrap();
        assert_eq!(
            (section.name.as_str(), section.version),
            (["vcpu.0", "vcpu.1"][index], 1)
        );
        let received = VcpuState::from_section(&section).unwrap();
        assert_eq!(received, saved);
        let loaded = destination.threads[index].call(move |vcpu| {
            vcpu.restore(&received).unwrap();
            vcpu.save().unwrap()
        });
        assert_eq!(loaded.wait().unwrap(), saved);
    }
}

#[test]
fn a_damaged_section_is_refused_by_name() {
    let Some(kvm) = kvm_or_skip() else { return };
    let mut machine = Machine::new(&kvm, 1);
    let good = machine.threads[0].call(Vcpu::save).wait().unwrap().unwrap();
    let refused = |change: &dyn Fn(&mut Body)| {
        let mut state = good.clone();
        change(&mut state.0);
        let section = state.to_section(0).unwrap();
        VcpuState::from_section(&section).unwrap_err().to_string()
    };
    assert_eq!(
        refused(&|body| body.msrs = vec![Msr::default(); 513]),
        "msrs has 513 entries; at most 512 are possible"
    );
    assert!(refused(&|body| body.xsave.truncate(1000)).contains("xsave"));
    assert!(refused(&|body| body.lapic.push(0)).contains("the length of lapic"));
    assert!(refused(&|body| body.mp_state = 5).contains("mp_state is 0x5"));
    assert!(refused(&|body| body.xcrs = vec![Xcr::default(); 17]).contains("xcrs has 17"));
    assert!(refused(&|body| body.cpuid = vec![CpuidEntry::default(); 257]).contains("cpuid"));

    // Truncated anywhere, or with a length that promises gigabytes: an error, and no panic.
    let section = good.to_section(0).unwrap();
    for len in (0..section.body.len()).step_by(7) {
        let mut cut = section.clone();
        cut.body.truncate(len);
        VcpuState::from_section(&cut).unwrap_err();
    }
    let mut huge = section.clone();
    huge.body[..8].copy_from_slice(&u64::MAX.to_le_bytes());
    VcpuState::from_section(&huge).unwrap_err();
    huge.body = section.body.clone();
    huge.body.push(0);
    let error = VcpuState::from_section(&huge).unwrap_err().to_string();
    assert!(error.contains("1 bytes are left over"), "{error}");
}

#[test]
fn loading_leaves_alone_the_memory_that_an_msr_makes_kvm_write_to() {
    use vm_memory::{Bytes, GuestAddress};
    let Some(kvm) = kvm_or_skip() else { return };
    let mut machine = Machine::new(&kvm, 1);
    let mut state = machine.threads[0].call(Vcpu::save).wait().unwrap().unwrap();
    let place = GuestAddress(0x30_0000);
    machine.ram().write_slice(&[0x5a; 16], place).unwrap();
    let mut clocks = 0;
    for msr in &mut state.0.msrs {
        if matches!(msr.index, 0x11 | 0x4b56_4d00) {
            msr.data = place.0;
            clocks += 1;
        }
    }
    let restored = machine.threads[0].call(move |vcpu| vcpu.restore(&state));
    restored.wait().unwrap().unwrap();
    let mut bytes = [0; 16];
    machine.ram().read_slice(&mut bytes, place).unwrap();
    assert_eq!(bytes, [0x5a; 16], "{clocks} wall clock registers");
}

#[test]
fn a_guest_runs_on_through_a_series_of_machines() {
    use crate::clock::ClockState;
    use crate::kvm::VmState;
    use migration::clock::{Clock, MonotonicClock};
    use vm_memory::{Bytes, GuestAddress};
    let Some(kvm) = kvm_or_skip() else { return };
    let mut machine = Machine::new(&kvm, 2);
    machine.enter_user_mode(&[
        0x48, 0xb8, 1, 2, 3, 4, 5, 6, 7, 8, // mov rax, 0x0807060504030201
        0x66, 0x48, 0x0f, 0x6e, 0xc0, // movq xmm0, rax
        0x48, 0xff, 0xc3, // again: inc rbx
        0x48, 0x89, 0x1c, 0x25, 0x00, 0x00, 0x20, 0x00, // mov [0x200000], rbx
        0x66, 0x48, 0x0f, 0x7e, 0xc1, // movq rcx, xmm0
        0x48, 0x39, 0xc1, // cmp rcx, rax
        0x74, 0xeb, // je again
        0x48, 0x89, 0x0c, 0x25, 0x08, 0x00, 0x20, 0x00, // mov [0x200008], rcx
        0xeb, 0xfe, // jmp $
    ]);
    let count = |machine: &Machine| {
        let ram = machine.ram();
        assert_eq!(ram.read_obj::<u64>(GuestAddress(0x20_0008)).unwrap(), 0);
        ram.read_obj::<u64>(GuestAddress(0x20_0000)).unwrap()
    };
    let mut last = 0;
    for _ in 0..10 {
        machine.run();
        while count(&machine) == last {
            std::thread::yield_now();
        }
        machine.pause();
        last = count(&machine);
        let stopped_at = machine
            .threads
            .iter()
            .filter_map(|thread| thread.last_left());
        let stopped_at = stopped_at.max().unwrap();
        let clocks: Vec<_> = machine
            .threads
            .iter()
            .map(|thread| thread.clock())
            .collect();
        let clock = ClockState::take(&machine.vm, &clocks, stopped_at).unwrap();
        let calls: Vec<_> = machine
            .threads
            .iter_mut()
            .map(|t| t.call(Vcpu::save))
            .collect();
        let states: Vec<_> = calls
            .into_iter()
            .map(|call| call.wait().unwrap().unwrap())
            .collect();
        let devices = VmState::save(&machine.vm).unwrap();

        let mut next = Machine::new(&kvm, 2);
        let mut bytes = vec![0; crate::memory::MIN_RAM as usize];
        machine
            .ram()
            .read_slice(&mut bytes, GuestAddress(0))
            .unwrap();
        next.ram().write_slice(&bytes, GuestAddress(0)).unwrap();
        let clocks: Vec<_> = next.threads.iter().map(|thread| thread.clock()).collect();
        clock
            .set(&next.vm, &clocks, std::time::Duration::ZERO)
            .unwrap();
        let calls: Vec<_> = next
            .threads
            .iter_mut()
            .zip(states)
            .map(|(thread, state)| thread.call(move |vcpu| vcpu.restore(&state)))
            .collect();
        for call in calls {
            call.wait().unwrap().unwrap();
        }
        devices.restore(&next.vm).unwrap();
        let clocks: Vec<_> = next.threads.iter().map(|thread| thread.clock()).collect();
        let stopped_for = MonotonicClock.now() - stopped_at;
        clock.set(&next.vm, &clocks, stopped_for).unwrap();
        assert_eq!(count(&next), last);
        machine = next;
    }
}
