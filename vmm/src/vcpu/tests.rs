//! vCPUs with tiny guests on a real KVM.

use std::time::{Duration, Instant};

use super::*;
use crate::kvm::tests::kvm_or_skip;
use crate::test_guest::Machine;

const LONG: Duration = Duration::from_secs(10);

#[test]
fn a_pvh_guest_runs_reads_ports_and_powers_off() {
    let Some(kvm) = kvm_or_skip() else { return };
    let mut machine = Machine::new(&kvm, 1);
    machine.boot(&[
        0xe4, 0x77, // in al, 0x77
        0xe6, 0x80, // out 0x80, al
        0x66, 0xb8, 0x34, 0x12, // mov ax, 0x1234
        0x66, 0xe7, 0x82, // out 0x82, ax
        0x66, 0xba, 0x04, 0x06, // mov dx, 0x604
        0xee, // out dx, al
        0xf4, // hlt: not reached
    ]);
    machine.run();
    let writes: Vec<_> = (0..3)
        .map(|_| machine.writes.recv_timeout(LONG).unwrap())
        .collect();
    assert_eq!(
        writes,
        [
            (0x80, vec![0x77]),
            (0x82, vec![0x34, 0x12]),
            (0x604, vec![0x34])
        ]
    );
    assert_eq!(
        machine.events.recv_timeout(LONG).unwrap(),
        (0, VcpuEvent::Shutdown)
    );
    assert_eq!(
        machine.threads[0].wait_paused(),
        VcpuStatus::Paused {
            event: Some(VcpuEvent::Shutdown)
        }
    );
}
