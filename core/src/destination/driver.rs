//! The destination in life: threads, channels and a clock around [`DestinationControl`].

mod links;
mod pages;

use std::io;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, Sender};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

pub use self::links::{accept, start as start_link};
use super::claims::Shared as SharedClaims;
use super::control::{Action, DestinationControl, Input};
use super::filling::{Filling, Links, Service};
use super::populating::Populating;
use super::receiving::{DestinationPages, ReceivingChannel};
use super::{DestinationOptions, DestinationOutcome};
use crate::channel::{Channel, HangUp, IncomingData, SessionToken};
use crate::layout::Layout;
use crate::link::ControlLink;
use crate::machine::{
    DestinationHost, DestinationMachine, LoadContext, MachineDescription, MachineError, Refusal, Section,
};
use crate::message::{self, Message, PrepareRequest, TimedStep};
use crate::ownership::{CALL_LIMIT, Claim, Nonce, RETRY_GAP, RightToRun};
use crate::phase::Phase;
use crate::postcopy::Wanted;
use crate::priority::{drop_later, run_promptly};
use crate::progress::{Event, Observer, Report, Step};
use crate::random;
use crate::table::{PageHasher, PageTable};
use crate::view::MemoryView;

/// How often silence is looked at.
const TICK: Duration = Duration::from_millis(200);
/// How often it is looked whether a source that is away has come back.
const AWAY_TICK: Duration = Duration::from_millis(20);

/// What happened, and on which links.
pub(super) type FromLinks = (u32, Input);

/// One attempt to take a machine in.
pub struct Driver<'a, H: DestinationHost> {
    host: &'a mut H,
    data: &'a mut dyn IncomingData,
    observer: Arc<dyn Observer>,
    options: DestinationOptions,
    token: SessionToken,
    link: ControlLink,
    /// How often the links were made: what comes from earlier ones is late.
    links: u32,
    link_lost: bool,
    control: DestinationControl,
    sender: Sender<FromLinks>,
    inputs: Receiver<FromLinks>,
    machine: Option<H::Machine>,
    pages: Option<Arc<DestinationPages>>,
    /// Makes memory ready for what comes in the first pass.
    populating: Option<Populating>,
    /// The data channels, while no worker has them.
    idle: Vec<ReceivingChannel>,
    workers: Vec<JoinHandle<ReceivingChannel>>,
    hang_ups: Vec<Arc<dyn HangUp>>,
    /// As it was agreed on.
    description: Option<MachineDescription>,
    /// Whether memory can be filled while the guest runs is to be judged in preflight.
    check_filling: bool,
    /// The channels for pages, until they are served, and how many pages are known to be missing.
    page_channels: Vec<Channel>,
    wanted: Option<Wanted>,
    first_page_channel: u16,
    /// Fills memory while the guest runs.
    service: Option<Arc<Service>>,
    /// Why these links are of no use any more.
    lost: Option<String>,
    /// A control channel of this session that has come back, and is not taken up yet.
    returned: Option<Channel>,
    /// Until when to wait for one.
    away_until: Option<Instant>,
    /// Until when the control link of a session whose data channels broke may bring a last word.
    last_word_until: Option<Instant>,
    stop_told: bool,
    claims: Option<SharedClaims>,
    /// The files behind the machine's memory were taken over.
    memory_taken: bool,
    /// How long each attempt to claim took, and what followed.
    handover_steps: Vec<TimedStep>,
    began: Instant,
    report: Report,
}

