//! The links to the source: data channels and their workers, breaks, and the source's return.

use std::io;
use std::ops::Range;
use std::sync::Arc;
use std::sync::mpsc::Sender;
use std::thread;
use std::time::{Duration, Instant};

use super::super::populating::Populating;
use super::super::receiving::{DestinationPages, ReceivingChannel};
use super::super::worker::{self, WorkerError};
use super::{Driver, FromLinks, Input};
use crate::channel::{Channel, IncomingData, SessionToken};
use crate::link::{ControlLink, LinkEnd};
use crate::machine::DestinationHost;
use crate::random;

/// How long the source may take to open its data channels once it was told to.
const OPEN_DATA_LIMIT: Duration = Duration::from_secs(10);
/// While data channels are waited for: how often it is looked whether the source has come back instead.
const RETURN_TICK: Duration = Duration::from_millis(100);
/// How long the source may take to close once it has been told that the move is over.
const LAST_WORD_LIMIT: Duration = Duration::from_secs(2);

/// Starts a control link's threads.
pub fn start(channel: Channel, links: u32, inputs: Sender<FromLinks>) -> io::Result<ControlLink> {
    ControlLink::start(channel, move |heard| {
        let input = match heard {
            Ok(message) => Input::Message(message),
            Err(LinkEnd::Broken(why)) => Input::LinkLost(why),
            Err(LinkEnd::Nonsense(why)) => Input::Nonsense(why),
        };
        // Nobody listens any more: the move is over.
        let _ = inputs.send((links, input));
    })
}

/// The data channels of these numbers, in order; an error if the source comes back before they do.
pub fn accept(
    data: &mut dyn IncomingData,
    returned: &mut Option<Channel>,
    channels: Range<u16>,
) -> io::Result<Vec<Channel>> {
    let deadline = Instant::now() + OPEN_DATA_LIMIT;
    let mut open: Vec<Option<Channel>> = channels.clone().map(|_| None).collect();
    while open.iter().any(Option::is_none) {
        let left = deadline.saturating_duration_since(Instant::now());
        let (index, channel) = match data.accept(left.min(RETURN_TICK)) {
            Ok(accepted) => accepted,
            Err(error) if error.kind() == io::ErrorKind::TimedOut && !left.is_zero() => match is_back(data, returned) {
                true => return Err(io::Error::other("the source came back before its data channels did")),
                false => continue,
            },
            Err(error) => return Err(error),
        };
        let place = index.checked_sub(channels.start).and_then(|place| open.get_mut(usize::from(place)));
        match place {
            Some(open @ None) => *open = Some(channel),
            _ => return Err(io::Error::other(format!("data channel {index} was not asked for"))),
        }
    }
    Ok(open.into_iter().flatten().collect())
}

/// Whether a control channel of this session has come back.
fn is_back(data: &mut dyn IncomingData, returned: &mut Option<Channel>) -> bool {
    if returned.is_none() {
        *returned = data.accept_return(Duration::ZERO).ok();
    }
    returned.is_some()
}

