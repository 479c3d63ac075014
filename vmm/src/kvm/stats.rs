//! KVM's statistics of a vCPU, of which the write faults are of interest: they tell who writes.
//!
//! While the dirty log is on, the first write to a page that was protected faults, and KVM counts
//! the fault with the vCPU that it is of. That a page was written by the VMM, or that a processor
//! keeps a log of its own (Intel's PML), is in no such count: what is known then is only what all of
//! the guest writes.
//!
//! The format is that of `KVM_GET_STATS_FD`: a header, descriptors with names, and the values.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;

use kvm_ioctls::VcpuFd;

use super::{IoctlError, ioctl};

/// The counter of faults after which the guest goes on with the page. Among them are the first
/// reads of pages.
const FIXED: &str = "pf_fixed";

/// More descriptors, or longer names, has no KVM.
const MAX_DESCRIPTORS: u32 = 4096;
const MAX_NAME: u32 = 256;

/// The fixed part of a descriptor in bytes.
const DESCRIPTOR: u64 = 16;

/// Whether this host's processor logs dirty pages without a fault, so that write faults don't tell
/// who writes: where KVM uses Intel's PML.
pub fn logs_without_faults() -> bool {
    pml_is_on(Path::new("/sys/module/kvm_intel/parameters/pml"))
}

fn pml_is_on(parameter: &Path) -> bool {
    // Not there with another KVM.
    std::fs::read(parameter).is_ok_and(|value| value.starts_with(b"Y"))
}

/// The statistics of one vCPU.
#[derive(Debug)]
pub struct VcpuStats {
    file: File,
    /// Where the counter is.
    fixed: u64,
}

impl VcpuStats {
    /// `None` where KVM doesn't tell.
    pub fn of(vcpu: &VcpuFd) -> Result<Option<Self>, IoctlError> {
        let Some(fd) = ioctl::stats_fd(vcpu)? else {
            return Ok(None);
        };
        let file = File::from(fd);
        let found = offsets(&file).map_err(|source| IoctlError {
            name: "reading the statistics of KVM_GET_STATS_FD",
            source,
        })?;
        let fixed = found.into_iter().find(|(name, _)| name == FIXED);
        Ok(fixed.map(|(_, fixed)| Self { file, fixed }))
    }

    /// How many write faults the vCPU has had, among others; only differences tell something.
    pub fn write_faults(&self) -> io::Result<u64> {
        let mut value = [0; 8];
        self.file.read_exact_at(&mut value, self.fixed)?;
        Ok(u64::from_ne_bytes(value))
    }
}

/// The counters that are one value, with their offsets in the file.
fn offsets(file: &File) -> io::Result<Vec<(String, u64)>> {
    let mut header = [0; 24];
    file.read_exact_at(&mut header, 0)?;
    let field = |index: usize| {
        let bytes = header.get(index * 4..index * 4 + 4).unwrap_or_default();
        u32::from_ne_bytes(bytes.try_into().unwrap_or_default())
    };
    let (name_size, count, descriptors, values) = (field(1), field(2), field(4), field(5));
    if count > MAX_DESCRIPTORS || name_size > MAX_NAME {
        let what = format!("{count} statistics with names of {name_size} bytes");
        return Err(io::Error::new(io::ErrorKind::InvalidData, what));
    }
    let size = DESCRIPTOR + u64::from(name_size);
    let mut descriptor = vec![0; size as usize];
    let mut found = Vec::new();
    for index in 0..u64::from(count) {
        file.read_exact_at(&mut descriptor, u64::from(descriptors) + index * size)?;
        let (fixed, name) = descriptor.split_at(DESCRIPTOR as usize);
        // flags: u32, exponent: i16, size: u16, offset: u32, bucket_size: u32
        let [_, _, _, _, _, _, low, high, a, b, c, d, ..] = *fixed else {
            continue;
        };
        if u16::from_ne_bytes([low, high]) == 1 {
            let len = name.iter().position(|&byte| byte == 0);
            let name =
                String::from_utf8_lossy(name.get(..len.unwrap_or(name.len())).unwrap_or_default());
            let offset = u64::from(values) + u64::from(u32::from_ne_bytes([a, b, c, d]));
            found.push((name.into_owned(), offset));
        }
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use migration::bitmap::PageBitmap;
    use migration::layout::Layout;

    use crate::kvm::tests::kvm_or_skip;
    use crate::test_guest::Machine;

    /// Writes to 2048 pages from 4 MiB on, over and over.
    const WRITER: [u8; 26] = [
        0xbe, 0x00, 0x00, 0x40, 0x00, // again: mov esi, 0x400000
        0xb9, 0x00, 0x08, 0x00, 0x00, // mov ecx, 2048
        0xfe, 0x06, // next: inc byte [rsi]
        0x81, 0xc6, 0x00, 0x10, 0x00, 0x00, // add esi, 4096
        0xff, 0xc9, // dec ecx
        0x75, 0xf4, // jnz next
        0xeb, 0xe8, // jmp again
        0x90, 0x90,
    ];

    fn faults(machine: &Machine) -> Vec<u64> {
        let faults = |vcpu: &crate::vcpu::VcpuThread| vcpu.stats().unwrap().write_faults();
        machine
            .threads
            .iter()
            .map(|vcpu| faults(vcpu).unwrap())
            .collect()
    }

    #[test]
    fn a_processor_that_logs_by_itself_is_known_by_its_module() {
        let dir = tempfile::tempdir().unwrap();
        let parameter = dir.path().join("pml");
        assert!(!super::pml_is_on(&parameter));
        for (value, on) in [("Y\n", true), ("N\n", false)] {
            std::fs::write(&parameter, value).unwrap();
            assert_eq!(super::pml_is_on(&parameter), on, "{value:?}");
        }
    }

    #[test]
    fn faults_tell_which_vcpu_writes_to_protected_pages() {
        let Some(kvm) = kvm_or_skip() else { return };
        let mut machine = Machine::new(&kvm, 2);
        if machine.threads.iter().any(|vcpu| vcpu.stats().is_none()) {
            return guest_tests::driver::skip("this KVM has no statistics of vCPUs");
        }
        machine.user_mode_on(0, &WRITER);
        machine.user_mode_on(1, &[0xeb, 0xfe]); // jmp $
        let vm = std::sync::Arc::clone(&machine.vm);
        let mut log = vm.dirty_log().unwrap();
        log.start(&vm).unwrap();
        let pages = Layout::of(machine.ram()).unwrap().pages();
        let run = |machine: &mut Machine, log: &mut crate::kvm::DirtyLog| {
            machine.run();
            std::thread::sleep(Duration::from_millis(300));
            machine.pause();
            let mut dirty = PageBitmap::new(pages);
            log.harvest(&vm, &mut dirty).unwrap();
            log.protect(&vm, &dirty, 0, pages).unwrap();
            dirty.count()
        };
        run(&mut machine, &mut log);
        let before = faults(&machine);
        let dirty = run(&mut machine, &mut log);
        let [writer, idle] = [0, 1].map(|vcpu: usize| faults(&machine)[vcpu] - before[vcpu]);
        assert!(dirty > 1000, "{dirty}");
        if writer < dirty / 2 {
            let why = format!("this processor logs without faults: {writer} of {dirty} pages");
            return guest_tests::driver::skip(&why);
        }
        assert!(writer < dirty * 2, "{writer} faults for {dirty} pages");
        assert!(
            idle < dirty / 10,
            "{idle} faults of a vCPU that writes nothing"
        );
    }
}