impl<'a, H: DestinationHost> Driver<'a, H> {
    /// Starts the control link's threads.
    pub fn new(
        control: Channel,
        data: &'a mut dyn IncomingData,
        host: &'a mut H,
        options: &DestinationOptions,
        observer: Arc<dyn Observer>,
    ) -> io::Result<Self> {
        let token = SessionToken(random::secret()?);
        let peer = control.peer.clone();
        let (sender, inputs) = mpsc::channel();
        let link = links::start(control, 0, sender.clone())?;
        Ok(Self {
            host,
            data,
            observer,
            options: options.clone(),
            token,
            link,
            links: 0,
            link_lost: false,
            control: DestinationControl::new(options.clone(), token, peer),
            sender,
            inputs,
            machine: None,
            pages: None,
            populating: None,
            idle: Vec::new(),
            workers: Vec::new(),
            hang_ups: Vec::new(),
            description: None,
            check_filling: false,
            page_channels: Vec::new(),
            wanted: None,
            first_page_channel: 0,
            service: None,
            lost: None,
            returned: None,
            away_until: None,
            last_word_until: None,
            stop_told: false,
            claims: None,
            memory_taken: false,
            handover_steps: Vec::new(),
            began: Instant::now(),
            report: Report::default(),
        })
    }

    /// Runs the attempt to its end.
    pub fn run(mut self) -> DestinationOutcome<H::Machine> {
        let _prompt = run_promptly();
        loop {
            while let Some(action) = self.control.poll_action() {
                match action {
                    Action::Own { running, right } => return self.own(running, right),
                    Action::Lose(why) => {
                        self.stop_filling();
                        self.hang_up();
                        return DestinationOutcome::Dropped(why);
                    }
                    Action::GiveUp(why) => return self.give_up(why),
                    action => self.execute(action),
                }
            }
            let tick = if self.away_until.is_some() { AWAY_TICK } else { TICK };
            match self.inputs.recv_timeout(tick) {
                Ok((links, input)) if links == self.links => {
                    self.link_lost |= matches!(input, Input::LinkLost(_));
                    if let Input::LinkLost(why) | Input::ChannelLost(why) = &input {
                        self.lost = Some(why.clone());
                    }
                    self.control.handle(input);
                }
                // Late.
                Ok(_) => {}
                Err(RecvTimeoutError::Timeout | RecvTimeoutError::Disconnected) => {}
            }
            self.listen_for_silence();
            self.look_for_return();
            self.look_for_orders();
        }
    }

    fn execute(&mut self, action: Action) {
        match action {
            Action::Send(message) => self.send(message),
            Action::TakeMemory(offer) => {
                let files = offer.accept(self.link.take_files());
                let taken = files.and_then(|files| self.host.take_memory(files));
                self.memory_taken = taken.is_ok();
                self.control.handle(Input::MemoryTaken(taken.map(|()| offer)));
            }
            Action::Check(machine, question, claims) => {
                self.enter(Phase::Preflight);
                let mut verdict = self.host.check(&machine, &question);
                if self.check_filling {
                    verdict.refusals.extend(self.host.check_filling(&machine).err());
                }
                verdict.refusals.extend(self.agree_on_claims(claims.as_ref(), &machine.name).err());
                for warning in &verdict.warnings {
                    tracing::warn!("{warning}");
                }
                self.control.handle(Input::Checked(verdict));
            }
            Action::CheckFilling => self.check_filling = true,
            Action::JudgeFilling => {
                // What is missing must stay so; and not in the pause, which would wait for it.
                self.populating = None;
                let objection = match &self.description {
                    Some(machine) => self.host.check_filling(machine).err().map(|refusal| refusal.reason),
                    None => Some("there is no machine yet".into()),
                };
                self.control.handle(Input::FillingJudged(objection));
            }
            Action::OpenPages { first } => {
                let opened = self.open_pages(first).map_err(|error| error.to_string());
                self.control.handle(Input::DataOpened(opened));
            }
            Action::NoteMissing(part) => {
                if let Err(why) = self.note_missing(&part) {
                    self.control.handle(Input::Nonsense(why));
                }
            }
            Action::Build { machine, request } => {
                self.enter(Phase::Prepare);
                let built = self.build(&machine, request).map_err(|error| error.to_string());
                self.control.handle(Input::Built(built));
            }
            Action::OpenData { channels } => {
                let opened = self.open_data(channels).map_err(|error| error.to_string());
                if opened.is_ok() && self.links == 0 {
                    self.enter(Phase::FirstPass);
                }
                self.control.handle(Input::DataOpened(opened));
            }
            Action::Round(0) => {}
            Action::Round(round) => {
                self.stop_populating();
                if round == 1 {
                    self.enter(Phase::Rounds);
                }
            }
            Action::Load(sections, context) => {
                self.enter(Phase::State);
                self.stop_populating();
                let steps = self.load(&sections, &context).map_err(|error| error.to_string());
                self.control.handle(Input::Loaded(steps));
            }
            Action::Claim(claim) => {
                self.enter(Phase::Commit);
                self.claim(&claim);
            }
            Action::Detach => self.detach(),
            Action::AwaitReturn(limit) => self.away_until = Some(Instant::now() + limit),
            Action::Attach => {
                if let Err(why) = self.attach() {
                    self.control.handle(Input::LinkLost(why.to_string()));
                }
            }
            Action::Wait => {
                thread::sleep(RETRY_GAP);
                self.look_for_orders();
                self.control.handle(Input::Retry);
            }
            Action::Say(why) => {
                tracing::warn!("{why}");
                self.observer.event(Event::Decision { text: why });
            }
            Action::MarkRunning(epoch) => {
                if let (Some(claims), Some(handover)) = (&self.claims, self.control.take_handover()) {
                    claims.mark_running(epoch, handover);
                }
            }
            Action::Start { run } => {
                self.enter(Phase::Commit);
                let started = self.start(run).map_err(|error| error.to_string());
                self.control.handle(Input::Started(started.map(|()| std::mem::take(&mut self.handover_steps))));
            }
            Action::Own { .. } | Action::GiveUp(_) | Action::Lose(_) => {}
        }
    }

