//! The source in life: threads, channels and a clock around [`SourceControl`].
//!
//! One coordinator thread carries out actions and feeds back what happened. Whatever the VMM is asked to do runs on a
//! thread of its own, one thing after the other, so that a slow machine never makes the coordinator deaf. Each data
//! channel has a worker.

use std::sync::mpsc::{self, Receiver, RecvTimeoutError, Sender};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use super::control::{Action, Beginning, Done, Input, RoundSent, SourceControl};
use super::data::{CONNECT_LIMIT, Data, Opening};
use super::sending::{Order, Report, SourcePages};
use super::settler::Settler;
use super::state::Shared as Handle;
use super::worker::Told as WorkerTold;
use super::{CancelError, SourceOutcome};
use crate::audit;
use crate::channel::{Dial, SessionToken};
use crate::link::ControlLink;
use crate::machine::{Inquiry, MachineError, SourceMachine};
use crate::message::{Applied, Message, TimedStep};
use crate::ownership::Holding;
use crate::pending::forget_vmm_writes;
use crate::progress::{Event as Told, Observer};
use crate::table::PageHasher;

/// How long the rehearsed pause may take.
const REHEARSAL_LIMIT: Duration = Duration::from_secs(1);
/// A peer that says nothing for this long is taken for lost: pings come every second.
const SILENCE_LIMIT: Duration = Duration::from_secs(8);
/// How long the peer may take to close once it has been told that the move is over.
const LAST_WORD_LIMIT: Duration = Duration::from_millis(500);
/// How often silence and deadlines are looked at.
const TICK: Duration = Duration::from_millis(100);

/// What reaches the coordinator.
pub enum Event {
    /// For the control plane.
    Input(Input),
    /// The data channels are open, or not.
    DataOpened(Result<Data, MachineError>),
    /// From a data worker.
    Worker(usize, WorkerTold),
    /// Call the move off, and say whether that is still possible.
    Cancel(Sender<Result<(), CancelError>>),
}

impl From<Input> for Event {
    fn from(input: Input) -> Self {
        Event::Input(input)
    }
}

/// The coordinator.
pub struct Driver {
    machine: Arc<dyn SourceMachine>,
    dial: Arc<dyn Dial>,
    observer: Arc<dyn Observer>,
    handle: Arc<Handle>,
    control: SourceControl,
    events: Receiver<Event>,
    sender: Sender<Event>,
    jobs: Sender<Job>,
    /// Between its question and the judgement of the answer. Only the machine's thread touches it.
    inquiry: Arc<Mutex<Option<Box<dyn Inquiry>>>>,
    ownership: Option<Arc<Holding>>,
    settler: Option<Settler>,
    queue_awaited: bool,
    silence_told: bool,
    link_lost: bool,
    data: Option<Data>,
    probe: Option<Probe>,
    round: Option<Round>,
    verify: bool,
    channels: u16,
}

type Job = Box<dyn FnOnce() + Send>;

/// Bytes that mean nothing, on their way.
struct Probe {
    bytes: u64,
    began: Instant,
}

struct Round {
    began: Instant,
    wire_bytes: u64,
    capped: bool,
}

impl Driver {
    /// A coordinator for a move that begins now.
    pub fn new(
        machine: Arc<dyn SourceMachine>,
        dial: Box<dyn Dial>,
        observer: Arc<dyn Observer>,
        handle: Arc<Handle>,
        beginning: Beginning,
        (sender, events): (Sender<Event>, Receiver<Event>),
    ) -> Self {
        let (jobs, queue) = mpsc::channel::<Job>();
        // Without the thread, jobs fail to be queued and the move ends with that error.
        let _ =
            thread::Builder::new().name("machine-jobs".into()).spawn(move || queue.into_iter().for_each(|job| job()));
        Self {
            machine,
            dial: Arc::from(dial),
            observer,
            handle,
            verify: beginning.options.verify,
            channels: beginning.options.channels,
            ownership: beginning.options.ownership.clone(),
            control: SourceControl::new(beginning),
            events,
            sender,
            jobs,
            inquiry: Arc::default(),
            settler: None,
            queue_awaited: false,
            silence_told: false,
            link_lost: false,
            data: None,
            probe: None,
            round: None,
        }
    }

