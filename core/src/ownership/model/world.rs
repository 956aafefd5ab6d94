//! The world of the model: two hosts with the real state machines, a network, a store, and whatever may befall them.

use std::collections::BTreeSet;
use std::sync::OnceLock;

use crate::ownership::claim::{Claimant, Epoch, Marker, Name, Nonce};
use crate::ownership::destination::{self, DestinationHandover};
use crate::ownership::modelled::{Answer, Call as Op, ModelledStore};
use crate::ownership::source::{self, Nonces, SourceHandover};
use crate::ownership::start::{self, Liveness, Mode, Start};
use crate::ownership::store::Occupant;
use crate::ownership::{RightToRun, Rules};

/// The two hosts.
pub const HOSTS: [usize; 2] = [0, 1];

/// How often each thing may still happen.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash)]
pub struct Budget {
    pub moves: u8,
    pub crashes: u8,
    pub starts: u8,
    pub take_overs: u8,
    pub power_offs: u8,
    pub timeouts: u8,
    pub failures: u8,
    pub duplicates: u8,
    pub stale_reads: u8,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct World {
    pub hosts: [Host; 2],
    pub store: ModelledStore,
    pub calls: Vec<Call>,
    pub wire: Vec<Packet>,
    pub budget: Budget,
    /// Epochs in which the guest has run.
    pub ran: BTreeSet<Epoch>,
    /// Nothing has crashed and nobody has powered off: one must end up running.
    pub calm: bool,
    /// The first thing that must never happen and has.
    pub violation: Option<&'static str>,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Host {
    pub control: Control,
    pub guest: Option<RightToRun>,
    /// The number of its process.
    pub instance: u8,
    /// The move it takes part in.
    pub session: u8,
    pub link_up: bool,
    /// It is to be told when time has passed.
    pub waiting: bool,
    /// It is to be told that the guest runs.
    pub starting: bool,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Control {
    /// No process, or one that holds no machine.
    Down,
    Idle,
    Source(SourceHandover),
    Destination(DestinationHandover),
    Start(Start),
}

/// A call to the store.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Call {
    pub host: usize,
    pub op: Op,
    /// It has taken effect, and this is on its way back.
    pub answer: Option<Answer>,
    /// Nobody waits any more; it may still take effect.
    pub orphan: bool,
}

#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Packet {
    pub to: usize,
    pub session: u8,
    pub body: Body,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Body {
    Ready,
    Commit(Epoch, Nonce),
    Running(Epoch),
}

/// What may happen next. A packet that is lost is one that is never delivered; a call that never takes effect likewise.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Step {
    Move(usize),
    GiveUp(usize),
    Deliver(usize),
    Duplicate(usize),
    LoseLink(usize),
    /// A call takes effect.
    Effect(usize),
    /// A look sees the store as it was a claim ago.
    Stale(usize),
    /// Its answer arrives.
    Answer(usize),
    TimeOut(usize),
    Fail(usize),
    Retry(usize),
    Started(usize),
    Crash(usize),
    PowerOff(usize),
    /// A person who knows that the destination died before it ran the guest lets it run on at the source.
    Force(usize, Epoch),
    Start(usize, Mode),
}

fn claimant(host: usize, instance: u8) -> &'static Claimant {
    static ALL: OnceLock<Vec<Claimant>> = OnceLock::new();
    let all = ALL.get_or_init(|| {
        let name = |text: String| text.parse::<Name>().unwrap();
        let claimant = |host, instance: usize| Claimant {
            machine: name("m".into()),
            host: name(format!("host{host}")),
            boot_id: name("b".into()),
            instance: name(format!("i{instance}")),
        };
        HOSTS.iter().flat_map(|host| (0..16).map(move |instance| claimant(host, instance))).collect()
    });
    &all[host * 16 + usize::from(instance)]
}

impl World {
    /// Host 0 runs the guest in epoch 1.
    pub fn new(budget: Budget) -> Self {
        let host = |guest, control| Host {
            control,
            guest,
            instance: 0,
            session: 0,
            link_up: false,
            waiting: false,
            starting: false,
        };
        let mut store = ModelledStore::default();
        store.take_effect(&Op::Claim(claimant(0, 0).claim(Epoch::FIRST, Nonce(0))));
        Self {
            hosts: [host(Some(RightToRun::for_test(Epoch::FIRST)), Control::Idle), host(None, Control::Down)],
            store,
            calls: Vec::new(),
            wire: Vec::new(),
            budget,
            ran: BTreeSet::from([Epoch::FIRST]),
            calm: true,
            violation: None,
        }
    }