    /// What this process was told from outside.
    fn look_for_orders(&mut self) {
        if self.options.stop.load(Ordering::Acquire) && !self.stop_told {
            self.stop_told = true;
            self.control.handle(Input::Stop);
        }
        if self.options.abandon.load(Ordering::Acquire) {
            self.control.handle(Input::Abandon);
        }
    }

    /// Looks for the source's claims here, if its machine has any.
    fn agree_on_claims(&mut self, offered: Option<&message::SharedClaims>, machine: &str) -> Result<(), Refusal> {
        let Some(offered) = offered else { return Ok(()) };
        let options = self.options.claims.as_ref().ok_or_else(|| {
            Refusal::new("ownership", "the machine has claims, and this host has no name to claim it with")
        })?;
        let claims = SharedClaims::find(options, offered, machine)?;
        self.control.expect_claim(claims.handover()?);
        self.claims = Some(claims);
        Ok(())
    }

    fn claim(&mut self, claim: &Claim) {
        let began = Instant::now();
        let Some(claims) = &self.claims else { return };
        let answer = claims.store().claim(claim, CALL_LIMIT);
        let step = self.step("claim", began);
        self.handover_steps.push(step);
        self.control.handle(Input::Claimed(answer));
    }

    fn send(&mut self, mut message: Message) {
        // Before it is told: its data channels may be quick.
        match &message {
            Message::Prepared(prepared) => self.data.expect(prepared.token),
            Message::Attached(token) => self.data.expect(*token),
            _ => {}
        }
        if let Message::ClockReply((_, realtime_ns)) = &mut message {
            let realtime = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
            *realtime_ns = realtime.as_nanos() as i64;
        }
        // A failure to send is left to the reading side to report: what the peer said last may still be in the socket.
        if let Err(error) = self.link.send(&message) {
            tracing::debug!("cannot send {}: {error}", message.name());
        }
    }

    fn build(&mut self, description: &MachineDescription, request: PrepareRequest) -> Result<Duration, MachineError> {
        let layout = Layout::new(&description.memory)
            .map_err(|error| MachineError::with_source("the machine's description", error))?;
        let mut machine = self.host.prepare(description)?;
        let context = LoadContext { clock_offset_ns: request.clock_offset_ns };
        // Of two the quicker counts: the first is also slowed by whatever is done for the first time.
        let mut load = || {
            let began = Instant::now();
            machine.load(&request.rehearsal, &context).map(|()| began.elapsed())
        };
        let load = load()?.min(load()?);
        let layout = Arc::new(layout);
        let pages = DestinationPages {
            view: MemoryView::new(machine.memory(), Arc::clone(&layout))?,
            table: PageTable::new(&layout),
            hasher: PageHasher::new(request.table_seed, request.verify),
        };
        self.pages = Some(Arc::new(pages));
        self.machine = Some(machine);
        self.description = Some(description.clone());
        self.data.expect_return(self.token);
        Ok(load)
    }

