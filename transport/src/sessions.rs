//! Channels find their session by its token.

use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use godwit_core::{Channel, IncomingData, SessionToken};

use crate::gate::Gate;
use crate::limits::{DATA_WAITING, RETURNS_WAITING};
use crate::queue::{Empty, Queue};

/// One session's side of the gate.
pub(crate) struct Session {
    tokens: Mutex<Tokens>,
    pub(crate) channels: Queue<(u16, Channel)>,
    /// Control channels of this session that are back after its links have broken.
    pub(crate) controls: Queue<Channel>,
}

/// What this session's channels have to show.
#[derive(Default)]
struct Tokens {
    data: Option<SessionToken>,
    control_again: Option<SessionToken>,
}

impl Session {
    pub(crate) fn expects(&self, token: SessionToken) -> bool {
        self.tokens().data == Some(token)
    }

    pub(crate) fn expects_return(&self, token: SessionToken) -> bool {
        self.tokens().control_again == Some(token)
    }

    fn tokens(&self) -> MutexGuard<'_, Tokens> {
        self.tokens.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The channels of one session after its first control channel; made by [`Listener::incoming_data`](crate::Listener::incoming_data).
///
/// Until [`expect`](IncomingData::expect) is called no data channel belongs to it. Dropping it turns away those
/// that were not taken and those that are still to come.
pub struct DataChannels {
    session: Arc<Session>,
}

impl DataChannels {
    pub(crate) fn new(gate: &Gate) -> Self {
        let session = Arc::new(Session {
            tokens: Mutex::default(),
            channels: Queue::new(DATA_WAITING),
            controls: Queue::new(RETURNS_WAITING),
        });
        gate.register(&session);
        Self { session }
    }
}

impl IncomingData for DataChannels {
    fn expect(&mut self, token: SessionToken) {
        self.session.tokens().data = Some(token);
    }

    fn accept(&mut self, limit: Duration) -> io::Result<(u16, Channel)> {
        self.session.channels.pop(limit).map_err(|empty| nothing("data", limit, &empty))
    }

    fn expect_return(&mut self, token: SessionToken) {
        self.session.tokens().control_again = Some(token);
    }

    fn accept_return(&mut self, limit: Duration) -> io::Result<Channel> {
        self.session.controls.pop(limit).map_err(|empty| nothing("control", limit, &empty))
    }
}

fn nothing(kind: &str, limit: Duration, empty: &Empty) -> io::Error {
    match empty {
        Empty::TimedOut => io::Error::new(
            io::ErrorKind::TimedOut,
            format!("no {kind} channel of this session came within {} ms", limit.as_millis()),
        ),
        Empty::Closed => io::Error::new(io::ErrorKind::ConnectionAborted, "the session has ended"),
    }
}

impl Drop for DataChannels {
    fn drop(&mut self) {
        self.session.channels.close();
        self.session.controls.close();
    }
}
