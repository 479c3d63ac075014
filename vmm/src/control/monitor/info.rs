//! `info`: what it shows, in QEMU's words where QEMU has it.

use std::fmt::Write;

use super::commands::{Failure, Reply};
use super::info_migrate::migration;
use super::line::Words;
use super::migrate;
use super::session::Session;
use crate::control::block::{BlockInfo, IoStatus};
use crate::control::command::{CommandError, DirtyRateMode, ErrorClass, RunState};
use crate::control::size::format_size;

/// Something that `info` shows.
pub struct Topic {
    /// Its name.
    pub name: &'static str,
    parameters: &'static str,
    help: &'static str,
    show: fn(&Session, &mut Words) -> Result<String, Failure>,
}

/// All that `info` shows, by name.
pub const TOPICS: &[Topic] = &[
    Topic {
        name: "balloon",
        parameters: "",
        help: "the memory that the guest has with its balloon, and what it tells of it",
        show: balloon,
    },
    Topic {
        name: "block",
        parameters: "[disk]",
        help: "the disks, or one",
        show: block,
    },
    Topic {
        name: "cpus",
        parameters: "",
        help: "the vCPUs and their threads",
        show: cpus,
    },
    Topic {
        name: "dirty_rate",
        parameters: "",
        help: "how much the guest writes, as calc_dirty_rate has measured it",
        show: dirty_rate,
    },
    Topic {
        name: "migrate",
        parameters: "",
        help: "how the migration under way, or the last one, is doing",
        show: |session, _| Ok(migration(&session.machine().migration_info())),
    },
    Topic {
        name: "migrate_capabilities",
        parameters: "",
        help: "the migration capabilities, on or off",
        show: capabilities,
    },
    Topic {
        name: "migrate_parameters",
        parameters: "",
        help: "the migration parameters",
        show: parameters,
    },
    Topic {
        name: "migration_forecast",
        parameters: "[bandwidth]",
        help: "whether a migration would converge, how long it would take, with what downtime",
        show: migrate::forecast,
    },
    Topic {
        name: "name",
        parameters: "",
        help: "the guest's name",
        show: |session, _| {
            Ok(session
                .machine()
                .name()
                .map(|name| name + "\n")
                .unwrap_or_default())
        },
    },
    Topic {
        name: "network",
        parameters: "",
        help: "the network cards, their taps, and how many packets went which way",
        show: networks,
    },
    Topic {
        name: "registers",
        parameters: "[-a|index]",
        help: "the registers of the chosen vCPU, of all (-a), or of one",
        show: registers,
    },
    Topic {
        name: "snapshots",
        parameters: "",
        help: "the snapshots of the guest and its disks",
        show: snapshots,
    },
    Topic {
        name: "status",
        parameters: "",
        help: "whether the guest runs, and why not",
        show: status,
    },
    Topic {
        name: "vcpu_dirty_limit",
        parameters: "",
        help: "the vCPUs whose writes are limited, what they write, and how much that slows them \
               down",
        show: vcpu_dirty_limit,
    },
    Topic {
        name: "version",
        parameters: "",
        help: "Ferry's version",
        show: |_, _| Ok(concat!("ferry ", env!("CARGO_PKG_VERSION"), "\n").to_owned()),
    },
];

/// Carries `info` out.
pub fn run(session: &mut Session, mut words: Words) -> Result<Reply, Failure> {
    let Some(name) = words.optional() else {
        return Ok(Reply::Text(help()));
    };
    let Some(topic) = TOPICS.iter().find(|topic| topic.name == name) else {
        return Err(Failure::Unknown(format!("info {name}")));
    };
    let text = (topic.show)(session, &mut words)?;
    words.finish()?;
    Ok(Reply::Text(text))
}

/// The topics, a line each.
pub fn help() -> String {
    let line = |topic: &Topic| {
        let space = if topic.parameters.is_empty() { "" } else { " " };
        format!(
            "info {}{space}{} -- {}\n",
            topic.name, topic.parameters, topic.help
        )
    };
    TOPICS.iter().map(line).collect()
}

fn status(session: &Session, _: &mut Words) -> Result<String, Failure> {
    let status = session.machine().status();
    Ok(match status.status {
        _ if status.running => "VM status: running\n".to_owned(),
        RunState::Paused => "VM status: paused\n".to_owned(),
        state => format!("VM status: paused ({state})\n"),
    })
}

