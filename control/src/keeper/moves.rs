//! A move of the machine to somewhere else: started, watched, told about, and what its end means here.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use godwit_core::ownership::{Holding, Settlement};
use godwit_core::progress::{Event, Observer, Progress};
use godwit_core::source::{CancelError, SourceMigration, SourceOptions};
use godwit_core::{Phase, SourceMachine};
use godwit_transport::Uri;
use godwit_vmm::{Machine, MachineStatus};
use serde_json::{Value, json};

use super::state::{Doubt, Ownership, Shared, Wake};
use crate::outcome::{Outcome, OutcomeKind};
use crate::parameters::Settings;
use crate::qmp::{Hub, QmpError};

/// How often GODWIT_PROGRESS is told.
const PROGRESS_INTERVAL: Duration = Duration::from_millis(200);

/// A move that runs or has ended.
pub(super) struct Move {
    pub(super) number: u64,
    pub(super) uri: String,
    pub(super) dry_run: bool,
    pub(super) engine: SourceMigration,
    teller: Arc<Teller>,
    outcome: OnceLock<Outcome>,
}

impl Move {
    /// Starts to move the machine to `uri` with `settings`; `adjust` may change the engine's options for this move.
    pub(super) fn start(
        shared: &Arc<Shared>,
        uri: &str,
        settings: &Settings,
        adjust: impl FnOnce(&mut SourceOptions),
    ) -> Result<u64, QmpError> {
        let _operation = shared.operation();
        let machine = shared.machine_at_rest()?;
        if shared.state().filling {
            return Err(QmpError::generic(
                "some of the machine's memory is still to come from where it was: wait for that",
            ));
        }
        // There is one dirty log.
        shared.estimating.call_off();
        let uri: Uri = uri.parse().map_err(|error| QmpError::generic(format!("{uri}: {error}")))?;
        let dial = godwit_transport::connect(&uri, settings.transport())
            .map_err(|error| QmpError::generic(error.to_string()))?;
        let mut options = settings.source_options();
        options.ownership = shared.state().holding.clone();
        adjust(&mut options);

        let number = shared.state().move_count + 1;
        let uri = uri.to_string();
        let dry_run = options.dry_run;
        let teller = Arc::new(Teller::new(shared.hub.clone(), number, dry_run, machine.is_running()));
        tracing::info!("move {number} to {uri} begins");
        let engine = SourceMigration::start(Arc::new(machine.clone()), dial, options, Arc::clone(&teller) as _);
        let started = Arc::new(Move { number, uri, dry_run, engine, teller, outcome: OnceLock::new() });
        let mut state = shared.state();
        state.move_count = number;
        state.last_move = Some(Arc::clone(&started));
        drop(state);
        let watched = Arc::clone(&started);
        let shared = Arc::clone(shared);
        thread::Builder::new().name("move".into()).spawn(move || watched.watch_and_settle(&shared, &machine)).map_err(
            |error| {
                let _ = started.engine.cancel();
                QmpError::generic(format!("cannot start a thread: {error}"))
            },
        )?;
        Ok(number)
    }

    /// How it ended, if it has.
    pub(super) fn outcome(&self) -> Option<&Outcome> {
        self.outcome.get()
    }

    /// Calls it off.
    pub(super) fn cancel(&self) -> Result<(), CancelError> {
        self.engine.cancel()?;
        self.teller.cancelling.store(true, Ordering::Release);
        self.teller.status("cancelling");
        Ok(())
    }

