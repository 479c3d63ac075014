//! Unix sockets on which the control plane listens, and their clients.

use std::fs;
use std::future::Future;
use std::io;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::os::unix::net::{UnixListener as StdListener, UnixStream as StdStream};
use std::path::{Path, PathBuf};
use std::time::Duration;

use tokio::net::{UnixListener, UnixStream};
use tokio::sync::watch;
use tokio::task::{JoinHandle, JoinSet};
use tokio::time::{sleep, timeout};

/// How many clients one socket serves at once; more are turned away.
pub const MAX_CLIENTS: usize = 32;

/// A listening socket's file; dropping it removes the file, unless another process has put its
/// own in its place.
#[derive(Debug)]
pub struct SocketFile {
    path: PathBuf,
    id: (u64, u64),
}

impl SocketFile {
    /// Listens on a Unix socket. A socket that nobody listens on any more is replaced; one that
    /// is in use, or a file of another type, is not.
    pub fn listen(path: &Path) -> io::Result<(StdListener, Self)> {
        let context = |error: io::Error| {
            io::Error::new(
                error.kind(),
                format!("cannot listen on unix:{}: {error}", path.display()),
            )
        };
        let listener = match StdListener::bind(path) {
            Err(error) if error.kind() == io::ErrorKind::AddrInUse => {
                if !fs::symlink_metadata(path)
                    .map_err(context)?
                    .file_type()
                    .is_socket()
                {
                    return Err(context(io::Error::other(
                        "the file exists and is not a socket",
                    )));
                }
                match StdStream::connect(path) {
                    Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {}
                    _ => return Err(context(io::Error::other("another process listens there"))),
                }
                fs::remove_file(path).map_err(context)?;
                StdListener::bind(path).map_err(context)?
            }
            result => result.map_err(context)?,
        };
        let metadata = fs::symlink_metadata(path).map_err(context)?;
        Ok((
            listener,
            Self {
                path: path.to_owned(),
                id: (metadata.dev(), metadata.ino()),
            },
        ))
    }
}

impl Drop for SocketFile {
    fn drop(&mut self) {
        let ours = fs::symlink_metadata(&self.path)
            .is_ok_and(|metadata| (metadata.dev(), metadata.ino()) == self.id);
        if ours && let Err(error) = fs::remove_file(&self.path) {
            tracing::warn!(path = %self.path.display(), %error, "cannot remove the socket");
        }
    }
}

/// Tells a client's task that the process is about to end.
pub type Closing = watch::Receiver<bool>;

/// Returns when the process is about to end.
pub async fn closed(closing: &mut Closing) {
    // An error says that the server has been dropped, which is an end too.
    let _ = closing.wait_for(|&closing| closing).await;
}

/// A socket with a task for each client.
#[derive(Debug)]
pub struct Server {
    close: watch::Sender<bool>,
    accepting: JoinHandle<JoinSet<()>>,
    _file: SocketFile,
}

impl Server {
    /// Listens on `path` and runs `client` for each connection, until [`close`](Self::close).
    /// Must be called in a tokio runtime.
    pub fn listen<C, F>(path: &Path, client: C) -> io::Result<Self>
    where
        C: Fn(UnixStream, Closing) -> F + Send + 'static,
        F: Future<Output = ()> + Send + 'static,
    {
        let (listener, file) = SocketFile::listen(path)?;
        listener.set_nonblocking(true)?;
        let listener = UnixListener::from_std(listener)?;
        let (close, closing) = watch::channel(false);
        let accepting = tokio::spawn(accept(listener, client, closing));
        Ok(Self {
            close,
            accepting,
            _file: file,
        })
    }

    /// Accepts no more, lets the clients have what is queued for them, but no longer than
    /// `patience`, and removes the socket.
    pub async fn close(self, patience: Duration) {
        self.close.send_replace(true);
        let finish = async {
            if let Ok(mut clients) = self.accepting.await {
                while clients.join_next().await.is_some() {}
            }
        };
        if timeout(patience, finish).await.is_err() {
            tracing::debug!("a client did not take what was queued for it before the end");
        }
    }
}

async fn accept<C, F>(listener: UnixListener, client: C, mut closing: Closing) -> JoinSet<()>
where
    C: Fn(UnixStream, Closing) -> F,
    F: Future<Output = ()> + Send + 'static,
{
    let mut clients = JoinSet::new();
    loop {
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            Some(_) = clients.join_next() => continue,
            () = closed(&mut closing) => return clients,
        };
        match accepted {
            Ok(_) if clients.len() >= MAX_CLIENTS => {
                tracing::warn!("more than {MAX_CLIENTS} clients: one is turned away");
            }
            Ok((stream, _)) => {
                clients.spawn(client(stream, closing.clone()));
            }
            Err(error) => {
                // Out of descriptors, most likely: that passes, so it is no reason to give up.
                tracing::warn!(%error, "cannot accept a client");
                sleep(Duration::from_millis(100)).await;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stale_socket_is_replaced_and_a_live_one_is_not() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        drop(StdListener::bind(&path).unwrap());
        let (_listener, file) = SocketFile::listen(&path).unwrap();
        let error = SocketFile::listen(&path).unwrap_err().to_string();
        assert!(error.contains("another process listens there"), "{error}");
        drop(file);
        assert!(!path.exists());
    }

    #[test]
    fn a_file_of_the_user_is_not_removed() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("precious");
        fs::write(&path, "data").unwrap();
        let error = SocketFile::listen(&path).unwrap_err().to_string();
        assert!(error.contains("not a socket"), "{error}");
        assert_eq!(fs::read(&path).unwrap(), b"data");
    }

    #[test]
    fn a_socket_that_another_process_put_there_is_left() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        let (_listener, file) = SocketFile::listen(&path).unwrap();
        // Both exist at once, so the second has another inode.
        let other = dir.path().join("other");
        let _other = StdListener::bind(&other).unwrap();
        fs::rename(&other, &path).unwrap();
        drop(file);
        assert!(path.exists());
    }
}
