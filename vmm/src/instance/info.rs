//! The engine's figures in the form of the commands.

use std::num::NonZeroU8;

use migration::compression::{Method, ZstdLevel};
use migration::parameters::Parameters;
use migration::progress::{
    Bytes, Compression, Disk, Downtime, Multifd, Postcopy, Ram, Round, Snapshot, Status,
};
use migration::uri::Uri;
use migration::xbzrle::Figures;
use migration::zero_copy::Sends;

use super::convergence;
use crate::control::command::{
    AnnounceParameters, BytesByKind, CommandError, CommandResult, CompressionInfo, DowntimeParts,
    FerryMigrationInfo, MigrationInfo, MigrationParameters, MigrationRound, MigrationStats,
    MigrationStatus, MultifdCompression, MultifdInfo, ParameterChange, PostcopyInfo, SocketAddress,
    XbzrleCacheStats, ZeroCopyInfo,
};

/// QAPI's status. Clients of QEMU know no hand-over without an answer: to them it is a failure,
/// after which the guest stays stopped.
pub(super) fn status(status: Status) -> MigrationStatus {
    match status {
        Status::None => MigrationStatus::None,
        Status::Setup => MigrationStatus::Setup,
        Status::Active => MigrationStatus::Active,
        Status::Device => MigrationStatus::Device,
        Status::PostcopyActive => MigrationStatus::PostcopyActive,
        Status::PostcopyPaused => MigrationStatus::PostcopyPaused,
        Status::PostcopyRecover => MigrationStatus::PostcopyRecover,
        Status::Completed => MigrationStatus::Completed,
        Status::Cancelling => MigrationStatus::Cancelling,
        Status::Cancelled => MigrationStatus::Cancelled,
        Status::Failed | Status::HandoverUnknown => MigrationStatus::Failed,
    }
}

/// A migration as its source sees it.
pub(super) fn outgoing(snapshot: &Snapshot) -> MigrationInfo {
    let ms = |time: std::time::Duration| u64::try_from(time.as_millis()).unwrap_or(u64::MAX);
    let begun = !matches!(snapshot.status, Status::None | Status::Setup);
    let status = match snapshot.status {
        // Its thread has not begun yet, but the command has succeeded.
        Status::None => MigrationStatus::Setup,
        begun => self::status(begun),
    };
    let postcopy = snapshot.postcopy.as_ref();
    let unconfirmed = postcopy.is_some_and(|postcopy| !postcopy.confirmed);
    let error = match (snapshot.status, &snapshot.error) {
        (Status::HandoverUnknown, error) => Some(format!(
            "the guest was handed over, but the destination has not confirmed that it runs there \
             ({}): it stays stopped here. If you know that it does not run at the destination, \
             'cont' runs it here",
            error.as_deref().unwrap_or("no answer")
        )),
        (Status::PostcopyPaused, Some(error)) if unconfirmed => Some(format!(
            "{error}. The destination has not confirmed that the guest runs there: if you know \
             that it does not, 'cont' runs it here"
        )),
        // In post-copy the guest may have ended there.
        (Status::Failed | Status::PostcopyPaused | Status::Completed, error) => error.clone(),
        _ => None,
    };
    let none = Postcopy::default();
    let postcopy = postcopy.unwrap_or(&none);
    let ns = |time: std::time::Duration| u64::try_from(time.as_nanos()).unwrap_or(u64::MAX);
    MigrationInfo {
        status,
        ram: begun.then(|| MigrationStats {
            postcopy_requests: postcopy.requests,
            postcopy_bytes: postcopy.bytes,
            multifd_bytes: snapshot.multifd.as_ref().map_or(0, |multifd| multifd.bytes),
            dirty_sync_missed_zero_copy: snapshot
                .zero_copy
                .map_or(0, |sends| zero_copy(sends).missed()),
            ..stats(&snapshot.ram)
        }),
        disk: snapshot
            .disk
            .filter(|_| begun)
            .map(|disk| disk_stats(&disk)),
        xbzrle_cache: snapshot.xbzrle.map(xbzrle),
        total_time: Some(ms(snapshot.total_time)),
        downtime: snapshot.downtime.map(|downtime| ms(downtime.total)),
        expected_downtime: snapshot.expected_downtime.map(ms),
        cpu_throttle_percentage: snapshot.throttle.share().map(u64::from),
        setup_time: begun.then(|| ms(snapshot.setup_time)),
        postcopy_blocktime: postcopy.blocktime.map(ms),
        postcopy_vcpu_blocktime: postcopy.vcpu_blocktime.iter().copied().map(ms).collect(),
        postcopy_latency: postcopy.latency_average.map(ns),
        postcopy_latency_dist: postcopy.latency_distribution.clone(),
        error_desc: error,
        ferry: begun.then(|| ferry(snapshot)),
        ..MigrationInfo::default()
    }
}

