//! A Unix socket as the guest's serial port: one client at a time, any number one after the
//! other. Without one, what the guest writes is thrown away, as on a port with no cable.

use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};

use rustix::event::PollFlags;

use super::input::Inlet;
use super::output::SerialOutput;
use super::sink::Sink;

/// Serves clients until the console is closed. The listener must not block.
pub(super) fn run(inlet: &Inlet, output: &SerialOutput, listener: &UnixListener) {
    while !inlet.is_closed() {
        let [ready] = inlet.wait([Some((listener.as_fd(), PollFlags::IN))], None);
        if !ready.contains(PollFlags::IN) {
            continue;
        }
        let client = match listener.accept() {
            Ok((client, _)) => client,
            Err(error) => {
                tracing::debug!(%error, "a client of a console was gone at once");
                continue;
            }
        };
        match client
            .try_clone()
            .and_then(|client| Sink::owned(OwnedFd::from(client)))
        {
            Ok(sink) => output.replace_sink(Some(sink)),
            Err(error) => {
                tracing::warn!(%error, "a client of a console cannot be served");
                continue;
            }
        }
        serve(inlet, &client);
        output.replace_sink(None);
    }
}

/// Hands a client's input to the guest until the client is gone. One that has closed only its
/// sending side may go on reading.
fn serve(inlet: &Inlet, client: &UnixStream) {
    let mut sends = true;
    while !inlet.is_closed() {
        let room = if sends { inlet.room() } else { 0 };
        let flags = if room > 0 {
            PollFlags::IN
        } else {
            PollFlags::empty()
        };
        let [ready] = inlet.wait([Some((client.as_fd(), flags))], None);
        if ready.contains(PollFlags::IN) {
            sends = inlet.transfer(client, room);
        } else if ready.intersects(PollFlags::HUP | PollFlags::ERR) {
            return;
        }
    }
}
