//! One guest's machine: KVM's VM and vCPUs, RAM and devices, put together.
//!
//! A [`Machine`] knows how to boot, run, pause, reset, save and load. Whether it should, and what
//! state that leaves the process in, is for [`crate::instance`] to decide.

pub mod backends;
pub mod config;
mod devices;
mod dirty_limit;
mod pause;
mod throttle;
mod virtio;
mod write_rates;

use std::fs::File;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use ::devices::disk::Disk;
use ::devices::virtio::net::tap::Tap;
use migration::clock::{Clock, MonotonicClock};
use migration::layout::GuestRam;
use migration::section::{Section, SectionError, Sections};

use self::backends::{BackendError, Backends};
use self::config::MachineConfig;
pub use self::devices::{DeviceError, DeviceStateError, Devices};
pub use self::pause::StillRunning;
pub use self::throttle::LimitedVcpu;
use self::throttle::Reasons;
pub(crate) use self::write_rates::WriteRates;
use crate::affinity::AffinityError;
use crate::boot::{self, BootError, BootSource};
use crate::clock::{self, ClockError, ClockState};
use crate::console::{Console, Interrupt};
use crate::control::command::CpuInfo;
use crate::cpuid::{Cpuid, GuestCpu, Model, ModelError};
use crate::kvm::{
    IRQCHIP_SECTION, IoctlError, Kvm, KvmError, PIT_SECTION, VM_STATE_VERSION, VcpuClockFd, Vm,
    VmState, VmStateError,
};
use crate::memory::MemoryError;
use crate::vcpu::{
    self, EventSink, IoBus, Pending, StateError, Vcpu, VcpuEnded, VcpuState, VcpuStatus, VcpuThread,
};

