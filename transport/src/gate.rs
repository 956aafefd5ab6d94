//! Who gets in: what every listener does with a preamble, whatever bytes carried it.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError, Weak};

use godwit_core::Channel;

use crate::limits::CONTROLS_WAITING;
use crate::preamble::{MAJOR, MINOR, Preamble, PreambleError, Refusal};
use crate::queue::Queue;
use crate::sessions::Session;

/// What the accepting threads share with the [`Listener`](crate::Listener).
pub(crate) struct Gate {
    /// Control channels that nobody has taken yet.
    pub(crate) controls: Queue<Channel>,
    sessions: Mutex<Vec<Weak<Session>>>,
    turned_away: AtomicU64,
    closed: AtomicBool,
}

/// Where an accepted connection belongs.
pub(crate) enum Place {
    Control,
    ControlAgain { session: Arc<Session> },
    Data { session: Arc<Session>, index: u16 },
}

impl Gate {
    pub(crate) fn new() -> Self {
        Self {
            controls: Queue::new(CONTROLS_WAITING),
            sessions: Mutex::default(),
            turned_away: AtomicU64::new(0),
            closed: AtomicBool::new(false),
        }
    }

    /// Decides on a decoded preamble. The caller tells the peer, and then [`deliver`](Self::deliver)s the channel.
    pub(crate) fn admit(&self, preamble: &Preamble) -> Result<Place, Refusal> {
        if self.is_closed() {
            return Err(Refusal::Closing);
        }
        match *preamble {
            Preamble::Control if self.controls.is_full() => Err(Refusal::Busy),
            Preamble::Control => Ok(Place::Control),
            Preamble::ControlAgain { token } => {
                let session = self.session(|session| session.expects_return(token)).ok_or(Refusal::UnknownSession)?;
                if session.controls.is_full() {
                    return Err(Refusal::Busy);
                }
                Ok(Place::ControlAgain { session })
            }
            Preamble::Data { token, index } => {
                let session = self.session(|session| session.expects(token)).ok_or(Refusal::UnknownSession)?;
                if session.channels.is_full() {
                    return Err(Refusal::Busy);
                }
                Ok(Place::Data { session, index })
            }
        }
    }

    /// Hands a channel, whose peer has been told that it is accepted, to whoever waits for it.
    pub(crate) fn deliver(&self, place: Place, channel: Channel) {
        let left_over = match place {
            Place::Control => self.controls.push(channel).err(),
            Place::ControlAgain { session } => session.controls.push(channel).err(),
            Place::Data { session, index } => session.channels.push((index, channel)).err().map(|(_, channel)| channel),
        };
        if let Some(channel) = left_over {
            // The session ended, or others filled the queue, since `admit`.
            self.turn_away(&channel.peer, "nobody waits for it any more");
            channel.hang_up.hang_up();
        }
    }

    /// Counts and logs a connection that does not get in.
    pub(crate) fn turn_away(&self, peer: &str, reason: impl std::fmt::Display) {
        self.turned_away.fetch_add(1, Ordering::Relaxed);
        tracing::warn!(peer, "turned a connection away: {reason}");
    }

    pub(crate) fn turned_away(&self) -> u64 {
        self.turned_away.load(Ordering::Relaxed)
    }

    pub(crate) fn register(&self, session: &Arc<Session>) {
        let mut sessions = self.sessions.lock().unwrap_or_else(PoisonError::into_inner);
        sessions.retain(|session| session.strong_count() > 0);
        sessions.push(Arc::downgrade(session));
    }

    fn session(&self, wanted: impl Fn(&Session) -> bool) -> Option<Arc<Session>> {
        let sessions = self.sessions.lock().unwrap_or_else(PoisonError::into_inner);
        sessions.iter().filter_map(Weak::upgrade).find(|session| wanted(session))
    }

    pub(crate) fn close(&self) {
        self.closed.store(true, Ordering::Release);
        self.controls.close();
    }

    pub(crate) fn is_closed(&self) -> bool {
        self.closed.load(Ordering::Acquire)
    }
}

/// What to answer a peer whose preamble is no good; `None` if it would not understand an answer.
pub(crate) fn refusal_of(error: &PreambleError) -> Option<Refusal> {
    match error {
        PreambleError::Truncated { .. } | PreambleError::NotOurs(_) => None,
        PreambleError::Version { .. } => Some(Refusal::Version { major: MAJOR, minor: MINOR }),
        PreambleError::Field { .. } => Some(Refusal::Malformed),
    }
}
