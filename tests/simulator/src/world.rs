//! The world of one seed: hosts with processes, a network, a store, and what happens in it.

use std::collections::BTreeSet;
use std::fmt::Arguments;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use godwit_core::layout::Layout;
use godwit_core::message::Message;
use godwit_core::ownership::destination as destination_rules;
use godwit_core::ownership::modelled::{Answer, Call};
use godwit_core::ownership::{Claimant, Epoch, Marker, Name};
use godwit_core::{Phase, SessionToken};

use crate::agenda::Agenda;
use crate::chance::{Chance, ms};
use crate::event::{Act, Dial, Event, Reached, Wake};
use crate::link::next_message;
use crate::machine::{SharedTruth, lock};
use crate::network::{ConnectionId, HOSTS, Kind, Network};
use crate::process::{Process, Role};
use crate::setup::{MACHINE, Setup, When};
use crate::store::Store;
use crate::trace::Trace;
use crate::truth::Truth;

/// A guest that nobody moves does something this often.
const IDLE_GUEST: Duration = ms(300);

/// The world.
pub struct World {
    /// How this seed is.
    pub setup: Setup,
    /// What is random.
    pub chance: Chance,
    /// What is to happen.
    pub agenda: Agenda<Event>,
    /// What has happened.
    pub trace: Trace,
    /// Streams.
    pub network: Network,
    /// Claims.
    pub store: Store,
    /// What the guest has done.
    pub truth: SharedTruth,
    /// Every process there has ever been.
    pub processes: Vec<Process>,
    /// How often each host has booted.
    pub boots: [u32; HOSTS],
    /// The two ends of the last move.
    pub current: Option<(usize, usize)>,
    /// Moves that may still be tried.
    pub moves_left: u32,
    /// A move has succeeded.
    pub has_moved: bool,
    /// Nothing has been killed.
    pub calm: bool,
    /// When the last fault's effects end.
    pub healed_at: Duration,
    /// When something last happened that can lead to more.
    pub busy_at: Duration,
    /// Disk writes take this much longer until then.
    pub slow_disk: (Duration, Duration),
    /// Epochs in which the guest has run.
    pub ran: BTreeSet<Epoch>,
    /// Faults that have come, or are about to.
    pub armed: Vec<bool>,
}

impl World {
    /// The world of a seed, in which a person is about to start the machine.
    pub fn new(seed: u64, print: bool) -> Self {
        let mut chance = Chance::new(seed);
        let setup = Setup::draw(&mut chance);
        let pages = Layout::new(&setup.description.memory).map_or(0, |layout| layout.pages());
        let network = Network::new(&mut chance);
        let store = Store::new(&mut chance);
        Self {
            armed: vec![false; setup.faults.len()],
            moves_left: setup.moves,
            setup,
            chance,
            agenda: Agenda::default(),
            trace: Trace::new(print),
            network,
            store,
            truth: Arc::new(Mutex::new(Truth::new(pages as usize))),
            processes: Vec::new(),
            boots: [0; HOSTS],
            current: None,
            has_moved: false,
            calm: true,
            healed_at: Duration::ZERO,
            busy_at: Duration::ZERO,
            slow_disk: (Duration::ZERO, Duration::ZERO),
            ran: BTreeSet::new(),
        }
    }

    /// The time.
    pub fn now(&self) -> Duration {
        self.agenda.now()
    }

    /// Notes something that happens.
    pub fn note(&mut self, what: Arguments<'_>) {
        self.trace.step(self.agenda.now(), what);
    }

    /// Notes something that must never happen.
    pub fn violate(&mut self, what: &str) {
        lock(&self.truth).violate(|| what.into());
    }

    /// A new process on a host.
    pub fn spawn(&mut self, host: usize, role: Role) -> usize {
        let number = self.processes.len();
        let name = |text: String| -> Name {
            match text.parse() {
                Ok(name) => name,
                Err(_) => unreachable!("letters and digits"),
            }
        };
        let claimant = Claimant {
            machine: name(MACHINE.into()),
            host: name(format!("host{host}")),
            boot_id: name(format!("boot{}", self.boots[host])),
            instance: name(format!("p{number}")),
        };
        self.processes.push(Process {
            host,
            claimant,
            alive: true,
            part: 0,
            role,
            machine: None,
            guest_goes_on: false,
            holding: None,
            marking: None,
        });
        number
    }