/// Why a machine can't be what it is asked to be.
#[derive(Debug, thiserror::Error)]
pub enum MachineError {
    /// RAM.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// Where its threads shall run.
    #[error(transparent)]
    Affinity(#[from] AffinityError),
    /// KVM.
    #[error(transparent)]
    Kvm(#[from] KvmError),
    /// An ioctl of KVM's.
    #[error(transparent)]
    Ioctl(#[from] IoctlError),
    /// The CPU model.
    #[error(transparent)]
    Model(#[from] ModelError),
    /// The kernel, the initrd or the command line.
    #[error(transparent)]
    Boot(#[from] BootError),
    /// What a device uses of the host.
    #[error(transparent)]
    Backend(#[from] BackendError),
    /// A device.
    #[error(transparent)]
    Device(#[from] DeviceError),
    /// A vCPU's thread can't be started.
    #[error("cannot start the thread of vCPU {index}: {source}")]
    Thread {
        /// The vCPU.
        index: u32,
        /// Why.
        source: std::io::Error,
    },
    /// A vCPU's thread is gone.
    #[error(transparent)]
    Ended(#[from] VcpuEnded),
    /// A vCPU's state.
    #[error("vCPU {index}: {source}")]
    Vcpu {
        /// The vCPU.
        index: u32,
        /// What is wrong.
        source: StateError,
    },
    /// There is no such vCPU.
    #[error("there is no vCPU {0}")]
    NoVcpu(u32),
    /// A machine that arrived has no files yet.
    #[error("the machine has no kernel to boot")]
    NoKernel,
    /// The state of KVM's devices.
    #[error(transparent)]
    Vm(#[from] VmStateError),
    /// The devices' state.
    #[error(transparent)]
    Devices(#[from] DeviceStateError),
    /// The clocks.
    #[error("clocks: {0}")]
    Clock(#[from] ClockError),
    /// The set of sections.
    #[error(transparent)]
    Sections(#[from] SectionError),
}

/// A guest's machine.
pub struct Machine {
    config: MachineConfig,
    vm: Arc<Vm>,
    devices: Arc<Devices>,
    disks: Vec<Arc<Disk>>,
    taps: Vec<Arc<Tap>>,
    /// Lets vCPUs go that wait for room in the console.
    interrupt: Interrupt,
    cpu: GuestCpu,
    /// How long it takes to save a vCPU's state.
    save_time: Duration,
    files: Mutex<Option<Arc<BootFiles>>>,
    vcpus: Mutex<Vcpus>,
    /// KVM's devices as after power-on, for a reset.
    power_on: VmState,
}

struct Vcpus {
    threads: Vec<VcpuThread>,
    /// The clocks at the last pause, to be set when the guest runs on.
    stopped: Option<ClockState>,
    /// Clocks that arrived with the guest, to be set when it starts.
    arrived: Option<ClockState>,
    /// Why vCPUs are kept from running for a share of their time.
    slowed: Reasons,
    /// The vCPUs were reset: what stopped them before is over.
    fresh: bool,
    /// Their states, in the making since the machine stopped.
    saving: Option<Vec<Pending<Result<Section, StateError>>>>,
}

/// What a machine boots from: open files, so that it can boot again after a reset, wherever it is.
#[derive(Debug)]
pub struct BootFiles {
    /// The kernel.
    pub kernel: File,
    /// The initrd, if any.
    pub initrd: Option<File>,
}

impl Machine {
    /// A machine as after power-on, paused, without a kernel yet. `ram` is as large as the
    /// configuration says. `seen` is what an arriving
    /// guest sees of its processor already; otherwise the configuration's CPU model decides.
    pub fn new(
        kvm: &Kvm,
        config: MachineConfig,
        ram: GuestRam,
        seen: Option<&GuestCpu>,
        console: &Console,
        backends: Backends,
        events: &Arc<dyn EventSink>,
    ) -> Result<Self, MachineError> {
        let vm = Arc::new(Vm::new(kvm, ram)?);
        vm.check_vcpus(config.vcpus)?;
        let waker = console.input_waker();
        let devices = Arc::new(Devices::new(
            &vm,
            Box::new(console.output()),
            Arc::new(move || waker.wake()),
            &config.virtio,
            &backends,
        )?);
        let cpuid = match seen {
            Some(seen) => seen.cpuid.clone(),
            None => config
                .cpu
                .parse::<Model>()?
                .cpuid(&Cpuid::supported(kvm)?)?,
        };
        let mut threads = Vec::new();
        let mut seen = None;
        let mut save_time = Duration::MAX;
        for index in 0..config.vcpus {
            let vcpu = Vcpu::new(kvm, &vm, index, config.vcpus, &cpuid)
                .map_err(|source| MachineError::Vcpu { index, source })?;
            if seen.is_none() {
                seen = Some(GuestCpu {
                    cpuid: vcpu.cpuid(),
                    tsc_khz: vcpu.tsc_khz()?,
                });
            }
            save_time = save_time.min(vcpu.save_time());
            let bus = Arc::clone(&devices) as Arc<dyn IoBus>;
            let thread = VcpuThread::spawn(vcpu, bus, Arc::clone(events))
                .map_err(|source| MachineError::Thread { index, source })?;
            threads.push(thread);
        }
        let power_on = VmState::save(&vm)?;
        Ok(Self {
            config,
            power_on,
            vm,
            devices,
            disks: backends.disks().to_vec(),
            taps: backends
                .nets
                .iter()
                .map(|net| Arc::clone(&net.tap))
                .collect(),
            interrupt: console.output().interrupt(),
            cpu: seen.ok_or(MachineError::NoVcpu(0))?,
            save_time,
            files: Mutex::new(None),
            vcpus: Mutex::new(Vcpus {
                threads,
                stopped: None,
                arrived: None,
                slowed: Reasons::default(),
                fresh: true,
                saving: None,
            }),
        })
    }

    /// The configuration.
    pub fn config(&self) -> &MachineConfig {
        &self.config
    }

    /// KVM's VM.
    pub fn vm(&self) -> &Vm {
        &self.vm
    }

    /// RAM.
    pub fn ram(&self) -> &GuestRam {
        self.vm.ram()
    }

    /// How long it takes to save a vCPU's state, at least.
    pub fn save_time(&self) -> Duration {
        self.save_time
    }

    /// The devices.
    pub fn devices(&self) -> &Arc<Devices> {
        &self.devices
    }

    /// The disks. Their images must be locked while the guest runs.
    pub fn disks(&self) -> &[Arc<Disk>] {
        &self.disks
    }

    /// The network cards' taps, in the order of the command line.
    pub fn taps(&self) -> &[Arc<Tap>] {
        &self.taps
    }

    /// How long the guest had run when it was stopped, by its kvmclock; zero if it was not.
    pub fn clock(&self) -> Duration {
        let vcpus = self.vcpus();
        let clocks = vcpus.arrived.as_ref().or(vcpus.stopped.as_ref());
        clocks.map_or(Duration::ZERO, ClockState::kvmclock)
    }

    /// What the guest sees of its processor.
    pub fn cpu(&self) -> &GuestCpu {
        &self.cpu
    }

    /// What the machine boots from; `None` before it is known.
    pub fn files(&self) -> Option<Arc<BootFiles>> {
        self.files
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }

    /// Says what the machine boots from, now or after a reset.
    pub fn set_files(&self, files: BootFiles) {
        *self.files.lock().unwrap_or_else(PoisonError::into_inner) = Some(Arc::new(files));
    }

    /// The vCPUs, as commands show them.
    pub fn cpus(&self) -> Vec<CpuInfo> {
        let vcpus = self.vcpus();
        vcpus
            .threads
            .iter()
            .map(|vcpu| CpuInfo {
                index: vcpu.index(),
                thread_id: vcpu.thread_id(),
                halted: false,
            })
            .collect()
    }

    /// Loads the kernel and puts vCPU 0 at its entry. The vCPUs are as after power-on.
    pub fn boot(&self) -> Result<(), MachineError> {
        let files = self.files().ok_or(MachineError::NoKernel)?;
        let virtio_mmio: Vec<_> = self.devices.virtio_mmio().collect();
        let source = BootSource {
            kernel: &files.kernel,
            initrd: files.initrd.as_ref(),
            command_line: &self.config.command_line,
            virtio_mmio: &virtio_mmio,
        };
        let entry = boot::load(self.vm.ram(), &source, self.config.vcpus)?;
        let mut vcpus = self.vcpus();
        let first = vcpus.threads.first_mut().ok_or(MachineError::NoVcpu(0))?;
        first
            .call(move |vcpu| vcpu.set_boot_state(&entry))
            .wait()?
            .map_err(|source| MachineError::Vcpu { index: 0, source })
    }

    /// Lets the guest run; nothing if it does already. A vCPU that has stopped by itself stays
    /// stopped until the machine is reset.
    pub fn run(&self) -> Result<(), MachineError> {
        let mut vcpus = self.vcpus();
        let stopped = vcpus.stopped.take();
        if let Some(clocks) = vcpus.arrived.take() {
            // Its user runs it only now: the time until then was not the migration's.
            clocks.set(&self.vm, &vcpus.clocks(), Duration::ZERO)?;
        } else {
            if let Some(clocks) = stopped {
                clocks.resume_kvmclock(&self.vm)?;
            }
            // One that has not stopped yet is in KVM, where this would wait for it.
            if !vcpus.any_running() {
                clock::tell_stopped(&self.vm, &vcpus.clocks());
            }
        }
        self.enter(&mut vcpus)
    }

    /// Lets a guest run that has arrived, its clocks set forward by the time that it was stopped.
    /// Returns when its first vCPU has been about to enter the guest, and when that was on the clock
    /// of the migration engine.
    pub fn start(&self, stopped_for: Duration) -> Result<Option<Duration>, MachineError> {
        let mut vcpus = self.vcpus();
        if let Some(clocks) = vcpus.arrived.take() {
            clocks.set(&self.vm, &vcpus.clocks(), stopped_for)?;
        }
        self.enter(&mut vcpus)?;
        Ok(vcpus.threads.first().and_then(VcpuThread::wait_entered))
    }

    /// Lets the guest run on after a stop that was none of its user's: its clocks have gone on.
    pub fn run_on(&self) -> Result<(), MachineError> {
        self.vcpus().stopped = None;
        self.run()
    }

    fn enter(&self, vcpus: &mut Vcpus) -> Result<(), MachineError> {
        vcpus.saving = None;
        self.interrupt.clear();
        self.devices.run();
        let fresh = std::mem::take(&mut vcpus.fresh);
        Ok(vcpus.run_unless_stopped(fresh)?)
    }

    /// Resets a stopped machine: it is as after power-on, with the kernel loaded again.
    pub fn reset(&self) -> Result<(), MachineError> {
        self.devices.reset();
        {
            let mut vcpus = self.vcpus();
            vcpus.saving = None;
            vcpus.on_each(Vcpu::reset)?;
            vcpus.fresh = true;
        }
        // After the vCPUs' local APICs, as when a state is loaded.
        self.power_on.restore(&self.vm)?;
        self.boot()
    }

    /// The registers of a stopped vCPU, as text.
    pub fn registers(&self, index: u32) -> Result<String, MachineError> {
        let mut vcpus = self.vcpus();
        let vcpu = vcpus
            .threads
            .get_mut(index as usize)
            .ok_or(MachineError::NoVcpu(index))?;
        vcpu.call(|vcpu| vcpu.registers())
            .wait()?
            .map_err(|source| MachineError::Vcpu { index, source })
    }

    /// Has the vCPUs of a stopped machine save their states for the next [`save`](Self::save),
    /// while the caller does something else.
    pub fn begin_save(&self) {
        let mut vcpus = self.vcpus();
        vcpus.saving = Some(vcpus.begin_save());
    }

    /// The state of everything but RAM, of a stopped machine.
    pub fn save(&self) -> Result<Vec<Section>, MachineError> {
        let mut vcpus = self.vcpus();
        let saving = match vcpus.saving.take() {
            Some(saving) => saving,
            None => vcpus.begin_save(),
        };
        let chips = VmState::save(&self.vm)?.to_sections()?;
        // The clocks at the pause: they stand still with the guest.
        let clocks = match (&vcpus.arrived, &vcpus.stopped) {
            (Some(clocks), _) | (None, Some(clocks)) => clocks.to_section()?,
            (None, None) => {
                let now = MonotonicClock.now();
                ClockState::take(&self.vm, &vcpus.clocks(), now)?.to_section()?
            }
        };
        let devices = self.devices.save()?;
        let mut sections = wait_for_all(saving)?;
        sections.extend(chips);
        sections.push(clocks);
        sections.extend(devices);
        Ok(sections)
    }

    /// Loads the state of everything but RAM into a machine that has not run yet.
    pub fn load(&self, sections: Vec<Section>) -> Result<(), MachineError> {
        let mut sections = Sections::new(sections)?;
        let mut vcpus = self.vcpus();
        // Devices first: restoring one may pulse its interrupt line, which the interrupt
        // controllers' state, loaded after it, overrides: it has seen that pulse already.
        self.devices.load(&mut sections)?;
        let section = sections.take(clock::SECTION, clock::VERSION, clock::VERSION)?;
        let clocks = ClockState::from_section(&section, vcpus.threads.len())?;
        clocks.set(&self.vm, &vcpus.clocks(), Duration::ZERO)?;
        vcpus.arrived = Some(clocks);
        let mut states = Vec::new();
        for (index, _) in (0..).zip(&vcpus.threads) {
            let name = VcpuState::section_name(index);
            states.push(sections.take(&name, vcpu::VERSION, vcpu::VERSION)?);
        }
        let irqchip = sections.take(IRQCHIP_SECTION, VM_STATE_VERSION, VM_STATE_VERSION)?;
        let pit = sections.take(PIT_SECTION, VM_STATE_VERSION, VM_STATE_VERSION)?;
        let chips = VmState::from_sections(&irqchip, &pit)?;
        sections.finish()?;
        vcpus.saving = None;
        let mut pending = Vec::new();
        for (vcpu, section) in vcpus.threads.iter_mut().zip(states) {
            pending.push(vcpu.call(move |vcpu| {
                let state = VcpuState::from_section(&section)?;
                vcpu.restore(&state)
            }));
        }
        wait_for_all(pending)?;
        chips.restore(&self.vm)?;
        // When it runs it has been stopped, whenever that is; now there is time for that.
        clock::tell_stopped(&self.vm, &vcpus.clocks());
        Ok(())
    }

    fn vcpus(&self) -> MutexGuard<'_, Vcpus> {
        self.vcpus.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Vcpus {
    fn clocks(&self) -> Vec<&VcpuClockFd> {
        self.threads.iter().map(VcpuThread::clock).collect()
    }

    fn any_running(&self) -> bool {
        let running = |vcpu: &VcpuThread| vcpu.status() == VcpuStatus::Running;
        self.threads.iter().any(running)
    }

    /// Lets the vCPUs run but those that have stopped by themselves, unless they are `fresh`.
    fn run_unless_stopped(&mut self, fresh: bool) -> Result<(), VcpuEnded> {
        for vcpu in &mut self.threads {
            let by_itself = matches!(vcpu.status(), VcpuStatus::Paused { event: Some(_) });
            if fresh || !by_itself {
                vcpu.run()?;
            }
        }
        Ok(())
    }

    /// Has all vCPUs save their states at the same time.
    fn begin_save(&mut self) -> Vec<Pending<Result<Section, StateError>>> {
        let save = |vcpu: &mut VcpuThread| {
            let index = vcpu.index();
            vcpu.call(move |vcpu| vcpu.save()?.to_section(index))
        };
        self.threads.iter_mut().map(save).collect()
    }

    /// Does something with every vCPU, all at the same time.
    fn on_each<T: Send + 'static>(
        &mut self,
        f: fn(&mut Vcpu) -> Result<T, StateError>,
    ) -> Result<Vec<T>, MachineError> {
        let pending = self.threads.iter_mut().map(|vcpu| vcpu.call(f)).collect();
        wait_for_all(pending)
    }
}

fn wait_for_all<T>(pending: Vec<Pending<Result<T, StateError>>>) -> Result<Vec<T>, MachineError> {
    (0..)
        .zip(pending)
        .map(|(index, result)| {
            result
                .wait()?
                .map_err(|source| MachineError::Vcpu { index, source })
        })
        .collect()
}
