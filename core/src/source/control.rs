//! The source's control plane: a state machine without I/O, threads or a clock.
//!
//! It is given messages, completions and the time ([`SourceControl::handle`]) and answers with actions
//! ([`SourceControl::poll_action`]). The driver carries those out and never decides anything itself.
//!
//! ```text
//! connect → handshake → preflight → prepare → first-pass → rounds ⇄ pre-switchover
//!                                                             ↓
//!        completed ← commit ← state ← final-pages ← pause ←───┘
//! ```
//!
//! Memory that is handed over instead of being sent skips from *prepare* to *pause* (`control/handing_over.rs`).
//!
//! In post-copy the guest goes on at the destination before all of its memory is there: *commit* is followed by *postcopy*, and nothing is left
//! to be sent before it (`control/postcopying.rs`).
//!
//! A link that breaks between *first-pass* and *state* is made anew, and the rounds go on (`control/reconnecting.rs`).
//!
//! Whatever goes wrong before *commit* takes one way out (`SourceControl::end`), after which the guest is as it was.
//! After *commit* there is none but the claims ([`crate::ownership`]): without *running* the guest stays paused here until they
//! say whose it is, or, where there are none, a person decides.

mod ending;
mod handing_over;
mod measured;
mod postcopying;
mod reconnecting;
mod rounds;
mod setup;
mod stalling;
mod throttling;
mod vocabulary;

use std::collections::VecDeque;
use std::time::Duration;

use self::ending::Ending;
use self::measured::{Clock, FixedCost};
pub use self::measured::{HANDOVER_TRIPS, IN_PAUSE};
use self::postcopying::PostCopying;
use self::reconnecting::{LastBreak, Reconnecting};
pub(crate) use self::rounds::TELLING_ROUND_BYTES;
pub(crate) use self::setup::probe_bytes;
use self::stalling::Course;
pub use self::vocabulary::{Action, Done, Input, NotOffered, RoundSent};
use super::{CancelError, Encodings, SourceOptions, SourceOutcome};
use crate::channel::SessionToken;
use crate::machine::{MachineDescription, Refusal};
use crate::message::{FEATURE_COMING, FEATURE_SPARSE, Message, TableSum, TimedStep};
use crate::phase::Phase;
use crate::plants::{Plant, planted};
use crate::progress::{self, Report, Step};

/// A peer that says nothing for this long is taken for lost: pings come every second.
const SILENCE_LIMIT: Duration = Duration::from_secs(8);
/// The same while the guest is paused and could go on here: it does not wait longer than it has to.
const SILENCE_LIMIT_PAUSED: Duration = Duration::from_secs(3);
/// How long the destination may take to answer *hello* and each clock request.
const HANDSHAKE_LIMIT: Duration = Duration::from_secs(10);
/// How long it may take to judge the machine.
const PREFLIGHT_LIMIT: Duration = Duration::from_secs(30);
/// How long it may take to build the machine.
const PREPARE_LIMIT: Duration = Duration::from_secs(60);
/// As long as no round was telling, this is what the pause reckons with: a Gbit/s link.
const UNMEASURED_BYTES_PER_S: f64 = 125e6;
/// The longest wait for the destination to catch up between two rounds.
const QUEUE_LIMIT: Duration = Duration::from_millis(100);

/// The source's control plane.
pub struct SourceControl {
    options: SourceOptions,
    program: String,
    host: String,
    table_seed: u64,
    nonce: u64,
    /// Whether the guest ran when the move began.
    running: bool,

    phase: Phase,
    phase_since: Duration,
    now: Duration,
    actions: VecDeque<Action>,
    held: Option<VecDeque<Input>>,
    ending: Option<Ending>,
    /// The links have broken, and are being made anew.
    reconnecting: Option<Reconnecting>,
    /// The destination is lost, why, and the claims are being asked who has the machine.
    settling: Option<String>,
    finished: bool,
    link_up: bool,
    /// Both ends can take up a session again whose links have broken.
    returns: bool,
    /// What the other end can do.
    peer_features: u64,
    /// Memory is handed over instead of being sent.
    hands_over: bool,
    session: Option<SessionToken>,
    /// What data channels show.
    data_token: Option<SessionToken>,
    /// The move goes over to post-copy, or has.
    postcopy: Option<PostCopying>,
    /// How the last break went.
    last_break: Option<LastBreak>,