    /// Has something done in a process, in the part that it plays now.
    pub fn wake_at(&mut self, process: usize, at: Duration, wake: Wake) {
        let part = self.processes[process].part;
        self.agenda.at(at, Event::Wake(process, part, wake));
    }

    /// The same, after a while.
    pub fn wake_after(&mut self, process: usize, delay: Duration, wake: Wake) {
        self.wake_at(process, self.now() + delay, wake);
    }

    /// Sends a message from a side of a connection.
    pub fn send(&mut self, id: ConnectionId, side: usize, message: &Message) {
        match message.encode() {
            Ok(frame) => self.network.write(id, side, &frame, &mut self.chance, &mut self.agenda),
            Err(error) => self.violate(&format!("{} cannot be sent: {error}", message.name())),
        }
    }

    /// Whether a process reaches another one's host within a time limit, and when it knows.
    pub fn reach(&self, from: usize, to: usize, limit: Duration) -> (bool, Duration) {
        let (here, there) = (self.processes[from].host, self.processes[to].host);
        let at = self.network.arrival(self.now(), here, there);
        let at = self.network.arrival(at, there, here);
        let latest = self.now() + limit;
        (at <= latest, at.min(latest))
    }

    /// Who answers a source there that opens a channel.
    pub fn answers(&self, process: usize, dial: Dial) -> Reached {
        match &self.processes[process].role {
            Role::Listening if self.listens(process) && dial == Dial::First => Reached::Peer,
            Role::Destination(end) => end.answers(dial),
            Role::Filling(end) => end.answers(dial),
            _ => Reached::Stranger,
        }
    }

    /// A token that nobody else has.
    pub fn token(&mut self) -> SessionToken {
        let mut token = [0; 16];
        self.chance.fill(&mut token);
        SessionToken(token)
    }

    /// Connects two processes.
    pub fn connect(&mut self, kind: Kind, from: usize, to: usize) -> ConnectionId {
        let end = |process: usize| (process, self.processes[process].host);
        let ends = [end(from), end(to)];
        self.network.connect(kind, ends)
    }

    /// Whether a process waits for a machine.
    pub fn listens(&self, process: usize) -> bool {
        self.processes[process].alive && matches!(self.processes[process].role, Role::Listening)
    }

    /// A process calls the store.
    pub fn call_store(&mut self, process: usize, call: Call) {
        let host = self.processes[process].host;
        let what = match &call {
            Call::Claim(claim) => format!("claims epoch {}", claim.epoch),
            Call::Look => "looks at the claims".into(),
            Call::Mark(epoch, marker) => format!("marks epoch {epoch} {marker}"),
        };
        let (_, fate) = self.store.call((process, host), call, &mut self.chance, &mut self.agenda);
        match fate {
            Some(fate) => self.note(format_args!("p{process} {what} ({fate:?})")),
            None => self.note(format_args!("p{process} {what}")),
        }
    }

    /// The guest of a process has a next thing to do.
    pub fn guest_goes_on(&mut self, process: usize) {
        if !std::mem::replace(&mut self.processes[process].guest_goes_on, true) {
            self.agenda.after(IDLE_GUEST.mul_f64(0.1), Event::Guest(process));
        }
    }

    /// A move has entered a phase: faults may have waited for that.
    pub fn entered(&mut self, process: usize, phase: Phase) {
        self.note(format_args!("p{process} enters {phase}"));
        if phase == Phase::PreSwitchover {
            let delay = self.chance.time(ms(1), Duration::from_secs(2));
            self.agenda.after(delay, Event::Person(Act::Proceed));
        }
        for (number, planned) in self.setup.faults.iter().enumerate() {
            if let When::In(wanted, delay) = planned.when
                && wanted == phase
                && !std::mem::replace(&mut self.armed[number], true)
            {
                self.agenda.after(delay, Event::Fault(number));
            }
        }
        if let Some((wanted, delay)) = self.setup.asks_for_postcopy
            && wanted == phase
        {
            self.agenda.after(delay, Event::Person(Act::PostCopy));
        }
    }

