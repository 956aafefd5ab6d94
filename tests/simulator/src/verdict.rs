//! One seed from beginning to end, and what came of it.

use std::panic::{self, AssertUnwindSafe};
use std::time::Duration;

use godwit_core::Phase;
use godwit_core::ownership::{Claim, Marker};
use godwit_core::source::{OnStall, SourceOptions};

use crate::event::{Act, Dial, Event, Reached};
use crate::machine::lock;
use crate::network::HOSTS;
use crate::process::{Process, Role};
use crate::setup::When;
use crate::world::World;

/// With nothing happening for so long, nothing more will: longer than any wait or late effect there is.
const QUIET: Duration = Duration::from_secs(60);
/// What a person says counts for the moment only, and may come to nothing: so often it is said.
const MOST_WORDS: usize = 3;
/// How often somebody looks whether that is so.
const LOOK_INTERVAL: Duration = Duration::from_secs(5);
/// No seed takes longer than this: whatever does hangs (invariant 6).
const TIME_LIMIT: Duration = Duration::from_secs(1800);
/// However slow a healthy link is, a pause is over by then.
pub const PATIENT_PAUSE: Duration = Duration::from_secs(10);
/// However slow a healthy link is, a pause with nothing left to send is shorter.
const PATIENT_LIMIT: Duration = Duration::from_millis(600);
/// Nor so many steps.
const STEP_LIMIT: u64 = 1_000_000;

/// Where the guest was when things had come to rest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// At another host than in the beginning.
    Moved,
    /// At the same.
    Stayed,
    /// Nowhere: only a person could decide.
    Person,
}

/// What a seed came to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Verdict {
    /// Where the guest was.
    pub outcome: Outcome,
    /// What must never happen, and has.
    pub violation: Option<String>,
    /// How much has happened.
    pub steps: u64,
    /// The same for the same seed.
    pub hash: u64,
}

/// Plays a seed. `print`: every step goes to stdout.
pub fn play(seed: u64, print: bool) -> Verdict {
    let mut world = World::new(seed, print);
    if print {
        world.describe();
    }
    // A bug that panics is a bug of this seed, and the other seeds are played all the same.
    let played = panic::catch_unwind(AssertUnwindSafe(|| world.play()));
    let outcome = played.unwrap_or_else(|_| {
        world.violate("it panicked");
        Outcome::Person
    });
    let violation = lock(&world.truth).violation().cloned();
    Verdict { outcome, violation, steps: world.trace.steps(), hash: world.trace.hash() }
}

impl World {
    fn describe(&self) {
        let setup = &self.setup;
        println!(
            "claims: {}, guest every {:?}, disk {:?}, work {:?}",
            setup.claims, setup.guest_interval, setup.disk_latency, setup.work
        );
        println!(
            "memory: {:?}",
            setup.description.memory.iter().map(|region| region.size_bytes / 4096).collect::<Vec<_>>()
        );
        let SourceOptions { on_stall, max_bandwidth_bytes_per_s: cap, downtime_limit, max_rounds, .. } = &setup.options;
        println!(
            "on stall: {on_stall:?}, asked for: {:?}; cap {cap:?}, downtime limit {downtime_limit:?}, {max_rounds} rounds",
            setup.asks_for_postcopy
        );
        for planned in &setup.faults {
            println!("planned: {planned:?}");
        }
    }

    fn play(&mut self) -> Outcome {
        self.first_start();
        for (number, planned) in self.setup.faults.iter().enumerate() {
            if let When::At(at) = planned.when {
                self.armed[number] = true;
                self.agenda.at(at, Event::Fault(number));
            }
        }
        self.agenda.after(LOOK_INTERVAL, Event::Person(Act::Look));
        self.rest();
        self.give_up_the_lost();
        let outcome = self.outcome();
        if self.is_healthy() && !self.has_moved {
            self.violate("nothing went wrong, and yet the machine could not be moved");
        }
        if outcome == Outcome::Person && self.setup.claims && !self.is_over() {
            self.decide();
        }
        outcome
    }

    /// Nothing goes wrong, and the limits are such that the first move must succeed.
    fn is_healthy(&self) -> bool {
        let options = &self.setup.options;
        self.setup.faults.is_empty()
            && self.setup.store_trouble == 0.0
            && (options.on_stall == OnStall::Force || self.may_go_over_on_stall())
            && options.pause_timeout >= PATIENT_PAUSE
    }

    /// Whatever the guest writes, its memory can follow it.
    fn may_go_over_on_stall(&self) -> bool {
        let options = &self.setup.options;
        options.on_stall == OnStall::PostCopy
            && !options.reconnect_timeout.is_zero()
            && options.downtime_limit >= PATIENT_LIMIT
            && !self.setup.one_host
    }

    /// Until nothing more happens.
    fn rest(&mut self) {
        self.busy_at = self.now();
        while !self.is_over() {
            let quiet_since = self.busy_at.max(self.healed_at);
            if self.now() > quiet_since + QUIET {
                return self.check_rest();
            }
            self.agenda_never_ends();
            if !self.step() || self.now() > TIME_LIMIT || self.trace.steps() > STEP_LIMIT {
                return self.violate("it comes to no end");
            }
        }
    }

