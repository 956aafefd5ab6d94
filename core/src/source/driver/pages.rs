//! Post-copy in life: the channels for pages, and those who serve them.

use std::io;
use std::sync::Arc;
use std::thread::JoinHandle;

use super::super::data::dial_all;
use super::super::serving::{self, Serving};
use super::links::{CONNECT_AGAIN_LIMIT, unreachable};
use super::{Data, Done, Driver, Event, Input};
use crate::channel::{Channel, SessionToken};
use crate::message::Message;
use crate::postcopy::{Known, Missing, PageChannel, missing_parts};

/// The channels for pages, and what is known of them.
#[derive(Default)]
pub(super) struct Pages {
    /// Opened, and not served yet.
    open: Option<Vec<Channel>>,
    serving: Option<Serving>,
    /// Whether it is known what the destination lacks.
    missing: Known,
}

impl Pages {
    /// Sends pages that nobody has asked for, too.
    pub(super) fn push(&self) {
        if let Some(serving) = &self.serving {
            serving.push();
        }
    }

    pub(super) fn hang_up(&self) {
        if let Some(serving) = &self.serving {
            serving.hang_up();
        }
        self.open.iter().flatten().for_each(|channel| channel.hang_up.hang_up());
    }

    /// Lets those who serve end. They are to be joined.
    pub(super) fn dismiss(&mut self) -> Vec<JoinHandle<()>> {
        self.open = None;
        self.serving.take().map(Serving::dismiss).unwrap_or_default()
    }
}

impl Driver {
    pub(super) fn open_pages(&mut self, token: SessionToken) {
        let (dial, links) = (Arc::clone(&self.dial), self.links);
        let first = PageChannel::Fault.index(self.channels);
        self.off_thread("open-pages", move || Event::PagesOpened {
            links,
            opened: dial_all(&*dial, token, first..first + PageChannel::COUNT, CONNECT_AGAIN_LIMIT),
        });
    }

    pub(super) fn pages_opened(&mut self, links: u32, opened: io::Result<Vec<Channel>>) {
        // The move may have ended meanwhile, or the links have broken: then the channels are closed, which dropping them does.
        if links != self.links || self.control.is_ending() {
            return;
        }
        match opened {
            Ok(channels) => {
                self.pages.open = Some(channels);
                self.tell_pages_opened();
            }
            Err(error) => self.input(unreachable(&error)),
        }
    }

    fn tell_pages_opened(&mut self) {
        if self.pages.open.is_some() && self.pages.missing == Known::All {
            self.input(Input::Done(Done::PagesOpened));
        }
    }

    /// The destination says what it still lacks: that, and nothing else, is to follow.
    pub(super) fn still_missing(&mut self, part: &Missing) {
        let Some(data) = self.data.as_ref().filter(|_| self.pages.missing != Known::All) else {
            return self.input(Input::Failed("the destination said what it lacks without being asked".into()));
        };
        let pages = &data.shared.pages;
        match self.pages.missing.told(part, pages.view.layout(), &pages.pending) {
            Ok(()) => self.tell_pages_opened(),
            Err(error) => self.input(Input::LinkLost(error.to_string())),
        }
    }

    /// Tells the destination which pages it lacks: all that are pending.
    pub(super) fn send_missing(&mut self) {
        let Some(Data { shared, .. }) = &self.data else { return };
        let pages = Arc::clone(shared);
        serving::leave_out_untouched(&pages.pages);
        let pending = &pages.pages.pending;
        self.handle.flow.missing(pending.count());
        for part in missing_parts(pages.pages.view.layout(), |stripe| pending.get(stripe)) {
            self.send(Message::Missing(part));
        }
    }

    pub(super) fn serve(&mut self) {
        let (Some(channels), Some(data)) = (self.pages.open.take(), &self.data) else { return };
        self.handle.flow.go_on();
        match Serving::start(Arc::clone(&data.shared), channels, self.links, &self.sender) {
            Ok(serving) => self.pages.serving = Some(serving),
            Err(error) => {
                self.input(Input::LinkLost(format!("no thread could be started to send pages: {error}")));
            }
        }
    }

    /// The links broke in post-copy, and are to be made anew.
    pub(super) fn leave_pages(&mut self) {
        self.leave_links();
        self.pages.missing = Known::Nothing;
        let threads = self.pages.dismiss();
        self.off_thread("leave-pages", move || {
            threads.into_iter().for_each(|thread| drop(thread.join()));
            // The data channels' own workers ended before the guest went over.
            Event::Input(Input::Done(Done::BrokenOff(Default::default())))
        });
    }
}
