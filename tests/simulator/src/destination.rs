//! The receiving end: what the driver does in life, without its threads.
//!
//! Its one thread blocks while it prepares, loads, claims or waits: what comes in meanwhile waits, too. Data channels go on by
//! themselves.

mod channels;
mod pages;

use std::collections::VecDeque;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use godwit_core::destination::control::{Action, DestinationControl, Input};
use godwit_core::destination::{DestinationOptions, DestinationPages, ReceivingChannel};
use godwit_core::machine::{
    DestinationMachine, LoadContext, MachineDescription, MachineError, Refusal, Section, SourceMachine, Verdict,
};
use godwit_core::message::{Message, PrepareRequest, SharedClaims, TimedStep};
use godwit_core::ownership::destination::{self as rules, DestinationHandover};
use godwit_core::ownership::modelled::{Answer, Call};
use godwit_core::ownership::{Claim, Holding, Marker, Nonce, RETRY_GAP, RightToRun, Rules};
use godwit_core::postcopy::Wanted;
use godwit_core::table::{PageHasher, PageTable};
use godwit_core::{GuestMemory, SessionToken};

use crate::chance::us;
use crate::event::{Dial, Event, Reached, Wake};
use crate::filling::service::Service;
use crate::link::{LinkEnd, PING_INTERVAL};
use crate::machine::{Incoming, Machine};
use crate::network::ConnectionId;
use crate::process::{Role, TICK};
use crate::world::World;

/// How long the source may take to open its data channels.
const OPEN_DATA_LIMIT: Duration = Duration::from_secs(10);
/// How long a source may take to say that it has ended the move, once its data channels are gone.
const LAST_WORD_LIMIT: Duration = Duration::from_secs(2);
/// How often it is looked whether who loads state has the pages that it needs.
const LOAD_GAP: Duration = Duration::from_millis(20);
/// Where the claims are said to be.
pub const CLAIMS: &str = "/claims";

/// The receiving end of a move.
pub struct DestinationEnd {
    control: DestinationControl,
    /// The control link.
    pub link: LinkEnd,
    /// What control channels that come back show.
    session: SessionToken,
    /// What data channels show.
    expected: Option<SessionToken>,
    /// How often the links were made: what comes from earlier ones is late.
    links: u32,
    silence_limit: Duration,
    inputs: VecDeque<(u32, Input)>,
    blocked: Option<Blocked>,
    machine: Option<Arc<Machine>>,
    /// Memory that was handed over.
    memory: Option<GuestMemory>,
    pages: Option<Arc<DestinationPages>>,
    receiving: Vec<ReceivingChannel>,
    /// The data channels' connections, in order.
    accepted: Vec<ConnectionId>,
    /// A control channel that has come back, and is not taken up yet.
    returned: Option<ConnectionId>,
    away_until: Option<Duration>,
    /// Why the links are of no use any more.
    lost: Option<String>,
    /// Post-copy: the channels for pages, what will be missing, and who fills it in.
    page_channels: Vec<ConnectionId>,
    wanted: Option<Wanted>,
    service: Option<Service>,
    /// The control link of a session whose data channels broke may bring a last word until then.
    last_word_until: Option<Duration>,
}

/// What its thread is doing.
enum Blocked {
    Checking(Box<Verdict>),
    Building(Box<(MachineDescription, PrepareRequest)>),
    OpeningData { count: usize, until: Duration },
    OpeningPages { until: Duration },
    Loading(Vec<Section>, LoadContext),
    Claiming,
    Waiting,
    Starting { run: bool },
}

impl Blocked {
    /// How long it waits for channels.
    fn until(&self) -> Option<Duration> {
        match self {
            Self::OpeningData { until, .. } | Self::OpeningPages { until } => Some(*until),
            _ => None,
        }
    }
}

/// A process and the end it plays.
type End<'e> = (usize, &'e mut DestinationEnd);

impl DestinationEnd {
    /// The data channels' connections.
    pub fn data(&self) -> impl Iterator<Item = ConnectionId> {
        self.accepted.iter().copied()
    }

    /// Who a source finds that opens a channel.
    pub fn answers(&self, dial: Dial) -> Reached {
        let known = match dial {
            Dial::First => false,
            Dial::Again(token) => self.pages.is_some() && token == self.session,
            Dial::Data(token) | Dial::Pages(token) => self.expected == Some(token),
        };
        if known { Reached::Peer } else { Reached::Stranger }
    }

    /// Those who fill memory.
    pub fn service(&self) -> Option<&Service> {
        self.service.as_ref()
    }

    fn tell(&mut self, input: Input) {
        self.inputs.push_back((self.links, input));
    }
}

