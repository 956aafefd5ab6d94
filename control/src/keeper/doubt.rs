//! A machine whose handover nobody knows the end of: what is known, and the two words that a person may say about it.
//!
//! No protocol can tell a destination that is dead from one that cannot be heard. A person can go and look: `resume --force` says that
//! it never ran the guest and never will, `abandon` that the copy here is never to run.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::thread;
use std::time::{Duration, Instant};

use godwit_core::ownership::store::Reading;
use godwit_core::ownership::{CALL_LIMIT, Epoch, Holding, RETRY_GAP};
use serde::Deserialize;
use serde_json::{Value, json};

use super::commands::{NoArguments, resume};
use super::state::{Ownership, Shared, State, Wake};
use crate::claims::{as_json, whose};
use crate::outcome::Outcome;
use crate::qmp::message::arguments;
use crate::qmp::{Answer, Arguments, QmpError};

/// How long a person's word may take to be found good or not: one look at the claims and one claim, each after a wait.
const FORCE_LIMIT: Duration = CALL_LIMIT.saturating_add(RETRY_GAP).saturating_mul(2);

const FORCE_POLL: Duration = Duration::from_millis(10);

/// Who has the machine, as far as known here; with `look` the claims are read for it.
pub(super) fn query(shared: &Arc<Shared>, command: &str, given: Arguments) -> Answer {
    #[derive(Deserialize)]
    #[serde(deny_unknown_fields)]
    struct Query {
        #[serde(default)]
        look: bool,
    }
    let query: Query = arguments(command, given)?;
    let (holding, mut facts) = {
        let state = shared.state();
        (state.holding.clone(), facts(&state))
    };
    if let Some(holding) = holding {
        facts["directory"] = json!(holding.directory());
        facts["epoch"] = json!(holding.claim().epoch.get());
        if query.look {
            look(&holding, &mut facts);
        }
    }
    Ok(facts)
}

fn facts(state: &State) -> Value {
    let mut facts = json!({ "machine": state.name });
    match (&state.ownership, &state.machine, &state.incoming) {
        (Ownership::Moved(uri), ..) => {
            facts["owner"] = json!("moved");
            facts["peer"] = json!(uri);
        }
        (Ownership::Undecided(doubt), ..) => {
            facts["owner"] = json!("in-doubt");
            facts["peer"] = json!(doubt.uri);
            facts["age_s"] = json!(doubt.since.elapsed().as_secs());
            facts["heard"] = json!(state.last_move.as_ref().and_then(|last| last.outcome()).map(heard));
            facts["waiting"] = json!(doubt.waiting);
        }
        (Ownership::Here, Some(_), _) => match state.active_move().filter(|current| current.is_followed()) {
            Some(current) => {
                facts["owner"] = json!("incomplete");
                facts["peer"] = json!(current.uri);
                facts["waiting"] = json!(current.engine.progress().reconnecting.map(|reconnecting| reconnecting.why));
            }
            None => facts["owner"] = json!("here"),
        },
        (Ownership::Here, None, Some(incoming)) => {
            facts["owner"] = json!(if incoming.is_in_doubt() { "claiming" } else { "coming-in" });
            facts["peer"] = json!(incoming.peer);
            facts["waiting"] = json!(incoming.decision);
        }
        (Ownership::Here, None, None) => facts["owner"] = json!("none"),
    }
    facts
}

/// What was last heard of the other end.
fn heard(outcome: &Outcome) -> String {
    outcome.reasons.join("; ")
}

fn look(holding: &Holding, facts: &mut Value) {
    match holding.newest(CALL_LIMIT) {
        Reading::Newest(newest) => {
            facts["newest"] = json!(newest.as_ref().map(as_json));
            facts["owned"] = json!(newest.as_ref().map(whose));
        }
        Reading::Unknown(why) => facts["unreadable"] = json!(why),
    }
}

