//! What the keeper's threads share.

use std::sync::atomic::AtomicBool;
use std::sync::mpsc::Sender;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use godwit_core::ownership::Holding;
use godwit_core::{HangUp, Phase};
use godwit_vmm::{Machine, MachineEvent, MachineStatus};

use super::estimate::Estimating;
use super::moves::Move;
use crate::parameters::Settings;
use crate::qmp::{Hub, QmpError};

/// How long a command that needs the machine waits for one that has been handed over and is being taken up.
const TAKE_UP_LIMIT: Duration = Duration::from_secs(1);

/// What wakes the keeper's own thread.
pub(super) enum Wake {
    /// The machine did something by itself.
    Machine(MachineEvent),
    /// A move has ended, in either direction.
    MoveEnded,
    /// The machine is another's, by its claims; what happened.
    Lost(String),
    /// A person has said that the copy here is never to run.
    Abandoned,
    /// A person has said that the guest is to run on here.
    Forced,
    /// A client wants the process to end.
    Quit,
    /// SIGTERM or SIGINT.
    Signal,
}

/// What the keeper's threads share.
pub(super) struct Shared {
    pub(super) hub: Hub,
    pub(super) wake: Sender<Wake>,
    /// Held by whatever starts, stops or sends away the machine.
    operation: Mutex<()>,
    /// Whether one runs. A move calls it off.
    pub(super) estimating: Estimating,
    state: Mutex<State>,
    /// A machine that was coming in has been taken up, or has turned out not to be ours, or not yet.
    pub(super) incoming_settled: Condvar,
}

pub(super) struct State {
    /// Until a machine is there, which has a name of its own.
    pub(super) name: String,
    pub(super) machine: Option<Machine>,
    pub(super) settings: Settings,
    /// How many moves have been asked for.
    pub(super) move_count: u64,
    /// The move that is running, or else the last one.
    pub(super) last_move: Option<Arc<Move>>,
    pub(super) ownership: Ownership,
    /// The machine's claims, if it has any.
    pub(super) holding: Option<Arc<Holding>>,
    /// A machine that is coming in.
    pub(super) incoming: Option<Incoming>,
    /// Whether the machine came from another host.
    pub(super) arrived: bool,
    /// Some of its memory is still to come from there.
    pub(super) filling: bool,
}

/// Who has the machine.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Ownership {
    /// This process.
    Here,
    /// It has moved to this URI.
    Moved(String),
    /// The peer may have it: *commit* was sent and no answer came.
    Undecided(Doubt),
}

/// Nobody here knows whether the machine has moved.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Doubt {
    /// Where to.
    pub(super) uri: String,
    /// Since when it is known that it is not known.
    pub(super) since: Instant,
    /// What the claims said last, if there are any.
    pub(super) waiting: Option<String>,
}

/// A machine that is coming in.
pub(super) struct Incoming {
    pub(super) peer: String,
    pub(super) phase: Option<Phase>,
    pub(super) hang_up: Arc<dyn HangUp>,
    /// A person's word that the copy here is never to run.
    pub(super) abandon: Arc<AtomicBool>,
    /// What was last decided about it; in a handover, what it waits for.
    pub(super) decision: Option<String>,
}

impl Incoming {
    /// Whether it has been handed over and the claims do not say yet whose it is.
    pub(super) fn is_in_doubt(&self) -> bool {
        self.phase == Some(Phase::Commit) && self.decision.is_some()
    }

    /// Whether it has been handed over, and will be this process's in a moment.
    fn is_being_taken_up(&self) -> bool {
        matches!(self.phase, Some(Phase::Commit | Phase::PostCopy | Phase::Completed)) && !self.is_in_doubt()
    }

    /// Whose it is, as far as is known here.
    pub(super) fn standing(&self) -> String {
        let peer = &self.peer;
        match (self.phase, &self.decision) {
            (Some(Phase::Commit), Some(waits_for)) => {
                format!(
                    "the machine that came from {peer} has been handed over, and is not this process's yet: {waits_for}"
                )
            }
            (Some(Phase::Commit | Phase::PostCopy | Phase::Completed), _) => {
                format!(
                    "the machine that came from {peer} has been handed over and is being taken up: ask again in a moment"
                )
            }
            _ => format!("a machine is coming in from {peer}: it is that end's, which can call the move off"),
        }
    }
}

