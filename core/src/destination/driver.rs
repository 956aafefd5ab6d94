//! The destination in life: threads, channels and a clock around [`DestinationControl`].

use std::io;
use std::sync::Arc;
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, Sender};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use super::claims::Shared as SharedClaims;
use super::control::{Action, DestinationControl, Input};
use super::receiving::{DestinationPages, ReceivingChannel};
use super::worker::{self, Shared};
use super::{ClaimOptions, DestinationOptions, DestinationOutcome};
use crate::channel::{Channel, HangUp, IncomingData, SessionToken};
use crate::layout::Layout;
use crate::link::ControlLink;
use crate::machine::{DestinationHost, DestinationMachine, LoadContext, MachineDescription, MachineError, Refusal};
use crate::message::{self, Message, PrepareRequest, TimedStep};
use crate::ownership::{CALL_LIMIT, Claim, Nonce, RETRY_GAP, RightToRun};
use crate::phase::Phase;
use crate::progress::{Event, Observer, Report, Step};
use crate::random;
use crate::table::{PageHasher, PageTable};
use crate::view::MemoryView;

/// How long the source may take to open its data channels once it was told to.
const OPEN_DATA_LIMIT: Duration = Duration::from_secs(10);
/// How long the source may take to close once it has been told that the move is over.
const LAST_WORD_LIMIT: Duration = Duration::from_secs(2);
/// How often silence is looked at.
const TICK: Duration = Duration::from_millis(200);

