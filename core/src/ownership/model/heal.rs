//! What becomes of a world in which nothing more goes wrong.

use super::world::{Budget, Control, HOSTS, Step, World};
use crate::ownership::Rules;

/// More steps than any healed world takes.
const MAX_STEPS: usize = 300;
/// A wait that has not ended after so many retries never does.
const MAX_RETRIES: usize = 6;

/// How what is still under way turns out.
#[derive(Debug, Clone, Copy)]
pub struct Turn {
    /// What is on the wire arrives, or is lost.
    pub delivered: bool,
    /// Calls that nobody waits for take effect after all, or never.
    pub late_effects: bool,
}

/// All four.
pub const TURNS: [Turn; 4] = [
    Turn { delivered: true, late_effects: true },
    Turn { delivered: true, late_effects: false },
    Turn { delivered: false, late_effects: true },
    Turn { delivered: false, late_effects: false },
];

/// Lets the world come to rest with a network and a store that work. What is silent for long counts as lost.
pub fn heal(mut world: World, turn: Turn, rules: Rules) -> World {
    world.budget = Budget::default();
    while let Some(at) = world.calls.iter().position(|call| call.orphan) {
        match turn.late_effects {
            true => world.take(Step::Effect(at), rules),
            false => drop(world.calls.remove(at)),
        }
    }
    if !turn.delivered {
        world.wire.clear();
    }
    let mut retries = 0;
    for _ in 0..MAX_STEPS {
        let Some(step) = next(&world, retries) else { break };
        retries += usize::from(matches!(step, Step::Retry(_)));
        if retries > MAX_RETRIES {
            break;
        }
        world.take(step, rules);
    }
    world
}

/// Retries come in turns: no host is kept from its own by the other's.
fn next(world: &World, retries: usize) -> Option<Step> {
    if let Some(call) = world.calls.first() {
        return Some(if call.answer.is_some() { Step::Answer(0) } else { Step::Effect(0) });
    }
    let host = |wanted: fn(&super::world::Host) -> bool| HOSTS.into_iter().find(|host| wanted(&world.hosts[*host]));
    let silent = |host: &super::world::Host| host.link_up && host.control != Control::Idle;
    None.or_else(|| host(|host| host.starting).map(Step::Started))
        .or_else(|| (!world.wire.is_empty()).then_some(Step::Deliver(0)))
        .or_else(|| host(silent).map(Step::LoseLink))
        .or_else(|| [retries % 2, 1 - retries % 2].into_iter().find(|host| world.hosts[*host].waiting).map(Step::Retry))
}
