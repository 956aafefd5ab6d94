//! Sockets that live in a network namespace: they stay in the one where they were made, whoever uses them.

use std::net::{SocketAddr, TcpStream};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, anyhow};
use nix::sched::{CloneFlags, setns};

use crate::netns::Namespace;

/// How long a connection may take to be made.
pub const CONNECT_LIMIT: Duration = Duration::from_secs(20);

/// Does `work` on a thread inside `namespace`.
pub fn inside<T: Send>(namespace: &Namespace, work: impl FnOnce() -> Result<T> + Send) -> Result<T> {
    let namespace = namespace.open()?;
    let entered = move || {
        setns(&namespace, CloneFlags::CLONE_NEWNET).context("cannot enter the namespace")?;
        work()
    };
    thread::scope(|scope| scope.spawn(entered).join()).map_err(|_| anyhow!("a thread in a namespace panicked"))?
}

/// A TCP connection from `namespace` whose small messages leave at once and whose reads and writes end after
/// `io_limit`.
pub fn connect(namespace: &Namespace, address: SocketAddr, io_limit: Duration) -> Result<TcpStream> {
    inside(namespace, || {
        let stream = TcpStream::connect_timeout(&address, CONNECT_LIMIT)
            .with_context(|| format!("cannot connect to {address}"))?;
        stream.set_nodelay(true)?;
        stream.set_read_timeout(Some(io_limit))?;
        stream.set_write_timeout(Some(io_limit))?;
        Ok(stream)
    })
}