    /// Runs the move to its end.
    pub fn run(mut self) {
        loop {
            while let Some(action) = self.control.poll_action() {
                if let Some(outcome) = self.execute(action) {
                    return self.end(outcome);
                }
                self.handle.note(&self.control);
            }
            let wait = match self.control.deadline() {
                Some(deadline) => deadline.saturating_sub(self.now()).min(TICK),
                None => TICK,
            };
            match self.events.recv_timeout(wait) {
                Ok(event) => self.take_in(event),
                Err(RecvTimeoutError::Timeout | RecvTimeoutError::Disconnected) => self.input(Input::Tick),
            }
            self.listen_for_silence();
            self.handle.note(&self.control);
        }
    }

    fn now(&self) -> Duration {
        self.handle.flow.now()
    }

    fn input(&mut self, input: Input) {
        let now = self.now();
        self.control.handle(now, input);
    }

    fn take_in(&mut self, event: Event) {
        match event {
            Event::Input(Input::Message(Message::Applied(applied))) => self.applied(applied),
            Event::Input(input) => {
                self.link_lost |= matches!(input, Input::LinkLost(_));
                self.input(input);
            }
            Event::Worker(index, told) => self.worker(index, told),
            Event::DataOpened(opened) => self.data_opened(opened),
            Event::Cancel(answer) => {
                let allowed = self.control.may_cancel();
                // Whether anybody still waits for the answer makes no difference.
                let _ = answer.send(allowed.clone());
                if allowed.is_ok() {
                    self.input(Input::Cancel);
                }
            }
        }
    }

    fn applied(&mut self, Applied { channel, mark }: Applied) {
        let channels = self.data.as_mut().map(|data| &mut data.unacknowledged);
        let Some(unacknowledged) = channels.and_then(|channels| channels.get_mut(usize::from(channel))) else {
            return self.input(Input::LinkLost(format!("it acknowledged what came over no channel ({channel})")));
        };
        if let Err(error) = unacknowledged.applied(mark) {
            return self.input(Input::LinkLost(format!("data channel {channel}: {error}")));
        }
        if self.queue_awaited {
            self.queue_awaited = !self.queue_empty();
        }
        if channel == 0
            && let Some(Probe { bytes, began }) = self.probe.take()
        {
            self.input(Input::Done(Done::Probed { bytes, duration: began.elapsed() }));
        }
    }

    /// Whether everything sent has been acknowledged; if so, the control plane is told.
    fn queue_empty(&mut self) -> bool {
        let empty = self.data.as_ref().is_none_or(|data| data.queued_bytes() == 0);
        if empty {
            self.input(Input::Done(Done::QueueEmpty));
        }
        empty
    }

    fn listen_for_silence(&mut self) {
        let silence = self.handle.link().map(|link| link.silence());
        if !self.silence_told && silence.is_some_and(|silence| silence > SILENCE_LIMIT) {
            self.silence_told = true;
            self.link_lost = true;
            self.input(Input::LinkLost(format!("nothing was heard from it for {SILENCE_LIMIT:?}")));
        }
    }