    /// How many run the guest.
    pub fn running(&self) -> usize {
        self.hosts.iter().filter(|host| host.guest.is_some()).count()
    }

    /// Everything that may happen next.
    pub fn steps(&self, steps: &mut Vec<Step>) {
        let budget = &self.budget;
        for host in HOSTS {
            let Host { control, guest, link_up, waiting, starting, .. } = &self.hosts[host];
            let mut may = |possible: bool, step| steps.extend(possible.then_some(step));
            let owner = *control == Control::Idle && guest.is_some();
            may(owner && self.hosts[1 - host].control == Control::Down && budget.moves > 0, Step::Move(host));
            may(matches!(control, Control::Source(source) if source.before_commit()), Step::GiveUp(host));
            may(*link_up, Step::LoseLink(host));
            may(*waiting, Step::Retry(host));
            may(*starting, Step::Started(host));
            may(*control != Control::Down && budget.crashes > 0, Step::Crash(host));
            may(owner && budget.power_offs > 0, Step::PowerOff(host));
            let down = *control == Control::Down && budget.starts > 0;
            may(down, Step::Start(host, Mode::Existing));
            if let Some(owner) = self.store.newest_claim() {
                let take_over = down && budget.take_overs > 0 && !self.alive(&owner.claimant);
                may(take_over, Step::Start(host, Mode::TakeOver(owner.epoch)));
                let died_before = !self.alive(&owner.claimant) && !self.ran.contains(&owner.epoch);
                let paused = matches!(control, Control::Source(source) if !source.before_commit());
                may(paused && died_before && budget.take_overs > 0, Step::Force(host, owner.epoch));
            }
        }
        for (at, call) in self.calls.iter().enumerate() {
            let mut may = |possible: bool, step| steps.extend(possible.then_some(step));
            may(call.answer.is_none(), Step::Effect(at));
            may(call.answer.is_none() && call.op == Op::Look && budget.stale_reads > 0, Step::Stale(at));
            may(call.answer.is_some(), Step::Answer(at));
            may(!call.orphan && budget.timeouts > 0, Step::TimeOut(at));
            may(!call.orphan && call.answer.is_none() && budget.failures > 0, Step::Fail(at));
        }
        for at in 0..self.wire.len() {
            steps.push(Step::Deliver(at));
            if budget.duplicates > 0 {
                steps.push(Step::Duplicate(at));
            }
        }
    }

    /// Lets something happen.
    pub fn take(&mut self, step: Step, rules: Rules) {
        match step {
            Step::Move(host) => self.begin_move(host, rules),
            Step::GiveUp(host) => self.tell_source(host, source::Input::GiveUp),
            Step::Deliver(at) => {
                let packet = self.wire.remove(at);
                self.deliver(packet);
            }
            Step::Duplicate(at) => {
                self.budget.duplicates -= 1;
                self.send(self.wire[at].clone());
            }
            Step::LoseLink(host) => {
                self.hosts[host].link_up = false;
                self.tell_source(host, source::Input::Lost);
                self.tell_destination(host, destination::Input::Lost);
            }
            Step::Effect(at) => self.take_effect(at, false),
            Step::Stale(at) => {
                self.budget.stale_reads -= 1;
                self.take_effect(at, true);
            }
            Step::Answer(at) => {
                let call = self.calls.remove(at);
                if let Some(answer) = call.answer {
                    self.answer(call.host, answer);
                }
            }
            Step::TimeOut(at) => {
                self.budget.timeouts -= 1;
                let call = self.calls[at].clone();
                self.calls[at].orphan = true;
                if call.answer.is_some() || call.op == Op::Look {
                    self.calls.remove(at);
                }
                self.answer(call.host, call.op.unknown(""));
            }
            Step::Fail(at) => {
                self.budget.failures -= 1;
                let call = self.calls.remove(at);
                self.answer(call.host, call.op.failed(""));
            }
            Step::Retry(host) => {
                self.hosts[host].waiting = false;
                self.tell_source(host, source::Input::Retry);
                self.tell_destination(host, destination::Input::Retry);
                self.tell_start(host, start::Input::Retry);
            }
            Step::Started(host) => {
                self.hosts[host].starting = false;
                self.tell_destination(host, destination::Input::Started);
            }
            Step::Crash(host) => {
                self.budget.crashes -= 1;
                self.calm = false;
                self.end_process(host);
            }
            Step::PowerOff(host) => {
                self.budget.power_offs -= 1;
                self.calm = false;
                if let Some(right) = self.hosts[host].guest.take() {
                    self.call(host, Op::Mark(right.give_up(), Marker::Free));
                }
                self.end_process(host);
            }
            Step::Force(host, epoch) => {
                self.budget.take_overs -= 1;
                self.tell_source(host, source::Input::Force(epoch));
            }
            Step::Start(host, mode) => {
                self.budget.starts -= 1;
                self.budget.take_overs -= u8::from(matches!(mode, Mode::TakeOver(_)));
                self.hosts[host].instance += 1;
                let instance = self.hosts[host].instance;
                let nonce = Nonce(300 + 16 * host as u64 + u64::from(instance));
                let (start, action) = Start::new(claimant(host, instance).clone(), nonce, mode, rules);
                self.hosts[host].control = Control::Start(start);
                self.start_acts(host, action);
            }
        }
        // What nobody listens for is forgotten, and what lies in no order is kept in one: equal worlds look equal.
        let listens = |host: &Host| matches!(host.control, Control::Source(_) | Control::Destination(_));
        self.wire.retain(|packet| {
            let host = &self.hosts[packet.to];
            host.session == packet.session && listens(host)
        });
        self.wire.sort();
    }

