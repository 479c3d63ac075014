//! The file as a source: what is in it is sent.

use std::sync::Arc;

use super::error::TransferError;
use super::never;
use super::reader::{Pages, Snapshot};
use crate::channel::{Channel, ChannelError};
use crate::clock::Clock;
use crate::frame::{Kind, MAX_CHUNK};
use crate::layout::PAGE_SIZE;
use crate::link::{Deadlines, Link, Stream};
use crate::message::{
    AddressRun, BlobChunk, End, Go, Hello, Preamble, Sync, encode_pages, encode_reason,
    encode_state, encode_zero,
};
use crate::protocol::OutOfOrder;

/// After so many bytes the destination is asked whether all has arrived, for its numbers.
const MARK_BYTES: u64 = 32 << 20;

/// Sends the snapshot's guest on `stream`. If that fails, the destination is told.
pub(super) fn run(
    snapshot: &Snapshot,
    stream: Stream,
    deadlines: &Deadlines,
    clock: Arc<dyn Clock>,
) -> Result<(), TransferError> {
    let link = Link::new(stream, never()?, deadlines).map_err(ChannelError::from)?;
    let mut channel = Channel::new(link, clock, true);
    let result = converse(snapshot, &mut channel);
    if let Err(error) = &result {
        let mut body = Vec::new();
        encode_reason(&error.to_string(), &mut body);
        // If the destination has said why it gave up, this is not possible.
        channel.send_now(Kind::Cancel, &body);
        channel.link().finish();
    }
    result
}

fn converse(snapshot: &Snapshot, channel: &mut Channel) -> Result<(), TransferError> {
    channel.send_raw(&Preamble::OURS.encode())?;
    let mut body = Vec::new();
    // Of what the source has offered nothing is used: pages are as the file has them, with their
    // checksums.
    Hello {
        optional: 0,
        ..snapshot.hello().clone()
    }
    .encode(&mut body)
    .map_err(|error| ChannelError::Body {
        kind: Kind::Hello,
        error,
    })?;
    channel.send(Kind::Hello, &body)?;
    expect(channel, Kind::Accept)?;
    for index in 0..snapshot.hello().offer.blobs.len() {
        snapshot.blob(index, MAX_CHUNK, |offset, data| {
            let index = index as u16;
            body.clear();
            body.extend(BlobChunk { index, offset }.encode());
            body.extend(data);
            Ok::<_, TransferError>(channel.send(Kind::Blob, &body)?)
        })?;
    }
    send_ram(snapshot, channel)?;
    for section in snapshot.sections() {
        encode_state(section, &mut body).map_err(|error| ChannelError::Body {
            kind: Kind::State,
            error,
        })?;
        channel.send(Kind::State, &body)?;
    }
    End {
        sections: snapshot.sections().len() as u32,
        was_running: snapshot.was_running(),
    }
    .encode(&mut body);
    channel.send(Kind::End, &body)?;
    expect(channel, Kind::Ready)?;
    Go {
        id: snapshot.hello().id,
        run: snapshot.was_running(),
        // Its clocks go on where they stopped.
        stopped_ns: 0,
        round_trip_ns: 0,
    }
    .encode(&mut body);
    channel.send(Kind::Go, &body)?;
    expect(channel, Kind::Running)
}

fn send_ram(snapshot: &Snapshot, channel: &mut Channel) -> Result<(), TransferError> {
    let layout = &snapshot.hello().offer.layout;
    let (mut body, mut data) = (Vec::new(), Vec::new());
    let mut zero: Vec<AddressRun> = Vec::new();
    let (mut marked, mut mark) = (0, 0);
    for number in 0..snapshot.chunks() {
        for pages in snapshot.pages(number)? {
            match pages {
                Pages::Zero(run) => zero.extend(layout.addresses(run)),
                Pages::Data(run, crcs) => {
                    snapshot.read_pages(run, &crcs, &mut data)?;
                    let address = layout.addresses(run);
                    encode_pages(address.as_slice(), &crcs, &mut body);
                    channel.send_data(Kind::Pages, &body, &[&data])?;
                }
            }
        }
        if !zero.is_empty() {
            encode_zero(&zero, &mut body);
            channel.send(Kind::Zero, &body)?;
            zero.clear();
        }
        let through = (number + 1) * super::format::CHUNK_PAGES * PAGE_SIZE;
        if through - marked >= MARK_BYTES {
            marked = through;
            mark += 1;
            Sync { mark, round: 1 }.encode(&mut body);
            channel.send(Kind::Sync, &body)?;
            expect(channel, Kind::SyncAck)?;
        }
    }
    Ok(())
}

fn expect(channel: &mut Channel, expected: Kind) -> Result<(), TransferError> {
    let kind = channel.receive()?.kind;
    if kind == expected {
        Ok(())
    } else {
        let phase = channel.phase();
        Err(ChannelError::OutOfOrder(OutOfOrder { kind, phase }).into())
    }
}
