//! The links to the destination: opening them, opening them again, and closing them.

use std::io;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use super::super::data::{CONNECT_LIMIT, dial_all};
use super::{Data, Done, Driver, Event, Input, jobs};
use crate::channel::{Channel, SessionToken};
use crate::link::ControlLink;
use crate::machine::MachineError;
use crate::table::PageHasher;

/// How long opening a channel again may take: short, since it is tried again.
pub(super) const CONNECT_AGAIN_LIMIT: Duration = Duration::from_secs(3);
/// How long the peer may take to close once it has been told that the move is over.
const LAST_WORD_LIMIT: Duration = Duration::from_millis(500);

/// What came of opening data channels.
pub enum Opened {
    /// For the first time.
    First(Result<(Data, Vec<Channel>), MachineError>),
    /// Again, for the same session.
    Again(io::Result<Vec<Channel>>),
}

impl Driver {
    /// Opens the control channel, for a new session or again for the one of the token. On a thread of its own: a peer that does not
    /// answer must not keep the machine's thread from restoring.
    pub(super) fn connect(&mut self, again: Option<SessionToken>) {
        let (dial, links) = (Arc::clone(&self.dial), self.links);
        self.off_thread("connect", move || Event::Connected {
            links,
            channel: match again {
                None => dial.control(CONNECT_LIMIT),
                Some(token) => dial.control_again(token, CONNECT_AGAIN_LIMIT),
            },
        });
    }

    pub(super) fn connected(&mut self, links: u32, channel: io::Result<Channel>) {
        if links != self.links {
            // Too late: dropping the channel closes it.
            return;
        }
        let events = self.sender.clone();
        let hear = move |heard| {
            // Nobody listens any more: the move is over.
            let _ = events.send(Event::Heard { links, heard });
        };
        match channel.and_then(|channel| ControlLink::start(channel, hear)) {
            Ok(link) => {
                self.handle.set_link(link);
                (self.silence_told, self.link_lost) = (false, false);
                self.input(Input::Done(Done::Connected));
            }
            Err(error) => self.input(unreachable(&error)),
        }
    }

    pub(super) fn open_data(&mut self, token: SessionToken, table_seed: u64) {
        let hasher = PageHasher::new(table_seed, self.verify);
        let (machine, flow) = (Arc::clone(&self.machine), Arc::clone(&self.handle.flow));
        let (dial, channels, links) = (Arc::clone(&self.dial), self.channels, self.links);
        let encodings = self.control.encodings();
        self.off_thread("open-data", move || {
            let open = || {
                let data = Data::new(machine, flow, hasher, channels, encodings)?;
                let opened = dial_all(&*dial, token, 0..channels, CONNECT_LIMIT);
                Ok((data, opened.map_err(|error| MachineError::new(error.to_string()))?))
            };
            Event::DataOpened { links, opened: Opened::First(open()) }
        });
    }

    pub(super) fn reopen_data(&mut self, token: SessionToken) {
        let (dial, channels, links) = (Arc::clone(&self.dial), self.channels, self.links);
        self.off_thread("open-data", move || {
            let opened = dial_all(&*dial, token, 0..channels, CONNECT_AGAIN_LIMIT);
            Event::DataOpened { links, opened: Opened::Again(opened) }
        });
    }

    pub(super) fn data_opened(&mut self, links: u32, opened: Opened) {
        // The move may have ended meanwhile, or the links have broken: then the channels are closed, which dropping them does.
        if links != self.links || self.control.is_ending() {
            return;
        }
        let channels = match opened {
            Opened::First(Ok((data, channels))) => {
                self.handle.set_data(Arc::clone(&data.shared));
                self.data = Some(data);
                channels
            }
            Opened::First(Err(why)) => return self.input(Input::Failed(why.to_string())),
            Opened::Again(Ok(channels)) => channels,
            Opened::Again(Err(error)) => return self.input(unreachable(&error)),
        };
        let Some(data) = &mut self.data else { return };
        self.handle.flow.go_on();
        if let Err(error) = data.attach(channels, self.links, &self.sender) {
            return self.input(Input::Failed(format!("no thread could be started for a data channel: {error}")));
        }
        if self.links == 0 {
            self.handle.flow.allow_for(self.control.round_trip());
            let capped = self.handle.flow.bytes_per_s().is_some();
            return self.input(Input::Done(Done::DataOpened { capped }));
        }
        match jobs::harvest(&*self.machine, &data.shared.pages, &data.harvester) {
            Ok(dirtied_pages) => self.input(Input::Done(Done::Reattached { dirtied_pages })),
            Err(error) => self.input(Input::Failed(error.to_string())),
        }
    }

    pub(super) fn off_thread(&mut self, name: &str, work: impl FnOnce() -> Event + Send + 'static) {
        let events = self.sender.clone();
        let spawned = thread::Builder::new().name(name.into()).spawn(move || {
            // Nobody listens any more: the move is over.
            let _ = events.send(work());
        });
        if let Err(error) = spawned {
            self.input(Input::Failed(format!("no thread could be started to connect: {error}")));
        }
    }

    pub(super) fn listen_for_silence(&mut self) {
        let (silence, limit) = (self.handle.link().map(|link| link.silence()), self.control.silence_limit());
        if !self.silence_told && !self.link_lost && silence.is_some_and(|silence| silence > limit) {
            self.silence_told = true;
            self.link_lost = true;
            self.input(Input::LinkLost(format!("nothing was heard from it for {limit:?}")));
        }
    }

    /// Closes what is left of the links; whatever still comes from them is late.
    pub(super) fn leave_links(&mut self) {
        self.links += 1;
        self.link_lost = true;
        self.queue_awaited = false;
        (self.probe, self.round) = (None, None);
        self.hang_up();
        if let Some(link) = self.handle.link() {
            link.hang_up();
        }
    }

    pub(super) fn hang_up(&mut self) {
        self.handle.flow.stop();
        if let Some(data) = &self.data {
            data.hang_up();
        }
        self.pages.hang_up();
    }

    /// Gives the peer a moment to hear the last word and close, before the control link is closed under it.
    pub(super) fn close_link(&mut self) {
        let Some(link) = self.handle.link() else { return };
        let deadline = Instant::now() + LAST_WORD_LIMIT;
        let next = || self.events.recv_timeout(deadline.saturating_duration_since(Instant::now()));
        if !self.link_lost {
            // Whoever asks to cancel now finds the channel closed, which says that the move has ended.
            while next().is_ok_and(|event| !matches!(event, Event::Heard { heard: Err(_), .. })) {}
        }
        link.hang_up();
    }
}

/// What came of an attempt to reach the destination again.
///
/// Where a listener says no to a session, has another certificate than before, or is not there at all on a host that answers, the
/// process that held the session is gone.
pub(super) fn unreachable(error: &io::Error) -> Input {
    use io::ErrorKind::{ConnectionRefused, NotFound, PermissionDenied};
    let gone = matches!(error.kind(), ConnectionRefused | NotFound | PermissionDenied);
    Input::Unreachable { why: error.to_string(), gone }
}
