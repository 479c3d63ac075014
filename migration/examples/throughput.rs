//! How fast the engine moves memory: an idle guest full of random data, over loopback TCP or a
//! Unix socket, to a second process.
//!
//! `cargo run --release -p migration --example throughput -- [MIB] [tcp|unix] [small|huge]
//! [TOUCHED MIB]`

use std::io::{Read, Write};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::Duration;

use migration::bitmap::PageBitmap;
use migration::cancel::Cancel;
use migration::clock::{Clock, MonotonicClock};
use migration::convergence::Costs;
use migration::destination;
use migration::layout::{GuestRam, Layout};
use migration::link::Deadlines;
use migration::listener::Listener;
use migration::parameters::Parameters;
use migration::progress::Progress;
use migration::section::Section;
use migration::source::{self, Outcome, Peer};
use migration::vm::{DestinationVm, Offer, Pause, SourceVm, Start, VmError};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

type Any = VmError;

struct Idle(GuestRam);

impl SourceVm for Idle {
    fn offer(&mut self) -> Result<Offer, VmError> {
        Ok(Offer {
            layout: Layout::of(&self.0)?,
            configuration: vec![],
            blobs: vec![],
            disks: vec![],
        })
    }
    fn open_blob(&mut self, _: usize) -> Result<Box<dyn Read + Send>, VmError> {
        Err("no blobs".into())
    }
    fn ram(&self) -> GuestRam {
        self.0.clone()
    }
    fn start_dirty_log(&mut self) -> Result<(), VmError> {
        Ok(())
    }
    fn harvest_dirty(&mut self, _: &mut PageBitmap) -> Result<(), VmError> {
        Ok(())
    }
    fn protect(&mut self, _: &PageBitmap, _: u64, _: u64) -> Result<(), VmError> {
        Ok(())
    }
    fn pause(&mut self, _: bool) -> Result<Pause, VmError> {
        Ok(Pause {
            was_running: true,
            last_instruction: MonotonicClock.now(),
        })
    }
    fn save(&mut self) -> Result<Vec<Section>, VmError> {
        Ok(vec![])
    }
    fn release(&mut self) -> Result<(), VmError> {
        Ok(())
    }
    fn resume(&mut self, _: Pause) -> Result<(), VmError> {
        Ok(())
    }
    fn handed_over(&mut self) {}
    fn stop_dirty_log(&mut self) {}
}

struct Arriving(bool);

impl DestinationVm for Arriving {
    fn prepare(&mut self, offer: &Offer) -> Result<GuestRam, VmError> {
        let ranges: Vec<_> = offer
            .layout
            .regions()
            .iter()
            .map(|region| (GuestAddress(region.start), region.len as usize))
            .collect();
        let ram: GuestRam = GuestMemoryMmap::from_ranges(&ranges)?;
        if self.0 {
            huge(&ram)?;
        }
        Ok(ram)
    }
    fn create_blob(&mut self, _: usize) -> Result<Box<dyn Write + Send>, VmError> {
        Err("no blobs".into())
    }
    fn load(&mut self, _: Vec<Section>) -> Result<(), VmError> {
        Ok(())
    }
    fn start(&mut self, _: Start) -> Result<Option<Duration>, VmError> {
        Ok(None)
    }
    fn abandon(&mut self) {}
}

/// Asks for transparent huge pages.
#[allow(unsafe_code, reason = "madvise")]
fn huge(ram: &GuestRam) -> Result<(), VmError> {
    use vm_memory::{GuestMemoryBackend, GuestMemoryRegion};
    for region in ram.iter() {
        let (start, len) = (region.as_ptr(), region.len() as usize);
        // SAFETY: the region's whole mapping; the advice changes no contents.
        let result = unsafe { libc::madvise(start.cast(), len, libc::MADV_HUGEPAGE) };
        if result != 0 {
            return Err(std::io::Error::last_os_error().into());
        }
    }
    Ok(())
}

fn progress() -> Arc<Progress> {
    Arc::new(Progress::new(Arc::new(MonotonicClock), None))
}

/// The CPU time of this process.
fn cpu() -> Duration {
    let time = rustix::time::clock_gettime(rustix::time::ClockId::ProcessCPUTime);
    Duration::new(time.tv_sec as u64, time.tv_nsec as u32)
}

fn receive(uri: &str, huge: bool) -> Result<(), Any> {
    let mut listener = Listener::bind(&uri.parse()?)?;
    println!("{}", listener.uri());
    let job = destination::Job {
        cancel: Cancel::new()?,
        progress: progress(),
        deadlines: Deadlines::default(),
        postcopy: None,
    };
    let incoming = listener.accept(&job.cancel, &job.deadlines)?;
    let before = cpu();
    destination::receive(&mut Arriving(huge), incoming, None, &job)?;
    println!("{}", (cpu() - before).as_millis());
    Ok(())
}

fn main() -> Result<(), Any> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let argument = |index: usize| arguments.get(index).map(String::as_str);
    if argument(0) == Some("receive") {
        return receive(argument(1).unwrap_or("tcp::0"), argument(2) == Some("huge"));
    }
    let mib: usize = argument(0).unwrap_or("512").parse()?;
    let uri = match argument(1) {
        Some("unix") => format!("unix:/tmp/ferry-throughput-{}", std::process::id()),
        _ => "tcp::0".to_owned(),
    };
    let ram: GuestRam = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), mib << 20)])?;
    let huge_pages = argument(2).unwrap_or("small");
    if huge_pages == "huge" {
        huge(&ram)?;
    }
    let touched: usize = argument(3).map_or(Ok(mib), str::parse)?;
    let mut state = 1u64;
    let mut chunk = vec![0u8; 1 << 20];
    for at in (0..mib).step_by(mib / touched.clamp(1, mib)) {
        for word in chunk.as_chunks_mut::<8>().0 {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            *word = state.to_le_bytes();
        }
        ram.write_slice(&chunk, GuestAddress((at << 20) as u64))?;
    }
    let mut child = Command::new(std::env::current_exe()?)
        .args(["receive", &uri, huge_pages])
        .stdout(Stdio::piped())
        .spawn()?;
    let mut output = std::io::BufReader::new(child.stdout.take().ok_or("no output")?);
    let mut line = String::new();
    std::io::BufRead::read_line(&mut output, &mut line)?;
    let job = source::Job {
        cancel: Cancel::new()?,
        parameters: Arc::new(Parameters::default()),
        progress: progress(),
        deadlines: Deadlines::default(),
        costs: Costs::default(),
        postcopy: None,
    };
    let before = cpu();
    let outcome = source::migrate(&mut Idle(ram), Peer::Uri(line.trim().parse()?), &job);
    let source_cpu = cpu() - before;
    let Outcome::Completed(Some(downtime)) = outcome else {
        return Err(format!("{outcome:?}").into());
    };
    line.clear();
    std::io::BufRead::read_line(&mut output, &mut line)?;
    child.wait()?;
    let snapshot = job.progress.snapshot();
    let seconds = snapshot.total_time.as_secs_f64();
    println!(
        "{mib} MiB in {:.0} ms: {:.2} GB/s; CPU: source {} ms, destination {} ms; downtime {downtime:?}",
        seconds * 1e3,
        (mib << 20) as f64 / seconds / 1e9,
        source_cpu.as_millis(),
        line.trim(),
    );
    Ok(())
}