fn balloon(session: &Session, _: &mut Words) -> Result<String, Failure> {
    let info = session.machine().balloon()?;
    let mut text = format!("balloon: actual={}\n", info.actual >> 20);
    if let Some(told) = info.ferry {
        let _ = writeln!(text, "guest statistics, {} ms old:", told.guest_stats_age);
        for (name, value) in told.guest_stats {
            let _ = writeln!(text, "  {name}: {value}");
        }
    }
    Ok(text)
}

fn block(session: &Session, words: &mut Words) -> Result<String, Failure> {
    let mut disks = session.machine().disks();
    if let Some(name) = words.optional() {
        disks.retain(|disk| disk.device == name);
        if disks.is_empty() {
            let class = ErrorClass::DeviceNotFound;
            return Err(CommandError::new(class, format!("Device '{name}' not found")).into());
        }
    }
    let disks: Vec<_> = disks.iter().map(disk).collect();
    Ok(disks.join("\n"))
}

fn disk(disk: &BlockInfo) -> String {
    let image = &disk.inserted;
    let readonly = if image.ro { ", read-only" } else { "" };
    let direct = if image.cache.direct { ", direct" } else { "" };
    let mut text = format!(
        "{} ({}): {} ({}{readonly})\n    Cache mode:       writeback{direct}\n",
        disk.device, image.node_name, image.file, image.drv
    );
    if disk.io_status == IoStatus::Nospace {
        text.push_str("    I/O status:       nospace\n");
    }
    if let Some(name) = &image.backing_file {
        let depth = image.backing_file_depth;
        let _ = writeln!(text, "    Backing file:     {name} (chain depth: {depth})");
    }
    text
}

fn cpus(session: &Session, _: &mut Words) -> Result<String, Failure> {
    let line = |cpu: crate::control::command::CpuInfo| {
        let mark = if cpu.index == session.cpu() { '*' } else { ' ' };
        let halted = if cpu.halted { " (halted)" } else { "" };
        format!(
            "{mark} CPU #{}:{halted} thread_id={}\n",
            cpu.index, cpu.thread_id
        )
    };
    Ok(session.machine().cpus().into_iter().map(line).collect())
}

fn dirty_rate(session: &Session, _: &mut Words) -> Result<String, Failure> {
    let info = session.machine().dirty_rate();
    let mut text = format!(
        "Status: {}\nStart Time: {} (s)\n",
        info.status.as_str(),
        info.start_time
    );
    if info.mode == DirtyRateMode::PageSampling {
        let _ = writeln!(text, "Sample Pages: {} (per GB)", info.sample_pages);
    }
    let _ = writeln!(
        text,
        "Period: {} (sec)\nMode: {}",
        info.calc_time, info.mode
    );
    match info.dirty_rate {
        Some(rate) => writeln!(text, "Dirty rate: {rate} (MB/s)"),
        None => writeln!(text, "Dirty rate: (not ready)"),
    }
    .unwrap_or_default();
    for vcpu in info.vcpu_dirty_rate.into_iter().flatten() {
        let (id, rate) = (vcpu.id, vcpu.dirty_rate);
        let _ = writeln!(text, "vcpu[{id}], Dirty rate: {rate} (MB/s)");
    }
    Ok(text)
}

fn vcpu_dirty_limit(session: &Session, _: &mut Words) -> Result<String, Failure> {
    let limits = session.machine().vcpu_dirty_limits();
    if limits.is_empty() {
        return Ok("Dirty page limit not enabled!\n".to_owned());
    }
    let mut text = String::new();
    for vcpu in limits {
        let average = match vcpu.rate_is_average {
            true => " on average of all vCPUs",
            false => "",
        };
        let _ = writeln!(
            text,
            "vcpu[{}], limit rate {} (MB/s), current rate {} (MB/s){average}, kept from running \
             {} %",
            vcpu.cpu_index, vcpu.limit_rate, vcpu.current_rate, vcpu.throttle_percentage
        );
    }
    Ok(text)
}

fn networks(session: &Session, _: &mut Words) -> Result<String, Failure> {
    let mut text = String::new();
    for (index, net) in (0..).zip(session.machine().networks()) {
        let link = if net.link_up { "up" } else { "down" };
        let ((received, lost_in), (sent, lost_out)) = (net.received, net.sent);
        let _ = writeln!(
            text,
            "{}: index={index},type=nic,model=virtio-net-device,macaddr={},link={link}\n \\ \
             type=tap,ifname={}\n   received {received} packets, dropped {lost_in}; sent {sent}, \
             dropped {lost_out}",
            net.name, net.mac, net.ifname
        );
    }
    Ok(text)
}