    /// Carries out an action; some outcome is the end.
    fn execute(&mut self, action: Action) -> Option<SourceOutcome> {
        match action {
            Action::Enter(phase) => {
                tracing::debug!("phase {phase}");
                self.observer.event(Told::Phase { phase });
            }
            Action::RoundEnded(round) => self.observer.event(Told::Round(round)),
            Action::Say(text) => {
                tracing::info!("{text}");
                self.observer.event(Told::Decision { text });
            }
            Action::Send(message) => self.send(message),
            Action::CutRound => self.handle.flow.cut_round(),
            Action::HangUp => self.hang_up(),
            Action::Finish(outcome) => return Some(*outcome),
            Action::Connect => self.connect(),
            Action::Describe => {
                let inquiry = Arc::clone(&self.inquiry);
                self.job(move |machine| {
                    let (description, asked) = (machine.describe()?, machine.inquire()?);
                    let question = asked.question();
                    *lock(&inquiry) = Some(asked);
                    Ok(Done::Described(description, question))
                });
            }
            Action::Judge(evidence) => {
                let inquiry = Arc::clone(&self.inquiry);
                self.job(move |_| {
                    let asked = lock(&inquiry).take();
                    Ok(Done::Judged(asked.map(|asked| asked.judge(&evidence)).unwrap_or_default()))
                });
            }
            Action::Rehearse => self.job(rehearse),
            Action::OpenData { token, table_seed } => self.open_data(token, table_seed),
            Action::Probe(bytes) => {
                self.probe = Some(Probe { bytes, began: Instant::now() });
                self.order(Order::Probe(bytes), 1);
            }
            Action::StartLog => self.start_log(),
            Action::Round { first } => {
                self.settler.get_or_insert_with(|| Settler::start(Arc::clone(&self.machine)));
                let flow = &self.handle.flow;
                let capped = flow.bytes_per_s().is_some();
                self.round = Some(Round { began: Instant::now(), wire_bytes: flow.wire_bytes(), capped });
                self.order(Order::Round { first }, usize::MAX);
            }
            Action::AwaitQueue => self.queue_awaited = !self.queue_empty(),
            Action::StopGuest => self.stop_guest(),
            Action::SendFinal => self.order(Order::Final, usize::MAX),
            Action::Restore { resume } => self.restore(resume),
            Action::Settle(patience) => self.settle(patience),
            Action::Audit => {
                let shared = self.data.as_ref().map(|data| Arc::clone(&data.shared))?;
                self.job(move |_| Ok(Done::Audited(audit::memory_against_table(&shared.pages))));
            }
        }
        None
    }

    fn send(&mut self, message: Message) {
        let Some(link) = self.handle.link() else { return };
        if let Message::ClockRequest(_) = message {
            let realtime = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
            self.control.clock_asked(self.handle.flow.now(), realtime.as_nanos() as i64);
        }
        // A failure to send is left to the reading side to report: what the peer said last may still be in the socket, and
        // says why. If nothing comes from there either, the silence is noticed.
        if let Err(error) = link.send(&message) {
            tracing::debug!("cannot send {}: {error}", message.name());
        }
        if let Message::Abort(_) = message {
            link.finish();
        }
    }

    /// Runs `job` on the machine's thread; its result comes back as an input.
    fn job(&mut self, job: impl FnOnce(&dyn SourceMachine) -> Result<Done, MachineError> + Send + 'static) {
        let (machine, events) = (Arc::clone(&self.machine), self.sender.clone());
        let queued = self.jobs.send(Box::new(move || {
            let input = match job(&*machine) {
                Ok(done) => Input::Done(done),
                Err(error) => Input::Failed(error.to_string()),
            };
            let _ = events.send(input.into());
        }));
        if queued.is_err() {
            self.input(Input::Failed("no thread could be started for the machine".into()));
        }
    }

    /// On a thread of its own: a peer that does not answer must not keep the machine's thread from restoring.
    fn connect(&mut self) {
        let (dial, events, handle) = (Arc::clone(&self.dial), self.sender.clone(), Arc::clone(&self.handle));
        let spawned = thread::Builder::new().name("connect".into()).spawn(move || {
            let heard = events.clone();
            let hear = move |message: Result<Message, String>| {
                let _ = heard.send(message.map_or_else(Input::LinkLost, Input::Message).into());
            };
            let input = match dial.control(CONNECT_LIMIT).and_then(|channel| ControlLink::start(channel, hear)) {
                Ok(link) => {
                    handle.set_link(link);
                    Input::Done(Done::Connected)
                }
                Err(error) => Input::Failed(error.to_string()),
            };
            let _ = events.send(input.into());
        });
        if let Err(error) = spawned {
            self.input(Input::Failed(format!("no thread could be started to connect: {error}")));
        }
    }

    /// On a thread of its own, as connecting is.
    fn open_data(&mut self, token: SessionToken, table_seed: u64) {
        let opening = Opening {
            machine: Arc::clone(&self.machine),
            dial: Arc::clone(&self.dial),
            flow: Arc::clone(&self.handle.flow),
            events: self.sender.clone(),
            hasher: PageHasher::new(table_seed, self.verify),
            channels: self.channels,
            compression: self.control.compression(),
            token,
        };
        let events = self.sender.clone();
        let spawned = thread::Builder::new().name("open-data".into()).spawn(move || {
            let _ = events.send(Event::DataOpened(opening.open()));
        });
        if let Err(error) = spawned {
            self.input(Input::Failed(format!("no thread could be started to open data channels: {error}")));
        }
    }