    /// Lets the next thing happen. False: nothing is to happen any more.
    pub fn step(&mut self) -> bool {
        let Some(event) = self.agenda.take_next() else { return false };
        if self.matters(&event) {
            self.busy_at = self.now();
        }
        match event {
            Event::Guest(process) => self.guest_acts(process),
            Event::DiskWrite(process, request) => self.disk_write(process, request),
            Event::Arrives(id, side) => self.arrives(id, side),
            Event::Broken(id, side) => self.broken(id, side),
            Event::Readable(id, side) => self.reads(id, side),
            Event::Expires(id) => self.network.cut(id, &mut self.chance, &mut self.agenda),
            Event::Close(id, side) => self.network.close(id, side, &mut self.agenda),
            Event::StoreEffect(number) => {
                let what = match self.store.take_effect(number, &mut self.agenda) {
                    Call::Claim(claim) => {
                        Some(format!("the claim of epoch {} by {} arrives", claim.epoch, claim.claimant.instance))
                    }
                    Call::Mark(epoch, marker) => Some(format!("epoch {epoch} is marked {marker}")),
                    Call::Look => None,
                };
                if let Some(what) = what {
                    self.note(format_args!("{what}"));
                }
            }
            Event::StoreAnswer(number, answer) => self.store_answers(number, Some(answer)),
            Event::StoreTimeOut(number) => self.store_answers(number, None),
            Event::Mark(process) => self.marks(process, destination_rules::Input::Retry),
            Event::MarkComplete(process) => self.mark_complete(process),
            Event::Wake(process, part, wake) => self.wakes(process, part, wake),
            Event::Fault(number) => self.fault(number),
            Event::Person(act) => self.act(act),
        }
        self.check();
        true
    }

    /// Whether something can lead to more than itself.
    fn matters(&self, event: &Event) -> bool {
        let idle = |process: usize| matches!(self.processes[process].role, Role::Watching | Role::Over);
        match event {
            Event::Guest(_) | Event::DiskWrite(..) | Event::Person(Act::Look) => false,
            Event::StoreTimeOut(_) | Event::Close(..) => false,
            Event::Wake(_, _, Wake::Tick | Wake::Ping) => false,
            Event::Wake(process, ..) => !idle(*process) && !self.is_away(*process),
            Event::StoreEffect(call) | Event::StoreAnswer(call, _) => {
                let caller = self.store.caller(*call);
                !idle(caller) && !self.is_away(caller)
            }
            Event::Arrives(id, side) => !idle(self.network.process(*id, *side)) && !self.network.is_ping(*id, *side),
            _ => true,
        }
    }

    /// A source in post-copy that tries to reach its destination does so for ever.
    fn is_away(&self, process: usize) -> bool {
        matches!(&self.processes[process].role, Role::Source(end) if end.control.phase() == Phase::PostCopyPaused)
    }

    fn guest_acts(&mut self, process: usize) {
        let moving =
            |process: &Process| matches!(process.role, Role::Source(_) | Role::Destination(_) | Role::Filling(_));
        let interval = match self.processes.iter().any(moving) {
            true => self.setup.guest_interval,
            false => IDLE_GUEST,
        };
        let Process { alive: true, machine: Some(machine), .. } = &self.processes[process] else {
            self.processes[process].guest_goes_on = false;
            return;
        };
        let disk = self.chance.hit(self.setup.disk_share);
        if let Some(request) = machine.step(disk) {
            let slow = if self.now() < self.slow_disk.1 { self.slow_disk.0 } else { Duration::ZERO };
            let delay = self.setup.disk_latency.mul_f64(0.5 + self.chance.below(100) as f64 / 100.0) + slow;
            self.agenda.after(delay, Event::DiskWrite(process, request));
        }
        self.trace.small_step(self.agenda.now(), process as u64);
        self.filling_listens(process);
        let interval = interval.mul_f64(0.2 + self.chance.below(160) as f64 / 100.0);
        self.agenda.after(interval, Event::Guest(process));
    }

    fn disk_write(&mut self, process: usize, request: u64) {
        let Process { alive: true, machine: Some(machine), .. } = &self.processes[process] else { return };
        if !machine.runs() {
            return self.violate("a disk was written by a guest that had been paused");
        }
        machine.disk_write_done(request);
        self.filling_listens(process);
    }

    /// Which link a process listens to.
    fn link_of(&self, process: usize) -> Option<ConnectionId> {
        match &self.processes[process].role {
            Role::Source(end) => end.link.as_ref().map(|link| link.id),
            Role::Destination(end) => Some(end.link.id),
            Role::Filling(end) => Some(end.link.id),
            _ => None,
        }
    }

