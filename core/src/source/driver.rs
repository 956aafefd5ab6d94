//! The source in life: threads, channels and a clock around [`SourceControl`].
//!
//! One coordinator thread carries out actions and feeds back what happened. Whatever the VMM is asked to do runs on a
//! thread of its own, one thing after the other, so that a slow machine never makes the coordinator deaf. Each data
//! channel has a worker.

mod links;
mod machine;
mod pages;
mod rounds;

use std::collections::HashSet;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use self::links::Opened;
use self::machine::{Inquiring, Jobs};
use self::pages::Pages;
use self::rounds::Round;
use super::applying::Applying;
use super::control::{Action, Beginning, Done, Input, SourceControl};
use super::data::Data;
use super::sending::{Order, SendingChannel};
use super::settler::Settler;
use super::state::Shared as Handle;
use super::tally::Tallied;
use super::worker::Told as WorkerTold;
use super::{CancelError, SourceOutcome, jobs};
use crate::audit;
use crate::channel::{Channel, Dial};
use crate::fit::Watch;
use crate::link::LinkEnd;
use crate::machine::SourceMachine;
use crate::message::{Applied, Message};
use crate::ownership::Holding;
use crate::priority::drop_later;
use crate::progress::{Event as Told, Observer};

/// How often silence and deadlines are looked at.
const TICK: Duration = Duration::from_millis(100);

/// What reaches the coordinator.
pub enum Event {
    /// For the control plane.
    Input(Input),
    /// A control channel is open, or not.
    Connected {
        /// The links that it is to be one of.
        links: u32,
        /// The channel.
        channel: std::io::Result<Channel>,
    },
    /// The control link brought a message, or has ended.
    Heard {
        /// The links that it is one of.
        links: u32,
        /// What was heard.
        heard: Result<Message, LinkEnd>,
    },
    /// The data channels are open, or not.
    DataOpened {
        /// The links that they are to be of.
        links: u32,
        /// The channels.
        opened: Opened,
    },
    /// From a data worker.
    Worker {
        /// The links that it writes to.
        links: u32,
        /// Its channel.
        index: usize,
        /// What it tells.
        told: WorkerTold,
    },
    /// The channels for pages are open, or not.
    PagesOpened {
        /// The links that they are to be of.
        links: u32,
        /// Both of them.
        opened: std::io::Result<Vec<Channel>>,
    },
    /// A channel for pages broke; why.
    PagesLost {
        /// The links that it is of.
        links: u32,
        /// Why.
        why: String,
    },
    /// Let the guest go on at the destination before its memory is there, and say whether that is possible.
    PostCopy(Sender<Result<(), String>>),
    /// The workers of links that broke have ended.
    BrokenOff(Vec<SendingChannel>),
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
    jobs: Jobs,
    inquiry: Inquiring,
    ownership: Option<Arc<Holding>>,
    settler: Option<Settler>,
    queue_awaited: bool,
    /// How often the links were made: what comes from earlier ones is late.
    links: u32,
    silence_told: bool,
    /// What the channels have said.
    said: HashSet<String>,
    link_lost: bool,
    data: Option<Data>,
    pages: Pages,
    probe: Option<Probe>,
    round: Option<Round>,
    watch: Option<Watch>,
    applying: Applying,
    verify: bool,
    channels: u16,
}

