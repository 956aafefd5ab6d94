//! Channels over QUIC: one connection with one bidirectional stream each.
//!
//! # Threads
//!
//! QUIC is user-space work (encryption, acknowledgements, timers) that goes on while nobody reads or writes. Every
//! connection's share of it runs on a thread of its own, with a single-threaded tokio runtime, so that channels
//! scale over cores:
//!
//! - A dialled channel has its own UDP socket; one thread does all of its work.
//! - A listener has one UDP socket. One thread receives from it and sorts datagrams by connection. On hosts with
//!   cores to spare each accepted connection decrypts, acknowledges and sends on a thread of its own; on small hosts
//!   the receiving thread does that too ([`runtime`]).
//!
//! The caller's reads and writes happen on the caller's thread, straight on quinn's streams: the futures they
//! return are runtime-agnostic, so a thread that blocks just parks ([`park`]). No bytes pass through a queue.

mod channel;
mod config;
mod dial;
mod listener;
mod park;
mod runtime;
mod tls;
mod window;

pub(crate) use dial::QuicDial;
pub(crate) use listener::QuicListener;

use quinn::VarInt;

/// Application error codes that a connection is closed with. They are for people who read packet captures.
mod close_code {
    use super::VarInt;

    /// The channel was closed or hung up.
    pub(super) const CLOSED: VarInt = VarInt::from_u32(0);
    /// The connection did not get in.
    pub(super) const TURNED_AWAY: VarInt = VarInt::from_u32(1);
}
