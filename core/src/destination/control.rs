//! The destination's control plane: a state machine without I/O, threads or a clock.
//!
//! ```text
//! hello → preflight → prepare → receiving → loading → ready → owned
//!                               ⇅
//!                              away
//! ```
//!
//! If the links break while memory is being received, what has arrived is kept for a while, in case the source comes back.
//!
//! Until *commit* has arrived this end owns nothing: whatever goes wrong, it drops what it has. Once it has arrived the
//! machine is this end's, whatever becomes of the link; where there are claims, only once it has claimed it, and nothing but the
//! store ends that attempt ([`crate::ownership::destination`]).

mod vocabulary;

use std::collections::VecDeque;
use std::time::Duration;

pub use self::vocabulary::{Action, Input};
use super::DestinationOptions;
use crate::channel::SessionToken;
use crate::machine::{LoadContext, Section};
use crate::memory_files::MemoryOffer;
use crate::message::{Commit, FEATURES, Hello, Message, PreflightRequest, Prepared, TimedStep, VERSION};
use crate::ownership::destination::{self as rules, DestinationHandover, Dropped};
use crate::ownership::{Epoch, Nonce, RightToRun};
use crate::plants::{Plant, planted};
use crate::postcopy::PageChannel;
use crate::source::MAX_CHANNELS;

enum State {
    Hello,
    Preflight,
    TakingMemory,
    Checking(Box<PreflightRequest>),
    AwaitPrepare(Box<PreflightRequest>),
    Building(LoadContext),
    Receiving(Receiving),
    /// The links have broken.
    Away(LoadContext),
    Loading,
    Ready,
    Claiming {
        run: bool,
        nonce: Nonce,
    },
    Starting {
        run: bool,
        right: Option<(RightToRun, Nonce)>,
    },
    Over,
}

struct Receiving {
    context: LoadContext,
    /// Data channels that have not ended.
    open_channels: u16,
    sum: u64,
    state: Option<Vec<Section>>,
    table: Option<u64>,
    pages: Pages,
}

/// What is known of pages that will be missing when the guest goes on (post-copy).
#[derive(Clone, Copy, PartialEq, Eq)]
enum Pages {
    /// None will.
    AllHere,
    /// Whether that can be is being looked at.
    Judging,
    /// It can be.
    MayBeMissing,
    /// It was said which.
    Missing,
}

/// The destination's control plane.
pub struct DestinationControl {
    options: DestinationOptions,
    token: SessionToken,
    state: State,
    channels: u16,
    verify: bool,
    /// Memory that was handed over: nothing will be sent.
    memory: Option<MemoryOffer>,
    /// The source may want its memory filled while its guest runs.
    filling_wanted: bool,
    /// How long to keep what has arrived if the links break.
    keep: Option<Duration>,
    /// The data channels have been open.
    opened: bool,
    peer: String,
    /// The rules by which ownership passes, if the machine has claims.
    handover: Option<DestinationHandover>,
    actions: VecDeque<Action>,
}

impl DestinationControl {
    /// A control channel has just been opened by a peer. `token` is random, drawn for this move.
    pub fn new(options: DestinationOptions, token: SessionToken, peer: String) -> Self {
        let (state, actions) = (State::Hello, VecDeque::new());
        Self {
            options,
            token,
            state,
            channels: 0,
            verify: true,
            memory: None,
            filling_wanted: false,
            keep: None,
            opened: false,
            peer,
            handover: None,
            actions,
        }
    }

    /// Who the source is, for messages.
    pub fn peer(&self) -> &str {
        &self.peer
    }

    /// The rules, once the guest runs and only its marker is left to be made.
    pub fn take_handover(&mut self) -> Option<DestinationHandover> {
        self.handover.take()
    }

    /// The machine has claims, and this end has seen the source's.
    pub fn expect_claim(&mut self, handover: DestinationHandover) {
        self.handover = Some(handover);
    }

    /// The next thing to do.
    pub fn poll_action(&mut self) -> Option<Action> {
        self.actions.pop_front()
    }

