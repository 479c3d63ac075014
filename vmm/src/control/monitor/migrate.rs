//! The monitor's commands on migrations that take parameters.

use super::commands::{Failure, Reply, on_or_off};
use super::line::Words;
use super::session::Session;
use crate::control::command::{
    CommandError, DirtyRateMode, DirtyRateRequest, MigrateRequest, MigrationCapabilityStatus,
    ParameterChange, StorageCopy, Uri,
};
use crate::control::size::parse_size;

/// The migration parameters that `migrate_set_parameter` knows.
pub const PARAMETERS: [&str; 24] = [
    "announce-initial",
    "announce-max",
    "announce-rounds",
    "announce-step",
    "avail-switchover-bandwidth",
    "cpu-throttle-increment",
    "cpu-throttle-initial",
    "cpu-throttle-tailslow",
    "downtime-limit",
    "max-bandwidth",
    "max-cpu-throttle",
    "max-postcopy-bandwidth",
    "multifd-channels",
    "multifd-compression",
    "multifd-zstd-level",
    "throttle-trigger-threshold",
    "vcpu-dirty-limit",
    "x-migration-timeout",
    "x-migration-timeout-action",
    "x-postcopy-after-rounds",
    "x-postcopy-after-time",
    "x-postcopy-no-convergence",
    "x-vcpu-dirty-limit-period",
    "xbzrle-cache-size",
];

/// Starts a migration, or goes on with one that is paused in post-copy.
pub fn start(session: &mut Session, mut words: Words) -> Result<Reply, Failure> {
    let options = words.options("drbi")?;
    let resume = options.contains('r');
    // One that is resumed was begun by somebody else, perhaps.
    let detach = resume || options.contains('d');
    let uri = words.required()?;
    words.finish()?;
    session.machine().migrate(MigrateRequest {
        address: uri.parse::<Uri>().map_err(CommandError::from)?,
        resume,
        copy: StorageCopy::of(options.contains('b'), options.contains('i')),
    })?;
    Ok(if detach {
        Reply::nothing()
    } else {
        Reply::Migrating
    })
}

/// Waits for a guest.
pub fn incoming(session: &mut Session, mut words: Words) -> Result<Reply, Failure> {
    let uri = words.required()?;
    words.finish()?;
    session
        .machine()
        .migrate_incoming(uri.parse::<Uri>().map_err(CommandError::from)?, true)?;
    Ok(Reply::nothing())
}

/// Waits for the source of a migration that is paused in post-copy.
pub fn recover(session: &mut Session, mut words: Words) -> Result<Reply, Failure> {
    let uri = words.required()?;
    words.finish()?;
    let address = uri.parse::<Uri>().map_err(CommandError::from)?;
    session.machine().migrate_recover(address)?;
    Ok(Reply::nothing())
}

/// Switches a capability.
pub fn set_capability(session: &mut Session, mut words: Words) -> Result<Reply, Failure> {
    let capability = words.required()?.parse()?;
    let state = on_or_off(&words.required()?)?;
    words.finish()?;
    session
        .machine()
        .set_capabilities(&[MigrationCapabilityStatus { capability, state }])?;
    Ok(Reply::nothing())
}

/// Sets a parameter.
pub fn set_parameter(session: &mut Session, mut words: Words) -> Result<Reply, Failure> {
    let name = words.required()?;
    let value = words.required()?;
    words.finish()?;
    let mut set = ParameterChange::default();
    match name.as_str() {
        "max-bandwidth" => set.max_bandwidth = Some(bandwidth(&value)?),
        "avail-switchover-bandwidth" => {
            set.avail_switchover_bandwidth = Some(bandwidth(&value)?);
        }
        "downtime-limit" => set.downtime_limit = Some(milliseconds(&value)?),
        "max-postcopy-bandwidth" => set.max_postcopy_bandwidth = Some(bandwidth(&value)?),
        "multifd-channels" => set.multifd_channels = Some(whole(&value)?),
        "multifd-compression" => set.multifd_compression = Some(value.parse()?),
        "multifd-zstd-level" => set.multifd_zstd_level = Some(whole(&value)?),
        "xbzrle-cache-size" => set.xbzrle_cache_size = Some(bytes(&value)?),
        "x-postcopy-after-rounds" => set.postcopy_after_rounds = Some(whole(&value)?),
        "x-postcopy-after-time" => set.postcopy_after_time = Some(milliseconds(&value)?),
        "x-postcopy-no-convergence" => set.postcopy_no_convergence = Some(on_or_off(&value)?),
        "cpu-throttle-tailslow" => set.convergence.tailslow = Some(on_or_off(&value)?),
        "x-migration-timeout" => set.convergence.timeout = Some(milliseconds(&value)?),
        "x-migration-timeout-action" => set.convergence.timeout_action = Some(value.parse()?),
        _ => {
            let ParameterChange {
                announce,
                convergence,
                ..
            } = &mut set;
            let known = announce.value_mut(&name).or(convergence.value_mut(&name));
            match known {
                Some(to) => *to = Some(whole(&value)?),
                None => {
                    let desc = format!("invalid parameter value: {name}");
                    return Err(CommandError::generic(desc).into());
                }
            }
        }
    }
    change(session, set)
}

