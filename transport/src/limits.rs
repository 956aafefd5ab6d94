//! Every limit of this crate, in one place.

use std::time::Duration;

/// A connection must have shown its whole preamble within this time. Generous for a TLS handshake over a slow
/// link with losses; short enough that silent strangers do not pile up.
pub const PREAMBLE_LIMIT: Duration = Duration::from_secs(5);

/// Connections that may be in the preamble stage at once. When one more arrives, a stream listener turns the
/// oldest away and a QUIC listener the new one.
pub const PREAMBLES_AT_ONCE: usize = 64;

/// Control channels that may wait for [`next_control`](crate::Listener::next_control).
pub const CONTROLS_WAITING: usize = 16;

/// Data channels of one session that may wait for [`accept`](godwit_core::IncomingData::accept).
pub const DATA_WAITING: usize = 256;

/// Control channels that may wait, of one session that is back after its links have broken.
pub const RETURNS_WAITING: usize = 4;

/// How long resolving a host name may take.
pub const RESOLVE_LIMIT: Duration = Duration::from_secs(10);

/// A peer that acknowledges nothing for this long is dead (`TCP_USER_TIMEOUT`, QUIC's idle timeout).
pub const DEAD_PEER_LIMIT: Duration = Duration::from_secs(30);

/// An idle connection is probed this often, so that the two ends and what lies between them know it lives.
pub const KEEP_ALIVE_INTERVAL: Duration = Duration::from_secs(5);

/// How long dropping the writer of a QUIC channel waits for the peer's acknowledgement of its last bytes. (The
/// kernel does that for TCP, even after the process has gone; nobody does it for a user-space transport.)
pub const QUIC_LINGER_LIMIT: Duration = Duration::from_secs(2);