    /// Loads the state, with the pages that are missing being served from before it: KVM itself touches guest memory.
    fn load(&mut self, sections: &[Section], context: &LoadContext) -> Result<Vec<TimedStep>, MachineError> {
        let mut steps = Vec::new();
        if self.wanted.is_some() {
            let began = Instant::now();
            self.begin_to_fill()?;
            steps.push(self.step("forget stale pages", began));
        }
        let began = Instant::now();
        let machine = self.machine.as_mut().ok_or_else(|| MachineError::new("there is no machine to load into"))?;
        machine.load(sections, context)?;
        steps.push(self.step("load state", began));
        Ok(steps)
    }

    /// The machine is this end's, and so is its memory: lets it run, or not.
    fn start(&mut self, run: bool) -> Result<(), MachineError> {
        let Some(machine) = &mut self.machine else { return Ok(()) };
        if let Some(service) = &self.service {
            service.own();
        }
        let began = Instant::now();
        machine.own_memory()?;
        let owned = Instant::now();
        if run {
            machine.start()?;
        }
        let steps = [("own memory", began, owned), ("start vCPUs", owned, Instant::now())];
        for (name, began, ended) in steps.into_iter().skip(usize::from(!self.memory_taken)) {
            let step = self.timed(name, ended - began);
            self.handover_steps.push(step);
        }
        Ok(())
    }

    fn own(mut self, running: bool, right: Option<(RightToRun, Nonce)>) -> DestinationOutcome<H::Machine> {
        self.enter(if self.service.is_some() { Phase::PostCopy } else { Phase::Completed });
        // Each has said its last word, and nobody waits for what is left of it.
        self.hang_up_data();
        self.workers.clear();
        drop_later((self.pages.take(), self.populating.take(), std::mem::take(&mut self.idle)));
        self.report.total_ms = self.began.elapsed().as_secs_f64() * 1e3;
        self.report.wire_bytes = self.link.wire_bytes();
        match self.machine.take() {
            Some(machine) => {
                let holding = self.claims.take().zip(right);
                let incomplete = self.service.is_some();
                let holding =
                    holding.map(|(claims, (right, nonce))| Arc::new(claims.into_holding(right, nonce, incomplete)));
                let filling = self.service.take().map(|service| {
                    Box::new(Filling::new(Links {
                        service,
                        link: self.link,
                        number: self.links,
                        lost: self.lost,
                        returned: self.returned,
                        sender: self.sender,
                        inputs: self.inputs,
                        first_channel: self.first_page_channel,
                        peer: self.control.peer().to_owned(),
                        observer: self.observer,
                        silence_limit: self.options.silence_limit,
                        holding: holding.clone(),
                    }))
                });
                DestinationOutcome::Owned { machine, running, holding, filling, report: Box::new(self.report) }
            }
            None => DestinationOutcome::Ended("there is no machine".into()),
        }
    }

    fn give_up(mut self, why: String) -> DestinationOutcome<H::Machine> {
        self.stop_filling();
        self.hang_up();
        DestinationOutcome::Ended(why)
    }

    /// What is coming has come.
    fn stop_populating(&self) {
        self.populating.iter().for_each(Populating::stop);
    }

    fn enter(&self, phase: Phase) {
        self.observer.event(Event::Phase { phase });
    }

    fn step(&mut self, name: &str, began: Instant) -> TimedStep {
        self.timed(name, began.elapsed())
    }

    fn timed(&mut self, name: &str, duration: Duration) -> TimedStep {
        let duration_ms = duration.as_secs_f64() * 1e3;
        self.report.steps.push(Step { end: "destination", name: name.into(), duration_ms });
        TimedStep { name: name.into(), duration }
    }
}