/// One attempt to take a machine in.
pub struct Driver<'a, H: DestinationHost> {
    host: &'a mut H,
    data: &'a mut dyn IncomingData,
    observer: Arc<dyn Observer>,
    silence_limit: Duration,
    token: SessionToken,
    link: ControlLink,
    control: DestinationControl,
    sender: Sender<Input>,
    inputs: Receiver<Input>,
    machine: Option<H::Machine>,
    shared: Option<Arc<Shared>>,
    workers: Vec<JoinHandle<()>>,
    hang_ups: Vec<Arc<dyn HangUp>>,
    link_lost: bool,
    claim_options: Option<ClaimOptions>,
    claims: Option<SharedClaims>,
    /// How long each attempt to claim took.
    claim_steps: Vec<TimedStep>,
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
        let hear = sender.clone();
        let link = ControlLink::start(control, move |message| {
            // Nobody listens any more: the move is over.
            let _ = hear.send(message.map_or_else(Input::LinkLost, Input::Message));
        })?;
        Ok(Self {
            host,
            data,
            observer,
            silence_limit: options.silence_limit,
            token,
            link,
            control: DestinationControl::new(options.clone(), token, peer),
            sender,
            inputs,
            machine: None,
            shared: None,
            workers: Vec::new(),
            hang_ups: Vec::new(),
            link_lost: false,
            claim_options: options.claims.clone(),
            claims: None,
            claim_steps: Vec::new(),
            began: Instant::now(),
            report: Report::default(),
        })
    }

    /// Runs the attempt to its end.
    pub fn run(mut self) -> DestinationOutcome<H::Machine> {
        loop {
            while let Some(action) = self.control.poll_action() {
                match action {
                    Action::Own { running, right } => return self.own(running, right),
                    Action::Lose(why) => {
                        self.hang_up();
                        return DestinationOutcome::Dropped(why);
                    }
                    Action::GiveUp(why) => return self.give_up(why),
                    action => self.execute(action),
                }
            }
            match self.inputs.recv_timeout(TICK) {
                Ok(input) => {
                    self.link_lost |= matches!(input, Input::LinkLost(_));
                    self.control.handle(input);
                }
                Err(RecvTimeoutError::Timeout | RecvTimeoutError::Disconnected) => {}
            }
            if self.link.silence() > self.silence_limit {
                self.link_lost = true;
                let why = format!("nothing was heard from it for {:?}", self.silence_limit);
                self.control.handle(Input::LinkLost(why));
            }
        }
    }

    fn execute(&mut self, action: Action) {
        match action {
            Action::Send(message) => self.send(message),
            Action::Check(machine, question, claims) => {
                self.enter(Phase::Preflight);
                let mut verdict = self.host.check(&machine, &question);
                verdict.refusals.extend(self.agree_on_claims(claims.as_ref(), &machine.name).err());
                for warning in &verdict.warnings {
                    tracing::warn!("{warning}");
                }
                self.control.handle(Input::Checked(verdict));
            }
            Action::Build { machine, request } => {
                self.enter(Phase::Prepare);
                let built = self.build(&machine, request).map_err(|error| error.to_string());
                self.control.handle(Input::Built(built));
            }
            Action::OpenData { channels } => {
                let opened = self.open_data(channels).map_err(|error| error.to_string());
                if opened.is_ok() {
                    self.enter(Phase::FirstPass);
                }
                self.control.handle(Input::DataOpened(opened));
            }
            Action::Round(1) => self.enter(Phase::Rounds),
            Action::Round(_) => {}
            Action::Load(sections, context) => {
                self.enter(Phase::State);
                let began = Instant::now();
                let loaded = match &mut self.machine {
                    Some(machine) => machine.load(&sections, &context).map_err(|error| error.to_string()),
                    None => Err("there is no machine to load into".into()),
                };
                let steps = loaded.map(|()| vec![self.step("load state", began)]);
                self.control.handle(Input::Loaded(steps));
            }
            Action::Claim(claim) => {
                self.enter(Phase::Commit);
                self.claim(&claim);
            }
            Action::Wait => {
                thread::sleep(RETRY_GAP);
                self.control.handle(Input::Retry);
            }
            Action::Say(why) => {
                tracing::warn!("it is not known yet whether the machine is this end's: {why}");
                self.observer.event(Event::Decision { text: why });
            }
            Action::MarkRunning(epoch) => {
                if let (Some(claims), Some(handover)) = (&self.claims, self.control.take_handover()) {
                    claims.mark_running(epoch, handover);
                }
            }
            Action::Start { run } => {
                self.enter(Phase::Commit);
                let began = Instant::now();
                let started = match &mut self.machine {
                    Some(machine) if run => machine.start().map_err(|error| error.to_string()),
                    _ => Ok(()),
                };
                let step = self.step("start vCPUs", began);
                let steps = started.map(|()| self.claim_steps.drain(..).chain([step]).collect());
                self.control.handle(Input::Started(steps));
            }
            Action::Own { .. } | Action::GiveUp(_) | Action::Lose(_) => {}
        }
    }

    /// Looks for the source's claims here, if its machine has any.
    fn agree_on_claims(&mut self, offered: Option<&message::SharedClaims>, machine: &str) -> Result<(), Refusal> {
        let Some(offered) = offered else { return Ok(()) };
        let options = self.claim_options.as_ref().ok_or_else(|| {
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
        self.claim_steps.push(step);
        self.control.handle(Input::Claimed(answer));
    }

    fn send(&mut self, mut message: Message) {
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
        self.shared = Some(Arc::new(Shared { pages, link: self.link.clone() }));
        self.machine = Some(machine);
        self.data.expect(self.token);
        Ok(load)
    }

    fn open_data(&mut self, channels: u16) -> io::Result<()> {
        let deadline = Instant::now() + OPEN_DATA_LIMIT;
        let mut open = vec![false; channels.into()];
        while open.contains(&false) {
            let (index, channel) = self.data.accept(deadline.saturating_duration_since(Instant::now()))?;
            match open.get_mut(usize::from(index)) {
                Some(open) if !*open => *open = true,
                _ => return Err(io::Error::other(format!("data channel {index} was not asked for"))),
            }
            self.hang_ups.push(Arc::clone(&channel.hang_up));
            self.start_worker(index.into(), channels.into(), channel)?;
        }
        Ok(())
    }

    fn start_worker(&mut self, index: usize, channels: usize, channel: Channel) -> io::Result<()> {
        let Some(shared) = self.shared.clone() else { return Ok(()) };
        let inputs = self.sender.clone();
        let mut receiving = ReceivingChannel::new(&shared.pages, index, channels)?;
        let worker = thread::Builder::new().name(format!("data-{index}")).spawn(move || {
            // The writing half stays open until the channel has ended: closing it early could reset the connection.
            let Channel { reader, writer: _writer, .. } = channel;
            let input = match worker::run(&shared, index, &mut receiving, reader) {
                Ok(sum) => Input::ChannelEnded { sum },
                Err(error) => Input::ChannelFailed(error.to_string()),
            };
            let _ = inputs.send(input);
        })?;
        self.workers.push(worker);
        Ok(())
    }

    fn own(mut self, running: bool, right: Option<(RightToRun, Nonce)>) -> DestinationOutcome<H::Machine> {
        self.enter(Phase::Completed);
        self.join();
        self.report.total_ms = self.began.elapsed().as_secs_f64() * 1e3;
        self.report.wire_bytes = self.link.wire_bytes();
        match self.machine.take() {
            Some(machine) => {
                let holding = self.claims.take().zip(right);
                let holding = holding.map(|(claims, (right, nonce))| Arc::new(claims.into_holding(right, nonce)));
                DestinationOutcome::Owned { machine, running, holding, report: self.report }
            }
            None => DestinationOutcome::Ended("there is no machine".into()),
        }
    }

    fn give_up(mut self, why: String) -> DestinationOutcome<H::Machine> {
        self.hang_up();
        DestinationOutcome::Ended(why)
    }

    fn hang_up(&mut self) {
        self.link.finish();
        self.join();
        // The peer is given a moment to hear why and close, before the link is closed under it.
        let deadline = Instant::now() + LAST_WORD_LIMIT;
        let next = || self.inputs.recv_timeout(deadline.saturating_duration_since(Instant::now()));
        if !self.link_lost {
            while next().is_ok_and(|input| !matches!(input, Input::LinkLost(_))) {}
        }
        self.link.hang_up();
    }

    /// The data channels have ended, or are ended here.
    fn join(&mut self) {
        self.hang_ups.drain(..).for_each(|hang_up| hang_up.hang_up());
        self.workers.drain(..).for_each(|worker| drop(worker.join()));
    }

    fn enter(&self, phase: Phase) {
        self.observer.event(Event::Phase { phase });
    }

    fn step(&mut self, name: &str, began: Instant) -> TimedStep {
        let duration = began.elapsed();
        let duration_ms = duration.as_secs_f64() * 1e3;
        self.report.steps.push(Step { end: "destination", name: name.into(), duration_ms });
        TimedStep { name: name.into(), duration }
    }
}
