//! Data channels find their session by its token.

use std::io;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use godwit_core::{Channel, IncomingData, SessionToken};

use crate::gate::Gate;
use crate::limits::DATA_WAITING;
use crate::queue::{Empty, Queue};

/// One session's side of the gate.
pub(crate) struct Session {
    token: Mutex<Option<SessionToken>>,
    pub(crate) channels: Queue<(u16, Channel)>,
}

impl Session {
    pub(crate) fn expects(&self, token: SessionToken) -> bool {
        *self.token.lock().unwrap_or_else(PoisonError::into_inner) == Some(token)
    }
}

/// The data channels of one session; made by [`Listener::incoming_data`](crate::Listener::incoming_data).
///
/// Until [`expect`](IncomingData::expect) is called no data channel belongs to it. Dropping it turns away those
/// that were not taken and those that are still to come.
pub struct DataChannels {
    session: Arc<Session>,
}

impl DataChannels {
    pub(crate) fn new(gate: &Gate) -> Self {
        let session = Arc::new(Session { token: Mutex::new(None), channels: Queue::new(DATA_WAITING) });
        gate.register(&session);
        Self { session }
    }
}

impl IncomingData for DataChannels {
    fn expect(&mut self, token: SessionToken) {
        *self.session.token.lock().unwrap_or_else(PoisonError::into_inner) = Some(token);
    }

    fn accept(&mut self, limit: Duration) -> io::Result<(u16, Channel)> {
        self.session.channels.pop(limit).map_err(|empty| match empty {
            Empty::TimedOut => io::Error::new(
                io::ErrorKind::TimedOut,
                format!("no data channel of this session came within {} ms", limit.as_millis()),
            ),
            Empty::Closed => io::Error::new(io::ErrorKind::ConnectionAborted, "the session has ended"),
        })
    }
}

impl Drop for DataChannels {
    fn drop(&mut self) {
        self.session.channels.close();
    }
}
