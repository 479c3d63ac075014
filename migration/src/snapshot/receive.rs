//! The file as a destination: what the source sends is written.

use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

use super::error::TransferError;
use super::never;
use super::writer::Writer;
use crate::channel::{Channel, ChannelError};
use crate::clock::Clock;
use crate::frame::Kind;
use crate::link::{Deadlines, Link, Stream};
use crate::listener::Incoming;
use crate::message::{
    Accept, BlobChunk, Go, Hello, Ready, Running, Sync, SyncAck, decode_pages, decode_state,
    decode_zero, encode_reason,
};
use crate::protocol::{NEWEST_VERSION, OutOfOrder};

/// Writes what comes on `stream` into a snapshot at `path`. If that fails, the source is told.
pub(super) fn run(path: &Path, stream: Stream, deadlines: &Deadlines, clock: Arc<dyn Clock>) {
    let began = Instant::now();
    let result = connect(stream, deadlines, Arc::clone(&clock)).and_then(|mut channel| {
        let result = converse(path, &mut channel, &*clock);
        if let Err(error) = &result {
            let mut body = Vec::new();
            encode_reason(&error.to_string(), &mut body);
            // If the source has said why it gave up, neither is possible.
            let _ = channel.send_now(Kind::Refuse, &body) || channel.send_now(Kind::Failed, &body);
        }
        channel.linger(Instant::now() + deadlines.linger);
        result
    });
    match result {
        Ok(()) => tracing::info!(path = %path.display(), ms = began.elapsed().as_millis(), "saved"),
        Err(error) => tracing::info!(path = %path.display(), "nothing was saved: {error}"),
    }
}

fn connect(
    stream: Stream,
    deadlines: &Deadlines,
    clock: Arc<dyn Clock>,
) -> Result<Channel, TransferError> {
    let cancel = never()?;
    let incoming = Incoming::from_stream(stream, &cancel, deadlines)?;
    let link = Link::new(incoming.stream, cancel, deadlines).map_err(ChannelError::from)?;
    Ok(Channel::new(link, clock, false))
}

fn converse(path: &Path, channel: &mut Channel, clock: &dyn Clock) -> Result<(), TransferError> {
    channel.receive()?;
    let hello = channel.decode(Kind::Hello, Hello::decode)?;
    let mut writer = Writer::create(path, &hello, channel.body())?;
    let mut body = Vec::new();
    Accept {
        id: hello.id,
        version: NEWEST_VERSION,
        // Each page has a place in the file, as it is.
        capabilities: 0,
    }
    .encode(&mut body);
    channel.send(Kind::Accept, &body)?;

    let mut sections = Vec::new();
    let (mut runs, mut crcs, mut data) = (Vec::new(), Vec::new(), Vec::new());
    loop {
        let arrived = channel.receive()?;
        match arrived.kind {
            Kind::Blob => {
                let (chunk, data) =
                    BlobChunk::decode(channel.body()).map_err(|error| ChannelError::Body {
                        kind: Kind::Blob,
                        error,
                    })?;
                writer.blob(chunk, data)?;
            }
            Kind::Pages => {
                channel.decode(Kind::Pages, |body| {
                    decode_pages(body, arrived.payload_len, true, &mut runs, &mut crcs)
                })?;
                channel.receive_data(arrived.payload_len as usize, &mut data)?;
                writer.pages(&runs, &crcs, &data)?;
            }
            Kind::Zero => {
                channel.decode(Kind::Zero, |body| decode_zero(body, &mut runs))?;
                writer.zero(&runs)?;
            }
            Kind::Sync => {
                let sync = channel.decode(Kind::Sync, Sync::decode_padded)?;
                writer.settle()?;
                SyncAck { mark: sync.mark }.encode(&mut body);
                channel.send(Kind::SyncAck, &body)?;
            }
            Kind::State => sections.push(channel.decode(Kind::State, decode_state)?),
            Kind::End => break,
            // No disks were accepted.
            kind => return Err(out_of_order(channel, kind)),
        }
    }
    let began = clock.now();
    writer.check_complete()?;
    writer.finish(sections)?;
    let load_ns = nanoseconds(clock.now().saturating_sub(began));
    Ready { load_ns }.encode(&mut body);
    channel.send(Kind::Ready, &body)?;

    let kind = channel.receive()?.kind;
    if kind != Kind::Go {
        return Err(out_of_order(channel, kind));
    }
    let arrived_at = channel.arrived_at();
    let go = channel.decode(Kind::Go, Go::decode)?;
    writer.publish(go.run)?;
    let start_ns = nanoseconds(clock.now().saturating_sub(arrived_at));
    Running { start_ns }.encode(&mut body);
    Ok(channel.send(Kind::Running, &body)?)
}

fn out_of_order(channel: &Channel, kind: Kind) -> TransferError {
    let phase = channel.phase();
    ChannelError::OutOfOrder(OutOfOrder { kind, phase }).into()
}

fn nanoseconds(duration: std::time::Duration) -> u64 {
    duration.as_nanos().try_into().unwrap_or(u64::MAX)
}
