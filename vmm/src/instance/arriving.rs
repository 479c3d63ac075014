//! The machine that a guest arrives in.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::Write;
use std::sync::Arc;
use std::time::Duration;

use migration::disk::{DestinationDisk, Disk};
use migration::layout::GuestRam;
use migration::section::Section;
use migration::vm::{DestinationVm, Offer, Start, VmError};
use rustix::fs::{MemfdFlags, memfd_create};

use super::Shared;
use super::arriving_disk::{self, Arrival, ArrivingDisk, Replaced, Unfinished};
use super::offer::{INITRD, KERNEL, MovingMachine};
use crate::control::command::RunState;
use crate::cpuid::HostCpu;
use crate::machine::backends::{self, Backends};
use crate::machine::config::VirtioConfig;
use crate::machine::{BootFiles, Machine};

/// The machine that is being received.
pub(super) struct Destination {
    shared: Arc<Shared>,
    arriving: Option<Arriving>,
    /// The images that new ones have replaced. They go with this, when the guest runs: freeing
    /// them takes long.
    replaced: Vec<Replaced>,
}

struct Arriving {
    moving: MovingMachine,
    /// For each disk that travels whether its image was made for it.
    fresh: Vec<bool>,
    /// The kernel and the initrd, as far as they have come, in the order of the offer's blobs.
    files: Vec<File>,
    machine: Arc<Machine>,
    /// The images that are new; put back if the guest doesn't arrive.
    unfinished: Vec<Unfinished>,
}

impl Destination {
    pub(super) fn new(shared: Arc<Shared>) -> Self {
        Self {
            shared,
            arriving: None,
            replaced: Vec::new(),
        }
    }

    /// The machine that is offered, if it can be had here.
    pub(super) fn check(&self, offer: &Offer) -> Result<MovingMachine, VmError> {
        let shared = &self.shared;
        let moving = MovingMachine::from_sections(&offer.configuration)?;
        let host = HostCpu::probe(&shared.kvm)?;
        let mut objections =
            moving.objections(&shared.settings.given, &host, crate::memory::of_host())?;
        let layout = crate::memory::layout(moving.config.memory)?;
        if layout != offer.layout {
            objections.push(format!(
                "the source's memory layout is {:?}, but {} bytes are laid out as {:?} here",
                offer.layout.regions(),
                moving.config.memory,
                layout.regions()
            ));
        }
        objections.extend(misplaced_files(&moving, offer));
        objections.extend(misplaced_disks(&moving, offer));
        if !objections.is_empty() {
            return Err(objections.join("\n").into());
        }
        Ok(moving)
    }

    /// Builds it on `backends`.
    pub(super) fn build(
        &mut self,
        moving: MovingMachine,
        backends: Backends,
        fresh: Vec<bool>,
        unfinished: Vec<Unfinished>,
    ) -> Result<GuestRam, VmError> {
        let shared = &self.shared;
        let machine = shared.build(moving.config.clone(), Some(&moving.cpu), backends)?;
        let here = machine.devices().inventory();
        if here != moving.devices {
            return Err(device_differences(&moving.devices, &here).join("\n").into());
        }
        let ram = machine.ram().clone();
        self.arriving = Some(Arriving {
            moving,
            fresh,
            files: Vec::new(),
            machine,
            unfinished,
        });
        Ok(ram)
    }

    /// The machine once it is loaded, and the name that came with it.
    pub(super) fn take(&mut self) -> Result<(Arc<Machine>, Option<String>), VmError> {
        let arriving = self.arriving.take().ok_or("no machine was prepared")?;
        Ok((arriving.machine, arriving.moving.name))
    }

    fn arriving(&mut self) -> Result<&mut Arriving, VmError> {
        self.arriving
            .as_mut()
            .ok_or_else(|| "no machine was prepared".into())
    }

    /// Opens the host's side of the devices, with images for the disks that travel; for each of
    /// those whether its image is new, and what to do with it in the end.
    fn backends(
        &self,
        moving: &MovingMachine,
        offer: &Offer,
    ) -> Result<(Backends, Vec<bool>, Vec<Unfinished>), VmError> {
        let given = &self.shared.settings.given;
        let mut arrivals = Vec::new();
        for (disk, Disk { capacity, .. }) in moving.disks.iter().zip(&offer.disks) {
            let mut here = given.disks.iter().enumerate();
            let options = here.find(|(index, options)| options.id(*index) == disk.id);
            let (_, options) = options.ok_or("a disk that arrives has no image here")?;
            arrivals.push(Arrival {
                moving: disk,
                options,
                capacity: *capacity,
            });
        }
        arriving_disk::check_space(&arrivals)?;
        let (mut fresh, mut unfinished) = (Vec::new(), Vec::new());
        let mut images = BTreeMap::new();
        for arrival in &arrivals {
            let prepared = arrival.prepare()?;
            images.insert(arrival.moving.id.as_str(), prepared.image);
            fresh.push(prepared.fresh);
            unfinished.extend(prepared.unfinished);
        }
        let backends = self.shared.open_backends_for(|id| images.remove(id), &[])?;
        Ok((backends, fresh, unfinished))
    }
}

impl DestinationVm for Destination {
    fn prepare(&mut self, offer: &Offer) -> Result<GuestRam, VmError> {
        let moving = self.check(offer)?;
        let (backends, fresh, unfinished) = self.backends(&moving, offer)?;
        self.build(moving, backends, fresh, unfinished)
    }