    machine: Option<MachineDescription>,
    /// What the machine asks the destination.
    question: Vec<u8>,
    peer_host: String,
    clock: Clock,
    round: u32,
    round_under_way: bool,
    proceed: bool,
    cut: bool,
    queue_awaited_since: Option<Duration>,
    cost: FixedCost,
    /// How the move goes.
    course: Course,
    switchover_bytes_per_s: f64,
    wire_bytes_per_page: f64,
    paused_at: Option<Duration>,
    /// The guest was asked to stop, and not to go on again.
    guest_stopped: bool,
    downtime: Option<Duration>,
    sent_at: Duration,
    report: Report,
}

/// What the driver knows when a move begins.
pub struct Beginning {
    /// The knobs.
    pub options: SourceOptions,
    /// Name and version of this program.
    pub program: String,
    /// This host's name.
    pub host: String,
    /// Whether the guest runs.
    pub running: bool,
    /// A random number for the page table.
    pub table_seed: u64,
    /// A random number for the commit.
    pub nonce: u64,
}

impl SourceControl {
    /// A move that begins now.
    pub fn new(beginning: Beginning) -> Self {
        let Beginning { options, program, host, running, table_seed, nonce } = beginning;
        let mut control = Self {
            switchover_bytes_per_s: options
                .switchover_bandwidth_bytes_per_s
                .map_or(UNMEASURED_BYTES_PER_S, |rate| rate as f64),
            wire_bytes_per_page: 4096.0 + 24.0,
            options,
            program,
            host,
            table_seed,
            nonce,
            running,
            phase: Phase::Connect,
            phase_since: Duration::ZERO,
            now: Duration::ZERO,
            actions: VecDeque::new(),
            held: None,
            ending: None,
            reconnecting: None,
            settling: None,
            finished: false,
            link_up: false,
            returns: false,
            peer_features: 0,
            hands_over: false,
            session: None,
            data_token: None,
            postcopy: None,
            last_break: None,
            machine: None,
            question: Vec::new(),
            peer_host: "the destination".into(),
            clock: Clock::default(),
            round: 0,
            round_under_way: false,
            proceed: false,
            cut: false,
            queue_awaited_since: None,
            cost: FixedCost::default(),
            course: Course::default(),
            paused_at: None,
            guest_stopped: false,
            downtime: None,
            sent_at: Duration::ZERO,
            report: Report::default(),
        };
        control.enter(Phase::Connect);
        control.act(Action::Connect);
        control
    }

    /// The next thing to do. Nothing while a test holds the move.
    pub fn poll_action(&mut self) -> Option<Action> {
        match &self.held {
            // What was queued up to the entry of the phase still goes out.
            Some(_) => match self.actions.front() {
                Some(Action::Enter(_) | Action::RoundEnded(_) | Action::Say(_)) => self.actions.pop_front(),
                _ => None,
            },
            None => self.actions.pop_front(),
        }
    }

    /// When to call [`SourceControl::handle`] with [`Input::Tick`] at the latest.
    pub fn deadline(&self) -> Option<Duration> {
        if self.ending.is_some() || self.settling.is_some() || self.held.is_some() {
            return None;
        }
        if let Some(reconnecting) = &self.reconnecting {
            return Some(reconnecting.deadline(self.options.reconnect_timeout));
        }
        if let Some(deadline) = self.postcopy.as_ref().and_then(PostCopying::deadline) {
            return Some(deadline);
        }
        let limit = match self.phase {
            Phase::Handshake => HANDSHAKE_LIMIT,
            Phase::Preflight => PREFLIGHT_LIMIT,
            Phase::Prepare => PREPARE_LIMIT,
            Phase::Commit => self.options.handover_timeout,
            Phase::Pause | Phase::FinalPages | Phase::State => {
                return self.paused_at.map(|at| at + self.options.pause_timeout);
            }
            Phase::FirstPass | Phase::Rounds => {
                let queue = self.queue_awaited_since.map(|since| since + QUEUE_LIMIT);
                let timeout = self.options.timeout.filter(|_| !self.cut);
                return queue.into_iter().chain(timeout).chain(self.certain_at()).min();
            }
            Phase::Connect | Phase::PreSwitchover => return None,
            // Neither end gives up by itself.
            Phase::PostCopy | Phase::PostCopyPaused | Phase::Completed => return None,
        };
        Some(self.phase_since + limit)
    }

