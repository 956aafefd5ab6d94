//! Channels over stream sockets: TCP and unix.
//!
//! Everything is a plain blocking system call on one descriptor that both halves share; hanging up is
//! `shutdown(2)`, which ends blocked calls in other threads at once.

mod dial;
mod files;
mod listener;
mod tcp;
mod zero_copy;

use std::io::{self, Read};
use std::net::Shutdown;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Weak};

use godwit_core::{Channel, ChannelReader, ChannelWriter, Delivery, HangUp};
use socket2::{Domain, Socket, TcpKeepalive};
use vm_memory::{ReadVolatile, VolatileMemoryError, VolatileSlice};

pub(crate) use dial::{TcpDial, UnixDial};
pub(crate) use listener::{Family, StreamListener};
use zero_copy::ZeroCopy;

use crate::limits::{DEAD_PEER_LIMIT, KEEP_ALIVE_INTERVAL};

/// Bytes that a TCP socket may hold and has not sent yet, apart from those in flight (`TCP_NOTSENT_LOWAT`). What is
/// queued in front of the last pages lengthens the guest's pause, so this is short; writes still come in pieces that
/// keep the link busy.
const TCP_UNSENT_BYTES: u32 = 128 << 10;

/// The send buffer asked for on a unix socket, whose default (208 KiB) costs a context switch for every few pages.
const UNIX_SEND_BUFFER_BYTES: usize = 1 << 20;

/// Pages are read once they are all there, or so much of them: the kernel makes the receive buffer twice as large, if it is smaller.
const MOST_AWAITED_BYTES: usize = 128 << 10;

/// At most this much unread input is thrown away on close.
const DISCARD_LIMIT_BYTES: usize = 1 << 20;

/// Sets what a TCP connection of ours needs.
fn tune_tcp(socket: &Socket) -> io::Result<()> {
    socket.set_tcp_nodelay(true)?;
    socket.set_tcp_user_timeout(Some(DEAD_PEER_LIMIT))?;
    socket.set_tcp_notsent_lowat(TCP_UNSENT_BYTES)?;
    let keepalive = TcpKeepalive::new().with_time(KEEP_ALIVE_INTERVAL).with_interval(KEEP_ALIVE_INTERVAL);
    socket.set_tcp_keepalive(&keepalive)
}

/// Sets what a unix connection of ours needs.
fn tune_unix(socket: &Socket) -> io::Result<()> {
    socket.set_send_buffer_size(UNIX_SEND_BUFFER_BYTES)
}

/// Makes a channel of a connected, blocking socket.
fn channel(socket: Socket, peer: String, zero_copy: bool) -> Channel {
    let zero_copy = zero_copy.then(|| ZeroCopy::new(&socket));
    let passes_files = socket.domain().is_ok_and(|domain| domain == Domain::UNIX);
    let shared = Arc::new(Shared { socket, passes_files, hung_up: AtomicBool::new(false) });
    Channel {
        hang_up: Arc::new(StreamHangUp(Arc::downgrade(&shared))),
        reader: Box::new(StreamReader {
            shared: Arc::clone(&shared),
            incoming: tcp::Incoming::new(),
            files: Vec::new(),
        }),
        writer: Box::new(StreamWriter { shared, bytes_written: 0, zero_copy }),
        peer,
    }
}

/// What the two halves share. The connection closes with the last of them.
struct Shared {
    socket: Socket,
    /// It is a unix socket.
    passes_files: bool,
    hung_up: AtomicBool,
}

impl Shared {
    fn check(&self) -> io::Result<()> {
        if self.hung_up.load(Ordering::Acquire) { Err(hung_up_error()) } else { Ok(()) }
    }

    /// Runs one reading call. Whatever it returns once we have hung up means only that.
    fn read_with(&self, mut call: impl FnMut() -> io::Result<usize>) -> io::Result<usize> {
        self.check()?;
        loop {
            match call() {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                result => return self.check().and(result),
            }
        }
    }
}

impl Drop for Shared {
    fn drop(&mut self) {
        // Closing a socket that holds unread input resets the connection, and the reset can overtake our last
        // words (a refusal, for example). So read what is there.
        if self.hung_up.load(Ordering::Acquire) || self.socket.set_nonblocking(true).is_err() {
            return;
        }
        let mut scratch = [0; 16 << 10];
        let mut discarded = 0;
        while let Ok(read @ 1..) = (&self.socket).read(&mut scratch) {
            discarded += read;
            if discarded >= DISCARD_LIMIT_BYTES {
                break;
            }
        }
    }
}

fn hung_up_error() -> io::Error {
    io::Error::new(io::ErrorKind::ConnectionAborted, "the connection was hung up on this side")
}

struct StreamReader {
    shared: Arc<Shared>,
    incoming: tcp::Incoming,
    /// What has come along and was not taken.
    files: Vec<OwnedFd>,
}