    fn data_opened(&mut self, opened: Result<Data, MachineError>) {
        match opened {
            Ok(data) => {
                self.handle.set_data(Arc::clone(&data.shared));
                self.data = Some(data);
                // The move may have ended meanwhile: then the channels end too.
                if self.handle.flow.check_stopped().is_err() {
                    self.hang_up();
                }
                let capped = self.handle.flow.bytes_per_s().is_some();
                self.input(Input::Done(Done::DataOpened { capped }));
            }
            Err(why) => self.input(Input::Failed(why.to_string())),
        }
    }

    fn start_log(&mut self) {
        let Some(shared) = self.data.as_ref().map(|data| Arc::clone(&data.shared)) else { return };
        self.job(move |machine| {
            // Whatever is written from here on is logged, and all that was written before is about to be sent.
            machine.dirty_log().start()?;
            forget_vmm_writes(shared.pages.view.memory());
            shared.pages.pending.fill(shared.pages.view.layout());
            Ok(Done::LogStarted)
        });
    }

    /// Gives an order to the first `workers` workers.
    fn order(&mut self, order: Order, workers: usize) {
        let Some(data) = &mut self.data else { return };
        data.awaited = data.orders.len().min(workers);
        data.pages = 0;
        data.sum = 0;
        for orders in data.orders.iter().take(workers) {
            // A worker that is gone has reported why.
            let _ = orders.send(order);
        }
    }

    fn worker(&mut self, index: usize, told: WorkerTold) {
        let Some(data) = &mut self.data else { return };
        let report = match told {
            WorkerTold::Marked(batch) => {
                if let Err(error) = data.unacknowledged[index].sent(batch) {
                    self.input(Input::LinkLost(format!("data channel {index}: {error}")));
                }
                return;
            }
            WorkerTold::Broken(why) => return self.input(Input::LinkLost(why)),
            WorkerTold::Done(report) => report,
        };
        data.awaited = data.awaited.saturating_sub(1);
        match report {
            Report::Probing => return,
            Report::RoundSent { pages, .. } => data.pages += pages,
            Report::Ended(sum) => data.sum = data.sum.wrapping_add(sum),
        }
        if data.awaited == 0 {
            match report {
                Report::Ended(_) => {
                    let sum = data.sum;
                    self.input(Input::Done(Done::FinalSent { sum }));
                }
                _ => self.end_round(),
            }
        }
    }

    fn end_round(&mut self) {
        let Some(data) = &mut self.data else { return };
        let Some(Round { began, wire_bytes, capped }) = self.round.take() else { return };
        let flow = &self.handle.flow;
        let mut sent = RoundSent {
            duration: began.elapsed(),
            pages: data.pages,
            wire_bytes: flow.wire_bytes() - wire_bytes,
            capped: capped || flow.bytes_per_s().is_some(),
            ..RoundSent::default()
        };
        let harvesting = Instant::now();
        if let Err(error) = data.harvest() {
            return self.input(Input::Failed(error.to_string()));
        }
        sent.harvest = harvesting.elapsed();
        sent.dirty_pages = data.shared.pages.pending.count();
        sent.queued_bytes = data.queued_bytes();
        self.handle.round_ended(sent);
        self.input(Input::Done(Done::RoundSent(sent)));
    }

    fn stop_guest(&mut self) {
        let Some(data) = &mut self.data else { return };
        let Some(mut harvester) = data.harvester.take() else { return };
        let shared = Arc::clone(&data.shared);
        let limit = self.handle.pause_timeout;
        let ownership = self.ownership.clone();
        self.settler = None;
        self.job(move |machine| {
            let mut steps = Vec::new();
            let mut began = Instant::now();
            let mut step = |name: &str| {
                let duration = began.elapsed();
                began = Instant::now();
                steps.push(TimedStep { name: name.into(), duration });
            };
            machine.pause(limit)?;
            // Whatever ends the move from here on gives the right back before the guest resumes.
            if let Some(holding) = ownership {
                holding.begin_handover();
            }
            step("pause vCPUs and devices");
            let sections = machine.save()?;
            step("save state");
            // The last harvest follows the last KVM ioctl and the last device write.
            let SourcePages { view, pending, .. } = &shared.pages;
            harvester.harvest(view.layout(), machine.dirty_log(), view.memory(), pending)?;
            step("last harvest");
            Ok(Done::Stopped { sections, steps })
        });
    }

