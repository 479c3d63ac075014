//! `info migrate`: a migration in QEMU's words, then what only Ferry tells.

use std::fmt::Write;

use crate::control::command::{
    MigrationInfo, MigrationStats, MigrationStatus, MultifdInfo, XbzrleCacheStats,
};
use crate::control::size::format_size;

/// A migration, as `info migrate` shows it.
pub fn migration(info: &MigrationInfo) -> String {
    let mut text = String::new();
    let _ = write_migration(&mut text, info);
    text
}

fn write_migration(text: &mut String, info: &MigrationInfo) -> std::fmt::Result {
    for reason in &info.blocked_reasons {
        writeln!(text, "Outgoing migration blocked: {reason}")?;
    }
    if info.status != MigrationStatus::None {
        write!(text, "Migration status: {}", info.status)?;
        match &info.error_desc {
            Some(error) => writeln!(text, " ({error})")?,
            None => writeln!(text)?,
        }
    }
    for address in &info.socket_address {
        writeln!(text, "socket address: {address}")?;
    }
    for (what, time) in [
        ("total time", info.total_time),
        ("expected downtime", info.expected_downtime),
        ("downtime", info.downtime),
        ("setup", info.setup_time),
    ] {
        if let Some(time) = time {
            writeln!(text, "{what}: {time} ms")?;
        }
    }
    if let Some(ram) = &info.ram {
        write_ram(text, ram)?;
    }
    if let Some(xbzrle) = &info.xbzrle_cache {
        write_xbzrle(text, xbzrle)?;
    }
    if let Some(share) = info.cpu_throttle_percentage {
        writeln!(text, "cpu throttle percentage: {share}")?;
    }
    write_postcopy(text, info)?;
    if let Some(disk) = &info.disk {
        write_disk(text, disk)?;
    }
    let Some(ferry) = &info.ferry else {
        return Ok(());
    };
    if let Some(compression) = &ferry.compression {
        writeln!(
            text,
            "compressed: {} pages in {} kbytes ({})",
            compression.pages,
            compression.bytes >> 10,
            if compression.active {
                "it pays"
            } else {
                "off, as it doesn't pay"
            }
        )?;
    }
    if let Some(multifd) = &ferry.multifd {
        write_multifd(text, multifd)?;
    }
    if let Some(zero_copy) = &ferry.zero_copy {
        writeln!(
            text,
            "zero copy: {} sends, {} copied",
            zero_copy.sends.saturating_add(zero_copy.refused),
            zero_copy.missed()
        )?;
    }
    if let Some(parts) = &ferry.downtime {
        writeln!(
            text,
            "downtime parts: stop {} us, last pages {} us, save {} us, send {} us, load {} us, \
             start {} us",
            parts.stop, parts.last_pages, parts.save, parts.send, parts.load, parts.start
        )?;
    }
    if let Some(bandwidth) = ferry.bandwidth {
        writeln!(text, "measured bandwidth: {}/s", format_size(bandwidth))?;
    }
    if let Some(round_trip) = ferry.round_trip {
        writeln!(text, "measured round trip: {round_trip} us")?;
    }
    Ok(())
}

/// What came after the downtime: the guest ran, but waited for pages.
fn write_postcopy(text: &mut String, info: &MigrationInfo) -> std::fmt::Result {
    if let Some(blocktime) = info.postcopy_blocktime {
        writeln!(text, "Postcopy Blocktime (ms): {blocktime}")?;
    }
    if !info.postcopy_vcpu_blocktime.is_empty() {
        let lines: Vec<String> = info
            .postcopy_vcpu_blocktime
            .chunks(VCPUS_PER_LINE)
            .map(|chunk| {
                chunk
                    .iter()
                    .map(u64::to_string)
                    .collect::<Vec<_>>()
                    .join(", ")
            })
            .collect();
        writeln!(
            text,
            "Postcopy vCPU Blocktime (ms):\n [{}]",
            lines.join(",\n  ")
        )?;
    }
    if let Some(latency) = info.postcopy_latency {
        writeln!(text, "Postcopy Latency (ns): {latency}")?;
    }
    if !info.postcopy_latency_dist.is_empty() {
        writeln!(text, "Postcopy Latency Distribution:")?;
        for (bucket, count) in (0..u64::BITS).zip(&info.postcopy_latency_dist) {
            let from = 1u64.checked_shl(bucket).map_or_else(String::new, in_unit);
            let to = 1u64
                .checked_shl(bucket + 1)
                .map_or_else(String::new, in_unit);
            writeln!(text, "  [ {from:>8} - {to:>8} ]: {count:>10}")?;
        }
    }
    let Some(postcopy) = info
        .ferry
        .as_ref()
        .and_then(|ferry| ferry.postcopy.as_ref())
    else {
        return Ok(());
    };
    writeln!(
        text,
        "postcopy: {} us without all of the memory, {} pages missing, {} asked for in {} requests",
        postcopy.time, postcopy.missing_pages, postcopy.requested_pages, postcopy.requests
    )?;
    if let Some(longest) = postcopy.latency_max {
        writeln!(text, "longest wait for a page: {longest} us")?;
    }
    Ok(())
}

