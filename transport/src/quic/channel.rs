//! Blocking halves over a QUIC stream.

use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock, Weak};
use std::thread;
use std::time::{Duration, Instant};

use godwit_core::{Channel, ChannelReader, ChannelWriter, HangUp};
use quinn::{Connection, ConnectionError, ReadError, RecvStream, SendStream, VarInt, WriteError};
use vm_memory::VolatileSlice;
use vm_memory::bytes::Bytes as _;

use super::close_code;
use super::park::{block_on, block_until};
use super::window::{Flow, LARGEST_BYTES, LEAST_AHEAD_BYTES, LEAST_UNACKNOWLEDGED_BYTES};
use crate::limits::QUIC_LINGER_LIMIT;

/// Packets' worth of bytes that a read takes from quinn at once: it holds the connection's lock meanwhile, which its
/// driver needs, so few calls are better and copying under the lock is worse.
const CHUNKS_AT_ONCE: usize = 64;

/// How long a closing thread waits until the peer was sent word of it.
const FAREWELL_LIMIT: Duration = Duration::from_millis(20);

/// Makes a channel of an established connection and its only stream.
pub(super) fn channel(connection: Connection, send: SendStream, receive: RecvStream, peer: String) -> Channel {
    let link = Arc::new(Link::new(connection));
    Channel {
        hang_up: Arc::new(QuicHangUp(Arc::downgrade(&link))),
        reader: Box::new(QuicReader::new(receive, Arc::clone(&link))),
        writer: Box::new(QuicWriter { stream: send, link, flow: Flow::new(Instant::now()) }),
        peer,
    }
}

/// What the two halves share. The connection closes with the last of them.
struct Link {
    connection: Connection,
    hung_up: AtomicBool,
    /// Set by the first close: how many datagrams had been sent, if the connection was alive until then.
    closed_after: OnceLock<Option<u64>>,
}

impl Link {
    fn new(connection: Connection) -> Self {
        Self { connection, hung_up: AtomicBool::new(false), closed_after: OnceLock::new() }
    }

    fn check(&self) -> io::Result<()> {
        if self.hung_up.load(Ordering::Acquire) { Err(hung_up_error()) } else { Ok(()) }
    }

    fn datagrams_sent(&self) -> u64 {
        self.connection.stats().udp_tx.datagrams
    }

    fn close(&self) -> Option<u64> {
        *self.closed_after.get_or_init(|| {
            let sent = self.connection.close_reason().is_none().then(|| self.datagrams_sent());
            self.connection.close(close_code::CLOSED, b"");
            sent
        })
    }
}

impl Drop for Link {
    fn drop(&mut self) {
        let Some(sent_before) = self.close() else { return };
        // The connection's driver sends the close, on its thread. If the process ended before that, the peer would
        // have to wait for its idle timeout to learn that we are gone.
        let deadline = Instant::now() + FAREWELL_LIMIT;
        while self.datagrams_sent() == sent_before && Instant::now() < deadline {
            thread::sleep(Duration::from_micros(50));
        }
    }
}

fn hung_up_error() -> io::Error {
    io::Error::new(io::ErrorKind::ConnectionAborted, "the connection was hung up on this side")
}

fn lost(error: ConnectionError) -> io::Error {
    match error {
        ConnectionError::LocallyClosed => hung_up_error(),
        ConnectionError::ApplicationClosed(_) | ConnectionError::ConnectionClosed(_) | ConnectionError::Reset => {
            io::Error::new(io::ErrorKind::ConnectionReset, "the peer closed the connection")
        }
        ConnectionError::TimedOut => io::Error::new(io::ErrorKind::TimedOut, "the peer does not answer any more"),
        other => io::Error::new(io::ErrorKind::ConnectionAborted, other),
    }
}

struct QuicReader {
    stream: RecvStream,
    link: Arc<Link>,
    /// Received and not yet read: those of `chunks` from `next` on that are not empty.
    chunks: [bytes::Bytes; CHUNKS_AT_ONCE],
    next: usize,
    flow: Flow,
    /// What the peer may send ahead.
    window: u64,
}

impl QuicReader {
    fn new(stream: RecvStream, link: Arc<Link>) -> Self {
        let flow = Flow::new(Instant::now());
        let chunks = [const { bytes::Bytes::new() }; CHUNKS_AT_ONCE];
        Self { stream, link, chunks, next: CHUNKS_AT_ONCE, flow, window: LEAST_AHEAD_BYTES }
    }