impl Shared {
    pub(super) fn new(name: String, settings: Settings, hub: Hub, wake: Sender<Wake>) -> Self {
        let state = State {
            name,
            machine: None,
            settings,
            move_count: 0,
            last_move: None,
            ownership: Ownership::Here,
            holding: None,
            incoming: None,
            arrived: false,
            filling: false,
        };
        Shared {
            hub,
            wake,
            operation: Mutex::default(),
            estimating: Estimating::default(),
            state: Mutex::new(state),
            incoming_settled: Condvar::new(),
        }
    }

    /// Never held across anything that takes long.
    pub(super) fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Keeps everybody else from starting, stopping or sending away the machine.
    pub(super) fn operation(&self) -> MutexGuard<'_, ()> {
        self.operation.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The machine, to look at. Whoever hears from the source that it has moved may ask before it has been taken up here.
    pub(super) fn machine(&self) -> Result<Machine, QmpError> {
        let taken_up_soon = |state: &mut State| {
            state.machine.is_none() && state.incoming.as_ref().is_some_and(Incoming::is_being_taken_up)
        };
        let waited = self.incoming_settled.wait_timeout_while(self.state(), TAKE_UP_LIMIT, taken_up_soon);
        let (state, _) = waited.unwrap_or_else(PoisonError::into_inner);
        state.machine.clone().ok_or_else(|| QmpError::generic(state.why_no_machine()))
    }

    /// The machine, to change whether it runs: only if it is ours and nothing is being done with it.
    pub(super) fn machine_at_rest(&self) -> Result<Machine, QmpError> {
        let machine = self.machine()?;
        let state = self.state();
        if let Some(current) = state.active_move() {
            return Err(QmpError::generic(format!("the machine is being moved to {}: cancel that first", current.uri)));
        }
        match &state.ownership {
            Ownership::Here if state.holding.as_ref().is_some_and(|holding| !holding.may_run()) => {
                return Err(QmpError::generic("this process has no right to run the machine: its claims say so"));
            }
            Ownership::Here => {}
            Ownership::Moved(uri) => return Err(QmpError::generic(format!("the machine has moved to {uri}"))),
            Ownership::Undecided(doubt) => {
                let more = match &state.holding {
                    Some(holding) => format!(
                        "The claims decide, and this process watches them (`godwit-sender ownership show {}`)",
                        holding.directory().display()
                    ),
                    None => "There are no claims that could tell".into(),
                };
                return Err(QmpError::generic(format!(
                    "the guest stays paused: {} may be running it. {more}. What only a person can know: `resume --force` \
                     (x-godwit-resume-force) or `abandon` (x-godwit-abandon)",
                    doubt.uri
                )));
            }
        }
        match machine.status() {
            MachineStatus::Running | MachineStatus::Paused => Ok(machine),
            MachineStatus::Shutdown => Err(QmpError::generic("the guest has powered off")),
            MachineStatus::Faulted => Err(QmpError::generic("the guest has failed and cannot run on")),
            MachineStatus::Stopped => Err(QmpError::generic("the machine has been stopped")),
        }
    }
}

impl State {
    /// The move that is running.
    pub(super) fn active_move(&self) -> Option<&Arc<Move>> {
        self.last_move.as_ref().filter(|last| last.outcome().is_none())
    }

    /// Why there is nothing yet to be asked about a machine.
    pub(super) fn why_no_machine(&self) -> String {
        match &self.incoming {
            None => "no machine has come in yet".into(),
            Some(incoming) => incoming.standing(),
        }
    }

    /// The machine has been handed over, and nobody knows yet who has it.
    pub(super) fn is_in_doubt(&self) -> bool {
        matches!(self.ownership, Ownership::Undecided(_))
    }

    /// QEMU's name for the state of the machine.
    pub(super) fn run_state(&self) -> &'static str {
        let Some(machine) = &self.machine else { return "inmigrate" };
        if matches!(self.ownership, Ownership::Moved(_)) {
            return "postmigrate";
        }
        match machine.status() {
            MachineStatus::Running => "running",
            MachineStatus::Paused if self.active_move().is_some_and(|current| current.has_paused_guest()) => {
                "finish-migrate"
            }
            MachineStatus::Paused => "paused",
            MachineStatus::Shutdown | MachineStatus::Stopped => "shutdown",
            MachineStatus::Faulted => "internal-error",
        }
    }
}