/// A person says that the destination never ran the guest and never will. With claims, that is about the owner of one epoch, and the
/// next one is claimed first.
pub(super) fn resume_force(shared: &Arc<Shared>, command: &str, given: Arguments) -> Answer {
    #[derive(Deserialize)]
    #[serde(deny_unknown_fields)]
    struct Force {
        epoch: Option<u64>,
    }
    let force: Force = arguments(command, given)?;
    let holding = {
        let mut state = shared.state();
        let doubt = in_doubt(&state)?;
        let holding = state.holding.clone();
        if holding.is_none() {
            tracing::warn!("a person says that {doubt} does not run the guest and never will: it runs on here");
            state.ownership = Ownership::Here;
        }
        holding
    };
    let _ = shared.wake.send(Wake::Forced);
    if let Some(holding) = &holding {
        let epoch = force.epoch.and_then(Epoch::new).ok_or_else(|| {
            QmpError::generic("the machine has claims: say the owner of which epoch never ran it (`epoch`)")
        })?;
        tracing::warn!("a person says that the owner of epoch {epoch} is dead and has never run the guest");
        holding.force(epoch);
        wait_until_it_is_here(shared)?;
    }
    let _operation = shared.operation();
    resume(shared)?;
    Ok(json!({ "epoch": holding.map(|holding| holding.claim().epoch.get()) }))
}

/// The thread that watches the claims takes the word up, and says so by who owns the machine.
fn wait_until_it_is_here(shared: &Shared) -> Result<(), QmpError> {
    let deadline = Instant::now() + FORCE_LIMIT;
    loop {
        match &shared.state().ownership {
            Ownership::Here => return Ok(()),
            Ownership::Moved(uri) => {
                return Err(QmpError::generic(format!(
                    "the claims show that the guest has run at {uri}: it has moved"
                )));
            }
            Ownership::Undecided(doubt) if Instant::now() >= deadline => {
                let why = doubt.waiting.as_deref().unwrap_or("the claims have not answered yet");
                return Err(QmpError::generic(format!("not resumed: {why}")));
            }
            Ownership::Undecided(_) => {}
        }
        thread::sleep(FORCE_POLL);
    }
}

/// A person says that the copy here is never to run: the process lets go of it and ends.
pub(super) fn abandon(shared: &Arc<Shared>, command: &str, given: Arguments) -> Answer {
    let NoArguments {} = arguments(command, given)?;
    let state = shared.state();
    if let Some(incoming) = state.incoming.as_ref().filter(|incoming| incoming.is_in_doubt()) {
        tracing::warn!("a person says that the copy of the machine that came from {} is never to run", incoming.peer);
        // The end of the attempt to take it in is told as that of every other.
        incoming.abandon.store(true, Ordering::Release);
        return Ok(json!({}));
    }
    if state.active_move().is_some_and(|current| current.engine.abandon()) {
        // The end of the move, as one of unknown outcome, is told as that of every other.
        tracing::warn!(
            "a person says that the destination, which lacks pages of the guest's memory, is not to be waited for"
        );
        return Ok(json!({}));
    }
    let doubt = in_doubt(&state)?;
    if state.holding.as_ref().is_some_and(|holding| !holding.abandon()) {
        return Err(QmpError::generic("it has just been decided who has the machine: look again (`status`)"));
    }
    tracing::warn!("a person says that the copy of the machine here is never to run: {doubt} has it, or nobody");
    let _ = shared.wake.send(Wake::Abandoned);
    Ok(json!({}))
}

/// Where the machine may be, or why nothing is in doubt.
fn in_doubt(state: &State) -> Result<String, QmpError> {
    let text = match (&state.ownership, &state.machine, &state.incoming) {
        (Ownership::Undecided(doubt), ..) => return Ok(doubt.uri.clone()),
        (Ownership::Moved(uri), ..) => format!("the machine has moved to {uri}"),
        (Ownership::Here, Some(_), _) => match state.active_move() {
            Some(current) if current.has_paused_guest() => {
                format!("the machine is being handed over to {}: how that ends is not known yet", current.uri)
            }
            Some(current) => format!("the machine is being moved to {}, and is this process's: `cancel`", current.uri),
            None => "the machine is this process's (`resume`, `quit`)".into(),
        },
        (Ownership::Here, None, _) => state.why_no_machine(),
    };
    Err(QmpError::generic(format!("nothing is in doubt here: {text}")))
}