    /// Takes in what has happened.
    pub fn handle(&mut self, input: Input) {
        let state = std::mem::replace(&mut self.state, State::Over);
        self.state = match (state, input) {
            (State::Over, _) => State::Over,
            // After *commit* the machine is ours: a broken link changes nothing.
            (State::Starting { run, right }, Input::Started(result)) => self.started(run, right, result),
            (starting @ State::Starting { .. }, _) => starting,
            (State::Claiming { run, nonce }, Input::Claimed(answer)) => {
                self.decide(rules::Input::Claimed(answer), run, nonce)
            }
            (State::Claiming { run, nonce }, Input::Retry) => self.decide(rules::Input::Retry, run, nonce),
            (State::Claiming { run, nonce }, Input::Abandon) => self.decide(rules::Input::Abandon, run, nonce),
            // Until the claim is decided nothing else counts.
            (claiming @ State::Claiming { .. }, _) => claiming,
            (_, Input::Message(Message::Abort(why))) => {
                self.give_up(format!("{} called the move off: {why}", self.peer))
            }
            (_, Input::Stop) => self.abort("this receiver is being ended".into()),
            (_, Input::Nonsense(why)) => self.abort(why),
            (State::Away(context), input) => self.away(context, input),
            (State::Receiving(receiving), Input::LinkLost(why)) => {
                self.link_lost(receiving.context, format!("the connection to {} broke: {why}", self.peer))
            }
            (State::Receiving(receiving), Input::ChannelLost(why) | Input::DataOpened(Err(why))) => {
                self.link_lost(receiving.context, why)
            }
            (State::Receiving(receiving), Input::Returned { token }) => {
                self.act(Action::Detach);
                self.take_up(receiving.context, token)
            }
            (_, Input::Returned { .. }) => {
                self.give_up(format!("{} came back after its state had been loaded here", self.peer))
            }
            (_, Input::LinkLost(why)) => self.give_up(format!("the connection to {} broke: {why}", self.peer)),
            (_, Input::ChannelLost(why)) => self.abort(why),
            (State::Hello, Input::Message(Message::Hello(hello))) => self.hello(hello),
            (State::Hello, Input::Message(message)) => {
                self.abort(format!("the peer began with {} instead of Hello", message.name()))
            }
            (state @ State::Preflight, Input::Message(Message::ClockRequest(number))) => {
                self.act(Action::Send(Message::ClockReply((number, 0))));
                state
            }
            (State::Preflight, Input::Message(Message::Memory(offer))) if self.memory.is_none() => {
                self.act(Action::TakeMemory(offer));
                State::TakingMemory
            }
            (State::TakingMemory, Input::MemoryTaken(taken)) => {
                let refused = taken.map(|offer| self.memory = Some(offer)).err();
                self.act(Action::Send(Message::MemoryTaken(refused)));
                State::Preflight
            }
            (state @ State::Preflight, Input::Message(Message::PostCopyWanted(()))) => {
                self.filling_wanted = true;
                state
            }
            (State::Preflight, Input::Message(Message::Preflight(request))) => self.preflight(request),
            (State::Checking(request), Input::Checked(verdict)) => {
                let go_on = verdict.refusals.is_empty();
                self.act(Action::Send(Message::Verdict(verdict)));
                match go_on {
                    true => State::AwaitPrepare(request),
                    false => self.give_up("the machine was refused by preflight".into()),
                }
            }
            (state @ State::AwaitPrepare(_), Input::Message(Message::Keep(limit))) => {
                self.keep = Some(limit.min(self.options.keep_limit)).filter(|limit| !limit.is_zero());
                state
            }
            (State::AwaitPrepare(agreed), Input::Message(Message::Prepare(request))) => {
                let context = LoadContext { clock_offset_ns: request.clock_offset_ns };
                self.channels = agreed.channels;
                self.verify = request.verify;
                self.act(Action::Build { machine: agreed.machine, request });
                State::Building(context)
            }
            (State::Building(context), Input::Built(Ok(load))) => {
                self.act(Action::Send(Message::Prepared(Prepared { token: self.token, load })));
                self.open_data(context)
            }
            (State::Building(_), Input::Built(Err(why))) => self.abort(why),
            (State::Receiving(receiving), input) => self.receiving(receiving, input),
            (State::Loading, Input::Loaded(Ok(steps))) => self.ready(steps),
            (State::Loading, Input::Loaded(Err(why))) => self.abort(why),
            (State::Ready, Input::Message(Message::Commit(commit))) => self.commit(commit),
            (_, Input::Message(message)) => self.abort(format!("{} has no place here", message.name())),
            (state, _) => state,
        };
    }

    fn hello(&mut self, hello: Hello) -> State {
        self.peer = format!("{} ({}, {})", self.peer, hello.host, hello.program);
        self.act(Action::Send(Message::Hello(Hello {
            version: VERSION,
            features: FEATURES,
            program: concat!("godwit ", env!("CARGO_PKG_VERSION")).into(),
            host: self.options.host_name.clone(),
        })));
        match hello.version.major == VERSION.major {
            true => State::Preflight,
            // The source says so to its user: it knows both versions now.
            false => self.give_up(format!("{} speaks protocol {}", self.peer, hello.version.major)),
        }
    }