/// Bytes that mean nothing, on their way.
struct Probe {
    bytes: u64,
    began: Instant,
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
        Self {
            jobs: Jobs::start(Arc::clone(&machine), sender.clone()),
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
            inquiry: Arc::new(Mutex::new(None)),
            settler: None,
            queue_awaited: false,
            links: 0,
            silence_told: false,
            said: HashSet::new(),
            link_lost: false,
            data: None,
            pages: Pages::default(),
            probe: None,
            round: None,
            watch: None,
            applying: Applying::default(),
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
            let wait = self
                .watch
                .as_ref()
                .and_then(|watch| watch.due())
                .map_or(wait, |due| wait.min(due.saturating_sub(self.now())));
            let wait = self.round.as_ref().and_then(Round::patience).map_or(wait, |patience| wait.min(patience));
            match self.events.recv_timeout(wait) {
                Ok(event) => self.take_in(event),
                Err(RecvTimeoutError::Timeout | RecvTimeoutError::Disconnected) => self.input(Input::Tick),
            }
            self.look();
            self.end_round();
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
            Event::Input(input) => self.input(input),
            Event::Connected { links, channel } => self.connected(links, channel),
            Event::Heard { links, heard } if links == self.links => self.heard(heard),
            Event::Heard { .. } => {}
            Event::DataOpened { links, opened } => self.data_opened(links, opened),
            Event::Worker { links, index, told } => self.worker(links, index, told),
            Event::PagesOpened { links, opened } => self.pages_opened(links, opened),
            Event::PagesLost { links, why } if links == self.links => self.input(Input::LinkLost(why)),
            Event::PagesLost { .. } => {}
            Event::PostCopy(answer) => {
                let allowed = self.control.may_go_over();
                // Whether anybody still waits for the answer makes no difference.
                let _ = answer.send(allowed.clone());
                if allowed.is_ok() {
                    self.input(Input::PostCopy);
                }
            }
            Event::BrokenOff(channels) => {
                let Some(data) = &mut self.data else { return };
                let broken = data.break_off(channels);
                self.input(Input::Done(Done::BrokenOff(broken)));
            }
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

    fn heard(&mut self, heard: Result<Message, LinkEnd>) {
        self.link_lost |= heard.is_err();
        match heard {
            Ok(Message::Applied(applied)) => self.applied(applied),
            Ok(Message::Missing(part)) => self.still_missing(&part),
            Ok(message) => self.input(Input::Message(message)),
            Err(LinkEnd::Broken(why)) => self.input(Input::LinkLost(why)),
            Err(LinkEnd::Nonsense(why)) => {
                self.input(Input::Failed(format!("what the destination says is wrong: {why}")))
            }
        }
    }

    fn applied(&mut self, Applied { channel, mark }: Applied) {
        let channels = self.data.as_mut().map(|data| &mut data.unacknowledged);
        let Some(unacknowledged) = channels.and_then(|channels| channels.get_mut(usize::from(channel))) else {
            return self
                .input(Input::Failed(format!("the destination acknowledged what came over no channel ({channel})")));
        };
        match unacknowledged.applied(mark) {
            Ok(pages) => {
                self.handle.flow.applied(channel.into(), pages);
                self.applying.applied(Instant::now(), pages);
            }
            Err(error) => return self.input(Input::Failed(format!("data channel {channel}: {error}"))),
        }
        if self.queue_awaited {
            self.queue_awaited = !self.queue_empty();
        }
        self.end_round();
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

    /// Carries out an action; some outcome is the end.
    fn execute(&mut self, action: Action) -> Option<SourceOutcome> {
        match action {
            Action::Enter(phase) => {
                tracing::debug!("phase {phase}");
                self.observer.event(Told::Phase { phase });
            }
            Action::RoundEnded(round) => self.observer.event(Told::Round(round)),
            Action::Say(text) => self.say(text),
            Action::Send(message) => self.send(message),
            Action::CutRound => self.handle.flow.cut_round(),
            Action::UncutRounds => self.handle.flow.uncut_rounds(),
            Action::OpenPages { token } => self.open_pages(token),
            Action::LeavePages => self.leave_pages(),
            Action::SendMissing => self.send_missing(),
            Action::Serve => self.serve(),
            Action::Push => self.pages.push(),
            Action::Throttle(hold) => self.throttle(hold),
            Action::HangUp => self.hang_up(),
            Action::Finish(outcome) => return Some(*outcome),
            Action::Connect => self.connect(None),
            Action::Describe => self.describe(),
            Action::OfferMemory => self.offer_memory(),
            Action::Judge(evidence) => self.judge(evidence),
            Action::Rehearse => {
                let handle = Arc::clone(&self.handle);
                self.job(move |machine| jobs::rehearse(machine, &|| handle.flow.now()));
            }
            Action::OpenData { token, table_seed } => self.open_data(token, table_seed),
            Action::BreakOff { resume } => self.break_off(resume),
            Action::Reconnect { token } => self.connect(Some(token)),
            Action::ReopenData { token } => self.reopen_data(token),
            Action::Probe(bytes) => {
                self.probe = Some(Probe { bytes, began: Instant::now() });
                self.order(Order::Probe(bytes), 1);
            }
            Action::Flush => self.flush(),
            Action::StartLog => {
                let shared = Arc::clone(&self.data.as_ref()?.shared);
                self.job(move |machine| jobs::start_log(machine, &shared.pages));
            }
            Action::Round { first } => {
                self.settler.get_or_insert_with(|| Settler::start(Arc::clone(&self.machine)));
                self.round = Some(Round::begin(&self.handle.flow));
                let flow = &self.handle.flow;
                let layout = self.data.as_ref().map(|data| data.shared.pages.view.layout());
                match (&mut self.watch, layout) {
                    (None, Some(layout)) => match Watch::new(layout, flow.now(), self.control.encodings()) {
                        Ok(watch) => self.watch = Some(watch),
                        Err(error) => self.input(Input::Failed(error.to_string())),
                    },
                    (Some(watch), _) => watch.round_begins(flow.now()),
                    (None, None) => {}
                }
                self.order(Order::Round { first }, usize::MAX);
            }
            Action::AwaitQueue => self.queue_awaited = !self.queue_empty(),
            Action::StopGuest => self.stop_guest(),
            Action::SendFinal => {
                let link_bytes_per_s = Some(self.control.switchover_bytes_per_s() as u64);
                self.order(Order::Final { link_bytes_per_s }, usize::MAX);
            }
            Action::EndChannels => self.order(Order::End, usize::MAX),
            Action::LetGo => self.job(jobs::let_go),
            Action::Restore { resume } => self.restore(resume),
            Action::Settle(patience) => self.settle(patience),
            Action::Audit => {
                let shared = Arc::clone(&self.data.as_ref()?.shared);
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
        if let Message::Abort(_) | Message::Farewell(()) = message {
            link.finish();
        }
    }

    fn say(&self, text: String) {
        tracing::info!("{text}");
        self.observer.event(Told::Decision { text });
    }

    /// Every channel says the same.
    fn say_once(&mut self, text: String) {
        if self.said.insert(text.clone()) {
            self.say(text);
        }
    }

    fn order(&mut self, order: Order, workers: usize) {
        if let Some(data) = &mut self.data {
            data.order(order, workers);
        }
    }

    fn worker(&mut self, links: u32, index: usize, told: WorkerTold) {
        let Some(data) = &mut self.data else { return };
        let tallied = match told {
            // Also of links that have broken: what it lists may not have arrived.
            WorkerTold::Marked(batch) => {
                if data.queued_pages() == 0 {
                    self.applying.begin(Instant::now());
                }
                if let Err(error) = data.unacknowledged[index].sent(batch) {
                    self.input(Input::Failed(format!("data channel {index}: {error}")));
                }
                return;
            }
            _ if links != self.links => return,
            WorkerTold::Says(text) => return self.say_once(text),
            WorkerTold::Broken(why) => return self.input(Input::LinkLost(why)),
            WorkerTold::Failed(why) => return self.input(Input::Failed(why)),
            WorkerTold::Done(report) => data.tally.note(report),
        };
        match tallied {
            None => {}
            Some(Tallied::Ended { sum }) => self.input(Input::Done(Done::FinalSent { sum })),
            Some(Tallied::Round { pages, again }) => self.round_written(pages, again),
        }
    }

    fn end(mut self, mut outcome: SourceOutcome) {
        self.hang_up();
        let mut data = self.data.take();
        let workers = data.as_mut().map(Data::dismiss).unwrap_or_default();
        let channels: Vec<_> = workers.into_iter().map(|worker| worker.join()).collect();
        self.pages.dismiss().into_iter().for_each(|thread| drop(thread.join()));
        // A machine that has moved never runs here again: its log ends with it.
        if let SourceOutcome::Unknown(..) = outcome
            && let Err(error) = self.machine.dirty_log().stop()
        {
            tracing::warn!("cannot stop the dirty log of the machine that may have moved: {error}");
        }
        let is_done = matches!(&outcome, SourceOutcome::Moved(report) if report.postcopy.is_none());
        if !is_done {
            self.close_link();
        } else if let Some(link) = self.handle.link() {
            link.hang_up();
        }
        let flow = &self.handle.flow;
        SourceControl::complete(&mut outcome, self.handle.wire_bytes(), flow.pages(), flow.postcopy());
        self.handle.ended(outcome);
        drop_later((data, channels));
    }
}
