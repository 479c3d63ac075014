//! Loading a snapshot: everything is made anew beside the guest that runs, the machine and its
//! images, and takes its place only when it is whole.

use std::collections::BTreeMap;
use std::io::Write;
use std::sync::Arc;
use std::time::{Duration, Instant};

use devices::image::{Cache, Format, Image, ImageConfig};
use migration::clock::MonotonicClock;
use migration::destination::Job;
use migration::layout::GuestRam;
use migration::link::Deadlines;
use migration::progress::Progress;
use migration::section::Section;
use migration::snapshot;
use migration::vm::{DestinationVm, Offer, Start, VmError};
use tracing::{error, info};

use super::super::Shared;
use super::super::arriving::Destination;
use super::replace::Replacement;
use super::store::{Store, StoreError, check_file, image_file};
use super::tag::Tag;
use super::{Failed, Stop};
use crate::control::command::{EventKind, RunState};
use crate::machine::config::{MachineConfig, VirtioConfig};
use crate::machine::{Machine, backends};

/// Loads the snapshot `tag` in place of the guest `old`, if there is one. If it fails, that one
/// goes on as if nothing had happened.
pub(super) fn load(
    shared: &Arc<Shared>,
    old: Option<Arc<Machine>>,
    store: &Store,
    tag: &Tag,
    stop: &Stop,
) -> Result<(), Failed> {
    let began = Instant::now();
    let manifest = store.read(tag)?;
    let state = store.check(tag, &manifest)?;
    // Without a guest here another process could have the images.
    let claimed = match &old {
        Some(_) => Vec::new(),
        None => claim(store)?,
    };
    let mut replacements = Vec::new();
    let mut images = BTreeMap::new();
    for (disk, saved) in store.disks.iter().zip(&manifest.disks) {
        let copy = disk.copy_path(tag, manifest.id);
        check_file(&copy, &saved.copy, image_file(&copy))?;
        let replacement = Replacement::prepare(disk, &copy, &|| stop.goes_on());
        let replacement = replacement.map_err(|error| StoreError::File { path: copy, error })?;
        // What will be used, whatever became of the copy meanwhile.
        let fresh = replacement.fresh();
        check_file(fresh, &saved.copy, image_file(fresh))?;
        let image = replacement.open()?;
        if image.format() != Format::from(saved.format) {
            return Err(Failed::new(format!(
                "disk '{}' is a {} image in the snapshot, but {} here",
                disk.id,
                Format::from(saved.format),
                image.format()
            )));
        }
        images.insert(disk.id.clone(), image);
        replacements.push(replacement);
    }
    let mut loading = Loading {
        destination: Destination::new(Arc::clone(shared)),
        shared: Arc::clone(shared),
        old,
        images,
        replacements,
        stopped: None,
    };
    let job = Job {
        cancel: stop.cancel.clone(),
        progress: Arc::new(Progress::new(Arc::new(MonotonicClock), None)),
        deadlines: Deadlines::default(),
        postcopy: None,
    };
    snapshot::load(&mut loading, state, &job).map_err(Failed::new)?;
    drop(claimed);
    let stopped_ms = loading.stopped.map(|stopped| stopped.as_millis());
    info!(%tag, ms = began.elapsed().as_millis(), stopped_ms, "loaded a snapshot");
    Ok(())
}

/// Locks the images as if they were to be written, whatever is in them.
fn claim(store: &Store) -> Result<Vec<Image>, Failed> {
    let claim = |path: &std::path::Path| {
        let image = Image::open(&ImageConfig {
            path: path.to_owned(),
            format: Some(Format::Raw),
            readonly: false,
            cache: Cache::Writeback,
        })?;
        image.lock()?;
        Ok(image)
    };
    store.disks.iter().map(|disk| claim(&disk.image)).collect()
}

/// The engine's view of the machine that is made.
struct Loading {
    shared: Arc<Shared>,
    destination: Destination,
    /// The guest that is to be replaced.
    old: Option<Arc<Machine>>,
    images: BTreeMap<String, Image>,
    replacements: Vec<Replacement>,
    /// How long there was no guest that could run.
    stopped: Option<Duration>,
}