fn registers(session: &Session, words: &mut Words) -> Result<String, Failure> {
    let machine = session.machine();
    let indices: Vec<u32> = if words.options("a")?.contains('a') {
        machine.cpus().iter().map(|cpu| cpu.index).collect()
    } else {
        match words.optional() {
            Some(word) => vec![word.parse().map_err(|_| {
                CommandError::generic(format!("'{word}' is not the index of a vCPU"))
            })?],
            None => vec![session.cpu()],
        }
    };
    let mut text = String::new();
    for index in indices {
        let registers = machine.registers(index)?;
        let _ = writeln!(text, "CPU#{index}\n{}", registers.trim_end());
    }
    Ok(text)
}

fn snapshots(session: &Session, _: &mut Words) -> Result<String, Failure> {
    let snapshots = session.machine().snapshots()?;
    if snapshots.is_empty() {
        return Ok("There is no snapshot available.\n".to_owned());
    }
    let mut text = "List of snapshots present on all disks:\n".to_owned();
    let mut line = |[id, tag, size, date, clock, icount]: [&str; 6]| {
        // Columns as in QEMU.
        let _ = writeln!(
            text,
            "{id:<7} {tag:<16} {size:>8} {date:>20} {clock:>15} {icount:>10}"
        );
    };
    line(["ID", "TAG", "VM_SIZE", "DATE", "VM_CLOCK", "ICOUNT"]);
    for snapshot in &snapshots {
        let (size, date, clock) = match &snapshot.saved {
            Some(saved) => (
                format_size(saved.state_bytes),
                saved.date(),
                saved.vm_clock(),
            ),
            None => ("--".to_owned(), "--".to_owned(), "--".to_owned()),
        };
        line(["--", &snapshot.tag, &size, &date, &clock, "--"]);
    }
    for snapshot in snapshots {
        if let Some(problem) = snapshot.problem {
            let _ = writeln!(text, "'{}' can't be loaded: {problem}", snapshot.tag);
        }
    }
    Ok(text)
}

fn capabilities(session: &Session, _: &mut Words) -> Result<String, Failure> {
    let capabilities = session.machine().capabilities().list();
    Ok(capabilities
        .iter()
        .map(|c| format!("{}: {}\n", c.capability, on_off(c.state)))
        .collect())
}

fn on_off(state: bool) -> &'static str {
    if state { "on" } else { "off" }
}

fn parameters(session: &Session, _: &mut Words) -> Result<String, Failure> {
    let parameters = session.machine().parameters();
    Ok(format!(
        "max-bandwidth: {} bytes/second\n\
         avail-switchover-bandwidth: {} bytes/second\n\
         downtime-limit: {} ms\n\
         max-postcopy-bandwidth: {} bytes/second\n\
         multifd-channels: {}\n\
         multifd-compression: {}\n\
         multifd-zstd-level: {}\n\
         xbzrle-cache-size: {} bytes\n\
         x-postcopy-after-rounds: {}\n\
         x-postcopy-after-time: {} ms\n\
         x-postcopy-no-convergence: {}\n\
         throttle-trigger-threshold: {}\n\
         cpu-throttle-initial: {}\n\
         cpu-throttle-increment: {}\n\
         cpu-throttle-tailslow: {}\n\
         max-cpu-throttle: {}\n\
         vcpu-dirty-limit: {} MB/s\n\
         x-vcpu-dirty-limit-period: {} ms\n\
         x-migration-timeout: {} ms\n\
         x-migration-timeout-action: {}\n\
         announce-initial: {} ms\n\
         announce-max: {} ms\n\
         announce-rounds: {}\n\
         announce-step: {} ms\n",
        parameters.max_bandwidth,
        parameters.avail_switchover_bandwidth,
        parameters.downtime_limit,
        parameters.max_postcopy_bandwidth,
        parameters.multifd_channels,
        parameters.multifd_compression,
        parameters.multifd_zstd_level,
        parameters.xbzrle_cache_size,
        parameters.postcopy_after_rounds,
        parameters.postcopy_after_time,
        on_off(parameters.postcopy_no_convergence),
        parameters.convergence.trigger_threshold,
        parameters.convergence.initial,
        parameters.convergence.increment,
        on_off(parameters.convergence.tailslow),
        parameters.convergence.max,
        parameters.convergence.vcpu_dirty_limit,
        parameters.convergence.vcpu_dirty_limit_period,
        parameters.convergence.timeout,
        parameters.convergence.timeout_action,
        parameters.announce.initial,
        parameters.announce.max,
        parameters.announce.rounds,
        parameters.announce.step,
    ))
}