    fn begin_move(&mut self, from: usize, rules: Rules) {
        let to = 1 - from;
        let Some(right) = self.hosts[from].guest.take() else { return };
        let Some(next) = right.epoch().next() else { return };
        self.budget.moves -= 1;
        let session = self.hosts[from].session.max(self.hosts[to].session) + 1;
        self.hosts[to].instance += 1;
        for host in HOSTS {
            self.hosts[host].session = session;
            self.hosts[host].link_up = true;
        }
        let nonces = Nonces { theirs: Nonce(100 + u64::from(session)), ours: Nonce(200 + u64::from(session)) };
        let me = |host: usize| claimant(host, self.hosts[host].instance).clone();
        let source = SourceHandover::new(right, me(from), nonces, rules);
        let destination = DestinationHandover::new(me(to), next, rules);
        self.hosts[from].control = Control::Source(source);
        self.hosts[to].control = Control::Destination(destination);
        self.tell_destination(to, destination::Input::Loaded);
    }

    fn alive(&self, claimant: &Claimant) -> bool {
        HOSTS.iter().any(|host| {
            let Host { control, instance, .. } = &self.hosts[*host];
            *control != Control::Down && claimant == self::claimant(*host, *instance)
        })
    }

    fn send(&mut self, packet: Packet) {
        self.wire.push(packet);
    }

    fn deliver(&mut self, Packet { to, session, body }: Packet) {
        if self.hosts[to].session != session {
            return;
        }
        match body {
            Body::Ready => self.tell_source(to, source::Input::Commit),
            Body::Commit(epoch, nonce) => self.tell_destination(to, destination::Input::Commit(epoch, nonce)),
            Body::Running(epoch) => self.tell_source(to, source::Input::Running(epoch)),
        }
    }

    fn call(&mut self, host: usize, op: Op) {
        self.calls.push(Call { host, op, answer: None, orphan: false });
    }

    fn take_effect(&mut self, at: usize, stale: bool) {
        let answer = match stale {
            true => self.store.stale_look(),
            false => self.store.take_effect(&self.calls[at].op),
        };
        match self.calls[at].orphan {
            true => drop(self.calls.remove(at)),
            false => self.calls[at].answer = Some(answer),
        }
    }

    fn answer(&mut self, host: usize, answer: Answer) {
        match answer {
            Answer::Claimed(answer) => {
                self.tell_source(host, source::Input::Claimed(answer.clone()));
                self.tell_destination(host, destination::Input::Claimed(answer.clone()));
                self.tell_start(host, start::Input::Claimed(answer));
            }
            Answer::Seen(reading) => {
                self.tell_source(host, source::Input::Seen(reading.clone()));
                self.tell_start(host, start::Input::Seen(reading));
            }
            Answer::Marked(answer) => self.tell_destination(host, destination::Input::Marked(answer)),
        }
    }

    /// Its calls may still take effect, and nobody waits for them.
    fn end_process(&mut self, host: usize) {
        let Host { control, guest, link_up, waiting, starting, .. } = &mut self.hosts[host];
        *control = Control::Down;
        *guest = None;
        (*link_up, *waiting, *starting) = (false, false, false);
        self.calls.retain(|call| call.host != host || call.op != Op::Look && call.answer.is_none());
        self.calls.iter_mut().filter(|call| call.host == host).for_each(|call| call.orphan = true);
    }

    fn tell_source(&mut self, host: usize, input: source::Input) {
        let Control::Source(source) = &mut self.hosts[host].control else { return };
        for action in source.handle(input) {
            self.source_acts(host, action);
        }
    }