    /// The shortest round trip to the peer so far, of a few messages on the control channel.
    pub fn round_trip(&self) -> Duration {
        self.cost.round_trip
    }

    /// What was asked for, as far as the peer knows it.
    pub fn encodings(&self) -> Encodings {
        let SourceOptions { compression, delta_cache_bytes, .. } = self.options;
        let knows = |feature| self.peer_features & feature != 0;
        Encodings { compression, delta_cache_bytes, sparse: knows(FEATURE_SPARSE), coming: knows(FEATURE_COMING) }
    }

    /// A peer from which nothing was heard for so long is lost: [`Input::LinkLost`].
    pub fn silence_limit(&self) -> Duration {
        match self.phase {
            Phase::Pause | Phase::FinalPages | Phase::State => SILENCE_LIMIT_PAUSED,
            _ => SILENCE_LIMIT,
        }
    }

    /// Whether it has ended, or is about to.
    pub fn is_ending(&self) -> bool {
        self.finished || self.ending.is_some()
    }

    /// Where the move stands.
    pub fn phase(&self) -> Phase {
        self.phase
    }

    /// The round under way.
    pub fn round(&self) -> u32 {
        self.round
    }

    /// The pause predicted when the last round ended, or what it takes with nothing to send where memory is handed over.
    pub fn predicted_pause(&self) -> Option<Duration> {
        match self.report.rounds.last() {
            Some(last) => Some(Duration::from_secs_f64(last.predicted_pause_ms / 1e3)),
            None => self.hands_over.then(|| self.cost.total()),
        }
    }

    /// The pause, once it is over: until *running* was heard.
    pub fn downtime(&self) -> Option<Duration> {
        self.downtime
    }

    /// While the links are broken.
    pub fn reconnecting(&self) -> Option<progress::Reconnecting> {
        let reconnecting = self.reconnecting.as_ref()?;
        Some(reconnecting.progress(self.now, self.options.reconnect_timeout))
    }

    /// What the pause can count on, bytes per second.
    pub fn switchover_bytes_per_s(&self) -> f64 {
        self.switchover_bytes_per_s
    }

    /// Whether calling the move off is still possible.
    pub fn may_cancel(&self) -> Result<(), CancelError> {
        match () {
            () if self.finished || self.ending.is_some() => Err(CancelError::Ended),
            () if self.phase.before_commit() || planted(Plant::CancelAfterCommit) => Ok(()),
            () => Err(CancelError::Committed(self.peer_host.clone())),
        }
    }