/// A migration as its destination sees it, which listens at `uri`, or reads that file.
pub(super) fn incoming(snapshot: &Snapshot, uri: &Uri) -> MigrationInfo {
    MigrationInfo {
        socket_address: SocketAddress::of(uri).into_iter().collect(),
        ..outgoing(snapshot)
    }
}

fn stats(ram: &Ram) -> MigrationStats {
    let Ram {
        transferred,
        remaining,
        total,
        duplicate,
        normal,
        normal_bytes,
        mbps,
        dirty_sync_count,
        dirty_pages_rate,
        pages_per_second,
        precopy_bytes,
        downtime_bytes,
    } = *ram;
    MigrationStats {
        transferred,
        remaining,
        total,
        duplicate,
        normal,
        normal_bytes,
        dirty_pages_rate,
        mbps,
        dirty_sync_count,
        page_size: Ram::PAGE_SIZE,
        pages_per_second,
        precopy_bytes,
        downtime_bytes,
        // Told beside it.
        multifd_bytes: 0,
        dirty_sync_missed_zero_copy: 0,
        postcopy_requests: 0,
        postcopy_bytes: 0,
    }
}

/// The disks in the form of memory, as in QEMU: its pages are blocks.
fn disk_stats(disk: &Disk) -> MigrationStats {
    let Disk {
        transferred,
        remaining,
        total,
        normal,
        normal_bytes,
        zero_bytes,
        // What the destination has is neither sent nor told of in QEMU.
        absent_bytes: _,
        mbps,
        dirty_sync_count,
        dirty_bytes_rate,
        flush: _,
        downtime_bytes,
    } = *disk;
    MigrationStats {
        transferred,
        remaining,
        total,
        duplicate: zero_bytes / Disk::BLOCK_SIZE,
        normal,
        normal_bytes,
        dirty_pages_rate: dirty_bytes_rate / Disk::BLOCK_SIZE,
        mbps,
        dirty_sync_count,
        page_size: Disk::BLOCK_SIZE,
        downtime_bytes,
        ..MigrationStats::default()
    }
}

fn ferry(snapshot: &Snapshot) -> FerryMigrationInfo {
    let skip = snapshot
        .rounds
        .len()
        .saturating_sub(FerryMigrationInfo::MAX_ROUNDS);
    FerryMigrationInfo {
        rounds: snapshot.rounds.iter().skip(skip).map(round).collect(),
        bytes: bytes(snapshot.bytes),
        downtime: snapshot.downtime.map(parts),
        bandwidth: snapshot.bandwidth.map(|rate| rate as u64),
        round_trip: snapshot.round_trip.map(us),
        compression: snapshot.compression.map(compression),
        multifd: snapshot.multifd.as_ref().map(multifd),
        zero_copy: snapshot.zero_copy.map(zero_copy),
        postcopy: snapshot.postcopy.as_ref().map(postcopy),
    }
}

fn multifd(figures: &Multifd) -> MultifdInfo {
    let Multifd {
        channels,
        in_use,
        bytes: _,
        why_one,
    } = figures;
    MultifdInfo {
        channels: *channels,
        in_use: *in_use,
        why_one: why_one.clone(),
    }
}

fn zero_copy(sends: Sends) -> ZeroCopyInfo {
    let Sends {
        tried,
        done,
        copied,
        refused,
    } = sends;
    ZeroCopyInfo {
        sends: tried,
        done,
        copied,
        refused,
    }
}

fn compression(figures: Compression) -> CompressionInfo {
    let Compression {
        active,
        pages,
        bytes,
    } = figures;
    CompressionInfo {
        active,
        pages,
        bytes,
    }
}

fn xbzrle(figures: Figures) -> XbzrleCacheStats {
    let Figures {
        cache_size,
        bytes,
        pages,
        cache_miss,
        cache_miss_rate,
        encoding_rate,
        overflow,
    } = figures;
    XbzrleCacheStats {
        cache_size,
        bytes,
        pages,
        cache_miss,
        cache_miss_rate,
        encoding_rate,
        overflow,
    }
}

fn postcopy(figures: &Postcopy) -> PostcopyInfo {
    let Postcopy {
        phase_time,
        bytes,
        requests,
        requested_pages,
        missing_pages,
        confirmed: _,
        blocktime,
        vcpu_blocktime,
        latency_average,
        latency_max,
        // QEMU has a member for it.
        latency_distribution: _,
    } = figures;
    PostcopyInfo {
        time: us(*phase_time),
        bytes: *bytes,
        requests: *requests,
        requested_pages: *requested_pages,
        missing_pages: *missing_pages,
        blocktime: blocktime.map(us),
        vcpu_blocktime: vcpu_blocktime.iter().copied().map(us).collect(),
        latency_average: latency_average.map(us),
        latency_max: latency_max.map(us),
    }
}