    fn preflight(&mut self, request: PreflightRequest) -> State {
        let possible = match &self.memory {
            Some(memory) if !memory.covers(&request.machine.memory) => {
                return self.abort("the memory that was handed over is not the machine's".into());
            }
            Some(_) => 0..=0,
            None => 1..=MAX_CHANNELS,
        };
        if !possible.contains(&request.channels) {
            let (fewest, most) = possible.into_inner();
            return self
                .abort(format!("{} data channels were asked for, {fewest} to {most} are possible", request.channels));
        }
        if self.filling_wanted {
            self.act(Action::CheckFilling);
        }
        self.act(Action::Check(request.machine.clone(), request.question.clone(), request.claims.clone()));
        State::Checking(Box::new(request))
    }

    fn receiving(&mut self, mut receiving: Receiving, input: Input) -> State {
        match input {
            Input::DataOpened(Ok(())) => self.opened = true,
            Input::ChannelEnded { sum } => {
                receiving.open_channels = receiving.open_channels.saturating_sub(1);
                receiving.sum = receiving.sum.wrapping_add(sum);
            }
            Input::Message(Message::Round(round)) => self.act(Action::Round(round.round)),
            Input::Message(Message::State(sections)) => receiving.state = Some(sections),
            Input::Message(Message::PostCopy(())) if receiving.pages == Pages::AllHere && self.channels > 0 => {
                receiving.pages = Pages::Judging;
                self.act(Action::JudgeFilling);
            }
            Input::FillingJudged(objection) if receiving.pages == Pages::Judging => {
                receiving.pages = if objection.is_none() { Pages::MayBeMissing } else { Pages::AllHere };
                self.act(Action::Send(Message::PostCopyAnswer(objection)));
                if receiving.pages == Pages::MayBeMissing {
                    self.act(Action::OpenPages { first: PageChannel::Fault.index(self.channels) });
                }
            }
            Input::Message(Message::Missing(missing)) if receiving.pages == Pages::MayBeMissing => {
                if missing.last {
                    receiving.pages = Pages::Missing;
                }
                self.act(Action::NoteMissing(missing));
            }
            Input::Message(Message::Table(table)) => receiving.table = Some(table.sum),
            Input::Message(message) => return self.abort(format!("{} has no place here", message.name())),
            _ => {}
        }
        let ended = receiving.open_channels == 0 || planted(Plant::LoadBeforeEnd);
        let (Some(sum), true, true) = (receiving.table, ended, receiving.state.is_some()) else {
            return State::Receiving(receiving);
        };
        if self.verify && sum != receiving.sum && !planted(Plant::IgnoreTable) {
            // Invariant 4: nothing is loaded over memory that is not what was sent.
            return self.abort("the memory that arrived is not what was sent (the page tables differ)".into());
        }
        match (receiving.pages, &mut self.handover) {
            (Pages::AllHere, _) | (Pages::Missing, None) => {}
            (Pages::Missing, Some(handover)) => handover.without_all_memory(),
            (Pages::Judging | Pages::MayBeMissing, _) => {
                return self.abort("it was not said which pages are missing".into());
            }
        }
        if planted(Plant::ReadyBeforeLoad) {
            return self.ready(Vec::new());
        }
        self.act(Action::Load(receiving.state.unwrap_or_default(), receiving.context));
        State::Loading
    }

    fn open_data(&mut self, context: LoadContext) -> State {
        self.act(Action::OpenData { channels: self.channels });
        State::Receiving(Receiving {
            context,
            open_channels: self.channels,
            sum: 0,
            state: None,
            table: None,
            pages: Pages::AllHere,
        })
    }

    /// The links broke while memory was being received.
    fn link_lost(&mut self, context: LoadContext, why: String) -> State {
        let Some(keep) = self.keep.filter(|_| self.opened) else { return self.abort(why) };
        self.act(Action::Say(format!("{why}; what has arrived is kept for {keep:.0?}, in case it comes back")));
        self.act(Action::Detach);
        self.act(Action::AwaitReturn(keep));
        State::Away(context)
    }

    fn away(&mut self, context: LoadContext, input: Input) -> State {
        match input {
            Input::Returned { token } => self.take_up(context, token),
            Input::NotReturned => {
                self.give_up(format!("{} did not come back in time after the connection had broken", self.peer))
            }
            // What was under way when the links broke, and is late.
            _ => State::Away(context),
        }
    }

