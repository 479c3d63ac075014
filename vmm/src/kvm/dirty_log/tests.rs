//! The dirty log against an oracle that keeps every page's contents and compares.

use std::time::Duration;

use migration::layout::{Layout, PAGE_SIZE, Region};
use vm_memory::{Bytes, GuestAddress};

use super::*;
use crate::kvm::tests::kvm_or_skip;
use crate::memory;
use crate::test_guest::{CODE, Machine};
use crate::vcpu::VcpuEvent;

/// Writes a byte to each of the addresses in the list at 0x200000, up to a zero, then powers off.
const WRITER: &[u8] = &[
    0xbe, 0x00, 0x00, 0x20, 0x00, // mov esi, 0x200000
    0xfc, // cld
    0xad, // next: lodsd
    0x85, 0xc0, // test eax, eax
    0x74, 0x06, // jz done
    0xfe, 0x00, // inc byte [eax]
    0xeb, 0xf7, // jmp next
    0x90, 0x90, // nop; nop
    0x66, 0xba, 0x04, 0x06, // done: mov dx, 0x604
    0xee, // out dx, al
];
const LIST: u64 = 0x20_0000;

/// A guest in several slots, of which one starts at a dense page that is no multiple of 64, and
/// one lies above 4 GiB, where only the VMM writes.
struct Subject {
    machine: Machine,
    layout: Layout,
    log: DirtyLog,
    /// Each page as it was when it was last "sent".
    sent: Vec<Vec<u8>>,
    random: u64,
}

impl Subject {
    fn new(kvm: &crate::kvm::Kvm, how: ManualProtect) -> Self {
        let region = |start, pages| Region {
            start,
            len: pages * PAGE_SIZE,
        };
        let layout = Layout::new(vec![
            region(0, 1027),
            region(8 << 20, 200),
            region(12 << 20, 64),
            region(4 << 30, 77),
        ])
        .unwrap();
        let vm = Vm::with_limits(
            kvm,
            memory::map(&layout, &Default::default()).unwrap(),
            256,
            Some(how),
        )
        .unwrap();
        assert_eq!(vm.slots().len(), 8);
        let log = vm.dirty_log().unwrap();
        let mut machine = Machine::with_vm(kvm, vm, 1);
        machine.boot(WRITER);
        let mut subject = Self {
            machine,
            sent: vec![Vec::new(); layout.pages() as usize],
            layout,
            log,
            random: 0x1234_5678_9abc_def1,
        };
        for page in 0..subject.layout.pages() {
            subject.send(page);
        }
        subject
    }

    fn random(&mut self, below: u64) -> u64 {
        self.random ^= self.random << 13;
        self.random ^= self.random >> 7;
        self.random ^= self.random << 17;
        self.random % below
    }

    fn addr(&self, mut page: u64) -> u64 {
        for region in self.layout.regions() {
            if page < region.pages() {
                return region.start + page * PAGE_SIZE;
            }
            page -= region.pages();
        }
        unreachable!()
    }

    fn contents(&self, page: u64) -> Vec<u8> {
        let mut bytes = vec![0; PAGE_SIZE as usize];
        let addr = GuestAddress(self.addr(page));
        self.machine.ram().read_slice(&mut bytes, addr).unwrap();
        bytes
    }

    fn send(&mut self, page: u64) {
        self.sent[page as usize] = self.contents(page);
    }

    /// Has the guest write to pages of the lower regions that are not its code or its list.
    fn guest_writes(&mut self, count: usize) {
        let list: Vec<u8> = (0..count)
            .flat_map(|_| {
                let page = loop {
                    let page = self.random(1027 + 200 + 64);
                    let addr = self.addr(page);
                    if addr >= LIST + 0x10_0000 && addr != CODE {
                        break page;
                    }
                };
                let addr = self.addr(page) + self.random(PAGE_SIZE);
                (addr as u32).to_le_bytes()
            })
            .chain([0; 4])
            .collect();
        self.machine
            .ram()
            .write_slice(&list, GuestAddress(LIST))
            .unwrap();
        let restart = self.machine.threads[0].call(|vcpu| {
            let mut regs = vcpu.fd().get_regs().unwrap();
            regs.rip = CODE;
            vcpu.fd().set_regs(&regs).unwrap();
        });
        restart.wait().unwrap();
        self.machine.run();
        let event = self.machine.events.recv_timeout(Duration::from_secs(30));
        assert_eq!(event.unwrap(), (0, VcpuEvent::Shutdown));
    }

