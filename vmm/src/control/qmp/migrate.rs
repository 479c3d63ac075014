//! The commands on migrations that take arguments.

use std::sync::Arc;

use serde_json::Value;

use super::arguments::Arguments;
use super::commands::nothing;
use crate::control::command::{
    AnnounceChange, CommandError, CommandResult, Control, ConvergenceChange, DirtyRateMode,
    DirtyRateRequest, MigrateRequest, MigrationCapabilityStatus, ParameterChange, StorageCopy, Uri,
};

/// Starts a migration, or goes on with one that is paused in post-copy.
pub fn migrate(machine: &Arc<dyn Control>, mut arguments: Arguments) -> CommandResult<Value> {
    let uri = arguments.string("uri")?;
    let channels = arguments.objects("channels")?;
    // How QEMU's older clients ask for disks to be copied as well.
    let full = arguments.boolean("blk")? == Some(true);
    let incremental = arguments.boolean("inc")? == Some(true);
    let copy = StorageCopy::of(full, incremental);
    // Ignored, as in QEMU: over QMP a migration always goes on in the background.
    arguments.boolean("detach")?;
    let resume = arguments.boolean("resume")? == Some(true);
    let address = address(&arguments, uri, channels)?;
    nothing(arguments, || {
        machine.migrate(MigrateRequest {
            address,
            resume,
            copy,
        })
    })
}

/// Waits for a guest.
pub fn incoming(machine: &Arc<dyn Control>, mut arguments: Arguments) -> CommandResult<Value> {
    let uri = arguments.string("uri")?;
    let channels = arguments.objects("channels")?;
    let exit_on_error = arguments.boolean("exit-on-error")?.unwrap_or(true);
    let address = address(&arguments, uri, channels)?;
    nothing(arguments, || {
        machine.migrate_incoming(address, exit_on_error)
    })
}

/// Waits for the source of a migration that is paused in post-copy.
pub fn recover(machine: &Arc<dyn Control>, mut arguments: Arguments) -> CommandResult<Value> {
    let uri = arguments.string("uri")?;
    let address = address(&arguments, uri, None)?;
    nothing(arguments, || machine.migrate_recover(address))
}

/// The address of a migration, from one of the two ways to give it.
fn address(
    arguments: &Arguments,
    uri: Option<String>,
    channels: Option<Vec<Arguments>>,
) -> CommandResult<Uri> {
    match (uri, channels) {
        (Some(_), Some(_)) => Err(CommandError::generic(
            "'uri' and 'channels' are mutually exclusive: exactly one of the two must be present",
        )),
        (uri, None) => Ok(arguments.required("uri", uri)?.parse::<Uri>()?),
        (None, Some(channels)) => match <[Arguments; 1]>::try_from(channels) {
            Ok([channel]) => main_channel(channel),
            Err(channels) => Err(CommandError::generic(format!(
                "Parameter 'channels' expects one channel, of type main, got {}",
                channels.len()
            ))),
        },
    }
}

/// QAPI's `MigrationChannel` (since QEMU 8.2), brought into the form of a URI.
fn main_channel(mut channel: Arguments) -> CommandResult<Uri> {
    let kind = channel.string("channel-type")?;
    let kind = channel.required("channel-type", kind)?;
    if kind != "main" {
        return Err(channel.not_accepted("channel-type", &kind));
    }
    let addr = channel.object("addr")?;
    let mut addr = channel.required("addr", addr)?;
    channel.finish()?;

    let transport = addr.string("transport")?;
    let transport = addr.required("transport", transport)?;
    if transport == "file" {
        let filename = addr.string("filename")?;
        let filename = addr.required("filename", filename)?;
        let offset = addr.unsigned("offset")?;
        if offset.is_some_and(|offset| offset != 0) {
            return Err(CommandError::generic(
                "an 'offset' other than 0 is not supported: a snapshot is a file of its own",
            ));
        }
        addr.finish()?;
        return Ok(format!("file:{filename}").parse::<Uri>()?);
    }
    if transport != "socket" {
        return Err(addr.not_accepted("transport", &transport));
    }
    let kind = addr.string("type")?;
    let kind = addr.required("type", kind)?;
    let mut string = |name| {
        let value = addr.string(name)?;
        addr.required(name, value)
    };
    let uri = match kind.as_str() {
        "inet" => {
            let (host, port) = (string("host")?, string("port")?);
            if host.contains(':') {
                format!("tcp:[{host}]:{port}")
            } else {
                format!("tcp:{host}:{port}")
            }
        }
        "unix" => format!("unix:{}", string("path")?),
        _ => return Err(addr.not_accepted("type", &kind)),
    };
    addr.finish()?;
    Ok(uri.parse::<Uri>()?)
}

