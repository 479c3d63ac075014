//! The state of the devices that KVM emulates: the two PICs, the I/O APIC, and the PIT. (The
//! local APICs are the vCPUs', kvmclock is with the [clocks](crate::clock).)

use kvm_bindings::{
    KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE, kvm_ioapic_state,
    kvm_ioapic_state__bindgen_ty_1, kvm_irqchip, kvm_irqchip__bindgen_ty_1, kvm_pic_state,
    kvm_pit_channel_state, kvm_pit_state2,
};
use migration::section::Section;
use serde::{Deserialize, Serialize};

use super::{IoctlError, Vm, ioctl};
use crate::section_body::{self, BodyError};

/// The name of the section with the PICs and the I/O APIC.
pub const IRQCHIP_SECTION: &str = "irqchip";
/// The name of the section with the PIT.
pub const PIT_SECTION: &str = "pit";
/// The version of both bodies that this build writes; it reads no other.
pub const VM_STATE_VERSION: u32 = 1;
const MAX_BODY: usize = 4096;

/// Why the state can't be saved or loaded.
#[derive(Debug, thiserror::Error)]
pub enum VmStateError {
    /// An ioctl failed.
    #[error(transparent)]
    Ioctl(#[from] IoctlError),
    /// A section can't be decoded or encoded.
    #[error("section '{section}': {source}")]
    Body {
        /// Its name.
        section: &'static str,
        /// What is wrong with it.
        source: BodyError,
    },
    /// A value that can't be.
    #[error("section '{section}': {field} is {value:#x}, which cannot be")]
    Value {
        /// The section.
        section: &'static str,
        /// The field.
        field: &'static str,
        /// Its value.
        value: u64,
    },
}

/// The state of the interrupt controllers and of the PIT.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VmState {
    irqchip: IrqChip,
    pit: Pit,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct IrqChip {
    pic_master: Pic,
    pic_slave: Pic,
    io_apic: IoApic,
}

/// Defines a saved struct and its conversions from and to KVM's, naming every field.
macro_rules! saved {
    ($name:ident = $kvm:ident { $($field:ident: $type:ty),* $(,)? }) => {
        #[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
        struct $name { $($field: $type),* }

        impl From<$kvm> for $name {
            fn from($kvm { $($field),* }: $kvm) -> Self {
                Self { $($field),* }
            }
        }

        impl From<$name> for $kvm {
            fn from($name { $($field),* }: $name) -> Self {
                Self { $($field),* }
            }
        }
    };
}

saved! {
    Pic = kvm_pic_state {
        last_irr: u8, irr: u8, imr: u8, isr: u8, priority_add: u8, irq_base: u8,
        read_reg_select: u8, poll: u8, special_mask: u8, init_state: u8, auto_eoi: u8,
        rotate_on_auto_eoi: u8, special_fully_nested_mode: u8, init4: u8, elcr: u8, elcr_mask: u8,
    }
}

saved! {
    PitChannel = kvm_pit_channel_state {
        count: u32, latched_count: u16, count_latched: u8, status_latched: u8, status: u8,
        read_state: u8, write_state: u8, write_latch: u8, rw_mode: u8, mode: u8, bcd: u8, gate: u8,
        // Of the host's clock: KVM replaces it when it loads the state.
        count_load_time: i64,
    }
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct IoApic {
    base_address: u64,
    ioregsel: u32,
    id: u32,
    irr: u32,
    redirections: [u64; 24],
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Pit {
    channels: [PitChannel; 3],
    flags: u32,
}

impl IoApic {
    fn from_kvm(state: kvm_ioapic_state) -> Self {
        let redirections = ioctl::redirections(&state);
        let kvm_ioapic_state {
            base_address,
            ioregsel,
            id,
            irr,
            pad: _,
            redirtbl: _,
        } = state;
        Self {
            base_address,
            ioregsel,
            id,
            irr,
            redirections,
        }
    }

    fn into_kvm(self) -> kvm_ioapic_state {
        let Self {
            base_address,
            ioregsel,
            id,
            irr,
            redirections,
        } = self;
        kvm_ioapic_state {
            base_address,
            ioregsel,
            id,
            irr,
            pad: 0,
            redirtbl: redirections.map(|bits| kvm_ioapic_state__bindgen_ty_1 { bits }),
        }
    }
}

impl VmState {
    /// Reads the state. The vCPUs are paused; the PIT goes on, but nobody sees it.
    pub fn save(vm: &Vm) -> Result<Self, VmStateError> {
        let chip = |id: u32| {
            let mut chip = kvm_irqchip {
                chip_id: id,
                ..Default::default()
            };
            vm.fd()
                .get_irqchip(&mut chip)
                .map_err(IoctlError::named("KVM_GET_IRQCHIP"))
                .map(|()| chip)
        };
        // The PIT first: an interrupt that it raises meanwhile is then in the controllers' state,
        // or comes again at the destination, where it counts its period from the start.
        let pit = vm
            .fd()
            .get_pit2()
            .map_err(IoctlError::named("KVM_GET_PIT2"))?;
        let kvm_pit_state2 {
            channels,
            flags,
            reserved: _,
        } = pit;
        Ok(Self {
            pit: Pit {
                channels: channels.map(PitChannel::from),
                flags,
            },
            irqchip: IrqChip {
                pic_master: ioctl::pic_of(&chip(KVM_IRQCHIP_PIC_MASTER)?).into(),
                pic_slave: ioctl::pic_of(&chip(KVM_IRQCHIP_PIC_SLAVE)?).into(),
                io_apic: IoApic::from_kvm(ioctl::ioapic_of(&chip(KVM_IRQCHIP_IOAPIC)?)),
            },
        })
    }

    /// Loads the state, of a migrated guest or for a reset. After the vCPUs' local APICs: loading
    /// the I/O APIC delivers interrupts that are pending in it.
    pub fn restore(&self, vm: &Vm) -> Result<(), VmStateError> {
        let Self { irqchip, pit } = self.clone();
        let IrqChip {
            pic_master,
            pic_slave,
            io_apic,
        } = irqchip;
        let chips = [
            (
                KVM_IRQCHIP_PIC_MASTER,
                kvm_irqchip__bindgen_ty_1 {
                    pic: pic_master.into(),
                },
            ),
            (
                KVM_IRQCHIP_PIC_SLAVE,
                kvm_irqchip__bindgen_ty_1 {
                    pic: pic_slave.into(),
                },
            ),
            (
                KVM_IRQCHIP_IOAPIC,
                kvm_irqchip__bindgen_ty_1 {
                    ioapic: io_apic.into_kvm(),
                },
            ),
        ];
        for (chip_id, chip) in chips {
            vm.fd()
                .set_irqchip(&kvm_irqchip {
                    chip_id,
                    pad: 0,
                    chip,
                })
                .map_err(IoctlError::named("KVM_SET_IRQCHIP"))?;
        }
        // Last: it starts the timer, which raises interrupts.
        let Pit { channels, flags } = pit;
        vm.fd()
            .set_pit2(&kvm_pit_state2 {
                channels: channels.map(kvm_pit_channel_state::from),
                flags,
                reserved: [0; 9],
            })
            .map_err(IoctlError::named("KVM_SET_PIT2"))?;
        Ok(())
    }

    /// Encodes the state: the sections [`IRQCHIP_SECTION`] and [`PIT_SECTION`].
    pub fn to_sections(&self) -> Result<[Section; 2], VmStateError> {
        let section = |name: &'static str, body: Result<Vec<u8>, BodyError>| {
            Ok::<_, VmStateError>(Section {
                name: name.to_owned(),
                version: VM_STATE_VERSION,
                body: body.map_err(|source| VmStateError::Body {
                    section: name,
                    source,
                })?,
            })
        };
        Ok([
            section(IRQCHIP_SECTION, section_body::encode(&self.irqchip))?,
            section(PIT_SECTION, section_body::encode(&self.pit))?,
        ])
    }

    /// Decodes and validates the two sections. Nothing in them is trusted.
    pub fn from_sections(irqchip: &Section, pit: &Section) -> Result<Self, VmStateError> {
        let body = |section| move |source| VmStateError::Body { section, source };
        let irqchip = section_body::decode::<MAX_BODY, IrqChip>(&irqchip.body)
            .map_err(body(IRQCHIP_SECTION))?;
        let pit: Pit =
            section_body::decode::<MAX_BODY, Pit>(&pit.body).map_err(body(PIT_SECTION))?;
        let check = |section, field, value: u32, most: u32| {
            if value > most {
                return Err(VmStateError::Value {
                    section,
                    field,
                    value: value.into(),
                });
            }
            Ok(())
        };
        for channel in &pit.channels {
            // A counter has 16 bits; 0 stands for 65536 and KVM keeps either. Old kernels divided
            // by what they were given here.
            check(PIT_SECTION, "count", channel.count, 0x1_0000)?;
            // 0xff: none set yet.
            if channel.mode != 0xff {
                check(PIT_SECTION, "mode", channel.mode.into(), 7)?;
            }
            check(PIT_SECTION, "rw_mode", channel.rw_mode.into(), 3)?;
            check(PIT_SECTION, "read_state", channel.read_state.into(), 4)?;
            check(PIT_SECTION, "write_state", channel.write_state.into(), 4)?;
        }
        for pic in [&irqchip.pic_master, &irqchip.pic_slave] {
            check(IRQCHIP_SECTION, "priority_add", pic.priority_add.into(), 7)?;
            check(IRQCHIP_SECTION, "init_state", pic.init_state.into(), 3)?;
        }
        Ok(Self { irqchip, pit })
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::kvm_or_skip;
    use super::*;

    #[test]
    fn every_field_survives_saving_and_loading_into_another_vm() {
        let Some(kvm) = kvm_or_skip() else { return };
        let vm = || {
            let layout = crate::memory::layout(crate::memory::MIN_RAM).unwrap();
            Vm::new(
                &kvm,
                crate::memory::map(&layout, &Default::default()).unwrap(),
            )
            .unwrap()
        };
        let mut state = VmState::save(&vm()).unwrap();
        state.irqchip.pic_master.imr = 0xa5;
        state.irqchip.pic_master.irq_base = 0x20;
        state.irqchip.pic_slave.irq_base = 0x28;
        state.irqchip.io_apic.redirections[4] = 1 << 16 | 0x34;
        state.irqchip.io_apic.redirections[23] = 7 << 56 | 1 << 16 | 0x99;
        state.irqchip.io_apic.ioregsel = 0x10;
        state.pit.channels[2].count = 0x1234;
        state.pit.channels[2].mode = 3;
        let [irqchip, pit] = state.to_sections().unwrap();
        let decoded = VmState::from_sections(&irqchip, &pit).unwrap();
        assert_eq!(decoded, state);
        let other = vm();
        decoded.restore(&other).unwrap();
        let mut again = VmState::save(&other).unwrap();
        for (to, from) in again.pit.channels.iter_mut().zip(&state.pit.channels) {
            to.count_load_time = from.count_load_time;
        }
        assert_eq!(again, state);
    }

    #[test]
    fn impossible_values_are_refused_by_name() {
        let Some(kvm) = kvm_or_skip() else { return };
        let layout = crate::memory::layout(crate::memory::MIN_RAM).unwrap();
        let vm = Vm::new(
            &kvm,
            crate::memory::map(&layout, &Default::default()).unwrap(),
        )
        .unwrap();
        let good = VmState::save(&vm).unwrap();
        let refused = |state: &VmState| {
            let [irqchip, pit] = state.to_sections().unwrap();
            let error = VmState::from_sections(&irqchip, &pit).unwrap_err();
            error.to_string()
        };
        let mut bad = good.clone();
        bad.pit.channels[1].count = 0x1_0001;
        assert_eq!(
            refused(&bad),
            "section 'pit': count is 0x10001, which cannot be"
        );
        let mut bad = good.clone();
        bad.irqchip.pic_slave.priority_add = 8;
        assert!(refused(&bad).contains("priority_add is 0x8"));
        let [irqchip, mut pit] = good.to_sections().unwrap();
        pit.body.push(0);
        let error = VmState::from_sections(&irqchip, &pit).unwrap_err();
        assert!(
            error.to_string().contains("1 bytes are left over"),
            "{error}"
        );
        pit.body.truncate(30);
        assert!(VmState::from_sections(&irqchip, &pit).is_err());
    }
}