    fn vmm_writes(&mut self, count: usize) {
        for _ in 0..count {
            let page = self.random(self.layout.pages());
            let addr = self.addr(page);
            if addr >= LIST + 0x1000 {
                let (at, value) = (self.random(PAGE_SIZE), self.random(256) as u8);
                let addr = GuestAddress(addr + at);
                self.machine.ram().write_obj(value, addr).unwrap();
            }
        }
    }

    fn harvest(&mut self, dirty: &mut PageBitmap) {
        self.log.harvest(&self.machine.vm, dirty).unwrap();
    }

    fn protect(&mut self, dirty: &PageBitmap, first: u64, count: u64) {
        self.log
            .protect(&self.machine.vm, dirty, first, count)
            .unwrap();
    }
}

/// The ways in which this KVM's log can work.
fn ways(kvm: &crate::kvm::Kvm) -> Vec<ManualProtect> {
    let ram = memory::map(
        &memory::layout(memory::MIN_RAM).unwrap(),
        &Default::default(),
    )
    .unwrap();
    let vm = Vm::new(kvm, ram).unwrap();
    match vm.capabilities().manual_protect {
        ManualProtect::No => vec![ManualProtect::No],
        ManualProtect::Yes => vec![ManualProtect::No, ManualProtect::Yes],
        best => vec![ManualProtect::No, ManualProtect::Yes, best],
    }
}

#[test]
fn no_written_page_is_ever_missed() {
    let Some(kvm) = kvm_or_skip() else { return };
    for how in ways(&kvm) {
        misses_nothing(Subject::new(&kvm, how), how);
    }
}

fn misses_nothing(mut subject: Subject, how: ManualProtect) {
    let pages = subject.layout.pages();
    let vm = subject.machine.vm.clone();
    subject.log.start(&vm).unwrap();
    let mut dirty = PageBitmap::new(pages);
    for round in 0..30 {
        subject.guest_writes(200);
        subject.vmm_writes(20);
        subject.harvest(&mut dirty);
        // Every page that differs from what was sent is reported.
        let mut reported = 0;
        for page in 0..pages {
            let differs = subject.contents(page) != subject.sent[page as usize];
            assert!(
                dirty.test(page) || !differs,
                "{how:?}: page {page} at {:#x} is missed in round {round}",
                subject.addr(page)
            );
            reported += u64::from(dirty.test(page));
        }
        assert!(
            round == 0 || reported < pages * 3 / 4,
            "{reported} of {pages}"
        );
        // In pieces, as the engine does it, some of them left for the next round.
        let mut left = PageBitmap::new(pages);
        for first in (0..pages).step_by(192) {
            let count = 192.min(pages - first);
            if subject.random(4) == 0 {
                for page in (first..first + count).filter(|&page| dirty.test(page)) {
                    left.set_range(page, 1);
                }
                continue;
            }
            subject.protect(&dirty, first, count);
            // Between the protection and the reading: the next harvest tells.
            if subject.random(2) == 0 {
                subject.guest_writes(10);
            }
            for page in first..first + count {
                if dirty.test(page) {
                    subject.send(page);
                }
            }
        }
        dirty = left;
    }
    subject.log.stop(&vm);
}

#[test]
fn a_log_that_is_started_again_sees_writes_again() {
    let Some(kvm) = kvm_or_skip() else { return };
    for how in ways(&kvm) {
        sees_writes_again(Subject::new(&kvm, how));
    }
}

fn sees_writes_again(mut subject: Subject) {
    let (pages, vm) = (subject.layout.pages(), subject.machine.vm.clone());
    let all_protected = |subject: &mut Subject| {
        subject.log.start(&vm).unwrap();
        let mut all = PageBitmap::new(pages);
        subject.harvest(&mut all);
        all.set_range(0, pages);
        subject.protect(&all, 0, pages);
        let mut none = PageBitmap::new(pages);
        subject.harvest(&mut none);
        assert_eq!(none, PageBitmap::new(pages), "nothing was written");
    };
    all_protected(&mut subject);
    subject.log.stop(&vm);
    // Not logged, and forgotten at the start.
    subject.guest_writes(50);
    subject.vmm_writes(50);
    all_protected(&mut subject);
    let page = pages - 1;
    let last = GuestAddress(subject.addr(page) + PAGE_SIZE - 1);
    subject.machine.ram().write_obj(1u8, last).unwrap();
    let mut dirty = PageBitmap::new(pages);
    subject.harvest(&mut dirty);
    let mut expected = PageBitmap::new(pages);
    expected.set_range(page, 1);
    assert_eq!(dirty, expected);
    let mut again = PageBitmap::new(pages);
    subject.harvest(&mut again);
    assert_eq!(
        again,
        PageBitmap::new(pages),
        "the VMM's writes are told once"
    );
}