/// Begins to measure how much the guest writes.
pub fn calc_dirty_rate(session: &mut Session, mut words: Words) -> Result<Reply, Failure> {
    let options = words.options("br")?;
    if options.contains('r') {
        return Err(DirtyRateMode::no_dirty_ring().into());
    }
    let mode = match options.contains('b') {
        true => DirtyRateMode::DirtyBitmap,
        false => DirtyRateMode::PageSampling,
    };
    let calc_time = whole(&words.required()?)?;
    let samples = words.optional().map(|word| whole(&word)).transpose()?;
    words.finish()?;
    session.machine().measure_dirty_rate(DirtyRateRequest {
        calc_time,
        sample_pages: samples.unwrap_or(DirtyRateRequest::SAMPLE_PAGES),
        mode,
    })?;
    let text = "Starting dirty rate measurement: see info dirty_rate\n";
    Ok(Reply::Text(text.to_owned()))
}

/// Limits what vCPUs may write to.
pub fn set_vcpu_dirty_limit(session: &mut Session, mut words: Words) -> Result<Reply, Failure> {
    let rate = whole(&words.required()?)?;
    let cpu = words.optional().map(|word| whole(&word)).transpose()?;
    words.finish()?;
    session.machine().set_vcpu_dirty_limit(cpu, rate)?;
    Ok(Reply::Text(SEE_VCPU_DIRTY_LIMIT.to_owned()))
}

/// Lets vCPUs write what they like again.
pub fn cancel_vcpu_dirty_limit(session: &mut Session, mut words: Words) -> Result<Reply, Failure> {
    let cpu = words.optional().map(|word| whole(&word)).transpose()?;
    words.finish()?;
    session.machine().cancel_vcpu_dirty_limit(cpu)?;
    Ok(Reply::Text(SEE_VCPU_DIRTY_LIMIT.to_owned()))
}

const SEE_VCPU_DIRTY_LIMIT: &str =
    "[Please use 'info vcpu_dirty_limit' to query dirty limit for virtual CPU]\n";

/// What a migration would be like, over a link whose bandwidth may be given.
pub fn forecast(session: &Session, words: &mut Words) -> Result<String, Failure> {
    let given = words.optional().map(|word| bandwidth(&word)).transpose()?;
    let forecast = session.machine().forecast_migration(given)?;
    Ok(forecast.to_string())
}

/// Sets the most that a migration may send.
pub fn set_speed(session: &mut Session, mut words: Words) -> Result<Reply, Failure> {
    let value = words.required()?;
    words.finish()?;
    let max_bandwidth = Some(bandwidth(&value)?);
    change(
        session,
        ParameterChange {
            max_bandwidth,
            ..Default::default()
        },
    )
}

/// Sets the downtime limit.
pub fn set_downtime(session: &mut Session, mut words: Words) -> Result<Reply, Failure> {
    let word = words.required()?;
    words.finish()?;
    let downtime_limit = Some(parse_seconds(&word)?);
    change(
        session,
        ParameterChange {
            downtime_limit,
            ..Default::default()
        },
    )
}

fn change(session: &Session, change: ParameterChange) -> Result<Reply, Failure> {
    session.machine().change_parameters(change)?;
    Ok(Reply::nothing())
}

/// Bytes a second; a bare number is MiB a second.
fn bandwidth(text: &str) -> Result<u64, Failure> {
    parse_size(text, 1 << 20).map_err(|error| CommandError::generic(error.to_string()).into())
}

/// A bare number is bytes, as in QEMU.
fn bytes(text: &str) -> Result<u64, Failure> {
    parse_size(text, 1).map_err(|error| CommandError::generic(error.to_string()).into())
}

fn whole(text: &str) -> Result<u64, Failure> {
    text.parse().map_err(|_| {
        let desc = format!("'{text}' is not a whole number");
        CommandError::generic(desc).into()
    })
}

fn milliseconds(text: &str) -> Result<u64, Failure> {
    text.parse().map_err(|_| {
        let desc = format!("'{text}' is not a whole number of milliseconds");
        CommandError::generic(desc).into()
    })
}

/// Reads seconds, or a time with its unit, as milliseconds.
fn parse_seconds(text: &str) -> Result<u64, Failure> {
    let (number, factor) = [("ms", 1.0), ("us", 1e-3), ("ns", 1e-6), ("s", 1e3)]
        .into_iter()
        .find_map(|(unit, factor)| Some((text.strip_suffix(unit)?, factor)))
        .unwrap_or((text, 1e3));
    match number.parse::<f64>() {
        // The limit itself is checked where all parameters are; this is what the type holds.
        Ok(value) if value >= 0.0 && value * factor < 1e15 => Ok((value * factor).round() as u64),
        _ => Err(CommandError::generic(format!("'{text}' is not a time in seconds")).into()),
    }
}