    fn settle(&mut self, patience: Duration) {
        let Some(holding) = self.ownership.clone() else { return };
        let observer = Arc::clone(&self.observer);
        self.job(move |_| {
            let tell = |text: &str| {
                tracing::warn!("{text}");
                observer.event(Told::Decision { text: text.into() });
            };
            Ok(Done::Settled(holding.settle(Some(Instant::now() + patience), tell)))
        });
    }

    fn hang_up(&mut self) {
        self.handle.flow.stop();
        for hang_up in self.data.iter().flat_map(|data| &data.hang_ups) {
            hang_up.hang_up();
        }
    }

    /// Gives the peer a moment to hear the last word and close, before the control link is closed under it.
    fn close_link(&mut self) {
        let Some(link) = self.handle.link() else { return };
        let deadline = Instant::now() + LAST_WORD_LIMIT;
        let next = || self.events.recv_timeout(deadline.saturating_duration_since(Instant::now()));
        if !self.link_lost {
            // Whoever asks to cancel now finds the channel closed, which says that the move has ended.
            while next().is_ok_and(|event| !matches!(event, Event::Input(Input::LinkLost(_)))) {}
        }
        link.hang_up();
    }

    fn restore(&mut self, resume: bool) {
        let workers = self.data.as_mut().map(Data::dismiss).unwrap_or_default();
        let logging = self.data.is_some();
        let events = self.sender.clone();
        let (machine, inquiry) = (Arc::clone(&self.machine), Arc::clone(&self.inquiry));
        let ownership = self.ownership.clone();
        self.settler = None;
        let queued = self.jobs.send(Box::new(move || {
            // The guest first: it has waited long enough.
            let ours = ownership.is_none_or(|holding| holding.give_up_handover());
            let resumed = match (resume, ours) {
                (false, _) => Ok(()),
                (true, true) => machine.resume(),
                (true, false) => Err(MachineError::new("there is no right to run it: it has been handed over")),
            };
            machine.throttle(1.0);
            workers.into_iter().for_each(|worker| drop(worker.join()));
            let stopped = if logging { machine.dirty_log().stop() } else { Ok(()) };
            drop(lock(&inquiry).take());
            let result = resumed.and(stopped).map_err(|error| error.to_string());
            let _ = events.send(Input::Done(Done::Restored(result)).into());
        }));
        if queued.is_err() {
            self.input(Input::Done(Done::Restored(Err("no thread could be started for the machine".into()))));
        }
    }

    fn end(mut self, mut outcome: SourceOutcome) {
        self.hang_up();
        let workers = self.data.as_mut().map(Data::dismiss).unwrap_or_default();
        workers.into_iter().for_each(|worker| drop(worker.join()));
        if let SourceOutcome::Moved(_) | SourceOutcome::Unknown(..) = outcome
            && let Err(error) = self.machine.dirty_log().stop()
        {
            tracing::warn!("cannot stop the dirty log of the machine that has moved: {error}");
        }
        if !matches!(outcome, SourceOutcome::Moved(_)) {
            self.close_link();
        } else if let Some(link) = self.handle.link() {
            link.hang_up();
        }
        SourceControl::complete(&mut outcome, self.handle.wire_bytes(), self.handle.flow.pages());
        self.handle.ended(outcome);
    }
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Pauses, saves and lets run on, as a rehearsal: what cannot be saved is found now, and what it takes is known. Of two
/// the quicker counts: the first is also slowed by whatever is done for the first time.
fn rehearse(machine: &dyn SourceMachine) -> Result<Done, MachineError> {
    let running = machine.is_running();
    let once = || {
        let began = Instant::now();
        machine.pause(REHEARSAL_LIMIT)?;
        let saved = machine.save();
        let pause = began.elapsed();
        if running {
            machine.resume()?;
        }
        Ok::<_, MachineError>((pause, saved?))
    };
    let (first, _) = once()?;
    let (second, sections) = once()?;
    Ok(Done::Rehearsed { sections, pause: first.min(second) })
}
