//! Tiny guests for this crate's tests: hand-assembled code, and a machine around it.

use std::fs::File;
use std::io::Write;
use std::sync::mpsc::{self, Receiver, Sender};
use std::sync::{Arc, Mutex};

use migration::layout::GuestRam;
use vm_memory::{Bytes, GuestAddress};

use crate::boot::{self, BootSource};
use crate::cpuid::{Cpuid, Model};
use crate::kvm::{Kvm, Vm};
use crate::memory;
use crate::vcpu::{IoBus, IoOutcome, Vcpu, VcpuEvent, VcpuThread};

/// Where a guest's code is.
pub(crate) const CODE: u64 = 0x10_0000;

/// A PVH kernel with this 32-bit code and 4 KiB of zeroes behind it.
pub(crate) fn pvh_kernel(code: &[u8]) -> Vec<u8> {
    let mut file = vec![0; 0x1000];
    file[..20].copy_from_slice(b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0\x02\0\x3e\0");
    file[20] = 1;
    file[24..32].copy_from_slice(&CODE.to_le_bytes());
    file[32..40].copy_from_slice(&64u64.to_le_bytes());
    file[52..58].copy_from_slice(&[64, 0, 56, 0, 2, 0]);
    let mut header = |at: usize, kind: u32, fields: [u64; 6]| {
        file[at..at + 4].copy_from_slice(&kind.to_le_bytes());
        file[at + 4..at + 8].copy_from_slice(&7u32.to_le_bytes());
        for (index, field) in fields.iter().enumerate() {
            let at = at + 8 + index * 8;
            file[at..at + 8].copy_from_slice(&field.to_le_bytes());
        }
    };
    let len = code.len() as u64;
    header(64, 1, [0x1000, CODE, CODE, len, len + 0x1000, 0x1000]);
    header(120, 4, [0x200, 0, 0, 20, 20, 4]);
    file[0x200..0x210].copy_from_slice(b"\x04\0\0\0\x04\0\0\0\x12\0\0\0Xen\0");
    file[0x210..0x214].copy_from_slice(&(CODE as u32).to_le_bytes());
    file.extend_from_slice(code);
    file
}

/// A file with these contents.
pub(crate) fn file(contents: &[u8]) -> File {
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(contents).unwrap();
    file
}

/// What a test's guest does on its ports: writes go to the test; writing to 0x64 resets, to 0x604
/// powers off; reads give the low byte of the port's number.
pub(crate) struct Ports(Mutex<Sender<(u16, Vec<u8>)>>);

impl Ports {
    pub(crate) fn new() -> (Arc<Self>, Receiver<(u16, Vec<u8>)>) {
        let (sender, receiver) = mpsc::channel();
        (Arc::new(Self(Mutex::new(sender))), receiver)
    }
}

impl IoBus for Ports {
    fn port_read(&self, port: u16, data: &mut [u8]) {
        data.fill(port as u8);
    }

    fn port_write(&self, port: u16, data: &[u8]) -> IoOutcome {
        // A test that has what it wants doesn't listen any more.
        let _ = self.0.lock().unwrap().send((port, data.to_vec()));
        match port {
            0x64 => IoOutcome::Reset,
            0x604 => IoOutcome::Shutdown,
            _ => IoOutcome::Continue,
        }
    }

    fn mmio_read(&self, addr: u64, data: &mut [u8]) {
        data.fill((addr >> 4) as u8);
    }

    fn mmio_write(&self, addr: u64, data: &[u8]) -> IoOutcome {
        self.port_write((addr >> 4) as u16, data)
    }
}

/// A machine with its vCPUs, paused.
pub(crate) struct Machine {
    pub(crate) threads: Vec<VcpuThread>,
    pub(crate) writes: Receiver<(u16, Vec<u8>)>,
    pub(crate) events: Receiver<(u32, VcpuEvent)>,
    pub(crate) vm: Arc<Vm>,
}

impl Machine {
    /// One with `vcpus` vCPUs and the least RAM, not booted.
    pub(crate) fn new(kvm: &Kvm, vcpus: u32) -> Self {
        let layout = memory::layout(memory::MIN_RAM).unwrap();
        Self::with_vm(
            kvm,
            Vm::new(kvm, memory::map(&layout, &Default::default()).unwrap()).unwrap(),
            vcpus,
        )
    }

    pub(crate) fn with_vm(kvm: &Kvm, vm: Vm, vcpus: u32) -> Self {
        let cpuid = Model::default()
            .cpuid(&Cpuid::supported(kvm).unwrap())
            .unwrap();
        let (bus, writes) = Ports::new();
        let (sender, events) = mpsc::channel();
        let sender = Mutex::new(sender);
        let sink = Arc::new(move |vcpu, event| {
            let _ = sender.lock().unwrap().send((vcpu, event));
        });
        let threads = (0..vcpus)
            .map(|index| {
                let vcpu = Vcpu::new(kvm, &vm, index, vcpus, &cpuid).unwrap();
                VcpuThread::spawn(vcpu, bus.clone(), sink.clone()).unwrap()
            })
            .collect();
        Self {
            threads,
            writes,
            events,
            vm: Arc::new(vm),
        }
    }

    pub(crate) fn ram(&self) -> &GuestRam {
        self.vm.ram()
    }

    /// Boots a PVH kernel with this 32-bit code.
    pub(crate) fn boot(&mut self, code: &[u8]) {
        let kernel = file(&pvh_kernel(code));
        let source = BootSource {
            kernel: &kernel,
            initrd: None,
            command_line: "test",
            virtio_mmio: &[],
        };
        let state = boot::load(self.ram(), &source, self.threads.len() as u32).unwrap();
        self.threads[0]
            .call(move |vcpu| vcpu.set_boot_state(&state))
            .wait()
            .unwrap()
            .unwrap();
    }

    /// Has vCPU 0 begin in 64-bit code at CPL 3, where it can use all of its memory (the page
    /// tables are those for booting Linux), but no exception handlers.
    pub(crate) fn enter_user_mode(&mut self, code: &[u8]) {
        self.user_mode_on(0, code);
    }

    pub(crate) fn user_mode_on(&mut self, vcpu: usize, code: &[u8]) {
        let ram = self.ram();
        boot::write_user_page_tables(ram);
        let at = CODE + vcpu as u64 * 0x1000;
        ram.write_slice(code, GuestAddress(at)).unwrap();
        self.threads[vcpu]
            .call(move |vcpu| {
                let state = boot::BootState::Linux64 {
                    entry: at,
                    boot_params: 0,
                };
                vcpu.set_boot_state(&state).unwrap();
                let mut sregs = vcpu.fd().get_sregs().unwrap();
                for segment in [
                    &mut sregs.cs,
                    &mut sregs.ds,
                    &mut sregs.es,
                    &mut sregs.fs,
                    &mut sregs.gs,
                    &mut sregs.ss,
                ] {
                    segment.dpl = 3;
                    segment.selector |= 3;
                }
                // SSE, for tests that keep something in its registers.
                sregs.cr4 |= 1 << 9 | 1 << 10;
                vcpu.fd().set_sregs(&sregs).unwrap();
                let mut regs = vcpu.fd().get_regs().unwrap();
                regs.rsp = 0x8_0000;
                vcpu.fd().set_regs(&regs).unwrap();
                vcpu.fd()
                    .set_mp_state(kvm_bindings::kvm_mp_state {
                        mp_state: kvm_bindings::KVM_MP_STATE_RUNNABLE,
                    })
                    .unwrap();
            })
            .wait()
            .unwrap();
    }

    pub(crate) fn run(&mut self) {
        for thread in &mut self.threads {
            thread.run().unwrap();
        }
    }

    pub(crate) fn pause(&mut self) {
        self.threads.iter().for_each(VcpuThread::request_pause);
        for thread in &self.threads {
            thread.wait_paused();
        }
    }
}