    /// Takes in what has happened.
    pub fn handle(&mut self, now: Duration, input: Input) {
        self.now = now;
        if self.finished {
            return;
        }
        if let Some(held) = &mut self.held {
            match input {
                Input::Release => {
                    let inputs = self.held.take().unwrap_or_default();
                    // The time spent held is not the phase's.
                    self.phase_since = now;
                    inputs.into_iter().for_each(|input| self.handle(now, input));
                }
                Input::Cancel if self.phase.before_commit() => {
                    self.held = None;
                    // What waited behind the hold never happens.
                    self.actions.clear();
                    self.end(Ending::Cancelled);
                }
                Input::Tick => {}
                input => held.push_back(input),
            }
            return;
        }
        match input {
            Input::Done(Done::Restored(result)) => return self.restored(result),
            _ if self.ending.is_some() => return,
            Input::Done(Done::Settled(settlement)) => return self.settled(settlement),
            // Late, and true: whoever asks the claims hears of it, too.
            Input::Message(Message::Running(_)) if self.settling.is_some() => return self.note_running(),
            Input::Abandon if self.settling.is_some() && self.is_following() => return self.abandon(),
            _ if self.settling.is_some() => return,
            input if self.reconnecting.is_some() => self.reconnect(input),
            // Whoever says no before anything was asked of it, refuses.
            Input::Message(Message::Abort(why)) if self.phase <= Phase::Preflight => {
                self.end(Ending::Refused(vec![Refusal::new("destination", why)]));
            }
            Input::Message(Message::Abort(why)) if self.is_following() => {
                self.unknown(format!(
                    "{} has given the machine up before all of its memory was there: {why}",
                    self.peer_host
                ));
            }
            Input::Message(Message::Abort(why)) => self.fail(format!("{} gave up: {why}", self.peer_host)),
            Input::Message(message) => self.message(message),
            Input::Done(done) => self.done(done),
            Input::LinkLost(why) => {
                self.link_up = false;
                self.link_lost(why);
            }
            Input::Unreachable { why, .. } if self.postcopy.is_some() => {
                self.link_up = false;
                self.link_lost(why);
            }
            Input::Failed(what) | Input::Unreachable { why: what, .. } => self.fail(what),
            Input::Cancel if self.may_cancel().is_ok() => self.end(Ending::Cancelled),
            Input::Proceed if self.phase == Phase::PreSwitchover && self.postcopy.is_none() => {
                self.proceed = true;
                match self.hands_over {
                    true => self.act(Action::Flush),
                    false => self.next_round(),
                }
            }
            Input::DowntimeLimit(limit) => self.options.downtime_limit = limit,
            Input::PostCopy if self.may_go_over().is_ok() => self.go_over("it was asked for".into(), false),
            Input::Proceed | Input::PostCopy | Input::Abandon | Input::Cancel | Input::Release | Input::Tick => {}
            Input::Looked(so_far) => self.looked(so_far),
        }
        self.check_deadline();
    }

    fn check_deadline(&mut self) {
        if self.deadline().is_none_or(|deadline| self.now < deadline) {
            return;
        }
        if self.reconnecting.is_some() {
            return self.reconnecting_overdue();
        }
        if self.postcopy.as_ref().and_then(PostCopying::deadline).is_some() {
            return self.link_lost("it did not open the channels for pages in time".into());
        }
        let peer = &self.peer_host;
        match self.phase {
            Phase::FirstPass | Phase::Rounds if self.queue_awaited_since.is_some() => self.next_round(),
            Phase::FirstPass | Phase::Rounds
                if self.options.timeout.is_none_or(|timeout| self.cut || self.now < timeout) =>
            {
                self.stalled_meanwhile();
            }
            Phase::FirstPass | Phase::Rounds => {
                self.cut = true;
                self.act(Action::CutRound);
            }
            Phase::Pause | Phase::FinalPages | Phase::State => self
                .fail(format!("the pause has lasted longer than --pause-timeout ({:.1?})", self.options.pause_timeout)),
            Phase::Commit => self.fail(format!(
                "{peer} did not say that it runs the guest within --handover-timeout ({:.1?})",
                self.options.handover_timeout
            )),
            phase => self.fail(format!("{peer} did not answer in time in phase {phase}")),
        }
    }

