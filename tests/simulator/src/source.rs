//! The sending end: what the driver does in life, without its threads.
//!
//! It carries out what the control plane says and tells it what came of it. The machine's thread is a queue of jobs, each of which
//! takes its time; data channels are polled, one thing at a time, so that the guest and all else goes on in between.

mod channels;
mod jobs;
mod links;
mod pages;

use std::collections::VecDeque;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use godwit_core::fit::Watch;
use godwit_core::machine::SourceMachine;
use godwit_core::memory_files::{MemoryOffer, OfferedRegion};
use godwit_core::message::{Applied, Message};
use godwit_core::ownership::holding::Next;
use godwit_core::ownership::modelled::{Answer, Call};
use godwit_core::ownership::source::Input as OwnershipInput;
use godwit_core::ownership::{Holding, RETRY_GAP, Settlement};
use godwit_core::pacer::Pacer;
use godwit_core::pending::Harvester;
use godwit_core::source::control::{Action, Done, Input, NotOffered, SourceControl};
use godwit_core::source::sending::Order;
use godwit_core::source::tally::Tally;
use godwit_core::source::{SendingChannel, SourceOptions, SourceOutcome, SourcePages, Unacknowledged};
use godwit_core::{Phase, SessionToken};

use self::channels::Wire;
use self::jobs::Job;
use self::pages::Pages;
use crate::chance::us;
use crate::event::{Dial, Event, Wake};
use crate::link::{LinkEnd, PING_INTERVAL};
use crate::machine::Machine;
use crate::process::{Role, TICK};
use crate::world::World;

/// How long the destination has to hear the last word.
const LAST_WORD_LIMIT: Duration = Duration::from_millis(500);

/// The sending end of a move.
pub struct SourceEnd {
    /// The control plane.
    pub control: SourceControl,
    /// The process at the other end.
    pub to: usize,
    /// The control link, once open.
    pub link: Option<LinkEnd>,
    began: Duration,
    machine: Arc<Machine>,
    holding: Option<Arc<Holding>>,
    verify: bool,
    audit_failed: bool,
    jobs: VecDeque<Job>,
    job_since: Option<Duration>,
    pause_limit: Duration,
    pages: Option<Arc<SourcePages>>,
    harvester: Option<Mutex<Harvester>>,
    /// How often the links were made: what comes of earlier ones is late.
    links: u32,
    sending: Vec<SendingChannel>,
    unacknowledged: Vec<Unacknowledged>,
    wires: Vec<Wire>,
    channel_count: u16,
    pacer: Pacer,
    cut: bool,
    tally: Tally,
    round: Option<(Duration, u64)>,
    watch: Option<Watch>,
    probe: Option<(u64, Duration)>,
    queue_awaited: bool,
    table_seed: u64,
    /// What the session shows when its links are made anew.
    session: Option<SessionToken>,
    postcopy: Pages,
    settling_until: Option<Duration>,
    tick_at: Duration,
}

impl SourceEnd {
    /// A move that begins now.
    pub fn new(
        control: SourceControl,
        to: usize,
        began: Duration,
        (machine, holding): (Arc<Machine>, Option<Arc<Holding>>),
        options: &SourceOptions,
    ) -> Self {
        Self {
            control,
            to,
            link: None,
            began,
            machine,
            holding,
            verify: options.verify,
            audit_failed: false,
            jobs: VecDeque::new(),
            job_since: None,
            pause_limit: options.pause_timeout,
            pages: None,
            harvester: None,
            links: 0,
            sending: Vec::new(),
            unacknowledged: Vec::new(),
            wires: Vec::new(),
            channel_count: options.channels,
            pacer: Pacer::new(options.max_bandwidth_bytes_per_s),
            cut: false,
            tally: Tally::default(),
            round: None,
            watch: None,
            probe: None,
            queue_awaited: false,
            table_seed: 0,
            session: None,
            postcopy: Pages::default(),
            settling_until: None,
            tick_at: Duration::ZERO,
        }
    }

    /// When the move began.
    pub fn began(&self) -> Duration {
        self.began
    }

    /// Whether the guest runs at the other end, or may, while this end has pages that it lacks.
    pub fn follows(&self) -> bool {
        matches!(self.control.phase(), Phase::PostCopy | Phase::PostCopyPaused)
    }

    /// Whether the machine's thread has something to do.
    pub fn is_busy(&self) -> bool {
        self.job_since.is_some()
    }