    /// The source is back, and sends again what it does not know to have arrived.
    fn take_up(&mut self, context: LoadContext, token: SessionToken) -> State {
        self.act(Action::Attach);
        self.act(Action::Say(format!("{} is back", self.peer)));
        self.act(Action::Send(Message::Attached(token)));
        self.open_data(context)
    }

    /// All is in place but the machine's owner. The rules ask for *ready*, which is said for machines without claims as well.
    fn ready(&mut self, steps: Vec<TimedStep>) -> State {
        let actions = self.handover.as_mut().map(|handover| handover.handle(rules::Input::Loaded));
        for action in actions.unwrap_or_default() {
            // Only a planted fault claims yet.
            if let rules::Action::Claim(claim) = action {
                self.act(Action::Claim(claim));
            }
        }
        self.act(Action::Send(Message::Ready(steps)));
        State::Ready
    }

    fn commit(&mut self, Commit { epoch, nonce, run }: Commit) -> State {
        let run = run && !self.options.hold;
        match (self.handover.is_some(), Epoch::new(epoch)) {
            (false, None) => {
                self.act(Action::Start { run });
                State::Starting { run, right: None }
            }
            (true, Some(epoch)) => self.decide(rules::Input::Commit(epoch, Nonce(nonce)), run, Nonce(nonce)),
            (true, None) => self.lose("the source handed the machine over without an epoch to claim".into()),
            (false, Some(epoch)) => {
                self.lose(format!("the source wants epoch {epoch} claimed, and no claims were agreed on"))
            }
        }
    }

    /// Does what the rules of the handover say, from *commit* until the claim is decided.
    fn decide(&mut self, input: rules::Input, run: bool, nonce: Nonce) -> State {
        let actions = self.handover.as_mut().map(|handover| handover.handle(input)).unwrap_or_default();
        for action in actions {
            match action {
                rules::Action::Claim(claim) => self.act(Action::Claim(claim)),
                rules::Action::Wait => self.act(Action::Wait),
                rules::Action::Report(why) => {
                    self.act(Action::Say(format!("it is not known yet whether the machine is this end's: {why}")));
                }
                rules::Action::Run(right) => {
                    self.act(Action::Start { run });
                    return State::Starting { run, right: Some((right, nonce)) };
                }
                rules::Action::Drop(why) => return self.lose(dropped(&why)),
                rules::Action::SendReady
                | rules::Action::Announce
                | rules::Action::Mark(..)
                | rules::Action::SendRunning(_) => {}
            }
        }
        State::Claiming { run, nonce }
    }

    fn started(
        &mut self,
        run: bool,
        right: Option<(RightToRun, Nonce)>,
        result: Result<Vec<TimedStep>, String>,
    ) -> State {
        match result {
            Ok(steps) => {
                let actions = self.handover.as_mut().map(|handover| handover.handle(rules::Input::Started));
                for action in actions.unwrap_or_default() {
                    // The machine announces itself when it first runs; *running* follows for every machine.
                    if let rules::Action::Mark(epoch, _) = action {
                        self.act(Action::MarkRunning(epoch));
                    }
                }
                self.act(Action::Send(Message::Running(steps)));
                self.act(Action::Own { running: run, right });
            }
            Err(why) => {
                // The machine is this end's and does not run: neither end may pretend otherwise.
                let why = format!("the guest was handed over and could not be started: {why}");
                self.act(Action::Send(Message::Abort(why.clone())));
                self.act(Action::Own { running: false, right });
            }
        }
        State::Over
    }

    /// Ends the move and tells the peer why.
    fn abort(&mut self, why: String) -> State {
        self.act(Action::Send(Message::Abort(why.clone())));
        self.give_up(why)
    }

    /// After *commit*, without a claim: the machine is not this end's.
    fn lose(&mut self, why: String) -> State {
        self.act(Action::Send(Message::Abort(why.clone())));
        self.act(Action::Lose(why));
        State::Over
    }

    fn give_up(&mut self, why: String) -> State {
        self.act(Action::GiveUp(why));
        State::Over
    }

    fn act(&mut self, action: Action) {
        self.actions.push_back(action);
    }
}

fn dropped(why: &Dropped) -> String {
    match why {
        Dropped::NotCommitted => "the move ended before the machine was handed over".into(),
        Dropped::WrongEpoch(epoch) => format!("the source handed over epoch {epoch}, which does not follow its own"),
        Dropped::Taken(occupant) => format!("the machine was claimed by another: {occupant}"),
        Dropped::CannotClaim(why) => format!("the machine cannot be claimed: {why}"),
        Dropped::Abandoned => "a person has said that this copy is never to run".into(),
    }
}

#[cfg(test)]
mod tests;
