//! What people do, and what follows from it in the processes they start: starts, moves and how those end.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use godwit_core::Phase;
use godwit_core::machine::SourceMachine;
use godwit_core::ownership::holding::Next;
use godwit_core::ownership::modelled::{Answer, Call};
use godwit_core::ownership::source::{Input as OwnershipInput, Nonces};
use godwit_core::ownership::start::{self, Liveness, Mode, Start};
use godwit_core::ownership::{Claim, Holding, Nonce, RETRY_GAP, RightToRun, Rules, Settlement};
use godwit_core::source::control::{Beginning, Input, SourceControl};
use godwit_core::source::{SourceOptions, SourceOutcome};

use crate::chance::ms;
use crate::destination::CLAIMS;
use crate::event::{Act, Event, Wake};
use crate::machine::Machine;
use crate::network::HOSTS;
use crate::process::{Process, Role};
use crate::source::{SourceEnd, settling_input};
use crate::world::World;

impl World {
    /// Somebody does something.
    pub fn act(&mut self, act: Act) {
        match act {
            Act::Migrate(host) => self.migrate(host),
            Act::Cancel => {
                let Some((source, _)) = self.current else { return };
                self.with_source(source, |world, (_, end)| {
                    let allowed = end.control.may_cancel();
                    world.note(format_args!("somebody cancels the move of p{source}: {allowed:?}"));
                    if allowed.is_ok() {
                        let now = world.now() - end.began();
                        end.control.handle(now, Input::Cancel);
                    }
                });
            }
            Act::Proceed => {
                let Some((source, _)) = self.current else { return };
                self.with_source(source, |world, (_, end)| {
                    let now = world.now() - end.began();
                    end.control.handle(now, Input::Proceed);
                });
            }
            Act::PostCopy => {
                let Some((source, _)) = self.current else { return };
                self.with_source(source, |world, (_, end)| {
                    let allowed = end.control.may_go_over();
                    world.note(format_args!("somebody wants the move of p{source} to go over: {allowed:?}"));
                    if allowed.is_ok() {
                        let now = world.now() - end.began();
                        end.control.handle(now, Input::PostCopy);
                    }
                });
            }
            Act::Abandon(source) => self.with_source(source, |world, (_, end)| {
                if end.control.phase() == Phase::PostCopyPaused {
                    world.note(format_args!("somebody says that p{source} has nobody to wait for"));
                    // Whoever does so may be wrong.
                    world.calm = false;
                    let now = world.now() - end.began();
                    end.control.handle(now, Input::Abandon);
                }
            }),
            Act::Quit(process) => {
                self.note(format_args!("p{process} is told to quit"));
                self.kill(process);
            }
            Act::Run(host) => self.start(host, Mode::Existing),
            Act::TakeOwnership(host, epoch) => self.start(host, Mode::TakeOver(epoch)),
            Act::Force(epoch) => {
                let watches = |process: &Process| process.alive && matches!(process.role, Role::Watching);
                if let Some(source) = self.processes.iter().find(|process| watches(process))
                    && let Some(holding) = &source.holding
                {
                    holding.force(epoch);
                }
            }
            Act::Look => {}
        }
    }

    /// Starts the machine for the first time.
    pub fn first_start(&mut self) {
        for host in 1..HOSTS {
            self.spawn(host, Role::Listening);
        }
        if self.setup.claims {
            self.start(0, Mode::New);
        } else {
            let process = self.spawn(0, Role::Keeping);
            self.boots_machine(process);
        }
    }

    fn start(&mut self, host: usize, mode: Mode) {
        if !self.setup.claims {
            return;
        }
        let process = self.spawn(host, Role::Listening);
        let nonce = Nonce(self.chance.number());
        let me = self.processes[process].claimant.clone();
        self.note(format_args!("p{process} is started on host {host}: {mode:?}"));
        let (start, first) = Start::new(me, nonce, mode, Rules::default());
        self.processes[process].role = Role::Starting(Box::new(start));
        self.start_does(process, nonce, vec![first]);
    }

