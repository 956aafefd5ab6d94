//! The unix socket's place in the file system.

use std::fs::{self, DirBuilder, File, Permissions};
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{DirBuilderExt, FileTypeExt, MetadataExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

use rustix::net::sockopt::socket_peercred;
use socket2::{Domain, SockAddr, Socket, Type};

const BACKLOG: i32 = 16;

/// Why a control socket cannot be opened.
#[derive(Debug, thiserror::Error)]
pub enum SocketError {
    /// Another process answers there; which.
    #[error("{1} listens at the control socket {0}; choose another with --name or --control")]
    Live(PathBuf, String),
    /// Something that is not a socket is in the way.
    #[error("{0} exists and is not a socket; choose another path with --control")]
    NotASocket(PathBuf),
    /// The directory could not be made.
    #[error("cannot make the directory {0} for the control socket: {1}")]
    Directory(PathBuf, #[source] io::Error),
    /// Anything else.
    #[error("cannot open the control socket {0}: {1}")]
    Bind(PathBuf, #[source] io::Error),
}

/// A listening socket, whose file is removed when this is dropped.
#[derive(Debug)]
pub struct ControlSocket {
    pub(super) listener: UnixListener,
    path: PathBuf,
    /// Tells our file from one that took its place.
    inode: u64,
}

impl ControlSocket {
    /// Listens at `path`: makes the directory (mode 0700) if it is missing, replaces the socket of a process that
    /// has died, and lets nobody but this user connect (mode 0600).
    pub fn bind(path: &Path) -> Result<Self, SocketError> {
        make_directory(path)?;
        clear_the_way(path)?;
        let failed = |error| SocketError::Bind(path.to_owned(), error);
        let listener = listen(path).map_err(failed)?;
        let inode = fs::symlink_metadata(path).map_err(failed)?.ino();
        Ok(ControlSocket { listener, path: path.to_owned(), inode })
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }
}

impl Drop for ControlSocket {
    fn drop(&mut self) {
        if fs::symlink_metadata(&self.path).is_ok_and(|metadata| metadata.ino() == self.inode) {
            let _ = fs::remove_file(&self.path);
        }
    }
}

fn make_directory(path: &Path) -> Result<(), SocketError> {
    match path.parent() {
        Some(directory) if !directory.as_os_str().is_empty() && !directory.exists() => DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(directory)
            .map_err(|error| SocketError::Directory(directory.to_owned(), error)),
        _ => Ok(()),
    }
}

fn clear_the_way(path: &Path) -> Result<(), SocketError> {
    let failed = |error| SocketError::Bind(path.to_owned(), error);
    match fs::symlink_metadata(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(failed(error)),
        Ok(metadata) if !metadata.file_type().is_socket() => return Err(SocketError::NotASocket(path.to_owned())),
        Ok(_) => {}
    }
    match UnixStream::connect(path) {
        Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => fs::remove_file(path).map_err(failed),
        Err(_) => Err(SocketError::Live(path.to_owned(), "another process".into())),
        Ok(stream) => Err(SocketError::Live(path.to_owned(), listener_of(&stream))),
    }
}

/// Which process listens at the other end.
fn listener_of(stream: &UnixStream) -> String {
    let Ok(peer) = socket_peercred(stream) else { return "another process".into() };
    let pid = peer.pid.as_raw_nonzero();
    match fs::read_to_string(format!("/proc/{pid}/comm")) {
        Ok(program) => format!("process {pid} ({})", program.trim_end()),
        Err(_) => format!("process {pid}"),
    }
}

fn listen(path: &Path) -> io::Result<UnixListener> {
    let socket = Socket::new(Domain::UNIX, Type::STREAM, None)?;
    // The file gets the mode that the socket has when it is bound: no moment in which others may connect.
    let file = File::from(OwnedFd::from(socket));
    file.set_permissions(Permissions::from_mode(0o600))?;
    let socket = Socket::from(OwnedFd::from(file));
    socket.bind(&SockAddr::unix(path)?)?;
    socket.listen(BACKLOG)?;
    Ok(OwnedFd::from(socket).into())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mode(path: &Path) -> u32 {
        fs::metadata(path).unwrap().permissions().mode() & 0o777
    }

    #[test]
    fn only_the_user_may_connect_and_the_directory_is_made() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("run/vm.sock");
        let socket = ControlSocket::bind(&path).unwrap();
        assert_eq!((mode(&path), mode(path.parent().unwrap())), (0o600, 0o700));
        drop(socket);
        assert!(!path.exists());
    }

    #[test]
    fn a_stale_socket_is_replaced_and_a_live_one_is_not() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("vm.sock");
        drop(UnixListener::bind(&path).unwrap());
        let live = ControlSocket::bind(&path).unwrap();
        let refused = ControlSocket::bind(&path).unwrap_err();
        assert!(matches!(refused, SocketError::Live(..)));
        let (text, me) = (refused.to_string(), format!("process {} (", std::process::id()));
        assert!(text.starts_with(&me) && text.contains("vm.sock"), "{text}");
        assert!(UnixStream::connect(live.path()).is_ok());
    }

    #[test]
    fn a_file_in_the_way_is_left_alone() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("notes.txt");
        fs::write(&path, "mine").unwrap();
        assert!(matches!(ControlSocket::bind(&path), Err(SocketError::NotASocket(_))));
        assert_eq!(fs::read(&path).unwrap(), b"mine");
    }

    #[test]
    fn a_path_that_is_too_long_is_an_error() {
        let path = PathBuf::from(format!("/tmp/{}", "x".repeat(200)));
        assert!(matches!(ControlSocket::bind(&path), Err(SocketError::Bind(..))));
    }
}
