//! The receiving end in post-copy: the machine is its own and runs, and pages of its memory are still to come.

pub mod service;

use std::collections::VecDeque;
use std::time::Duration;

use godwit_core::SessionToken;
use godwit_core::destination::filling::control::{Action, FillingControl, Input};
use godwit_core::message::Message;
use godwit_core::ownership::modelled::Call;
use godwit_core::ownership::store::MarkAnswer;
use godwit_core::ownership::{Marker, RETRY_GAP};

use self::service::{Service, Told};
use crate::event::{Dial, Event, Reached, Wake};
use crate::link::{LinkEnd, PING_INTERVAL};
use crate::network::ConnectionId;
use crate::process::{Role, TICK};
use crate::world::World;

/// How long the source may take to open its channels for pages.
pub const OPEN_PAGES_LIMIT: Duration = Duration::from_secs(10);

/// The receiving end of a move whose guest runs here already.
pub struct FillingEnd {
    control: FillingControl,
    /// Those who fill memory.
    pub service: Service,
    /// The control link.
    pub link: LinkEnd,
    /// What control channels that come back show.
    pub session: SessionToken,
    /// What channels for pages show.
    expected: Option<SessionToken>,
    links: u32,
    inputs: VecDeque<(u32, Input)>,
    /// Channels for pages are waited for, until then, and those that have come.
    opening: Option<Duration>,
    accepted: Vec<ConnectionId>,
    returned: Option<ConnectionId>,
    silence_limit: Duration,
    began: Duration,
}

/// What there is when the machine becomes this end's.
pub struct Beginning {
    /// Who the source is.
    pub peer: String,
    /// Those who fill memory.
    pub service: Service,
    /// The control link.
    pub link: LinkEnd,
    /// What control channels that come back show.
    pub session: SessionToken,
    /// Why the links are of no use any more.
    pub lost: Vec<String>,
    /// A control channel that has come back, and is not taken up yet.
    pub returned: Option<ConnectionId>,
    /// A peer that says nothing for so long is lost.
    pub silence_limit: Duration,
}

/// A process and the end it plays.
type End<'e> = (usize, &'e mut FillingEnd);

impl FillingEnd {
    /// The guest runs here from now on.
    pub fn new(beginning: Beginning, now: Duration) -> Self {
        let Beginning { peer, service, link, session, lost, returned, silence_limit } = beginning;
        let filled = (service.wanted().left() == 0).then(|| Input::Filled(service.filled()));
        let inputs = filled.into_iter().chain(lost.into_iter().map(Input::Lost));
        Self {
            control: FillingControl::new(peer),
            inputs: inputs.map(|input| (0, input)).collect(),
            service,
            link,
            session,
            expected: None,
            links: 0,
            opening: None,
            accepted: Vec::new(),
            returned,
            silence_limit,
            began: now,
        }
    }

    /// Who a source finds that opens a channel.
    pub fn answers(&self, dial: Dial) -> Reached {
        let known = match dial {
            Dial::First | Dial::Data(_) => false,
            Dial::Again(token) => token == self.session,
            Dial::Pages(token) => self.expected == Some(token),
        };
        if known { Reached::Peer } else { Reached::Stranger }
    }

    fn tell(&mut self, told: Option<Told>) {
        self.inputs.extend(told.map(|told| match told {
            Told::Filled => (self.links, Input::Filled(self.service.filled())),
            Told::Lost(why) => (self.links, Input::Lost(why)),
        }));
    }
}