    /// QEMU's name for where it stands.
    pub(super) fn status(&self) -> &'static str {
        match self.outcome() {
            _ if self.dry_run => "none",
            Some(outcome) => match outcome.outcome {
                OutcomeKind::Moved => "completed",
                OutcomeKind::WouldMove => "none",
                OutcomeKind::Refused | OutcomeKind::Failed | OutcomeKind::Unknown => "failed",
                OutcomeKind::Cancelled => "cancelled",
            },
            None if self.teller.cancelling.load(Ordering::Acquire) => "cancelling",
            None => {
                let progress = self.engine.progress();
                match progress.phase {
                    // Who hears `completed` asks for the downtime next.
                    Some(Phase::Completed) if progress.downtime_ms.is_none() => status_of(Phase::Commit),
                    phase => phase.map_or("setup", status_of),
                }
            }
        }
    }

    /// Whether the guest is stopped because of this move.
    pub(super) fn has_paused_guest(&self) -> bool {
        self.engine.progress().phase.is_some_and(Phase::guest_paused)
    }

    /// Whether the guest has gone on at the destination, and some of its memory is still only here.
    pub(super) fn is_followed(&self) -> bool {
        matches!(self.engine.progress().phase, Some(Phase::PostCopy | Phase::PostCopyPaused))
    }

    fn watch_and_settle(&self, shared: &Shared, machine: &Machine) {
        self.watch();
        self.settle(shared, machine);
        let undecided = self.outcome().is_some_and(|outcome| outcome.outcome == OutcomeKind::Unknown);
        let holding = shared.state().holding.clone().filter(|_| undecided);
        if let Some(holding) = holding {
            self.settle_by_claims(&holding, shared, machine);
        }
    }

    fn watch(&self) {
        let ended = AtomicBool::new(false);
        thread::scope(|scope| {
            let ticker = scope.spawn(|| {
                loop {
                    thread::park_timeout(PROGRESS_INTERVAL);
                    if ended.load(Ordering::Acquire) {
                        return;
                    }
                    self.teller.progress(&self.engine.progress());
                }
            });
            self.engine.wait();
            ended.store(true, Ordering::Release);
            ticker.thread().unpark();
        });
    }

    /// Draws the consequences of the end.
    fn settle(&self, shared: &Shared, machine: &Machine) {
        let ended = self.engine.wait();
        let mut outcome = Outcome::new(self.number, &self.uri, &ended, condition(machine.status()));
        if outcome.outcome == OutcomeKind::Unknown
            && let Some(holding) = &shared.state().holding
        {
            outcome.state = undecided(&self.uri, holding);
        }
        tracing::info!("move {}: {}", self.number, outcome.headline());
        {
            let mut state = shared.state();
            match outcome.outcome {
                OutcomeKind::Moved => state.ownership = Ownership::Moved(self.uri.clone()),
                OutcomeKind::Unknown => {
                    let doubt = Doubt { uri: self.uri.clone(), since: Instant::now(), waiting: None };
                    state.ownership = Ownership::Undecided(doubt);
                }
                _ => {}
            }
            let _ = self.outcome.set(outcome.clone());
        }
        if machine.is_running() {
            self.teller.resumed();
        }
        self.teller.status(self.status());
        shared.hub.publish("GODWIT_OUTCOME", json!(outcome));
        if outcome.outcome == OutcomeKind::Moved {
            machine.stop();
        }
        // Nobody listens only if the process is ending anyway.
        let _ = shared.wake.send(Wake::MoveEnded);
    }
}

impl Move {
    /// The command that asked for the move has been told that it is unknown; this process goes on until the claims say who has the
    /// machine.
    fn settle_by_claims(&self, holding: &Holding, shared: &Shared, machine: &Machine) {
        let settlement = holding.settle(None, |text| {
            tracing::warn!("{text}");
            self.teller.publish("GODWIT_DECISION", json!({ "text": text }));
            if let Ownership::Undecided(doubt) = &mut shared.state().ownership {
                doubt.waiting = Some(text.to_owned());
            }
        });
        let _operation = shared.operation();
        match settlement {
            Settlement::Resumed(epoch) => {
                tracing::warn!("claimed back, epoch {epoch}: the machine is here");
                shared.state().ownership = Ownership::Here;
                if self.teller.was_running {
                    match machine.resume() {
                        Ok(()) => self.teller.resumed(),
                        Err(error) => tracing::error!("the guest cannot run on: {}", crate::error_chain(&error)),
                    }
                }
                // Whoever asked for the end meanwhile is heard now.
                let _ = shared.wake.send(Wake::MoveEnded);
            }
            Settlement::Moved => {
                tracing::warn!("the claims show that the guest has run at {}", self.uri);
                shared.state().ownership = Ownership::Moved(self.uri.clone());
                machine.stop();
                let _ = shared.wake.send(Wake::MoveEnded);
            }
            Settlement::Superseded(record) => {
                let text =
                    format!("it was started anew elsewhere, and the copy here is out of date: {}", record.occupant);
                let _ = shared.wake.send(Wake::Lost(text));
            }
            // Abandoned: the process is ending.
            Settlement::Undecided(_) => {}
        }
    }
}

