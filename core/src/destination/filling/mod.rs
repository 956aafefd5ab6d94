//! A machine that runs here while pages of its memory are still to come (post-copy), in life.

pub mod arrived;
pub mod control;
mod service;

use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender};
use std::time::{Duration, Instant};
use std::{fmt, io};

use self::control::{Action, FillingControl};
pub(super) use self::service::Service;
use super::control::Input;
use super::driver::{FromLinks, accept, start_link};
use crate::channel::{Channel, IncomingData, SessionToken};
use crate::link::ControlLink;
use crate::message::{Filled, Message};
use crate::ownership::Holding;
use crate::phase::Phase;
use crate::postcopy::PageChannel;
use crate::progress::{Event, Observer};
use crate::random;

/// How often silence is looked at, and whether a source that is away has come back.
const TICK: Duration = Duration::from_millis(20);

/// What is left to be done for a machine that is this end's and whose memory is not complete. Pages come in from the moment it exists;
/// [`Filling::run`] sees to the links. Dropped before it is complete, it leaves the machine without the rest of its memory: whoever needs that
/// waits for ever.
pub struct Filling {
    links: Links,
    control: FillingControl,
    complete: bool,
    began: Instant,
}

impl fmt::Debug for Filling {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} pages to come from {}", self.missing_pages(), self.links.peer)
    }
}

/// What there was when the machine became this end's.
pub(super) struct Links {
    pub(super) service: Arc<Service>,
    pub(super) link: ControlLink,
    pub(super) number: u32,
    /// Why they broke, if they did.
    pub(super) lost: Option<String>,
    pub(super) returned: Option<Channel>,
    pub(super) sender: Sender<FromLinks>,
    pub(super) inputs: Receiver<FromLinks>,
    pub(super) first_channel: u16,
    pub(super) peer: String,
    pub(super) observer: Arc<dyn Observer>,
    pub(super) silence_limit: Duration,
    pub(super) holding: Option<Arc<Holding>>,
}

impl Filling {
    pub(super) fn new(links: Links) -> Self {
        Self { control: FillingControl::new(links.peer.clone()), links, complete: false, began: Instant::now() }
    }

    /// Pages that are still missing.
    pub fn missing_pages(&self) -> u64 {
        self.links.service.wanted().left()
    }

    /// Blocks until all of memory is there and the source has heard so: takes the source up again whenever its links break. The observer that
    /// [`super::receive`] was given hears of [`Phase::PostCopyPaused`], [`Phase::PostCopy`] and, as soon as nothing is missing,
    /// [`Phase::Completed`].
    pub fn run(mut self, data: &mut dyn IncomingData) -> Filled {
        if self.links.service.wanted().left() == 0 {
            self.filled(data);
        }
        if let Some(why) = self.links.lost.take() {
            self.handle(data, control::Input::Lost(why));
        }
        let mut over = false;
        while !over {
            match self.links.inputs.recv_timeout(TICK) {
                Ok((number, input)) => over = self.heard(data, number, input),
                Err(RecvTimeoutError::Timeout | RecvTimeoutError::Disconnected) => {}
            }
            over |= self.look_around(data);
        }
        let filled = self.links.service.filled();
        self.links.service.stop();
        self.links.link.finish();
        self.links.link.hang_up();
        filled
    }

    /// True: nothing is left to be done.
    fn heard(&mut self, data: &mut dyn IncomingData, number: u32, input: Input) -> bool {
        let here = number == self.links.number;
        match input {
            // Whatever link the last page came over.
            Input::Filled => self.filled(data),
            Input::LinkLost(why) | Input::ChannelLost(why) | Input::Nonsense(why) if here => {
                self.handle(data, control::Input::Lost(why))
            }
            Input::Message(Message::Farewell(())) => self.handle(data, control::Input::Farewell),
            Input::Message(Message::Abort(why)) if here => {
                self.handle(data, control::Input::Lost(format!("it has given up: {why}")))
            }
            _ => false,
        }
    }

    fn look_around(&mut self, data: &mut dyn IncomingData) -> bool {
        let Links { link, silence_limit, returned, .. } = &mut self.links;
        let silent = link.silence() > *silence_limit;
        if returned.is_none() {
            *returned = data.accept_return(Duration::ZERO).ok();
        }
        if returned.is_some() {
            let input = match random::secret() {
                Ok(token) => control::Input::Returned { token: SessionToken(token) },
                Err(error) => control::Input::Lost(format!("no random number can be had: {error}")),
            };
            return self.handle(data, input);
        }
        if silent {
            let why = format!("nothing was heard from it for {:?}", self.links.silence_limit);
            self.handle(data, control::Input::Lost(why));
        }
        self.handle(data, control::Input::Tick)
    }

    fn filled(&mut self, data: &mut dyn IncomingData) -> bool {
        let filled = self.links.service.filled();
        self.handle(data, control::Input::Filled(filled))
    }

    /// True: nothing is left to be done.
    fn handle(&mut self, data: &mut dyn IncomingData, input: control::Input) -> bool {
        let mut inputs = vec![input];
        while let Some(input) = inputs.pop() {
            for action in self.control.handle(self.began.elapsed(), input) {
                match self.execute(data, action) {
                    Ok(Done::Nothing) => {}
                    Ok(Done::Opened) => inputs.push(control::Input::Opened),
                    Ok(Done::End) => return true,
                    Err(error) => inputs.push(control::Input::Lost(error.to_string())),
                }
            }
        }
        false
    }

    /// What becomes of the links once all is there is no news.
    fn enter(&self, phase: Phase) {
        if !self.complete {
            self.links.observer.event(Event::Phase { phase });
        }
    }

    fn execute(&mut self, data: &mut dyn IncomingData, action: Action) -> io::Result<Done> {
        let links = &mut self.links;
        match action {
            Action::Say(text) => {
                tracing::warn!("{text}");
                links.observer.event(Event::Decision { text });
            }
            Action::Detach => {
                self.enter(Phase::PostCopyPaused);
                self.links.link.hang_up();
                self.links.service.detach();
            }
            Action::Attach => {
                links.link.hang_up();
                links.number += 1;
                if let Some(channel) = links.returned.take() {
                    links.link = start_link(channel, links.number, links.sender.clone())?;
                }
            }
            Action::Send(message) => {
                if let Message::Attached(token) = &message {
                    // Before it is told: its channels may be quick.
                    data.expect(*token);
                }
                // A failure to send is left to the reading side to report.
                if let Err(error) = links.link.send(&message) {
                    tracing::debug!("cannot send {}: {error}", message.name());
                }
            }
            Action::SendMissing => {
                for part in links.service.wanted().parts(links.service.layout()) {
                    links.link.send(&Message::Missing(part))?;
                }
            }
            Action::OpenPages => {
                let first = links.first_channel;
                let channels = accept(data, &mut links.returned, first..first + PageChannel::COUNT)?;
                links.service.attach(channels, links.number)?;
                self.enter(Phase::PostCopy);
                return Ok(Done::Opened);
            }
            Action::Complete(filled) => {
                links.service.complete();
                if let Some(holding) = &links.holding {
                    holding.mark_complete();
                }
                tracing::info!("all of the guest's memory is here: {filled:?}");
                self.enter(Phase::Completed);
                self.complete = true;
            }
            Action::End => return Ok(Done::End),
        }
        Ok(Done::Nothing)
    }
}

enum Done {
    Nothing,
    Opened,
    End,
}