    fn is_over(&self) -> bool {
        lock(&self.truth).violation().is_some()
    }

    /// There is always a next look, so that time goes on.
    fn agenda_never_ends(&mut self) {
        if self.agenda.is_empty() {
            self.agenda.after(LOOK_INTERVAL, Event::Person(Act::Look));
        }
    }

    /// What must hold when nothing more happens.
    fn check_rest(&mut self) {
        let hangs = (0..self.processes.len()).find(|process| self.is_undecided(*process) && !self.is_bereft(*process));
        if let Some(hangs) = hangs {
            let name = self.processes[hangs].role.name();
            return self.violate(&format!("p{hangs} hangs: nothing happens, and it is still {name}"));
        }
        let runner = (0..self.processes.len()).find(|process| self.processes[*process].runs());
        if !self.setup.claims {
            return;
        }
        let owner = self.store.entries.newest_claim().cloned();
        match runner {
            // Whoever waits for pages that nobody has any more runs no guest.
            Some(runner) if self.is_bereft(runner) && self.calm => {
                self.violate("a guest has lost its memory, and nobody has died");
            }
            Some(runner) if self.is_bereft(runner) => {}
            Some(_) => {
                let unmarked =
                    |owner: &Claim| owner.incomplete && !self.store.entries.is_marked(owner.epoch, Marker::Complete);
                if owner.as_ref().is_some_and(unmarked) {
                    self.violate("the guest has all of its memory, and the claims do not say so");
                }
            }
            None if self.calm => self.violate("nobody runs the guest, and nobody has died"),
            None if owner.is_some_and(|owner| self.is_alive(&owner)) => {
                self.violate("nobody runs the guest, and its owner lives");
            }
            None => {}
        }
    }

    /// Whether a process must not stay what it is.
    fn is_undecided(&self, process: usize) -> bool {
        let Process { alive, role, .. } = &self.processes[process];
        *alive
            && match role {
                Role::Source(_) | Role::Destination(_) | Role::Starting(_) => true,
                // With nothing left to come it may wait for a source to say goodbye.
                Role::Filling(end) => end.service.wanted().left() > 0,
                Role::Listening | Role::Keeping | Role::Watching | Role::Over => false,
            }
    }

    /// In post-copy the process at the other end is gone, or has given the session up: then, and only then, does this end wait for ever.
    fn is_bereft(&self, process: usize) -> bool {
        match &self.processes[process].role {
            Role::Source(end) if end.control.phase() == Phase::PostCopyPaused => {
                let answered = end.session().map(|token| self.answers(end.to, Dial::Again(token)));
                !self.processes[end.to].alive || answered != Some(Reached::Peer)
            }
            Role::Filling(end) if end.service.wanted().left() > 0 => {
                let follows = |source: &Process| match &source.role {
                    Role::Source(source) => {
                        source.to == process
                            && source.follows()
                            && source.session().is_none_or(|session| session == end.session)
                    }
                    _ => false,
                };
                !self.processes.iter().any(follows)
            }
            _ => false,
        }
    }

    /// People end what waits for somebody who is gone: only they know.
    fn give_up_the_lost(&mut self) {
        while !self.is_over()
            && let Some(process) = (0..self.processes.len()).find(|process| self.is_bereft(*process))
        {
            let act = match self.processes[process].role {
                Role::Filling(_) => Act::Quit(process),
                _ => Act::Abandon(process),
            };
            self.act(act);
            self.rest();
        }
    }

    fn outcome(&self) -> Outcome {
        match self.processes.iter().find(|process| process.runs()) {
            None => Outcome::Person,
            Some(process) if process.host == 0 => Outcome::Stayed,
            Some(_) => Outcome::Moved,
        }
    }

    /// Whether a source still has the guest as it was when it was handed over, and it has run nowhere since.
    fn may_force(&self, owner: &Claim) -> bool {
        !self.ran.contains(&owner.epoch)
            && self.processes.iter().any(|process| process.alive && matches!(process.role, Role::Watching))
    }

    /// Only a person can decide, and does: the owner is dead.
    fn decide(&mut self) {
        self.store.heal();
        self.moves_left = 0;
        let Some(owner) = self.store.entries.newest_claim().cloned() else { return };
        let host = self.processes.iter().find(|process| process.claimant == owner.claimant).map(|owner| owner.host);
        let act = match host {
            _ if self.may_force(&owner) && self.chance.hit(0.5) => Act::Force(owner.epoch),
            Some(host) if self.chance.hit(0.5) => Act::Run(host),
            _ => Act::TakeOwnership(self.chance.below(HOSTS), owner.epoch),
        };
        for _ in 0..MOST_WORDS {
            self.note(format_args!("a person decides: {act:?}"));
            self.act(act);
            self.rest();
            if self.is_over() || self.outcome() != Outcome::Person {
                break;
            }
        }
        if !self.is_over() && self.outcome() == Outcome::Person {
            self.violate("a person has decided, and still nobody runs the guest");
        }
    }
}