/// Changes parameters.
pub fn set_parameters(
    machine: &Arc<dyn Control>,
    mut arguments: Arguments,
) -> CommandResult<Value> {
    let compression = arguments.string("multifd-compression")?;
    let mut convergence = ConvergenceChange {
        tailslow: arguments.boolean("cpu-throttle-tailslow")?,
        ..ConvergenceChange::default()
    };
    for name in ConvergenceChange::NUMBERS {
        if let Some(to) = convergence.value_mut(name) {
            *to = arguments.unsigned(name)?;
        }
    }
    if let Some(action) = arguments.string("x-migration-timeout-action")? {
        convergence.timeout_action = Some(action.parse()?);
    }
    let change = ParameterChange {
        max_bandwidth: arguments.unsigned("max-bandwidth")?,
        avail_switchover_bandwidth: arguments.unsigned("avail-switchover-bandwidth")?,
        downtime_limit: arguments.unsigned("downtime-limit")?,
        max_postcopy_bandwidth: arguments.unsigned("max-postcopy-bandwidth")?,
        multifd_channels: arguments.unsigned("multifd-channels")?,
        multifd_compression: compression.map(|name| name.parse()).transpose()?,
        multifd_zstd_level: arguments.unsigned("multifd-zstd-level")?,
        xbzrle_cache_size: arguments.unsigned("xbzrle-cache-size")?,
        postcopy_after_rounds: arguments.unsigned("x-postcopy-after-rounds")?,
        postcopy_after_time: arguments.unsigned("x-postcopy-after-time")?,
        postcopy_no_convergence: arguments.boolean("x-postcopy-no-convergence")?,
        convergence,
        announce: AnnounceChange {
            initial: arguments.unsigned("announce-initial")?,
            max: arguments.unsigned("announce-max")?,
            rounds: arguments.unsigned("announce-rounds")?,
            step: arguments.unsigned("announce-step")?,
        },
    };
    nothing(arguments, || machine.change_parameters(change))
}

/// Begins to measure how much the guest writes.
pub fn calc_dirty_rate(
    machine: &Arc<dyn Control>,
    mut arguments: Arguments,
) -> CommandResult<Value> {
    let calc_time = arguments.unsigned("calc-time")?;
    let mode = arguments.string("mode")?;
    let request = DirtyRateRequest {
        calc_time: arguments.required("calc-time", calc_time)?,
        sample_pages: arguments
            .unsigned("sample-pages")?
            .unwrap_or(DirtyRateRequest::SAMPLE_PAGES),
        mode: mode.map_or(Ok(DirtyRateMode::default()), |mode| mode.parse())?,
    };
    nothing(arguments, || machine.measure_dirty_rate(request))
}

/// Limits what vCPUs may write to.
pub fn set_vcpu_dirty_limit(
    machine: &Arc<dyn Control>,
    mut arguments: Arguments,
) -> CommandResult<Value> {
    let cpu = arguments.unsigned("cpu-index")?;
    let rate = arguments.unsigned("dirty-rate")?;
    let rate = arguments.required("dirty-rate", rate)?;
    nothing(arguments, || machine.set_vcpu_dirty_limit(cpu, rate))
}

/// Lets vCPUs write what they like again.
pub fn cancel_vcpu_dirty_limit(
    machine: &Arc<dyn Control>,
    mut arguments: Arguments,
) -> CommandResult<Value> {
    let cpu = arguments.unsigned("cpu-index")?;
    nothing(arguments, || machine.cancel_vcpu_dirty_limit(cpu))
}

/// What a migration would be like.
pub fn forecast(machine: &Arc<dyn Control>, mut arguments: Arguments) -> CommandResult<Value> {
    let bandwidth = arguments.unsigned("bandwidth")?;
    arguments.finish()?;
    let forecast = machine.forecast_migration(bandwidth)?;
    serde_json::to_value(forecast).map_err(|error| CommandError::generic(error.to_string()))
}

/// Switches capabilities.
pub fn set_capabilities(
    machine: &Arc<dyn Control>,
    mut arguments: Arguments,
) -> CommandResult<Value> {
    let entries = arguments.objects("capabilities")?;
    let entries = arguments.required("capabilities", entries)?;
    let mut changes = Vec::with_capacity(entries.len());
    for mut entry in entries {
        let capability = entry.string("capability")?;
        let capability = entry.required("capability", capability)?.parse()?;
        let state = entry.boolean("state")?;
        let state = entry.required("state", state)?;
        entry.finish()?;
        changes.push(MigrationCapabilityStatus { capability, state });
    }
    nothing(arguments, || machine.set_capabilities(&changes))
}
