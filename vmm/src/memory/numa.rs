//! Which nodes guest memory comes from.
#![allow(unsafe_code, reason = "mbind(2), which no safe interface offers")]

use std::fs;
use std::io;

use migration::layout::GuestRam;
use vm_memory::GuestMemoryBackend;

use super::MemoryError;
use super::backing::{Numa, Policy};
use crate::host_list::parse_list;

/// The nodes that have memory, as a list.
const WITH_MEMORY: &str = "/sys/devices/system/node/has_memory";

const BITS: usize = libc::c_ulong::BITS as usize;

/// Says where pages of `ram` that are not there yet shall come from.
pub(super) fn apply(ram: &GuestRam, numa: &Numa) -> Result<(), MemoryError> {
    let nodes = nodes().map_err(MemoryError::Nodes)?;
    if let Some(&missing) = numa.nodes.iter().find(|node| !nodes.contains(node)) {
        return Err(MemoryError::NoNode {
            node: missing,
            nodes,
        });
    }
    let highest = numa.nodes.iter().max().copied().unwrap_or(0);
    let mut mask: Vec<libc::c_ulong> = vec![0; highest / BITS + 1];
    for node in &numa.nodes {
        if let Some(word) = mask.get_mut(node / BITS) {
            *word |= 1 << (node % BITS);
        }
    }
    let mode = match numa.policy {
        Policy::Preferred if numa.nodes.len() > 1 => MPOL_PREFERRED_MANY,
        Policy::Preferred => libc::MPOL_PREFERRED,
        Policy::Bind => libc::MPOL_BIND,
        Policy::Interleave => libc::MPOL_INTERLEAVE,
    };
    for region in ram.iter() {
        // SAFETY: the range is a whole mapping, which `ram` keeps; the mask has the bits that are
        // told, less one, as the kernel counts. No contents change.
        let result = unsafe {
            libc::syscall(
                libc::SYS_mbind,
                region.as_ptr(),
                region.size(),
                mode,
                mask.as_ptr(),
                mask.len() * BITS + 1,
                0,
            )
        };
        if result != 0 {
            return Err(MemoryError::Bind(io::Error::last_os_error()));
        }
    }
    Ok(())
}

/// `MPOL_PREFERRED_MANY` of linux/mempolicy.h, since Linux 5.15.
const MPOL_PREFERRED_MANY: libc::c_int = 5;

/// The host's nodes that have memory.
fn nodes() -> io::Result<Vec<usize>> {
    let text = fs::read_to_string(WITH_MEMORY)?;
    parse_list(text.trim()).map_err(io::Error::other)
}