    /// Hands out up to `capacity` bytes, chunk by chunk, to `take`, which is told where they go.
    fn read_with(
        &mut self,
        capacity: usize,
        mut take: impl FnMut(usize, &[u8]) -> io::Result<()>,
    ) -> io::Result<usize> {
        self.link.check()?;
        if capacity == 0 || (self.is_empty() && !self.fill()?) {
            return Ok(0);
        }
        let mut done = 0;
        while done < capacity && !self.is_empty() {
            let chunk = &mut self.chunks[self.next];
            let part = chunk.split_to(chunk.len().min(capacity - done));
            if chunk.is_empty() {
                // Frees the packet's buffer.
                *chunk = bytes::Bytes::new();
                self.next += 1;
            }
            take(done, &part)?;
            done += part.len();
        }
        self.tune(done);
        Ok(done)
    }

    /// Opens the receive window as [`window`](super::window) says. Credit once given cannot be taken back.
    fn tune(&mut self, read: usize) {
        let link = &self.link;
        if let Some(bytes) = self.flow.moved(read, Instant::now(), || link.connection.stats().path.min_rtt) {
            let bytes = (bytes + LEAST_AHEAD_BYTES).min(LARGEST_BYTES);
            if bytes > self.window {
                self.window = bytes;
                link.connection.set_receive_window(VarInt::from_u64(bytes).unwrap_or(VarInt::MAX));
            }
        }
    }

    fn is_empty(&self) -> bool {
        self.chunks.get(self.next).is_none_or(|chunk| chunk.is_empty())
    }

    /// Waits for bytes; `false` means that the peer has finished.
    fn fill(&mut self) -> io::Result<bool> {
        match block_on(self.stream.read_chunks(&mut self.chunks)) {
            Ok(Some(_)) => {
                self.next = 0;
                Ok(true)
            }
            Ok(None) => Ok(false),
            Err(ReadError::ConnectionLost(error)) => Err(self.link.check().err().unwrap_or_else(|| lost(error))),
            Err(error) => Err(io::Error::new(io::ErrorKind::ConnectionReset, error)),
        }
    }
}

impl ChannelReader for QuicReader {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.read_with(buffer.len(), |at, part| {
            buffer[at..at + part.len()].copy_from_slice(part);
            Ok(())
        })
    }

    fn read_volatile(&mut self, buffer: &mut VolatileSlice<'_, ()>) -> io::Result<usize> {
        self.read_with(buffer.len(), |at, part| buffer.write_slice(part, at).map_err(io::Error::other))
    }
}

struct QuicWriter {
    stream: SendStream,
    link: Arc<Link>,
    flow: Flow,
}

impl QuicWriter {
    /// Keeps the send window as [`window`](super::window) says, within what the network takes.
    fn tune(&mut self, written: usize) {
        let link = &self.link;
        if let Some(bytes) = self.flow.moved(written, Instant::now(), || link.connection.rtt()) {
            let bytes = bytes.min(link.connection.stats().path.cwnd) + LEAST_UNACKNOWLEDGED_BYTES;
            link.connection.set_send_window(bytes.min(LARGEST_BYTES));
        }
    }
}

impl ChannelWriter for QuicWriter {
    fn write_all(&mut self, buffer: &[u8]) -> io::Result<()> {
        let mut rest = buffer;
        while !rest.is_empty() {
            self.link.check()?;
            let written = block_on(self.stream.write(rest)).map_err(|error| match error {
                WriteError::ConnectionLost(error) => self.link.check().err().unwrap_or_else(|| lost(error)),
                WriteError::Stopped(_) => {
                    io::Error::new(io::ErrorKind::BrokenPipe, "the peer does not read this channel any more")
                }
                error => io::Error::new(io::ErrorKind::BrokenPipe, error),
            })?;
            self.tune(written);
            rest = &rest[written..];
        }
        Ok(())
    }

    fn bytes_on_wire(&self) -> u64 {
        self.link.connection.stats().udp_tx.bytes
    }

    fn finish(&mut self) -> io::Result<()> {
        self.link.check()?;
        self.stream.finish().map_err(|error| io::Error::new(io::ErrorKind::BrokenPipe, error))
    }
}

impl Drop for QuicWriter {
    fn drop(&mut self) {
        // Fails if it is finished already; and if the connection is lost, which ends the wait as well.
        let _ = self.stream.finish();
        if block_until(self.stream.stopped(), Instant::now() + QUIC_LINGER_LIMIT).is_none() {
            tracing::warn!(
                peer = %self.link.connection.remote_address(),
                "the peer did not acknowledge the last bytes within {QUIC_LINGER_LIMIT:?}"
            );
        }
    }
}

struct QuicHangUp(Weak<Link>);

impl HangUp for QuicHangUp {
    fn hang_up(&self) {
        if let Some(link) = self.0.upgrade() {
            link.hung_up.store(true, Ordering::Release);
            link.close();
        }
    }
}