    fn message(&mut self, message: Message) {
        match (self.phase, message) {
            (Phase::Handshake, Message::Hello(hello)) => self.hello(hello),
            (Phase::Handshake, Message::ClockReply((number, realtime_ns))) if number == self.clock.asked => {
                self.clock_reply(realtime_ns);
            }
            (Phase::Preflight, Message::MemoryTaken(refused)) => self.memory_taken(refused),
            (Phase::Preflight, Message::Verdict(verdict)) => {
                for warning in verdict.warnings {
                    self.act(Action::Say(format!("warning from {}: {warning}", self.peer_host)));
                }
                match verdict.refusals.is_empty() {
                    true => self.act(Action::Judge(verdict.evidence)),
                    false => self.end(Ending::Refused(verdict.refusals)),
                }
            }
            (Phase::Prepare, Message::Prepared(prepared)) => {
                self.cost.load = prepared.load;
                if self.hands_over {
                    return self.act(Action::Flush);
                }
                self.session = self.returns.then_some(prepared.token);
                self.data_token = Some(prepared.token);
                self.act(Action::OpenData { token: prepared.token, table_seed: self.table_seed });
            }
            (Phase::State, Message::Ready(steps)) => {
                self.destination_steps(steps);
                self.step("wait for ready");
                match self.hands_over {
                    true => self.act(Action::LetGo),
                    false => self.commit(),
                }
            }
            (Phase::Commit, Message::Running(steps)) => {
                self.note_running();
                self.destination_steps(steps);
                self.step("hand over");
                match self.postcopy {
                    None => self.moved(),
                    Some(_) => self.follow(),
                }
            }
            (_, Message::PostCopyAnswer(refused)) if self.postcopy.is_some() => self.postcopy_answered(refused),
            (Phase::PostCopy, Message::Complete(filled)) => self.followed(filled),
            (Phase::PostCopy, Message::Running(_)) => self.note_follows(),
            (phase, message) => {
                self.fail(format!("{} sent {}, which has no place in phase {phase}", self.peer_host, message.name()))
            }
        }
    }

    fn done(&mut self, done: Done) {
        if self.phase < Phase::FirstPass {
            return self.set_up(done);
        }
        match (self.phase, done) {
            (Phase::FirstPass | Phase::Rounds, Done::RoundSent(sent)) => self.round_sent(sent),
            (Phase::FirstPass | Phase::Rounds, Done::QueueEmpty) if self.queue_awaited_since.is_some() => {
                self.next_round();
            }
            (Phase::Pause, Done::Stopped { sections, steps }) => {
                for TimedStep { name, duration } in steps {
                    self.push_step("source", name, duration);
                }
                self.sent_at = self.now;
                if self.hands_over {
                    self.enter(Phase::State);
                    self.act(Action::Send(Message::State(sections)));
                    return self.act(Action::Send(Message::Table(TableSum { sum: 0 })));
                }
                self.enter(Phase::FinalPages);
                self.act(Action::Send(Message::State(sections)));
                self.act(match self.postcopy {
                    None => Action::SendFinal,
                    Some(_) => Action::EndChannels,
                });
            }
            (Phase::FirstPass | Phase::Rounds | Phase::PreSwitchover, Done::PagesOpened) => self.pages_opened(),
            (Phase::PreSwitchover, Done::Flushed) if self.proceed => self.flushed(),
            (Phase::State, Done::LetGo) => self.let_go(),
            (Phase::FinalPages, Done::FinalSent { sum }) => {
                self.step("final pages");
                self.enter(Phase::State);
                if self.postcopy.is_some() {
                    self.act(Action::SendMissing);
                    self.act(Action::Serve);
                }
                self.act(Action::Send(Message::Table(TableSum { sum })));
            }
            (Phase::Completed, Done::Audited(result)) => {
                self.report.audit = Some(result);
                self.finish(SourceOutcome::Moved);
            }
            // Completions of a phase that has been left are late and mean nothing.
            (phase, done) => tracing::debug!("late in phase {phase}: {done:?}"),
        }
    }

    fn enter(&mut self, phase: Phase) {
        self.phase = phase;
        self.phase_since = self.now;
        self.act(Action::Enter(phase));
        if self.options.hold_at == Some(phase) {
            self.options.hold_at = None;
            self.held = Some(VecDeque::new());
        }
    }

    fn act(&mut self, action: Action) {
        self.actions.push_back(action);
    }

    /// A step of the pause that ends now, and the next begins.
    fn step(&mut self, name: &str) {
        let duration = self.now.saturating_sub(self.sent_at);
        self.sent_at = self.now;
        self.push_step("source", name.into(), duration);
    }

    fn push_step(&mut self, end: &'static str, name: String, duration: Duration) {
        self.report.steps.push(Step { end, name, duration_ms: duration.as_secs_f64() * 1e3 });
    }

    fn destination_steps(&mut self, steps: Vec<TimedStep>) {
        for TimedStep { name, duration } in steps.into_iter().take(64) {
            self.push_step("destination", name, duration);
        }
    }
}

#[cfg(test)]
mod tests;