fn us(time: std::time::Duration) -> u64 {
    u64::try_from(time.as_micros()).unwrap_or(u64::MAX)
}

fn bytes(bytes: Bytes) -> BytesByKind {
    let Bytes {
        pages,
        zero,
        state,
        files,
        control,
    } = bytes;
    BytesByKind {
        pages,
        zero,
        state,
        files,
        control,
    }
}

fn round(round: &Round) -> MigrationRound {
    MigrationRound {
        round: round.number,
        pages: round.pages + round.zero,
        sent: round.pages,
        zero: round.zero,
        bytes: round.bytes,
        time: us(round.time),
        dirtied: Some(round.dirty),
    }
}

fn parts(downtime: Downtime) -> DowntimeParts {
    let Downtime {
        total,
        stop,
        last_pages,
        save,
        send,
        load,
        start,
        expected,
    } = downtime;
    DowntimeParts {
        total: us(total),
        stop: us(stop),
        last_pages: us(last_pages),
        save: us(save),
        send: us(send),
        load: us(load),
        start: us(start),
        expected: expected.map(us),
    }
}

/// The parameters now.
pub(super) fn parameters(
    parameters: &Parameters,
    announce: AnnounceParameters,
) -> MigrationParameters {
    MigrationParameters {
        max_bandwidth: parameters.max_bandwidth(),
        avail_switchover_bandwidth: parameters.avail_switchover_bandwidth(),
        downtime_limit: u64::try_from(parameters.downtime_limit().as_millis()).unwrap_or(u64::MAX),
        max_postcopy_bandwidth: parameters.max_postcopy_bandwidth(),
        multifd_channels: parameters.multifd_channels().get().into(),
        multifd_compression: match parameters.compression().method() {
            None => MultifdCompression::None,
            Some(Method::Lz4) => MultifdCompression::Lz4,
            Some(Method::Zstd) => MultifdCompression::Zstd,
        },
        multifd_zstd_level: parameters.zstd_level().get().into(),
        xbzrle_cache_size: parameters.xbzrle_cache_size(),
        postcopy_after_rounds: parameters.postcopy_after_rounds(),
        postcopy_after_time: parameters.postcopy_after_time().map_or(0, |time| {
            u64::try_from(time.as_millis()).unwrap_or(u64::MAX)
        }),
        postcopy_no_convergence: parameters.postcopy_no_convergence(),
        convergence: convergence::parameters(parameters),
        announce,
    }
}

/// Changes the parameters that are given, of those that are the engine's.
pub(super) fn change(parameters: &Parameters, change: ParameterChange) -> CommandResult<()> {
    let ParameterChange {
        max_bandwidth,
        avail_switchover_bandwidth,
        downtime_limit,
        max_postcopy_bandwidth,
        multifd_channels,
        multifd_compression,
        multifd_zstd_level,
        xbzrle_cache_size,
        postcopy_after_rounds,
        postcopy_after_time,
        postcopy_no_convergence,
        convergence,
        announce: _,
    } = change;
    let refused = |err: &dyn std::error::Error| CommandError::generic(err.to_string());
    convergence::change(parameters, convergence)?;
    if let Some(limit) = downtime_limit {
        parameters
            .set_downtime_limit_ms(limit)
            .map_err(|err| refused(&err))?;
    }
    if let Some(size) = xbzrle_cache_size {
        parameters
            .set_xbzrle_cache_size(size)
            .map_err(|err| refused(&err))?;
    }
    if let Some(level) = multifd_zstd_level {
        parameters.set_zstd_level(ZstdLevel::new(level).map_err(|err| refused(&err))?);
    }
    // What is out of range has been refused.
    let channels = multifd_channels.and_then(|channels| u8::try_from(channels).ok());
    if let Some(channels) = channels.and_then(NonZeroU8::new) {
        parameters.set_multifd_channels(channels);
    }
    if let Some(compression) = multifd_compression {
        parameters.set_compression(match compression {
            MultifdCompression::None => None,
            MultifdCompression::Lz4 => Some(Method::Lz4),
            MultifdCompression::Zstd => Some(Method::Zstd),
        });
    }
    if let Some(bandwidth) = max_bandwidth {
        parameters.set_max_bandwidth(bandwidth);
    }
    if let Some(bandwidth) = avail_switchover_bandwidth {
        parameters.set_avail_switchover_bandwidth(bandwidth);
    }
    if let Some(bandwidth) = max_postcopy_bandwidth {
        parameters.set_max_postcopy_bandwidth(bandwidth);
    }
    if let Some(rounds) = postcopy_after_rounds {
        parameters.set_postcopy_after_rounds(rounds);
    }
    if let Some(ms) = postcopy_after_time {
        parameters.set_postcopy_after_ms(ms);
    }
    if let Some(on) = postcopy_no_convergence {
        parameters.set_postcopy_no_convergence(on);
    }
    Ok(())
}