impl ChannelReader for StreamReader {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let Self { shared, incoming, files } = self;
        shared.read_with(|| match shared.passes_files {
            true => files::receive(&shared.socket, buffer, files),
            false => incoming.read(&shared.socket, buffer, 1),
        })
    }

    fn read_volatile(&mut self, buffer: &mut VolatileSlice<'_, ()>) -> io::Result<usize> {
        let Self { shared, incoming, .. } = self;
        shared.read_with(|| match shared.passes_files {
            // `read(2)` straight into guest memory.
            true => shared.socket.as_fd().read_volatile(buffer).map_err(into_io_error),
            // Pages come a run at a time. Woken up for each packet, who reads would go through the scheduler several times for one.
            false => incoming.read_volatile(&shared.socket, buffer, buffer.len().min(MOST_AWAITED_BYTES)),
        })
    }

    fn take_files(&mut self) -> Vec<OwnedFd> {
        std::mem::take(&mut self.files)
    }
}

fn into_io_error(error: VolatileMemoryError) -> io::Error {
    match error {
        VolatileMemoryError::IOError(error) => error,
        other => io::Error::other(other),
    }
}

struct StreamWriter {
    shared: Arc<Shared>,
    bytes_written: u64,
    /// Large writes are not copied.
    zero_copy: Option<ZeroCopy>,
}

impl StreamWriter {
    /// Writes all of `buffer`, by calls that each write some of what is left.
    fn write_by(&mut self, buffer: &[u8], mut call: impl FnMut(&Socket, &[u8]) -> io::Result<usize>) -> io::Result<()> {
        let mut rest = buffer;
        while !rest.is_empty() {
            self.shared.check()?;
            match call(&self.shared.socket, rest) {
                Ok(written) => {
                    self.bytes_written += written as u64;
                    rest = &rest[written..];
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return self.shared.check().and(Err(error)),
            }
        }
        Ok(())
    }

    /// Waits until the kernel reads few enough buffers.
    fn wait_for_room(&self, zero_copy: &mut ZeroCopy) -> io::Result<()> {
        loop {
            self.shared.check()?;
            if zero_copy.make_room(&self.shared.socket)? {
                return Ok(());
            }
            if let Some(error) = self.shared.socket.take_error()? {
                return self.shared.check().and(Err(error));
            }
        }
    }
}

impl ChannelWriter for StreamWriter {
    fn write_all(&mut self, buffer: &[u8]) -> io::Result<()> {
        // A broken connection is an error here, not a SIGPIPE.
        self.write_by(buffer, |socket, rest| socket.send_with_flags(rest, libc::MSG_NOSIGNAL))
    }

    fn write_more(&mut self, buffer: &[u8]) -> io::Result<()> {
        // What fills no packet waits for the next write (tcp(7), TCP_CORK).
        self.write_by(buffer, |socket, rest| socket.send_with_flags(rest, libc::MSG_NOSIGNAL | libc::MSG_MORE))
    }

    fn write_kept(&mut self, buffer: &mut Vec<u8>, length: usize, more: bool) -> io::Result<()> {
        let Some(mut zero_copy) = self.zero_copy.take_if(|zero_copy| zero_copy.pays_for(length)) else {
            return if more { self.write_more(&buffer[..length]) } else { self.write_all(&buffer[..length]) };
        };
        let (first, flags) = (zero_copy.next_call(), libc::MSG_NOSIGNAL | if more { libc::MSG_MORE } else { 0 });
        let written = self.write_by(&buffer[..length], |socket, rest| zero_copy.send(socket, rest, flags));
        zero_copy.keep(buffer, first);
        let result = written.and_then(|()| self.wait_for_room(&mut zero_copy));
        self.zero_copy = Some(zero_copy);
        result
    }

    fn says(&mut self) -> Option<String> {
        self.zero_copy.as_mut().and_then(ZeroCopy::says)
    }

    fn passes_files(&self) -> bool {
        self.shared.passes_files
    }

    fn write_all_with_files(&mut self, buffer: &[u8], files: &[BorrowedFd<'_>]) -> io::Result<()> {
        if !self.shared.passes_files {
            return Err(io::Error::new(io::ErrorKind::Unsupported, "files can be passed on over unix sockets only"));
        }
        let mut files = files;
        self.write_by(buffer, |socket, rest| {
            let written = files::send(socket, rest, files)?;
            // They went with the first byte.
            files = &[];
            Ok(written)
        })
    }

    fn bytes_on_wire(&self) -> u64 {
        self.bytes_written
    }

    fn delivery(&self) -> Option<Delivery> {
        tcp::delivery(&self.shared.socket)
    }

    fn hasten(&mut self) {
        self.zero_copy.iter_mut().for_each(ZeroCopy::stop);
        tcp::leave_bbr(&self.shared.socket);
    }

    fn finish(&mut self) -> io::Result<()> {
        self.shared.check()?;
        self.shared.socket.shutdown(Shutdown::Write)
    }
}

impl Drop for StreamWriter {
    fn drop(&mut self) {
        // Fails only if the connection is broken or finished already.
        let _ = self.shared.socket.shutdown(Shutdown::Write);
        self.zero_copy.iter_mut().for_each(|zero_copy| zero_copy.end(&self.shared.socket));
    }
}

struct StreamHangUp(Weak<Shared>);

impl HangUp for StreamHangUp {
    fn hang_up(&self) {
        if let Some(shared) = self.0.upgrade() {
            shared.hung_up.store(true, Ordering::Release);
            // Fails only if the connection is broken already.
            let _ = shared.socket.shutdown(Shutdown::Both);
        }
    }
}