    fn start_does(&mut self, process: usize, nonce: Nonce, actions: Vec<start::Action>) {
        for action in actions {
            match action {
                start::Action::Look => self.call_store(process, Call::Look),
                start::Action::Examine(claim) => {
                    let liveness = if self.is_alive(&claim) { Liveness::Alive } else { Liveness::Dead };
                    self.start_goes_on(process, start::Input::Examined(liveness));
                }
                start::Action::Claim(claim) => self.call_store(process, Call::Claim(claim)),
                start::Action::Wait => self.wake_after(process, RETRY_GAP, Wake::Retry),
                start::Action::Report(why) => self.note(format_args!("p{process} says: {why}")),
                start::Action::Run(right) => {
                    let predecessor = self.store.entries.before(right.epoch());
                    let alive = predecessor.is_some_and(|claim| self.is_alive(claim));
                    if alive {
                        self.violate("a machine was started while the owner of the claim before lives");
                    }
                    self.owns(process, right, nonce);
                    self.processes[process].role = Role::Keeping;
                    self.boots_machine(process);
                }
                start::Action::Refuse(why) => {
                    self.note(format_args!("p{process} may not start the machine: {why:?}"));
                    self.ends(process);
                }
            }
        }
    }

    fn start_goes_on(&mut self, process: usize, input: start::Input) {
        let Some(mut start) = self.processes[process].role.take_start() else { return };
        let nonce = start.nonce();
        let actions = start.handle(input);
        self.processes[process].role = Role::Starting(start);
        self.start_does(process, nonce, actions);
    }

    /// The store has answered.
    pub fn start_learns(&mut self, process: usize, answer: Answer) {
        match answer {
            Answer::Seen(reading) => self.start_goes_on(process, start::Input::Seen(reading)),
            Answer::Claimed(answer) => self.start_goes_on(process, start::Input::Claimed(answer)),
            Answer::Marked(_) => {}
        }
    }

    /// It is time to try again.
    pub fn start_retries(&mut self, process: usize) {
        self.start_goes_on(process, start::Input::Retry);
    }

    /// Whether the process that made a claim lives.
    pub fn is_alive(&self, claim: &Claim) -> bool {
        self.processes.iter().any(|process| process.alive && process.claimant == claim.claimant)
    }

    /// A process has won its claim.
    pub fn owns(&mut self, process: usize, right: RightToRun, nonce: Nonce) {
        let state = &mut self.processes[process];
        let claim = state.claimant.claim(right.epoch(), nonce);
        state.holding = Some(Arc::new(Holding::modelled(PathBuf::from(CLAIMS), claim, right)));
    }

    fn boots_machine(&mut self, process: usize) {
        let built = Machine::new(self.setup.description.clone(), Arc::clone(&self.truth), self.chance.fork());
        let machine = match built {
            Ok(machine) => Arc::new(machine),
            Err(error) => return self.violate(&format!("the machine cannot be built: {error}")),
        };
        machine.behave(self.setup.meddling, self.setup.whole_pages);
        machine.boot();
        self.processes[process].machine = Some(machine);
        self.note(format_args!("p{process} boots the machine"));
        self.guest_goes_on(process);
        self.store.trouble(self.setup.store_trouble);
        self.plan_move(process, 1.0);
    }

    /// A machine has come in.
    pub fn arrived(&mut self, process: usize) {
        self.plan_move(process, 0.25);
    }

    /// Sooner or later somebody sends the machine away, perhaps.
    fn plan_move(&mut self, process: usize, probability: f64) {
        if self.moves_left == 0 || !self.chance.hit(probability) {
            return;
        }
        self.moves_left -= 1;
        let others: Vec<_> = (0..HOSTS).filter(|host| *host != self.processes[process].host).collect();
        let to = *self.chance.pick(&others);
        let delay = self.chance.time(ms(1), Duration::from_secs(2));
        self.agenda.after(delay, Event::Person(Act::Migrate(to)));
    }

