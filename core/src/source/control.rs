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
//! Whatever goes wrong before *commit* takes one way out (`SourceControl::end`), after which the guest is as it was.
//! After *commit* there is none but the claims ([`crate::ownership`]): without *running* the guest stays paused here until they
//! say whose it is, or, where there are none, a person decides.

mod ending;
mod measured;
mod vocabulary;

use std::collections::VecDeque;
use std::time::Duration;

use self::ending::Ending;
use self::measured::{Clock, FixedCost};
pub use self::vocabulary::{Action, Done, Input, RoundSent};
use super::{CancelError, Compression, SourceOptions, SourceOutcome};
use crate::machine::{MachineDescription, Refusal};
use crate::message::{
    Hello, Message, PreflightRequest, PrepareRequest, RoundStart, SharedClaims, TableSum, TimedStep, VERSION,
};
use crate::phase::Phase;
use crate::policy::{Decision, Limits, RoundEnd};
use crate::progress::{Report, RoundReport, Step};

/// How long the destination may take to answer *hello* and each clock request.
const HANDSHAKE_LIMIT: Duration = Duration::from_secs(10);
/// How long it may take to judge the machine.
const PREFLIGHT_LIMIT: Duration = Duration::from_secs(30);
/// How long it may take to build the machine.
const PREPARE_LIMIT: Duration = Duration::from_secs(60);
/// Clock samples: the one with the shortest round trip counts (as in NTP, RFC 5905 section 10).
const CLOCK_SAMPLES: u32 = 5;
/// The link is first probed with little, so that a slow one is not kept busy for long …
const FIRST_PROBE_BYTES: u64 = 1 << 20;
/// … and again with more if it was quick.
const SECOND_PROBE_BYTES: u64 = 4 << 20;
const QUICK_PROBE: Duration = Duration::from_millis(10);
/// What copying and hashing leave of a fast link, until a round has measured it: what one core of a small machine
/// does (docs/performance.md).
const DATA_PATH_BYTES_PER_S: f64 = 1.5e9;
/// Rounds that sent less say little about the rate …
const TELLING_ROUND_BYTES: u64 = 256 << 10;
/// … and as long as none was telling, this is what the pause reckons with: a Gbit/s link.
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
    /// The destination is lost, why, and the claims are being asked who has the machine.
    settling: Option<String>,
    finished: bool,
    link_up: bool,

    machine: Option<MachineDescription>,
    peer_host: String,
    clock: Clock,
    round: u32,
    proceed: bool,
    cut: bool,
    queue_awaited_since: Option<Duration>,
    cost: FixedCost,
    switchover_bytes_per_s: f64,
    wire_bytes_per_page: f64,
    paused_at: Option<Duration>,
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
            settling: None,
            finished: false,
            link_up: false,
            machine: None,
            peer_host: "the destination".into(),
            clock: Clock::default(),
            round: 0,
            proceed: false,
            cut: false,
            queue_awaited_since: None,
            cost: FixedCost::default(),
            paused_at: None,
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
                return queue.into_iter().chain(timeout).min();
            }
            Phase::Connect | Phase::PreSwitchover | Phase::Completed => return None,
        };
        Some(self.phase_since + limit)
    }

    /// The compression asked for.
    pub fn compression(&self) -> Compression {
        self.options.compression
    }

    /// Where the move stands.
    pub fn phase(&self) -> Phase {
        self.phase
    }

    /// The round under way.
    pub fn round(&self) -> u32 {
        self.round
    }

    /// The pause predicted when the last round ended.
    pub fn predicted_pause(&self) -> Option<Duration> {
        let last = self.report.rounds.last()?;
        Some(Duration::from_secs_f64(last.predicted_pause_ms / 1e3))
    }

    /// The pause, once it is over: until *running* was heard.
    pub fn downtime(&self) -> Option<Duration> {
        self.downtime
    }

    /// What the pause can count on, bytes per second.
    pub fn switchover_bytes_per_s(&self) -> f64 {
        self.switchover_bytes_per_s
    }

    /// Whether calling the move off is still possible.
    pub fn may_cancel(&self) -> Result<(), CancelError> {
        match () {
            () if self.finished || self.ending.is_some() => Err(CancelError::Ended),
            () if self.phase.before_commit() => Ok(()),
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
            _ if self.settling.is_some() => return,
            // Whoever says no before anything was asked of it, refuses.
            Input::Message(Message::Abort(why)) if self.phase <= Phase::Preflight => {
                self.end(Ending::Refused(vec![Refusal::new("destination", why)]));
            }
            Input::Message(Message::Abort(why)) => self.fail(format!("{} gave up: {why}", self.peer_host)),
            Input::Message(message) => self.message(message),
            Input::Done(done) => self.done(done),
            Input::LinkLost(why) => {
                self.link_up = false;
                self.fail(format!("the connection to {} broke: {why}", self.peer_host));
            }
            Input::Failed(what) => self.fail(what),
            Input::Cancel if self.phase.before_commit() => self.end(Ending::Cancelled),
            Input::Proceed if self.phase == Phase::PreSwitchover => {
                self.proceed = true;
                self.next_round();
            }
            Input::DowntimeLimit(limit) => self.options.downtime_limit = limit,
            Input::Proceed | Input::Cancel | Input::Release | Input::Tick => {}
        }
        self.check_deadline();
    }

    fn check_deadline(&mut self) {
        if self.deadline().is_none_or(|deadline| self.now < deadline) {
            return;
        }
        let peer = &self.peer_host;
        match self.phase {
            Phase::FirstPass | Phase::Rounds if self.queue_awaited_since.is_some() => self.next_round(),
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
                self.act(Action::OpenData { token: prepared.token, table_seed: self.table_seed });
            }
            (Phase::State, Message::Ready(steps)) => {
                self.destination_steps(steps);
                self.step("wait for ready");
                self.commit();
            }
            (Phase::Commit, Message::Running(steps)) => {
                self.note_running();
                self.destination_steps(steps);
                self.step("hand over");
                self.moved();
            }
            (phase, message) => {
                self.fail(format!("{} sent {}, which has no place in phase {phase}", self.peer_host, message.name()))
            }
        }
    }

    fn hello(&mut self, hello: Hello) {
        if hello.version.major != VERSION.major {
            let why = format!(
                "{} ({}) speaks protocol {}.{}, this end {}.{}: the same version of Godwit is needed on both ends",
                hello.host, hello.program, hello.version.major, hello.version.minor, VERSION.major, VERSION.minor
            );
            return self.end(Ending::Refused(vec![Refusal::new("protocol", why)]));
        }
        self.peer_host = hello.host;
        self.ask_clock();
    }

    fn ask_clock(&mut self) {
        self.clock.asked += 1;
        self.clock.asked_at = self.now;
        self.act(Action::Send(Message::ClockRequest(self.clock.asked)));
    }

    /// Called by the driver as it sends a clock request: the time on this host's CLOCK_REALTIME.
    pub fn clock_asked(&mut self, now: Duration, realtime_ns: i64) {
        self.clock.asked_at = now;
        self.clock.asked_realtime_ns = realtime_ns;
    }

    fn clock_reply(&mut self, realtime_ns: i64) {
        let round_trip = self.now.saturating_sub(self.clock.asked_at);
        if self.clock.best_round_trip.is_none_or(|best| round_trip < best) {
            self.clock.best_round_trip = Some(round_trip);
            let middle = self.clock.asked_realtime_ns.saturating_add(round_trip.as_nanos() as i64 / 2);
            self.clock.offset_ns = realtime_ns.saturating_sub(middle);
            self.cost.round_trip = round_trip;
        }
        if self.clock.asked < CLOCK_SAMPLES {
            return self.ask_clock();
        }
        self.enter(Phase::Preflight);
        self.act(Action::Describe);
    }

    fn done(&mut self, done: Done) {
        match (self.phase, done) {
            (Phase::Connect, Done::Connected) => {
                self.link_up = true;
                self.enter(Phase::Handshake);
                let (program, host) = (self.program.clone(), self.host.clone());
                self.act(Action::Send(Message::Hello(Hello { version: VERSION, features: 0, program, host })));
            }
            (Phase::Preflight, Done::Described(machine, question)) => {
                let request = PreflightRequest {
                    machine: machine.clone(),
                    question,
                    claims: self.options.ownership.as_deref().map(|holding| SharedClaims {
                        directory: holding.directory().display().to_string(),
                        claim: holding.claim().to_string(),
                    }),
                    channels: self.options.channels,
                    dry_run: self.options.dry_run,
                };
                self.machine = Some(machine);
                self.act(Action::Send(Message::Preflight(request)));
            }
            (Phase::Preflight, Done::Judged(refusals)) => match refusals.is_empty() {
                true if self.options.dry_run => self.end(Ending::WouldMove),
                true => {
                    self.enter(Phase::Prepare);
                    self.act(Action::Rehearse);
                }
                false => self.end(Ending::Refused(refusals)),
            },
            (Phase::Prepare, Done::Rehearsed { sections, pause }) => {
                self.cost.pause = pause;
                self.act(Action::Send(Message::Prepare(PrepareRequest {
                    table_seed: self.table_seed,
                    verify: self.options.verify,
                    clock_offset_ns: self.clock.offset_ns,
                    rehearsal: sections,
                })));
            }
            // Without a cap the rounds themselves measure the link.
            (Phase::Prepare, Done::DataOpened { capped }) => match self.options.switchover_bandwidth_bytes_per_s {
                None if capped => self.act(Action::Probe(FIRST_PROBE_BYTES)),
                _ => self.act(Action::StartLog),
            },
            (Phase::Prepare, Done::Probed { bytes, duration }) => {
                if duration < QUICK_PROBE && bytes < SECOND_PROBE_BYTES {
                    return self.act(Action::Probe(SECOND_PROBE_BYTES));
                }
                let rate = bytes as f64 / duration.as_secs_f64().max(1e-6);
                self.switchover_bytes_per_s = rate.min(DATA_PATH_BYTES_PER_S);
                self.act(Action::Say(format!("the link takes {:.0} MB/s", rate / 1e6)));
                self.act(Action::StartLog);
            }
            (Phase::Prepare, Done::LogStarted) => {
                self.enter(Phase::FirstPass);
                self.begin_round();
            }
            (Phase::FirstPass | Phase::Rounds, Done::RoundSent(sent)) => self.round_sent(sent),
            (Phase::FirstPass | Phase::Rounds, Done::QueueEmpty) if self.queue_awaited_since.is_some() => {
                self.next_round();
            }
            (Phase::Pause, Done::Stopped { sections, steps }) => {
                for TimedStep { name, duration } in steps {
                    self.push_step("source", name, duration);
                }
                self.sent_at = self.now;
                self.enter(Phase::FinalPages);
                self.act(Action::Send(Message::State(sections)));
                self.act(Action::SendFinal);
            }
            (Phase::FinalPages, Done::FinalSent { sum }) => {
                self.step("final pages");
                self.enter(Phase::State);
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

    fn begin_round(&mut self) {
        let pages = match (self.report.rounds.last(), &self.machine) {
            (Some(round), _) => round.dirty_pages,
            (None, Some(machine)) => machine.memory_bytes() / 4096,
            (None, None) => 0,
        };
        self.act(Action::Send(Message::Round(RoundStart { round: self.round, pages })));
        self.act(Action::Round { first: self.round == 0 });
    }

    fn next_round(&mut self) {
        self.queue_awaited_since = None;
        if self.phase != Phase::Rounds {
            self.enter(Phase::Rounds);
        }
        self.round += 1;
        self.begin_round();
    }

    fn round_sent(&mut self, sent: RoundSent) {
        let seconds = sent.duration.as_secs_f64().max(1e-9);
        if sent.wire_bytes >= TELLING_ROUND_BYTES {
            self.wire_bytes_per_page = sent.wire_bytes as f64 / sent.pages.max(1) as f64;
            let rate = sent.wire_bytes as f64 / seconds;
            if self.options.switchover_bandwidth_bytes_per_s.is_none() {
                // Under a cap a round shows what the link takes at least; without one, what it takes.
                self.switchover_bytes_per_s = if sent.capped { self.switchover_bytes_per_s.max(rate) } else { rate };
            }
        }
        self.cost.harvest = sent.harvest;
        let end = RoundEnd {
            round: self.round,
            elapsed: self.now,
            dirty_pages: sent.dirty_pages,
            wire_bytes_per_page: self.wire_bytes_per_page,
            queued_bytes: sent.queued_bytes,
            switchover_bytes_per_s: self.switchover_bytes_per_s,
            fixed: self.cost.total(),
        };
        let report = RoundReport {
            round: self.round,
            duration_ms: sent.duration.as_secs_f64() * 1e3,
            pages_sent: sent.pages,
            wire_bytes: sent.wire_bytes,
            dirty_pages: sent.dirty_pages,
            predicted_pause_ms: end.predicted_pause().as_secs_f64() * 1e3,
        };
        self.report.rounds.push(report.clone());
        self.act(Action::RoundEnded(report));
        let limits = Limits {
            downtime: self.options.downtime_limit,
            max_rounds: self.options.max_rounds,
            timeout: self.options.timeout,
            on_stall: self.options.on_stall,
        };
        match end.decide(&limits) {
            Decision::AwaitQueue => {
                self.queue_awaited_since = Some(self.now);
                self.act(Action::AwaitQueue);
            }
            Decision::Continue => self.next_round(),
            Decision::Stop => {
                let pause = end.predicted_pause();
                self.act(Action::Say(format!(
                    "stopping the guest after round {}: {} dirty pages, predicted pause {pause:.1?} ({:.1?} of it fixed), limit {:.1?}",
                    self.round, sent.dirty_pages, end.fixed, limits.downtime
                )));
                self.switch_over();
            }
            Decision::ForceStop(why) => {
                self.act(Action::Say(format!("stopping the guest all the same (--on-stall force): {why}")));
                self.switch_over();
            }
            Decision::GiveUp(why) => self.fail(format!("the move does not converge: {why}")),
        }
    }

    fn switch_over(&mut self) {
        if self.options.pause_before_switchover && !self.proceed {
            return self.enter(Phase::PreSwitchover);
        }
        self.enter(Phase::Pause);
        self.paused_at = Some(self.now);
        self.act(Action::StopGuest);
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