impl<H: DestinationHost> Driver<'_, H> {
    pub(super) fn open_data(&mut self, channels: u16) -> io::Result<()> {
        let Some(pages) = self.pages.clone() else { return Ok(()) };
        let opened = self.accept_data(0..channels)?;
        if self.idle.is_empty() {
            let new = (0..channels).map(|index| ReceivingChannel::new(&pages, index.into(), channels.into()));
            self.idle = new.collect::<io::Result<_>>()?;
            self.populating = Some(Populating::start(Arc::clone(&pages))?);
        }
        let idle = std::mem::take(&mut self.idle);
        for (index, (receiving, channel)) in idle.into_iter().zip(opened).enumerate() {
            self.start_worker(Arc::clone(&pages), index, receiving, channel)?;
        }
        Ok(())
    }

    /// The data channels of these numbers, in order.
    pub(super) fn accept_data(&mut self, channels: Range<u16>) -> io::Result<Vec<Channel>> {
        accept(self.data, &mut self.returned, channels)
    }

    fn start_worker(
        &mut self,
        pages: Arc<DestinationPages>,
        index: usize,
        mut receiving: ReceivingChannel,
        channel: Channel,
    ) -> io::Result<()> {
        let (inputs, link, links) = (self.sender.clone(), self.link.clone(), self.links);
        let coming = self.populating.as_ref().map(Populating::coming);
        self.hang_ups.push(Arc::clone(&channel.hang_up));
        let worker = thread::Builder::new().name(format!("data-{index}")).spawn(move || {
            // The writing half stays open until the channel has ended: closing it early could reset the connection.
            let Channel { mut reader, writer: _writer, .. } = channel;
            let input = match worker::run(&pages, &link, index, &mut receiving, &mut *reader, coming.as_ref()) {
                Ok(sum) => Input::ChannelEnded { sum },
                Err(error @ WorkerError::Io(..)) => Input::ChannelLost(error.to_string()),
                Err(error @ WorkerError::Decode(..)) => Input::Nonsense(error.to_string()),
            };
            let _ = inputs.send((links, input));
            receiving
        })?;
        self.workers.push(worker);
        Ok(())
    }

    pub(super) fn listen_for_silence(&mut self) {
        let limit = self.options.silence_limit;
        if !self.link_lost && self.link.silence() > limit {
            self.link_lost = true;
            self.control.handle(Input::LinkLost(format!("nothing was heard from it for {limit:?}")));
        }
    }

    /// Whether a control channel of this session has come back.
    fn is_back(&mut self) -> bool {
        is_back(self.data, &mut self.returned)
    }

    pub(super) fn look_for_return(&mut self) {
        if self.last_word_until.is_some_and(|until| Instant::now() >= until) {
            self.last_word_until = None;
            self.link.hang_up();
        }
        if self.is_back() {
            self.away_until = None;
            match random::secret() {
                Ok(token) => self.control.handle(Input::Returned { token: SessionToken(token) }),
                Err(error) => self.control.handle(Input::Nonsense(format!("no random number can be had: {error}"))),
            }
        } else if self.away_until.is_some_and(|until| Instant::now() >= until) {
            self.away_until = None;
            self.control.handle(Input::NotReturned);
        }
    }

    /// Closes the data channels and keeps what has arrived. The control link stays for a moment: a source that has ended the move closes
    /// its data channels, too, and says so.
    pub(super) fn detach(&mut self) {
        match self.link_lost {
            true => self.link.hang_up(),
            false => self.last_word_until = Some(Instant::now() + LAST_WORD_LIMIT),
        }
        self.hang_up_data();
        self.stop_filling();
        let Some(pages) = self.pages.clone() else { return };
        if !self.workers.is_empty() {
            self.idle = self.workers.drain(..).filter_map(|worker| worker.join().ok()).collect();
        }
        self.idle.iter_mut().for_each(|channel| channel.reattach(&pages));
    }

    /// Takes up the control channel that came back.
    pub(super) fn attach(&mut self) -> io::Result<()> {
        self.link.hang_up();
        self.last_word_until = None;
        self.links += 1;
        let Some(channel) = self.returned.take() else { return Ok(()) };
        self.link = start(channel, self.links, self.sender.clone())?;
        (self.link_lost, self.lost) = (false, None);
        Ok(())
    }

    pub(super) fn hang_up(&mut self) {
        self.link.finish();
        self.join();
        // The peer is given a moment to hear why and close, before the link is closed under it.
        let deadline = Instant::now() + LAST_WORD_LIMIT;
        let next = || self.inputs.recv_timeout(deadline.saturating_duration_since(Instant::now()));
        if !self.link_lost {
            while next().is_ok_and(|(_, input)| !matches!(input, Input::LinkLost(_) | Input::Nonsense(_))) {}
        }
        self.link.hang_up();
    }

    /// Ends the data channels that have not ended.
    pub(super) fn hang_up_data(&mut self) {
        self.hang_ups.drain(..).for_each(|hang_up| hang_up.hang_up());
    }

    /// Nothing is applied any more once this returns.
    fn join(&mut self) {
        self.hang_up_data();
        self.workers.drain(..).for_each(|worker| drop(worker.join()));
    }
}