impl World {
    /// Lets the end do something, and then all that follows from it.
    fn with_filling(&mut self, process: usize, act: impl FnOnce(&mut Self, End<'_>)) {
        let Some(mut end) = self.processes[process].role.take_filling() else { return };
        act(self, (process, &mut end));
        while end.opening.is_none() {
            let input = match end.inputs.pop_front() {
                // Whatever link that came over.
                Some((_, input @ (Input::Filled(_) | Input::Farewell))) => input,
                Some((links, input)) if links == end.links => input,
                Some(_) => continue,
                None if end.returned.is_some() => Input::Returned { token: self.token() },
                None => break,
            };
            let actions = end.control.handle(self.now() - end.began, input);
            for action in actions {
                if action == Action::End {
                    return self.filling_ends(process, *end);
                }
                self.filling_does((process, &mut end), action);
            }
        }
        self.processes[process].role = Role::Filling(end);
    }

    /// The guest runs from now on.
    pub fn filling_begins(&mut self, process: usize) {
        self.wake_after(process, PING_INTERVAL, Wake::Ping);
        self.wake_after(process, TICK, Wake::Tick);
        self.with_filling(process, |_, _| {});
    }

    /// Something is due.
    pub fn filling_wakes(&mut self, process: usize, wake: Wake) {
        self.with_filling(process, |world, (process, end)| match wake {
            Wake::Tick => {
                let now = world.now();
                world.wake_after(process, TICK, Wake::Tick);
                if end.opening.is_some_and(|until| now >= until) {
                    world.filling_opens_no_pages(end, "the channels for pages did not come in time");
                }
                if end.link.has_fallen_silent(now, end.silence_limit) {
                    end.tell(Some(Told::Lost(format!("nothing was heard from it for {:?}", end.silence_limit))));
                }
                end.inputs.push_back((end.links, Input::Tick));
            }
            Wake::Ping => {
                world.send(end.link.id, 1, &Message::Ping(()));
                world.wake_after(process, PING_INTERVAL, Wake::Ping);
            }
            _ => {}
        });
    }

    /// Something was heard, or the link has ended.
    pub fn filling_hears(&mut self, process: usize, message: Result<Message, String>) {
        self.with_filling(process, |world, (_, end)| {
            let input = match message {
                Ok(Message::Farewell(())) => Input::Farewell,
                Ok(Message::Abort(why)) => Input::Lost(format!("it has given up: {why}")),
                Ok(_) => return,
                Err(why) => {
                    end.link.lost = true;
                    Input::Lost(why)
                }
            };
            world.note(format_args!("p{process} hears {input:?}"));
            end.inputs.push_back((end.links, input));
        });
    }

    /// The guest, or a device, may need a page.
    pub fn filling_listens(&mut self, process: usize) {
        self.with_filling(process, |world, (_, end)| world.service_listens(&mut end.service));
    }

    /// Bytes have arrived on a channel for pages.
    pub fn filling_reads(&mut self, process: usize, id: ConnectionId) {
        self.with_filling(process, |world, (_, end)| {
            let told = world.service_reads(&mut end.service, id);
            end.tell(told);
        });
    }

    /// A channel for pages is broken.
    pub fn filling_loses(&mut self, process: usize, id: ConnectionId) {
        self.with_filling(process, |_, (_, end)| end.tell(end.service.loses(id)));
    }

    /// A channel for pages has come in.
    pub fn filling_accepts(&mut self, process: usize, id: ConnectionId) {
        self.with_filling(process, |world, (_, end)| {
            end.accepted.push(id);
            world.filling_opens_pages(end);
        });
    }

    /// A control channel of the session has come back.
    pub fn filling_is_back(&mut self, process: usize, id: ConnectionId) {
        self.with_filling(process, |world, (_, end)| {
            if let Some(earlier) = end.returned.replace(id) {
                world.network.close(earlier, 1, &mut world.agenda);
            }
            if end.opening.is_some() {
                world.filling_opens_no_pages(end, "the source came back before its channels did");
            }
        });
    }

    fn filling_opens_pages(&mut self, end: &mut FillingEnd) {
        if end.opening.is_some() && end.accepted.len() == 2 {
            end.opening = None;
            let ids = std::mem::take(&mut end.accepted);
            self.service_attaches(&mut end.service, &ids);
            end.inputs.push_front((end.links, Input::Opened));
        }
    }

    fn filling_opens_no_pages(&mut self, end: &mut FillingEnd, why: &str) {
        end.opening = None;
        end.inputs.push_front((end.links, Input::Lost(why.into())));
        for id in end.accepted.drain(..) {
            self.network.close(id, 1, &mut self.agenda);
        }
    }

    fn filling_does(&mut self, (process, end): End<'_>, action: Action) {
        match action {
            Action::Say(text) => self.note(format_args!("p{process} says: {text}")),
            Action::Detach => {
                end.link.lost = true;
                self.network.close(end.link.id, 1, &mut self.agenda);
                self.service_detaches(&mut end.service);
            }
            Action::Attach => {
                if let Some(id) = end.returned.take() {
                    self.network.close(end.link.id, 1, &mut self.agenda);
                    end.links += 1;
                    end.link = LinkEnd::new(id, 1, self.now());
                    self.agenda.after(Duration::ZERO, Event::Readable(id, 1));
                }
            }
            Action::Send(message) => {
                if let Message::Attached(token) = &message {
                    end.expected = Some(*token);
                }
                self.send(end.link.id, 1, &message);
            }
            Action::SendMissing => {
                for part in end.service.wanted().parts(end.service.layout()) {
                    self.send(end.link.id, 1, &Message::Missing(part));
                }
            }
            Action::OpenPages => {
                end.opening = Some(self.now() + OPEN_PAGES_LIMIT);
                self.filling_opens_pages(end);
            }
            Action::Complete(filled) => {
                self.note(format_args!("p{process} has all of the guest's memory, after {} faults", filled.faults));
                end.service.complete();
                self.mark_complete(process);
            }
            Action::End => {}
        }
    }

    fn filling_ends(&mut self, process: usize, mut end: FillingEnd) {
        self.note(format_args!("p{process} needs its source no more"));
        self.service_detaches(&mut end.service);
        for id in end.accepted.into_iter().chain([end.link.id]).chain(end.returned) {
            self.network.close(id, 1, &mut self.agenda);
        }
        let state = &mut self.processes[process];
        state.part += 1;
        state.role = Role::Keeping;
        self.arrived(process);
    }

    /// Says in the store that all of the guest's memory is there.
    pub fn mark_complete(&mut self, process: usize) {
        if let Some(holding) = &self.processes[process].holding {
            let epoch = holding.claim().epoch;
            self.call_store(process, Call::Mark(epoch, Marker::Complete));
        }
    }

    /// The store has answered that.
    pub fn marked_complete(&mut self, process: usize, answer: &MarkAnswer) {
        if let MarkAnswer::Unknown(_) = answer {
            self.agenda.after(RETRY_GAP, Event::MarkComplete(process));
        }
    }
}