    /// What the session shows when its links are made anew, once they have been.
    pub fn session(&self) -> Option<SessionToken> {
        self.session
    }

    fn queued_bytes(&self) -> u64 {
        let queued = |(sending, unacknowledged): (&SendingChannel, &Unacknowledged)| {
            sending.written_bytes().saturating_sub(unacknowledged.applied_bytes())
        };
        self.sending.iter().zip(&self.unacknowledged).map(queued).sum()
    }

    fn written_bytes(&self) -> u64 {
        self.sending.iter().map(SendingChannel::written_bytes).sum()
    }
}

/// A process and the end it plays.
type End<'e> = (usize, &'e mut SourceEnd);

impl World {
    /// Lets the sending end of a process do something, and then all that follows from it.
    pub fn with_source(&mut self, process: usize, act: impl FnOnce(&mut Self, End<'_>)) {
        let Some(mut end) = self.processes[process].role.take_source() else { return };
        act(self, (process, &mut end));
        let mut outcome = None;
        while let Some(action) = end.control.poll_action() {
            outcome = self.source_does((process, &mut end), action);
            if outcome.is_some() {
                break;
            }
        }
        match outcome {
            Some(outcome) => self.source_ended(process, *end, outcome),
            None => {
                let next = end.control.deadline().map_or(Duration::MAX, |deadline| end.began + deadline);
                if next < end.tick_at {
                    end.tick_at = next;
                    self.wake_at(process, next, Wake::Tick);
                }
                self.processes[process].role = Role::Source(end);
            }
        }
    }

    /// A move has begun.
    pub fn source_begins(&mut self, process: usize) {
        self.wake_after(process, PING_INTERVAL, Wake::Ping);
        self.wake_after(process, TICK, Wake::Tick);
        self.with_source(process, |world, (_, end)| end.tick_at = world.now() + TICK);
    }

    /// Something is due.
    pub fn source_wakes(&mut self, process: usize, wake: Wake) {
        self.with_source(process, |world, (process, end)| match wake {
            Wake::Tick => world.source_tick((process, end)),
            Wake::Ping => {
                world.source_sends(end, &Message::Ping(()));
                world.wake_after(process, PING_INTERVAL, Wake::Ping);
            }
            Wake::Dialled(links, dial, reached) if links == end.links => {
                world.source_dialled((process, end), dial, reached);
            }
            Wake::Dialled(..) => {}
            Wake::Job => world.source_job((process, end)),
            Wake::Channel(links, index) if links == end.links => world.source_polls((process, end), index),
            Wake::Channel(..) => {}
            Wake::Push(links) if links == end.links => world.source_pushes((process, end)),
            Wake::Push(_) => {}
            Wake::Retry => world.source_settles((process, end), OwnershipInput::Retry),
        });
    }

    fn source_input(&mut self, end: &mut SourceEnd, input: Input) {
        end.control.handle(self.now() - end.began, input);
    }

    /// Something was heard, or the link has ended.
    pub fn source_hears(&mut self, process: usize, message: Result<Message, String>) {
        self.with_source(process, |world, (_, end)| match message {
            Ok(Message::Ping(())) => {}
            Ok(Message::Applied(applied)) => world.source_applied(end, applied),
            Ok(Message::Missing(part)) => world.source_hears_missing(end, &part),
            Ok(message) => {
                world.note(format_args!("p{process} hears {}", message.name()));
                world.source_input(end, Input::Message(message));
            }
            Err(why) => {
                if let Some(link) = &mut end.link {
                    link.lost = true;
                }
                world.note(format_args!("p{process} has lost its destination: {why}"));
                world.source_input(end, Input::LinkLost(why));
            }
        });
    }

    fn source_applied(&mut self, end: &mut SourceEnd, Applied { channel, mark }: Applied) {
        let Some(unacknowledged) = end.unacknowledged.get_mut(usize::from(channel)) else { return };
        if let Err(error) = unacknowledged.applied(mark) {
            return self.source_input(end, Input::Failed(error.to_string()));
        }
        if end.queue_awaited {
            self.source_queue(end);
        }
        if channel == 0
            && let Some((bytes, began)) = end.probe.take()
        {
            let duration = self.now() - began;
            self.source_input(end, Input::Done(Done::Probed { bytes, duration }));
        }
    }

    fn source_queue(&mut self, end: &mut SourceEnd) {
        end.queue_awaited = end.queued_bytes() > 0;
        if !end.queue_awaited {
            self.source_input(end, Input::Done(Done::QueueEmpty));
        }
    }

    fn source_tick(&mut self, (process, end): End<'_>) {
        let now = self.now();
        if now >= end.tick_at {
            end.tick_at = now + TICK;
            self.wake_at(process, end.tick_at, Wake::Tick);
        }
        self.source_looks(end);
        self.source_input(end, Input::Tick);
        let limit = end.control.silence_limit();
        if end.link.as_mut().is_some_and(|link| link.has_fallen_silent(now, limit)) {
            self.note(format_args!("p{process} has heard nothing for {limit:?}"));
            self.source_input(end, Input::LinkLost("nothing was heard from it".into()));
        }
    }

    fn source_sends(&mut self, end: &mut SourceEnd, message: &Message) {
        let Some(LinkEnd { id, side, .. }) = end.link else { return };
        if let Message::ClockRequest(_) = message {
            let now = self.now();
            end.control.clock_asked(now - end.began, now.as_nanos() as i64);
        }
        self.send(id, side, message);
    }

    /// Carries out an action; some outcome is the end.
    fn source_does(&mut self, (process, end): End<'_>, action: Action) -> Option<SourceOutcome> {
        match action {
            Action::Enter(phase) => self.entered(process, phase),
            Action::RoundEnded(_) => {}
            Action::Say(text) => self.note(format_args!("p{process} says: {text}")),
            Action::Send(message) => self.source_sends(end, &message),
            Action::CutRound => end.cut = true,
            Action::UncutRounds => end.cut = false,
            Action::OpenPages { token } => self.source_dials((process, end), Dial::Pages(token)),
            Action::LeavePages => self.source_leaves_pages(end),
            Action::SendMissing => self.source_sends_missing(end),
            Action::Serve => self.source_serves(end),
            Action::Push => self.source_begins_to_push((process, end)),
            Action::EndChannels => self.source_orders((process, end), Order::End, usize::MAX),
            Action::Throttle(hold) => {
                self.source_notes_held(end, hold.share);
                self.source_queues_job((process, end), Job::Throttle(hold));
            }
            Action::HangUp => self.source_hangs_up(end),
            Action::Finish(outcome) => return Some(*outcome),
            Action::Connect => self.source_dials((process, end), Dial::First),
            Action::Reconnect { token } => {
                end.session = Some(token);
                self.source_dials((process, end), Dial::Again(token));
            }
            Action::Describe => self.source_queues_job((process, end), Job::Describe),
            Action::OfferMemory => self.source_offers_memory((process, end)),
            Action::Judge(_) => self.source_queues_job((process, end), Job::Judge),
            Action::Rehearse => self.source_queues_job((process, end), Job::Rehearse),
            Action::OpenData { token, table_seed } => {
                end.table_seed = table_seed;
                self.source_dials((process, end), Dial::Data(token));
            }
            Action::ReopenData { token } => self.source_dials((process, end), Dial::Data(token)),
            Action::BreakOff { resume } => {
                self.source_leaves_links(end);
                self.source_queues_job((process, end), Job::BreakOff { resume });
            }
            Action::Probe(bytes) => {
                end.probe = Some((bytes, self.now()));
                self.source_orders((process, end), Order::Probe(bytes), 1);
            }
            Action::Flush => self.source_queues_job((process, end), Job::Flush),
            Action::StartLog => self.source_queues_job((process, end), Job::StartLog),
            Action::Round { first } => {
                end.round = Some((self.now(), end.written_bytes()));
                match (&mut end.watch, &end.pages) {
                    (None, Some(pages)) => {
                        let began = self.now() - end.began;
                        end.watch = Watch::new(pages.view.layout(), began, end.control.encodings()).ok();
                    }
                    (Some(watch), _) => watch.round_begins(self.now() - end.began),
                    (None, None) => {}
                }
                self.source_orders((process, end), Order::Round { first }, usize::MAX);
            }
            Action::AwaitQueue => self.source_queue(end),
            Action::StopGuest => {
                self.source_notes_held(end, 1.0);
                self.source_queues_job((process, end), Job::StopGuest);
            }
            Action::LetGo => self.source_queues_job((process, end), Job::LetGo),
            Action::SendFinal => {
                self.source_orders((process, end), Order::Final { link_bytes_per_s: None }, usize::MAX);
            }
            Action::Restore { resume } => {
                self.source_queues_job((process, end), Job::Restore { resume });
            }
            Action::Audit => self.source_queues_job((process, end), Job::Audit),
            Action::Settle(patience) => {
                end.settling_until = Some(self.now() + patience);
                self.source_settles((process, end), OwnershipInput::Lost);
            }
        }
        None
    }

    /// The files that would come along in life are the memory of this process, whose number stands for them.
    fn source_offers_memory(&mut self, (process, end): End<'_>) {
        if !self.setup.one_host {
            return self.source_input(end, Input::Done(Done::NotOffered(NotOffered::Link)));
        }
        let regions = self.setup.description.memory.iter();
        let regions =
            regions.map(|region| OfferedRegion { region: *region, device: 0, inode: process as u64, offset: 0 });
        let offer = MemoryOffer { boot_id: String::new(), regions: regions.collect() };
        self.source_sends(end, &Message::Memory(offer));
    }

    /// The store has answered what the settling of the handover had asked.
    pub fn source_learns(&mut self, process: usize, answer: Answer) {
        self.with_source(process, |world, end| {
            if let Some(input) = settling_input(answer) {
                world.source_settles(end, input);
            }
        });
    }

    fn source_settles(&mut self, (process, end): End<'_>, input: OwnershipInput) {
        let (Some(holding), Some(until)) = (end.holding.clone(), end.settling_until) else { return };
        let (next, told) = holding.settling(input);
        if let Some(text) = &told {
            self.note(format_args!("p{process} says: {text}"));
        }
        match next {
            Next::Claim(claim) => self.call_store(process, Call::Claim(claim)),
            Next::Look => self.call_store(process, Call::Look),
            Next::Wait if self.now() + RETRY_GAP > until => {
                end.settling_until = None;
                let undecided = Settlement::Undecided(told.unwrap_or_default());
                self.source_input(end, Input::Done(Done::Settled(undecided)));
            }
            Next::Wait => self.wake_after(process, RETRY_GAP, Wake::Retry),
            Next::Settled(settlement) => {
                end.settling_until = None;
                self.source_input(end, Input::Done(Done::Settled(settlement)));
            }
        }
    }

    /// The move is over, as seen from here.
    fn source_ended(&mut self, process: usize, mut end: SourceEnd, outcome: SourceOutcome) {
        self.note(format_args!("p{process} ends its move: {}", in_words(&outcome)));
        self.source_hangs_up(&mut end);
        if let Some(LinkEnd { id, side, .. }) = end.link {
            let delay = self.chance.time(us(10), LAST_WORD_LIMIT);
            self.agenda.after(delay, Event::Close(id, side));
        }
        let lacking = |machine: &Arc<Machine>| !machine.is_whole();
        if matches!(outcome, SourceOutcome::Moved(_)) && self.processes[end.to].machine.as_ref().is_some_and(lacking) {
            self.violate("the source has let go of memory that the guest still lacks");
        }
        if end.audit_failed {
            self.violate("the audit found memory that is not what was sent");
        }
        if let SourceOutcome::Moved(_) | SourceOutcome::Unknown(..) = outcome {
            // Stopping a log that is off does nothing, and this one does not fail.
            let _ = end.machine.dirty_log().stop();
        }
        self.move_ended(process, outcome);
    }
}

/// What an answer is to a handover that is being settled.
pub fn settling_input(answer: Answer) -> Option<OwnershipInput> {
    match answer {
        Answer::Claimed(answer) => Some(OwnershipInput::Claimed(answer)),
        Answer::Seen(reading) => Some(OwnershipInput::Seen(reading)),
        Answer::Marked(_) => None,
    }
}

fn in_words(outcome: &SourceOutcome) -> String {
    match outcome {
        SourceOutcome::Moved(_) => "moved".into(),
        SourceOutcome::WouldMove(_) => "would move".into(),
        SourceOutcome::Refused(refusals) => {
            let reasons: Vec<_> = refusals.iter().map(ToString::to_string).collect();
            format!("refused: {}", reasons.join("; "))
        }
        SourceOutcome::Failed(why, _) => format!("failed: {why}"),
        SourceOutcome::Cancelled(_) => "cancelled".into(),
        SourceOutcome::Unknown(why, _) => format!("unknown: {why}"),
    }
}
