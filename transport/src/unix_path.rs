//! The socket file of a unix listener: taking over a stale one, leaving a live one, removing our own.

use std::fs::{self, File, Permissions, TryLockError};
use std::io;
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use socket2::{Domain, SockAddr, Socket, Type};

use crate::{TransportError, Uri};

/// How long to wait for another process that binds in the same directory.
const DIRECTORY_LOCK_LIMIT: Duration = Duration::from_secs(2);

/// A bound socket's file; removed when dropped, if it is still the one that was bound.
pub(crate) struct SocketFile {
    path: PathBuf,
    device: u64,
    inode: u64,
}

impl SocketFile {
    /// Binds `path`, which only this user may connect to. Does not listen yet.
    pub(crate) fn bind(uri: &Uri, path: &Path) -> Result<(Socket, Self), TransportError> {
        let failed = |source| TransportError::Listen { uri: Arc::new(uri.clone()), source };
        let address = SockAddr::unix(path).map_err(failed)?;
        let directory = lock_directory(path).map_err(failed)?;
        remove_stale(path, failed)?;
        let socket = Socket::new(Domain::UNIX, Type::STREAM, None).map_err(failed)?;
        socket.bind(&address).map_err(failed)?;
        drop(directory);
        // Nobody can connect before we listen, so there is no moment at which others could.
        fs::set_permissions(path, Permissions::from_mode(0o600)).map_err(failed)?;
        let metadata = fs::symlink_metadata(path).map_err(failed)?;
        Ok((socket, Self { path: path.into(), device: metadata.dev(), inode: metadata.ino() }))
    }
}

impl Drop for SocketFile {
    fn drop(&mut self) {
        let ours = |metadata: &fs::Metadata| metadata.dev() == self.device && metadata.ino() == self.inode;
        if fs::symlink_metadata(&self.path).is_ok_and(|metadata| ours(&metadata))
            && let Err(error) = fs::remove_file(&self.path)
        {
            tracing::warn!("cannot remove {}: {error}", self.path.display());
        }
    }
}

/// Two processes that find the same stale file must not remove each other's new one, so they take turns.
fn lock_directory(path: &Path) -> io::Result<File> {
    let directory = File::open(path.parent().unwrap_or(Path::new("/")))?;
    let deadline = Instant::now() + DIRECTORY_LOCK_LIMIT;
    loop {
        match directory.try_lock() {
            Ok(()) => return Ok(directory),
            Err(TryLockError::WouldBlock) if Instant::now() < deadline => thread::sleep(Duration::from_millis(10)),
            Err(error) => return Err(error.into()),
        }
    }
}

fn remove_stale(path: &Path, failed: impl Fn(io::Error) -> TransportError) -> Result<(), TransportError> {
    match fs::symlink_metadata(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(failed(error)),
        Ok(metadata) if !metadata.file_type().is_socket() => {
            return Err(TransportError::NotASocket { path: path.into() });
        }
        Ok(_) => {}
    }
    match UnixStream::connect(path) {
        Ok(_) => Err(TransportError::SocketInUse { path: path.into() }),
        // Nobody listens: whoever bound it is gone.
        Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => fs::remove_file(path).map_err(failed),
        Err(error) => Err(failed(error)),
    }
}