/// What state the guest is in while only the claims know who has it.
fn undecided(uri: &str, holding: &Holding) -> String {
    format!(
        "the guest is paused here, and {uri} may be running it: this process watches the claims in {dir} and ends by itself once they \
         show that it has run there, or lets it run here if they give it back. Look at them (`godwit-sender ownership show {dir}`). Only \
         if their owner is dead: `abandon` here, then `run --take-ownership`, which boots the machine anew from its disks; or, if it \
         died before it ran the guest, `resume --force`",
        dir = holding.directory().display()
    )
}

/// How a guest is that is still here, for a sentence.
fn condition(status: MachineStatus) -> &'static str {
    match status {
        MachineStatus::Running => "running",
        MachineStatus::Paused => "paused",
        MachineStatus::Shutdown => "powered off",
        MachineStatus::Faulted => "stopped by a fault",
        MachineStatus::Stopped => "stopped",
    }
}

/// QEMU's name for a phase.
pub(super) fn status_of(phase: Phase) -> &'static str {
    match phase {
        Phase::Connect | Phase::Handshake | Phase::Preflight | Phase::Prepare => "setup",
        Phase::FirstPass | Phase::Rounds => "active",
        Phase::PreSwitchover => "pre-switchover",
        Phase::Pause | Phase::FinalPages | Phase::State | Phase::Commit => "device",
        Phase::PostCopy => "postcopy-active",
        Phase::PostCopyPaused => "postcopy-paused",
        Phase::Completed => "completed",
    }
}

/// Turns what the engine tells into QMP events.
struct Teller {
    hub: Hub,
    number: u64,
    dry_run: bool,
    was_running: bool,
    cancelling: AtomicBool,
    stopped: AtomicBool,
    last_status: Mutex<&'static str>,
}

impl Teller {
    fn new(hub: Hub, number: u64, dry_run: bool, was_running: bool) -> Self {
        Teller {
            hub,
            number,
            dry_run,
            was_running,
            cancelling: AtomicBool::new(false),
            stopped: AtomicBool::new(false),
            last_status: Mutex::new("none"),
        }
    }

    /// Tells the status if it is another one than before. A dry run has none.
    fn status(&self, status: &'static str) {
        let mut last = self.last_status.lock().unwrap_or_else(PoisonError::into_inner);
        if self.dry_run || std::mem::replace(&mut *last, status) == status {
            return;
        }
        self.hub.publish("MIGRATION", json!({ "status": status }));
    }

    fn progress(&self, progress: &Progress) {
        self.publish("GODWIT_PROGRESS", json!(progress));
    }

    fn phase(&self, phase: Phase) {
        // The end is told with the outcome.
        if phase != Phase::Completed && !self.cancelling.load(Ordering::Acquire) {
            self.status(status_of(phase));
        }
        self.publish("GODWIT_PHASE", json!({ "phase": phase }));
        if phase == Phase::FirstPass {
            self.hub.publish("MIGRATION_PASS", json!({ "pass": 1 }));
        }
        // The guest has been paused once the last pages are sent.
        if phase == Phase::FinalPages && self.was_running {
            self.stopped.store(true, Ordering::Release);
            self.hub.publish("STOP", Value::Null);
        }
    }

    /// The guest runs on here after the move has failed.
    fn resumed(&self) {
        if self.stopped.load(Ordering::Acquire) {
            self.hub.publish("RESUME", Value::Null);
        }
    }

    /// One of Godwit's own events, which say which move they are about.
    fn publish(&self, name: &str, mut data: Value) {
        data["move"] = json!(self.number);
        self.hub.publish(name, data);
    }
}

impl Observer for Teller {
    fn event(&self, event: Event) {
        match event {
            Event::Phase { phase } => self.phase(phase),
            Event::Round(round) => {
                // Round 0 was pass 1; with its end the next one begins.
                self.hub.publish("MIGRATION_PASS", json!({ "pass": round.round + 2 }));
                self.publish("GODWIT_ROUND", json!(round));
            }
            Event::Decision { text } => self.publish("GODWIT_DECISION", json!({ "text": text })),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_phase_has_a_status_that_clients_know() {
        let known = ["setup", "active", "pre-switchover", "device", "postcopy-active", "postcopy-paused", "completed"];
        let statuses: Vec<&str> = Phase::all().iter().map(|phase| status_of(*phase)).collect();
        assert!(statuses.iter().all(|status| known.contains(status)));
        // In the order in which QEMU goes through them.
        let place = |status: &&str| known.iter().position(|name| name == status);
        assert!(statuses.is_sorted_by_key(place));
    }
}