    fn source_acts(&mut self, host: usize, action: source::Action) {
        let session = self.hosts[host].session;
        match action {
            source::Action::SendCommit(epoch, nonce) => {
                self.send(Packet { to: 1 - host, session, body: Body::Commit(epoch, nonce) });
            }
            source::Action::Claim(claim) => self.call(host, Op::Claim(claim)),
            source::Action::Look => self.call(host, Op::Look),
            source::Action::Wait => self.hosts[host].waiting = true,
            source::Action::Resume(right) => {
                self.run(host, right);
                self.own(host);
            }
            source::Action::Moved => {
                let here = self.store.claims().rev().find(|claim| claim.claimant == *self.me(host));
                let since = here.map(|claim| claim.epoch);
                if self.ran.last().copied() <= since {
                    self.violate("moved, and nothing has run there");
                }
                self.end_process(host);
            }
            source::Action::Superseded(record) => {
                let Occupant::Claim(claim) = record.occupant else { return };
                if claim.claimant == *self.me(host) {
                    self.violate("let go of the machine to itself");
                }
                self.end_process(host);
            }
            source::Action::Report(_) => {}
        }
    }

    fn tell_destination(&mut self, host: usize, input: destination::Input) {
        let Control::Destination(destination) = &mut self.hosts[host].control else { return };
        let actions = destination.handle(input);
        let over = destination.is_over();
        for action in actions {
            self.destination_acts(host, action);
        }
        if over && self.hosts[host].guest.is_some() {
            self.own(host);
        }
    }

    fn destination_acts(&mut self, host: usize, action: destination::Action) {
        let session = self.hosts[host].session;
        match action {
            destination::Action::SendReady => self.send(Packet { to: 1 - host, session, body: Body::Ready }),
            destination::Action::Claim(claim) => self.call(host, Op::Claim(claim)),
            destination::Action::Run(right) => {
                self.run(host, right);
                self.hosts[host].starting = true;
            }
            destination::Action::Announce | destination::Action::Report(_) => {}
            destination::Action::Mark(epoch, marker) => self.call(host, Op::Mark(epoch, marker)),
            destination::Action::SendRunning(epoch) => {
                self.send(Packet { to: 1 - host, session, body: Body::Running(epoch) });
            }
            destination::Action::Wait => self.hosts[host].waiting = true,
            destination::Action::Drop(_) => self.end_process(host),
        }
    }

    fn tell_start(&mut self, host: usize, input: start::Input) {
        let Control::Start(start) = &mut self.hosts[host].control else { return };
        for action in start.handle(input) {
            self.start_acts(host, action);
        }
    }

    fn start_acts(&mut self, host: usize, action: start::Action) {
        match action {
            start::Action::Look => self.call(host, Op::Look),
            start::Action::Examine(claim) => {
                let liveness = if self.alive(&claim.claimant) { Liveness::Alive } else { Liveness::Dead };
                self.tell_start(host, start::Input::Examined(liveness));
            }
            start::Action::Claim(claim) => self.call(host, Op::Claim(claim)),
            start::Action::Run(right) => {
                self.check_predecessor(&right);
                self.run(host, right);
                self.own(host);
            }
            start::Action::Wait => self.hosts[host].waiting = true,
            start::Action::Report(_) => {}
            start::Action::Refuse(_) => self.end_process(host),
        }
    }

    fn me(&self, host: usize) -> &'static Claimant {
        claimant(host, self.hosts[host].instance)
    }

    fn own(&mut self, host: usize) {
        let Host { control, link_up, waiting, .. } = &mut self.hosts[host];
        *control = Control::Idle;
        (*link_up, *waiting) = (false, false);
    }

    fn run(&mut self, host: usize, right: RightToRun) {
        match self.store.claim_of(right.epoch()) {
            Some(claim) if claim.claimant == *self.me(host) => {}
            _ => self.violate("ran without a claim of its own"),
        }
        if self.store.newest_claim().is_some_and(|newest| newest.epoch > right.epoch()) {
            self.violate("ran after another's claim");
        }
        self.ran.insert(right.epoch());
        self.hosts[host].guest = Some(right);
    }

    fn check_predecessor(&mut self, right: &RightToRun) {
        let Some(claim) = self.store.before(right.epoch()) else { return };
        if self.alive(&claim.claimant) && !self.store.is_marked(claim.epoch, Marker::Free) {
            self.violate("started from a claim whose owner lives");
        }
    }

    fn violate(&mut self, what: &'static str) {
        self.violation.get_or_insert(what);
    }
}