    fn create_blob(&mut self, index: usize) -> Result<Box<dyn Write + Send>, VmError> {
        let arriving = self.arriving()?;
        let Some(identity) = arriving.moving.files.get(index) else {
            return Err(format!("there is no blob {index}").into());
        };
        // Anonymous memory of the kernel's: it is not mapped, and goes with the process.
        let file = File::from(memfd_create(&*identity.name, MemfdFlags::CLOEXEC)?);
        arriving.files.push(file.try_clone()?);
        Ok(Box::new(file))
    }

    fn open_disk(&mut self, index: usize) -> Result<Box<dyn DestinationDisk>, VmError> {
        let Arriving {
            moving,
            fresh,
            machine,
            ..
        } = self.arriving()?;
        let (Some(disk), Some(&fresh)) = (moving.disks.get(index), fresh.get(index)) else {
            return Err(format!("there is no disk {index}").into());
        };
        let disk = machine.disks().iter().find(|here| here.id() == disk.id);
        let disk = Arc::clone(disk.ok_or("the disk is not here")?);
        Ok(Box::new(ArrivingDisk { disk, fresh }))
    }

    fn vcpu_threads(&self) -> Vec<u32> {
        let arriving = self.arriving.as_ref();
        arriving.map_or_else(Vec::new, |arriving| {
            let cpus = arriving.machine.cpus();
            cpus.iter()
                .map(|cpu| cpu.thread_id.unsigned_abs())
                .collect()
        })
    }

    fn load(&mut self, sections: Vec<Section>) -> Result<(), VmError> {
        let arriving = self.arriving()?;
        let mut files = std::mem::take(&mut arriving.files).into_iter();
        let kernel = files.next().ok_or("the kernel has not come")?;
        arriving.machine.set_files(BootFiles {
            kernel,
            initrd: files.next(),
        });
        arriving.machine.load(sections)?;
        // Only now: what was there before is put back if the state is refused. The engine has
        // flushed the new images.
        for unfinished in std::mem::take(&mut arriving.unfinished) {
            self.replaced.push(unfinished.finish()?);
        }
        Ok(())
    }

    fn start(&mut self, start: Start) -> Result<Option<Duration>, VmError> {
        let (machine, name) = self.take()?;
        // The source has given them away, and waits.
        for disk in machine.disks() {
            disk.image().drop_page_cache()?;
        }
        backends::lock(machine.disks())?;
        let mut state = self.shared.state();
        let entered = if start.run && state.autostart {
            let entered = machine.start(start.stopped_for)?;
            state.set_running(&self.shared);
            entered
        } else {
            state.run = RunState::Paused;
            None
        };
        self.shared.install(&mut state, machine);
        // Whether it runs or not, it is here now.
        state.announce();
        state.name = state.name.take().or(name);
        Ok(entered)
    }

    fn abandon(&mut self) {
        self.arriving = None;
    }
}

/// The disks that travel must be such that the guest has and can write.
fn misplaced_disks(moving: &MovingMachine, offer: &Offer) -> Option<String> {
    let told: Vec<_> = moving.disks.iter().map(|disk| disk.id.as_str()).collect();
    let offered: Vec<_> = offer.disks.iter().map(|disk| disk.name.as_str()).collect();
    if told != offered {
        return Some(format!(
            "the configuration names the disks {told:?}, the offer {offered:?}"
        ));
    }
    let fits = |disk: &&Disk| {
        !moving.config.virtio.iter().any(|device| match device {
            VirtioConfig::Block(block) => {
                block.id == disk.name && block.capacity == disk.capacity && !block.readonly
            }
            _ => false,
        })
    };
    offer.disks.iter().find(fits).map(|disk| {
        format!(
            "the disk {:?} of {} bytes travels, but the guest has no such disk to write to",
            disk.name, disk.capacity
        )
    })
}

/// The blobs must be the files that the configuration names.
fn misplaced_files(moving: &MovingMachine, offer: &Offer) -> Option<String> {
    let told: Vec<_> = moving
        .files
        .iter()
        .map(|file| (&file.name, file.len))
        .collect();
    let offered: Vec<_> = offer
        .blobs
        .iter()
        .map(|blob| (&blob.name, blob.len))
        .collect();
    let names: Vec<_> = moving.files.iter().map(|file| file.name.as_str()).collect();
    if told != offered {
        Some(format!(
            "the configuration names the files {told:?}, the offer {offered:?}"
        ))
    } else if !matches!(*names, [KERNEL] | [KERNEL, INITRD]) {
        Some(format!(
            "the files that come with the guest are {names:?}, expected '{KERNEL}', and then \
             '{INITRD}' if there is one"
        ))
    } else {
        // They must fit into the guest's memory to be of any use.
        moving
            .files
            .iter()
            .find(|file| file.len > moving.config.memory)
            .map(|file| {
                format!(
                    "the file {:?} of {} bytes is larger than the guest's memory",
                    file.name, file.len
                )
            })
    }
}

fn device_differences(there: &[(String, u32)], here: &[(String, u32)]) -> Vec<String> {
    let find = |list: &[(String, u32)], name: &str| {
        list.iter()
            .find(|(other, _)| other == name)
            .map(|(_, version)| *version)
    };
    let mut differences = Vec::new();
    for (name, version) in there {
        match find(here, name) {
            None => differences.push(format!("the destination has no device {name:?}")),
            Some(ours) if ours != *version => differences.push(format!(
                "device {name:?} saves version {version} at the source, but {ours} here"
            )),
            Some(_) => {}
        }
    }
    for (name, _) in here {
        if find(there, name).is_none() {
            differences.push(format!("the source has no device {name:?}"));
        }
    }
    if differences.is_empty() {
        differences.push("the devices are the same, but in another order".to_owned());
    }
    differences
}
