//! One end of a control link: messages as bytes, silence, pings.

use std::io::ErrorKind;
use std::time::Duration;

use godwit_core::message::{Message, MessageError};

use crate::network::ConnectionId;

/// How often an end says that it is still here.
pub const PING_INTERVAL: Duration = Duration::from_secs(1);

/// An end of a control link.
pub struct LinkEnd {
    /// The connection.
    pub id: ConnectionId,
    /// Which side of it.
    pub side: usize,
    /// When something last arrived.
    pub heard_at: Duration,
    /// Its end has been told of.
    pub lost: bool,
}

impl LinkEnd {
    /// An end that opens now.
    pub fn new(id: ConnectionId, side: usize, now: Duration) -> Self {
        Self { id, side, heard_at: now, lost: false }
    }

    /// Whether nothing was heard for so long, and that is news.
    pub fn has_fallen_silent(&mut self, now: Duration, limit: Duration) -> bool {
        let silent = !self.lost && now.saturating_sub(self.heard_at) > limit;
        self.lost |= silent;
        silent
    }
}

/// The next whole message among the bytes that have arrived; they are then taken.
pub fn next_message(arrived: &mut Vec<u8>) -> Option<Result<Message, String>> {
    let mut rest = &arrived[..];
    let result = match Message::read(&mut rest) {
        Ok(message) => Ok(message),
        Err(MessageError::Io(error)) if error.kind() == ErrorKind::UnexpectedEof => return None,
        Err(error) => Err(error.to_string()),
    };
    let used = arrived.len() - rest.len();
    arrived.drain(..used);
    Some(result)
}