impl Loading {
    /// With the old guest stopped: puts the images in their places, and lets the new guest run if
    /// `run`. Undone when it fails.
    fn begin(&mut self, machine: &Machine, run: bool) -> Result<(), VmError> {
        // Before they have their names: nobody else can come in between.
        backends::lock(machine.disks())?;
        for replacement in &mut self.replacements {
            replacement.apply()?;
        }
        // What the old guest asked for is moot.
        self.shared.guest_events.forget();
        if run {
            machine.start(Duration::ZERO)?;
        }
        Ok(())
    }
}

impl DestinationVm for Loading {
    fn prepare(&mut self, offer: &Offer) -> Result<GuestRam, VmError> {
        let moving = self.destination.check(offer)?;
        if !moving.disks.is_empty() {
            return Err("its disks are in the file".into());
        }
        if let Some(old) = &self.old {
            let differences = differences(old.config(), &moving.config);
            if !differences.is_empty() {
                return Err(differences.join("\n").into());
            }
        }
        let taps = self.old.as_ref().map(|old| old.taps()).unwrap_or_default();
        let images = &mut self.images;
        let backends = self
            .shared
            .open_backends_for(|id| images.remove(id), taps)?;
        self.destination
            .build(moving, backends, Vec::new(), Vec::new())
    }

    fn create_blob(&mut self, index: usize) -> Result<Box<dyn Write + Send>, VmError> {
        self.destination.create_blob(index)
    }

    fn load(&mut self, sections: Vec<Section>) -> Result<(), VmError> {
        self.destination.load(sections)
    }

    /// The guest runs if the old one did, and not if it did when it was saved.
    fn start(&mut self, _: Start) -> Result<Option<Duration>, VmError> {
        let (machine, name) = self.destination.take()?;
        let shared = Arc::clone(&self.shared);
        let mut state = shared.state();
        let since = Instant::now();
        let (ran, run) = match &self.old {
            Some(old) => {
                let ran = state.run == RunState::Running;
                old.pause();
                (ran, ran)
            }
            None => (false, state.autostart),
        };
        if let Err(error) = self.begin(&machine, run) {
            machine.pause();
            // The images are put back while the new ones' locks are held.
            self.replacements.clear();
            if let (Some(old), true) = (&self.old, ran)
                && let Err(error) = old.run_on()
            {
                error!("the guest can't run on: {error}");
                state.run = RunState::InternalError;
            }
            return Err(error);
        }
        for replacement in self.replacements.drain(..) {
            replacement.finish();
        }
        state.announcement = None;
        // What is still to be done is to throw away what was before.
        state.snapshot = None;
        if ran {
            shared.emit(EventKind::Stop);
        }
        if run {
            state.set_running(&shared);
        } else {
            state.run = RunState::Paused;
        }
        self.stopped = Some(since.elapsed());
        shared.install(&mut state, machine);
        state.name = state.name.take().or(name);
        Ok(None)
    }

    fn abandon(&mut self) {
        self.destination.abandon();
    }
}

/// What the machine is that the saved one is not; the addresses of network cards are the saved
/// one's.
fn differences(here: &MachineConfig, saved: &MachineConfig) -> Vec<String> {
    let mut differences = Vec::new();
    let mut compare = |what: &str, here: String, saved: String| {
        if here != saved {
            differences.push(format!(
                "{what} here is {here}, but {saved} in the snapshot"
            ));
        }
    };
    let bytes = |bytes: u64| format!("{bytes} bytes");
    compare("the memory", bytes(here.memory), bytes(saved.memory));
    compare(
        "the number of vCPUs",
        here.vcpus.to_string(),
        saved.vcpus.to_string(),
    );
    let quoted = |text: &str| format!("{text:?}");
    compare("the CPU model", quoted(&here.cpu), quoted(&saved.cpu));
    compare(
        "the command line",
        quoted(&here.command_line),
        quoted(&saved.command_line),
    );
    let devices = |config: &MachineConfig| {
        let device = |device: &VirtioConfig| match device {
            VirtioConfig::Net(_) => device.kind_name().to_owned(),
            device => format!("{device:?}"),
        };
        let devices: Vec<_> = config.virtio.iter().map(device).collect();
        devices.join(", ")
    };
    compare("the list of devices", devices(here), devices(saved));
    differences
}
