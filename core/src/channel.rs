//! The byte streams that a transport provides.
//!
//! A move uses one control channel and any number of data channels. Each is an ordered, reliable, full-duplex
//! byte stream with blocking calls; [`HangUp`] ends a blocked call from another thread.

use std::io;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::time::Duration;

use vm_memory::VolatileSlice;

/// The reading half of a channel.
pub trait ChannelReader: Send {
    /// Reads some bytes; 0 means that the peer has finished writing.
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize>;

    /// Reads some bytes straight into guest memory; 0 means that the peer has finished writing.
    fn read_volatile(&mut self, buffer: &mut VolatileSlice<'_, ()>) -> io::Result<usize>;

    /// The files that have come with what was read so far, in order. Over a unix socket only, and a few at most
    /// ([`crate::memory_files::MAX_FILES`]): what else a peer passes on is closed.
    fn take_files(&mut self) -> Vec<OwnedFd> {
        Vec::new()
    }
}

/// How what is written gets to the peer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Delivery {
    /// How long, in all, what was to be sent has waited for the peer to read. What else a write waits for is the link.
    pub held_up_by_peer: Duration,
    /// What the peer has confirmed of late, in bytes per second, while there was something to send.
    pub bytes_per_s: u64,
}

/// The writing half of a channel.
pub trait ChannelWriter: Send {
    /// Writes all of `buffer`, blocking while the peer is slow.
    fn write_all(&mut self, buffer: &[u8]) -> io::Result<()>;

    /// Writes all of `buffer`, and more is going to be written at once: the end of it may wait for that, and fill a packet with it.
    fn write_more(&mut self, buffer: &[u8]) -> io::Result<()> {
        self.write_all(buffer)
    }

    /// Writes the first `length` bytes of `buffer` as [`ChannelWriter::write_all`] or [`ChannelWriter::write_more`] do. `buffer` may be kept
    /// for as long as they are on their way: then another one of the same length is put in its place, in which there may be anything.
    fn write_kept(&mut self, buffer: &mut Vec<u8>, length: usize, more: bool) -> io::Result<()> {
        match more {
            true => self.write_more(&buffer[..length]),
            false => self.write_all(&buffer[..length]),
        }
    }

    /// What whoever started the move should know of how this channel writes, once.
    fn says(&mut self) -> Option<String> {
        None
    }

    /// Whether files can be passed on with what is written: over a unix socket.
    fn passes_files(&self) -> bool {
        false
    }

    /// Writes all of `buffer`, and passes `files` on with its first byte.
    fn write_all_with_files(&mut self, _buffer: &[u8], _files: &[BorrowedFd<'_>]) -> io::Result<()> {
        Err(io::Error::new(io::ErrorKind::Unsupported, "files can be passed on over unix sockets only"))
    }

    /// Bytes given to the socket so far: for TCP and unix sockets those written, for QUIC the UDP payload
    /// (retransmissions and packet headers included). Never decreases.
    fn bytes_on_wire(&self) -> u64;

    /// How what is written gets to the peer; `None`: not known.
    fn delivery(&self) -> Option<Delivery> {
        None
    }

    /// Says that the guest stands still for what is written from now on: whatever else a connection does from time to time, such as
    /// measuring the link, it leaves until later if it can.
    fn hasten(&mut self) {}

    /// Says that nothing more will be written; what was written is still delivered.
    fn finish(&mut self) -> io::Result<()>;
}

/// Breaks a channel from any thread: blocked and later reads and writes fail.
pub trait HangUp: Send + Sync {
    /// Breaks the channel. May be called several times.
    fn hang_up(&self);
}

/// One connection to a peer, ready for the engine.
pub struct Channel {
    /// What the peer writes.
    pub reader: Box<dyn ChannelReader>,
    /// What the peer reads.
    pub writer: Box<dyn ChannelWriter>,
    /// Ends both halves.
    pub hang_up: Arc<dyn HangUp>,
    /// The peer, for messages: `tcp://10.0.0.2:7000`.
    pub peer: String,
}

/// What ties channels to a session: chosen at random by the destination and told to the source over the control channel.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct SessionToken(pub [u8; 16]);

/// Reaches a destination. Implemented by a transport for the source. Its errors say whom they could not reach, and why.
pub trait Dial: Send + Sync {
    /// Opens the control channel within `limit`.
    fn control(&self, limit: Duration) -> io::Result<Channel>;

    /// Opens a control channel again, within `limit`, for the session that `token` names, whose links have broken. An error of
    /// kind `ConnectionRefused`, `NotFound` or `PermissionDenied` says that whoever held the session is there no more.
    fn control_again(&self, token: SessionToken, limit: Duration) -> io::Result<Channel>;

    /// Opens data channel `index` (from 0) of the session that `token` names, within `limit`.
    fn data(&self, token: SessionToken, index: u16, limit: Duration) -> io::Result<Channel>;

    /// The destination's URI, for messages.
    fn uri(&self) -> String;
}

/// Data channels that arrive for one control channel. Implemented by a transport for the destination.
pub trait IncomingData: Send {
    /// From here on, data channels that show `token`, and no others, belong to this session.
    fn expect(&mut self, token: SessionToken);

    /// The next data channel and its index, or an error of kind `TimedOut` after `limit`.
    fn accept(&mut self, limit: Duration) -> io::Result<(u16, Channel)>;

    /// From here on, a control channel that shows `token` is this session's own, back after its links have broken.
    fn expect_return(&mut self, token: SessionToken);

    /// The next control channel of this session that is back, or an error of kind `TimedOut` after `limit`.
    fn accept_return(&mut self, limit: Duration) -> io::Result<Channel>;
}