    fn arrives(&mut self, id: ConnectionId, side: usize) {
        if !self.network.arrive(id, side, &mut self.agenda) {
            return;
        }
        let process = self.network.process(id, side);
        if !self.processes[process].alive {
            return;
        }
        let peer = self.network.process(id, 1 - side);
        match (self.network.kind(id), side) {
            (Kind::Control, _) => {}
            (Kind::Data(_), _) => {
                self.destination_reads(process, id);
                return self.source_has_room(peer, id);
            }
            (Kind::Pages(_), 0) => return self.source_is_asked(process, id),
            (Kind::Pages(_), _) => {
                self.destination_reads_pages(process, id);
                self.filling_reads(process, id);
                return self.source_may_push(peer, id);
            }
        }
        let now = self.now();
        match &mut self.processes[process].role {
            Role::Source(end) => end.link.iter_mut().filter(|link| link.id == id).for_each(|link| link.heard_at = now),
            Role::Destination(end) if end.link.id == id => end.link.heard_at = now,
            Role::Filling(end) if end.link.id == id => end.link.heard_at = now,
            _ => {}
        }
        self.reads(id, side);
    }

    /// Takes up the messages that have arrived, if whoever they are for listens there.
    fn reads(&mut self, id: ConnectionId, side: usize) {
        let process = self.network.process(id, side);
        while self.link_of(process) == Some(id) {
            match next_message(self.network.arrived(id, side)) {
                None => return,
                Some(Ok(message)) => self.hears(process, Ok(message)),
                Some(Err(error)) => return self.violate(&format!("a message cannot be read: {error}")),
            }
        }
    }

    fn hears(&mut self, process: usize, message: Result<Message, String>) {
        match self.processes[process].role {
            Role::Source(_) => self.source_hears(process, message),
            Role::Destination(_) => self.destination_hears(process, message),
            Role::Filling(_) => self.filling_hears(process, message),
            _ => {}
        }
    }

    fn broken(&mut self, id: ConnectionId, side: usize) {
        let process = self.network.process(id, side);
        if !self.processes[process].alive {
            return;
        }
        match self.network.kind(id) {
            Kind::Control if self.link_of(process) == Some(id) => {
                self.hears(process, Err("it was closed".into()));
            }
            Kind::Control => {}
            Kind::Data(_) => match self.processes[process].role {
                Role::Source(_) => self.source_loses_data(process, id),
                Role::Destination(_) => self.destination_loses_data(process, id),
                _ => {}
            },
            Kind::Pages(_) => match self.processes[process].role {
                Role::Source(_) => self.source_loses_pages(process, id),
                Role::Destination(_) => self.destination_loses_pages(process, id),
                Role::Filling(_) => self.filling_loses(process, id),
                _ => {}
            },
        }
    }

    fn store_answers(&mut self, number: usize, answer: Option<Answer>) {
        let Some((process, answer)) = self.store.answered(number, answer) else { return };
        if !self.processes[process].alive {
            return;
        }
        if let Answer::Marked(answer) = answer {
            if self.store.marker(number) == Some(Marker::Complete) {
                return self.marked_complete(process, &answer);
            }
            return self.marks(process, destination_rules::Input::Marked(answer));
        }
        match self.processes[process].role {
            Role::Source(_) => self.source_learns(process, answer),
            Role::Destination(_) => self.destination_learns(process, answer),
            Role::Starting(_) => self.start_learns(process, answer),
            Role::Watching => self.watcher_learns(process, answer),
            Role::Listening | Role::Keeping | Role::Filling(_) | Role::Over => {}
        }
    }

    fn wakes(&mut self, process: usize, part: u64, wake: Wake) {
        let state = &self.processes[process];
        if !state.alive || state.part != part {
            return;
        }
        match state.role {
            Role::Source(_) => self.source_wakes(process, wake),
            Role::Destination(_) => self.destination_wakes(process, wake),
            Role::Filling(_) => self.filling_wakes(process, wake),
            Role::Starting(_) => self.start_retries(process),
            Role::Watching => self.watcher_retries(process),
            Role::Listening | Role::Keeping | Role::Over => {}
        }
    }
}