/// As many figures are in a line, as in QEMU.
const VCPUS_PER_LINE: usize = 10;

/// Microseconds, in the largest unit of which there is at least one.
fn in_unit(us: u64) -> String {
    match us {
        0..=1000 => format!("{us} us"),
        1001..=1_000_999 => format!("{} ms", us / 1000),
        _ => format!("{} sec", us / 1_000_000),
    }
}

fn write_xbzrle(text: &mut String, xbzrle: &XbzrleCacheStats) -> std::fmt::Result {
    writeln!(text, "cache size: {} bytes", xbzrle.cache_size)?;
    writeln!(text, "xbzrle transferred: {} kbytes", xbzrle.bytes >> 10)?;
    writeln!(text, "xbzrle pages: {} pages", xbzrle.pages)?;
    writeln!(text, "xbzrle cache miss: {} pages", xbzrle.cache_miss)?;
    writeln!(
        text,
        "xbzrle cache miss rate: {:.2}",
        xbzrle.cache_miss_rate
    )?;
    writeln!(text, "xbzrle encoding rate: {:.2}", xbzrle.encoding_rate)?;
    writeln!(text, "xbzrle overflow: {}", xbzrle.overflow)
}

fn write_multifd(text: &mut String, multifd: &MultifdInfo) -> std::fmt::Result {
    let MultifdInfo {
        channels,
        in_use,
        why_one,
    } = multifd;
    match channels {
        0 => write!(text, "multifd: all pages go on one connection")?,
        _ => write!(text, "multifd: {in_use} of {channels} connections in use")?,
    }
    match why_one {
        Some(why) => writeln!(text, " ({why})"),
        None => writeln!(text),
    }
}

fn write_disk(text: &mut String, disk: &MigrationStats) -> std::fmt::Result {
    let percent = match disk.total {
        0 => 100,
        total => 100 * total.saturating_sub(disk.remaining) / total,
    };
    writeln!(text, "disks: {percent} %")?;
    writeln!(text, "transferred disk: {} kbytes", disk.transferred >> 10)?;
    writeln!(text, "remaining disk: {} kbytes", disk.remaining >> 10)?;
    writeln!(text, "total disk: {} kbytes", disk.total >> 10)
}

fn write_ram(text: &mut String, ram: &MigrationStats) -> std::fmt::Result {
    writeln!(text, "transferred ram: {} kbytes", ram.transferred >> 10)?;
    writeln!(text, "throughput: {:.2} mbps", ram.mbps)?;
    writeln!(text, "remaining ram: {} kbytes", ram.remaining >> 10)?;
    writeln!(text, "total ram: {} kbytes", ram.total >> 10)?;
    writeln!(text, "duplicate: {} pages", ram.duplicate)?;
    writeln!(text, "normal: {} pages", ram.normal)?;
    writeln!(text, "normal bytes: {} kbytes", ram.normal_bytes >> 10)?;
    if ram.multifd_bytes > 0 {
        writeln!(text, "multifd bytes: {} kbytes", ram.multifd_bytes >> 10)?;
    }
    writeln!(text, "dirty sync count: {}", ram.dirty_sync_count)?;
    writeln!(text, "page size: {} kbytes", ram.page_size >> 10)?;
    writeln!(text, "pages-per-second: {}", ram.pages_per_second)?;
    writeln!(text, "precopy ram: {} kbytes", ram.precopy_bytes >> 10)?;
    writeln!(text, "downtime ram: {} kbytes", ram.downtime_bytes >> 10)?;
    if ram.postcopy_bytes > 0 {
        writeln!(text, "postcopy ram: {} kbytes", ram.postcopy_bytes >> 10)?;
    }
    if ram.postcopy_requests > 0 {
        writeln!(text, "postcopy request count: {}", ram.postcopy_requests)?;
    }
    writeln!(text, "dirty pages rate: {} pages", ram.dirty_pages_rate)
}
