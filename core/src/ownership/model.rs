//! The rules, checked in every state that two hosts, a network and a store can reach.
//!
//! The state machines are those of life. Packets are delayed without end (lost), overtaken and duplicated; calls to the
//! store time out and take effect later or never; looks see the store as it was; processes crash and start again
//! at every step; a person powers off and takes over. How often each may happen is bounded ([`Budget`]), nothing else is.
//!
//! Never may two run, or anybody run against another's claim; and whenever nothing has crashed, the world that
//! heals ends with exactly one running ([`heal`]): that is checked from every state, however things under way turn out.

mod heal;
mod world;

use std::time::{Duration, Instant};

use stateright::{Checker, HasDiscoveries, Model, Property};

use self::heal::{TURNS, heal};
use self::world::{Budget, Control, Step, World};
use super::Rules;
use crate::plants::Plant;

/// No check may take longer.
const TIME_LIMIT: Duration = Duration::from_secs(120);

struct Handover {
    rules: Rules,
    budget: Budget,
}

impl Model for Handover {
    type State = World;
    type Action = Step;

    fn init_states(&self) -> Vec<World> {
        vec![World::new(self.budget)]
    }

    fn actions(&self, world: &World, steps: &mut Vec<Step>) {
        // What has gone wrong once is not followed up.
        if world.violation.is_none() {
            world.steps(steps);
        }
    }

    fn next_state(&self, world: &World, step: Step) -> Option<World> {
        let mut next = world.clone();
        next.take(step, self.rules);
        Some(next)
    }

    fn properties(&self) -> Vec<Property<Self>> {
        vec![
            Property::always("never two running", |_, world: &World| world.running() <= 1),
            Property::always("never against a claim", |_, world: &World| world.violation.is_none()),
            Property::always("one runs once healed", |model: &Self, world: &World| {
                let one_runs = |turn| heal(world.clone(), turn, model.rules).running() == 1;
                !world.calm || TURNS.into_iter().all(one_runs)
            }),
            Property::sometimes("moved", |_, world: &World| {
                world.hosts[1].guest.is_some() && world.hosts[0].control == Control::Down
            }),
            Property::sometimes("taken back", |_, world: &World| {
                world.hosts[0].guest.as_ref().is_some_and(|right| right.epoch().get() == 2)
            }),
        ]
    }
}

/// One handover, and everything but crashes.
const CALM: Budget = Budget {
    moves: 1,
    crashes: 0,
    starts: 1,
    take_overs: 0,
    power_offs: 0,
    timeouts: 2,
    failures: 1,
    duplicates: 1,
    stale_reads: 1,
};

/// One handover with crashes of either end, starts and a person.
const STORMY: Budget = Budget {
    moves: 1,
    crashes: 2,
    starts: 2,
    take_overs: 1,
    power_offs: 1,
    timeouts: 1,
    failures: 0,
    duplicates: 0,
    stale_reads: 1,
};

/// There, and back or once more.
const TWO_MOVES: Budget = Budget {
    moves: 2,
    crashes: 0,
    starts: 0,
    take_overs: 0,
    power_offs: 0,
    timeouts: 1,
    failures: 0,
    duplicates: 1,
    stale_reads: 0,
};

fn holds(name: &str, budget: Budget) {
    let began = Instant::now();
    let model = Handover { rules: Rules::default(), budget };
    let checker =
        model.checker().threads(2).timeout(TIME_LIMIT).finish_when(HasDiscoveries::AnyFailures).spawn_bfs().join();
    println!(
        "{name}: {} states, {} steps, depth {}, {:.1?}",
        checker.unique_state_count(),
        checker.state_count(),
        checker.max_depth(),
        began.elapsed()
    );
    // The checker stops at its time limit without a word.
    assert!(began.elapsed() < TIME_LIMIT, "{name}: not all states could be checked in {TIME_LIMIT:?}");
    checker.assert_properties();
}

#[test]
fn invariant_1_holds_whatever_becomes_of_messages_and_calls() {
    holds("calm", CALM);
}

#[test]
fn invariant_1_holds_through_crashes_restarts_and_take_overs() {
    holds("stormy", STORMY);
}

#[test]
fn invariant_1_holds_from_one_move_to_the_next() {
    holds("two moves", TWO_MOVES);
}

/// The counterexample to a planted fault: which property broke, after which steps.
fn counterexample(plant: Plant) -> Option<String> {
    [CALM, STORMY].into_iter().find_map(|budget| {
        let model = Handover { rules: Rules::planted(plant), budget };
        let checker =
            model.checker().threads(2).timeout(TIME_LIMIT).finish_when(HasDiscoveries::AnyFailures).spawn_bfs().join();
        let properties = ["never two running", "never against a claim", "one runs once healed"];
        properties.into_iter().find_map(|property| {
            let path = checker.discovery(property)?;
            Some(format!("{property}: {:?}", path.into_actions()))
        })
    })
}

#[test]
fn every_planted_fault_is_found() {
    for plant in Plant::all().iter().filter(|plant| plant.breaks_the_rules()) {
        let began = Instant::now();
        let found = counterexample(*plant);
        println!("{plant} ({:.1?}): {}", began.elapsed(), found.as_deref().unwrap_or("NOT FOUND"));
        assert!(found.is_some(), "nothing tells {plant} from the rules");
    }
}