impl World {
    /// A peer has opened a control channel.
    pub fn destination_begins(&mut self, process: usize, id: ConnectionId) {
        let options = DestinationOptions::default();
        let session = self.token();
        let end = DestinationEnd {
            silence_limit: options.silence_limit,
            control: DestinationControl::new(options, session, "the source".into()),
            link: LinkEnd::new(id, 1, self.now()),
            session,
            expected: None,
            links: 0,
            inputs: VecDeque::new(),
            blocked: None,
            machine: None,
            memory: None,
            pages: None,
            receiving: Vec::new(),
            accepted: Vec::new(),
            returned: None,
            away_until: None,
            lost: None,
            page_channels: Vec::new(),
            wanted: None,
            service: None,
            last_word_until: None,
        };
        let state = &mut self.processes[process];
        state.part += 1;
        state.role = Role::Destination(Box::new(end));
        self.wake_after(process, PING_INTERVAL, Wake::Ping);
        self.wake_after(process, TICK, Wake::Tick);
    }

    /// Lets the receiving end of a process do something, and then all that follows from it.
    fn with_destination(&mut self, process: usize, act: impl FnOnce(&mut Self, End<'_>)) {
        let Some(mut end) = self.processes[process].role.take_destination() else { return };
        act(self, (process, &mut end));
        if end.blocked.is_none() && end.returned.is_some() {
            end.away_until = None;
            let token = self.token();
            end.control.handle(Input::Returned { token });
        }
        while end.blocked.is_none() {
            match end.control.poll_action() {
                Some(Action::Own { running, right }) => return self.destination_owns(process, *end, running, right),
                Some(Action::GiveUp(why)) => {
                    self.note(format_args!("p{process} gives up: {why}"));
                    return self.destination_drops(process, *end, Role::Listening);
                }
                Some(Action::Lose(why)) => {
                    self.note(format_args!("p{process} drops the machine: {why}"));
                    return self.destination_drops(process, *end, Role::Over);
                }
                Some(action) => self.destination_does((process, &mut end), action),
                None => match end.inputs.pop_front() {
                    Some((links, input)) if links == end.links => {
                        if let Input::LinkLost(why) | Input::ChannelLost(why) = &input {
                            end.lost = Some(why.clone());
                        }
                        end.control.handle(input);
                    }
                    Some(_) => {}
                    None => break,
                },
            }
        }
        self.processes[process].role = Role::Destination(end);
    }

    /// Something is due.
    pub fn destination_wakes(&mut self, process: usize, wake: Wake) {
        self.with_destination(process, |world, (process, end)| match wake {
            Wake::Tick => {
                world.wake_after(process, TICK, Wake::Tick);
                if end.blocked.is_none() && end.link.has_fallen_silent(world.now(), end.silence_limit) {
                    world.note(format_args!("p{process} has heard nothing for {:?}", end.silence_limit));
                    end.tell(Input::LinkLost("nothing was heard from it".into()));
                }
                if end.blocked.is_none() && end.away_until.is_some_and(|until| world.now() >= until) {
                    end.away_until = None;
                    end.control.handle(Input::NotReturned);
                }
                if end.last_word_until.is_some_and(|until| world.now() >= until) {
                    end.last_word_until = None;
                    end.link.lost = true;
                    world.network.close(end.link.id, 1, &mut world.agenda);
                }
                if end.blocked.as_ref().and_then(Blocked::until).is_some_and(|until| world.now() >= until) {
                    end.blocked = None;
                    end.control.handle(Input::DataOpened(Err("data channels did not come in time".into())));
                }
                world.destination_waits_no_longer(end);
            }
            Wake::Ping => {
                world.send(end.link.id, 1, &Message::Ping(()));
                world.wake_after(process, PING_INTERVAL, Wake::Ping);
            }
            Wake::Job | Wake::Retry => world.destination_unblocks((process, end)),
            _ => {}
        });
    }

    /// Something was heard, or the link has ended.
    pub fn destination_hears(&mut self, process: usize, message: Result<Message, String>) {
        self.with_destination(process, |world, (_, end)| match message {
            Ok(Message::Ping(())) => {}
            Ok(message) => {
                world.note(format_args!("p{process} hears {}", message.name()));
                end.tell(Input::Message(message));
            }
            Err(why) => {
                end.link.lost = true;
                world.note(format_args!("p{process} has lost its source: {why}"));
                end.tell(Input::LinkLost(why));
            }
        });
    }

    fn destination_does(&mut self, (process, end): End<'_>, action: Action) {
        match action {
            Action::Send(mut message) => {
                if let Message::ClockReply((_, realtime_ns)) = &mut message {
                    *realtime_ns = self.now().as_nanos() as i64 + 1_000_000;
                }
                // Before it is told: its data channels may be quick.
                match &message {
                    Message::Prepared(prepared) => end.expected = Some(prepared.token),
                    Message::Attached(token) => end.expected = Some(*token),
                    _ => {}
                }
                self.send(end.link.id, 1, &message);
            }
            Action::TakeMemory(offer) => {
                let source = offer.regions.first().and_then(|region| self.processes.get(region.inode as usize));
                end.memory = source.and_then(|source| source.machine.as_ref()).map(|machine| machine.memory());
                let taken = end.memory.as_ref().map(|_| offer).ok_or_else(|| "the source is gone".into());
                end.control.handle(Input::MemoryTaken(taken));
            }
            Action::Check(_, _, claims) => {
                let refusals = self.destination_agrees((process, end), claims.as_ref()).err().into_iter().collect();
                let verdict = Verdict { refusals, ..Verdict::default() };
                self.destination_blocks((process, end), Blocked::Checking(Box::new(verdict)));
            }
            Action::Build { machine, request } => {
                self.destination_blocks((process, end), Blocked::Building(Box::new((machine, request))));
            }
            Action::OpenData { channels } => {
                let until = self.now() + OPEN_DATA_LIMIT;
                end.blocked = Some(Blocked::OpeningData { count: channels.into(), until });
                end.takes_up_data();
            }
            Action::Detach => self.destination_detaches(end),
            Action::AwaitReturn(limit) => end.away_until = Some(self.now() + limit),
            Action::Attach => {
                if let Some(id) = end.returned.take() {
                    self.network.close(end.link.id, 1, &mut self.agenda);
                    end.last_word_until = None;
                    end.links += 1;
                    end.lost = None;
                    end.link = LinkEnd::new(id, 1, self.now());
                    self.agenda.after(Duration::ZERO, Event::Readable(id, 1));
                }
            }
            Action::Round(_) => {}
            Action::CheckFilling => {}
            Action::JudgeFilling => end.control.handle(Input::FillingJudged(None)),
            Action::OpenPages { .. } => {
                end.blocked = Some(Blocked::OpeningPages { until: self.now() + OPEN_DATA_LIMIT });
                end.takes_up_pages();
            }
            Action::NoteMissing(part) => end.notes_missing(&part),
            Action::Load(sections, context) => {
                self.destination_begins_to_fill(end);
                self.destination_blocks((process, end), Blocked::Loading(sections, context));
            }
            Action::Claim(claim) => {
                end.blocked = Some(Blocked::Claiming);
                self.call_store(process, Call::Claim(claim));
            }
            Action::Wait => {
                end.blocked = Some(Blocked::Waiting);
                self.wake_after(process, RETRY_GAP, Wake::Retry);
            }
            Action::Say(why) => self.note(format_args!("p{process} says: {why}")),
            Action::MarkRunning(epoch) => {
                if let Some(handover) = end.control.take_handover() {
                    self.processes[process].marking = Some(handover);
                    self.call_store(process, Call::Mark(epoch, Marker::Running));
                }
            }
            Action::Start { run } => self.destination_blocks((process, end), Blocked::Starting { run }),
            Action::Own { .. } | Action::GiveUp(_) | Action::Lose(_) => {}
        }
    }

    fn destination_blocks(&mut self, (process, end): End<'_>, what: Blocked) {
        end.blocked = Some(what);
        let work = self.setup.work;
        let delay = self.chance.time(us(10), work.max(us(20)));
        self.wake_after(process, delay, Wake::Job);
    }

    fn destination_unblocks(&mut self, (process, end): End<'_>) {
        let input = match end.blocked.take() {
            Some(Blocked::Checking(verdict)) => Input::Checked(*verdict),
            Some(Blocked::Building(order)) => {
                let (description, request) = *order;
                let built = self.build((process, end), description, &request);
                Input::Built(built.map_err(|error| error.to_string()))
            }
            Some(blocked @ Blocked::Loading(..)) if end.machine.as_ref().is_some_and(|m| m.waits_to_load()) => {
                end.blocked = Some(blocked);
                return self.wake_after(process, LOAD_GAP, Wake::Job);
            }
            Some(Blocked::Loading(sections, context)) => {
                let loaded = match &end.machine {
                    Some(machine) => Incoming(Arc::clone(machine)).load(&sections, &context),
                    None => Err(MachineError::new("there is no machine to load into")),
                };
                let step = || vec![TimedStep { name: "load state".into(), duration: us(100) }];
                Input::Loaded(loaded.map(|()| step()).map_err(|error| error.to_string()))
            }
            Some(Blocked::Waiting) => Input::Retry,
            Some(Blocked::Starting { run }) => {
                let started = match &end.machine {
                    Some(machine) => {
                        let mut incoming = Incoming(Arc::clone(machine));
                        incoming.own_memory().and_then(|()| if run { incoming.start() } else { Ok(()) })
                    }
                    None => Ok(()),
                };
                if started.is_ok() {
                    self.processes[process].machine = end.machine.clone();
                    self.note(format_args!("p{process} runs the guest"));
                }
                Input::Started(started.map(|()| Vec::new()).map_err(|error| error.to_string()))
            }
            other => {
                end.blocked = other;
                return;
            }
        };
        end.control.handle(input);
    }

    /// The store has answered.
    pub fn destination_learns(&mut self, process: usize, answer: Answer) {
        self.with_destination(process, |_, (_, end)| {
            if let (Some(Blocked::Claiming), Answer::Claimed(answer)) = (&end.blocked, answer) {
                end.blocked = None;
                end.control.handle(Input::Claimed(answer));
            }
        });
    }

    /// Looks for the source's claim in the store.
    fn destination_agrees(&mut self, (process, end): End<'_>, offered: Option<&SharedClaims>) -> Result<(), Refusal> {
        let Some(offered) = offered else { return Ok(()) };
        let refused = |why: &str| Refusal::new("ownership", why);
        let claim: Claim = offered.claim.parse().map_err(|_| refused("the source's claim cannot be read"))?;
        let next = claim.epoch.next().ok_or_else(|| refused("no epoch can follow"))?;
        if self.store.entries.claim_of(claim.epoch) != Some(&claim) || self.store.entries.claim_of(next).is_some() {
            return Err(refused("the source's claim is not the newest in the store"));
        }
        let me = self.processes[process].claimant.clone();
        end.control.expect_claim(DestinationHandover::new(me, next, Rules::default()));
        Ok(())
    }

    fn build(
        &mut self,
        (_, end): End<'_>,
        description: MachineDescription,
        request: &PrepareRequest,
    ) -> Result<Duration, MachineError> {
        let (truth, chance) = (Arc::clone(&self.truth), self.chance.fork());
        let machine = Arc::new(match end.memory.take() {
            Some(memory) => Machine::over(description, memory, truth, chance)?,
            None => Machine::new(description, truth, chance)?,
        });
        machine.behave(self.setup.meddling, self.setup.whole_pages);
        let context = LoadContext { clock_offset_ns: request.clock_offset_ns };
        Incoming(Arc::clone(&machine)).load(&request.rehearsal, &context)?;
        end.pages = Some(Arc::new(DestinationPages {
            view: machine.view().clone(),
            table: PageTable::new(machine.view().layout()),
            hasher: PageHasher::new(request.table_seed, request.verify),
        }));
        end.machine = Some(machine);
        Ok(us(500))
    }

    fn destination_owns(
        &mut self,
        process: usize,
        mut end: DestinationEnd,
        _running: bool,
        right: Option<(RightToRun, Nonce)>,
    ) {
        let state = &mut self.processes[process];
        state.part += 1;
        state.machine = end.machine.clone();
        state.holding = right.map(|(right, nonce)| {
            let claim = Claim { incomplete: end.service.is_some(), ..state.claimant.claim(right.epoch(), nonce) };
            Arc::new(Holding::modelled(PathBuf::from(CLAIMS), claim, right))
        });
        self.note(format_args!("p{process} has the machine"));
        self.guest_goes_on(process);
        match end.service.take() {
            None => {
                self.destination_closes(&mut end);
                self.processes[process].role = Role::Keeping;
                self.arrived(process);
            }
            Some(service) => self.destination_fills(process, end, service),
        }
    }

    fn destination_drops(&mut self, process: usize, mut end: DestinationEnd, role: Role) {
        self.destination_closes(&mut end);
        let state = &mut self.processes[process];
        state.part += 1;
        state.alive = !matches!(role, Role::Over);
        state.role = role;
        state.machine = None;
    }

    fn destination_closes(&mut self, end: &mut DestinationEnd) {
        self.destination_stops_filling(end);
        for id in end.data().chain([end.link.id]).chain(end.returned) {
            self.network.close(id, 1, &mut self.agenda);
        }
    }

    /// The marker has been made, or not; or it is time to try again.
    pub fn marks(&mut self, process: usize, input: rules::Input) {
        let Some(mut handover) = self.processes[process].marking.take() else { return };
        for action in handover.handle(input) {
            match action {
                rules::Action::Mark(epoch, marker) => self.call_store(process, Call::Mark(epoch, marker)),
                rules::Action::Wait => {
                    self.agenda.after(RETRY_GAP, Event::Mark(process));
                }
                _ => {}
            }
        }
        if !handover.is_over() {
            self.processes[process].marking = Some(handover);
        }
    }
}