    fn migrate(&mut self, host: usize) {
        let keeps = |process: &Process| process.runs() && matches!(process.role, Role::Keeping);
        let Some(from) = self.processes.iter().position(keeps) else { return };
        if self.processes[from].host == host {
            return;
        }
        let waits =
            (0..self.processes.len()).find(|process| self.listens(*process) && self.processes[*process].host == host);
        let to = waits.unwrap_or_else(|| self.spawn(host, Role::Listening));
        let Some(machine) = self.processes[from].machine.clone() else { return };
        let holding = self.processes[from].holding.clone();
        if let Some(holding) = &holding {
            let mut nonce = || Nonce(self.chance.number());
            holding.draw(Nonces { theirs: nonce(), ours: nonce() });
        }
        let options = SourceOptions { ownership: holding.clone(), ..self.setup.options.clone() };
        self.note(format_args!("the machine of p{from} is to move to p{to}, host {host}"));
        self.current = Some((from, to));
        let beginning = Beginning {
            program: "simulator".into(),
            host: format!("host{}", self.processes[from].host),
            running: machine.is_running(),
            table_seed: self.chance.number(),
            nonce: self.chance.number(),
            options: options.clone(),
        };
        let end = SourceEnd::new(SourceControl::new(beginning), to, self.now(), (machine, holding), &options);
        let state = &mut self.processes[from];
        state.part += 1;
        state.role = Role::Source(Box::new(end));
        self.source_begins(from);
    }

    /// A move is over, as the source sees it.
    pub fn move_ended(&mut self, process: usize, outcome: SourceOutcome) {
        let state = &mut self.processes[process];
        state.part += 1;
        match outcome {
            SourceOutcome::Moved(_) => {
                self.has_moved = true;
                let since = state.holding.as_ref().map(|holding| holding.claim().epoch);
                self.ends(process);
                if since.is_some_and(|since| self.ran.last().is_none_or(|ran| *ran <= since)) {
                    self.violate("a move ended well, and the guest has run nowhere else");
                }
            }
            SourceOutcome::Unknown(..) => {
                state.role = Role::Watching;
                self.watches(process, OwnershipInput::Lost);
            }
            SourceOutcome::Failed(..)
            | SourceOutcome::Cancelled(_)
            | SourceOutcome::Refused(_)
            | SourceOutcome::WouldMove(_) => {
                state.role = Role::Keeping;
                let machine = state.machine.clone();
                if !machine.is_some_and(|machine| machine.runs() && machine.is_untouched()) {
                    self.violate("a move has failed, and the guest is not at the source as it was");
                }
                self.plan_move(process, 0.6);
            }
        }
    }

    /// The store has answered a source that watches.
    pub fn watcher_learns(&mut self, process: usize, answer: Answer) {
        if let Some(input) = settling_input(answer) {
            self.watches(process, input);
        }
    }

    /// It is time to look again.
    pub fn watcher_retries(&mut self, process: usize) {
        self.watches(process, OwnershipInput::Retry);
    }

    /// The command has ended; the process goes on until the claims say who has the machine.
    fn watches(&mut self, process: usize, input: OwnershipInput) {
        let Some(holding) = self.processes[process].holding.clone() else { return };
        let (next, _) = holding.settling(input);
        match next {
            Next::Claim(claim) => self.call_store(process, Call::Claim(claim)),
            Next::Look => self.call_store(process, Call::Look),
            Next::Wait => self.wake_after(process, RETRY_GAP, Wake::Retry),
            Next::Settled(settlement) => {
                self.note(format_args!("p{process} learns: {settlement:?}"));
                self.busy_at = self.now();
                match settlement {
                    Settlement::Resumed(_) => {
                        self.processes[process].role = Role::Keeping;
                        let machine = self.processes[process].machine.clone();
                        if machine.is_none_or(|machine| machine.resume().is_err()) {
                            self.violate("a machine that was claimed back does not run");
                        }
                    }
                    Settlement::Moved | Settlement::Superseded(_) | Settlement::Undecided(_) => self.ends(process),
                }
            }
        }
    }
}
