//! The keeper of a machine, whichever program it lives in.
//!
//! ```text
//!             adopt                    migrate
//!  no machine ──────▶ machine at rest ─────────▶ being moved ── moved ────▶ end
//!  (inmigrate)          ▲    │   ▲                  │    │
//!                  stop │    │   └── failed, cancelled, refused
//!                  cont └────┘                           └── unknown ──▶ in doubt: paused until the claims or a person decide
//! ```
//!
//! It answers the control socket, runs outgoing moves, tells what happens as events, and decides when the process has
//! nothing left to do. During a handover, and as long as nobody knows how it ended, nothing but a person's `abandon` ends it: only
//! one of the two ends may run the guest, and its memory may be here alone.

mod commands;
mod doubt;
mod estimate;
mod guest_commands;
mod move_commands;
mod moves;
mod state;

use std::fmt;
use std::io;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread;
use std::time::{Duration, Instant};

use godwit_core::ownership::Holding;
use godwit_core::source::CancelError;
use godwit_core::{HangUp, Phase};
use godwit_vmm::{Machine, MachineEvent};
use serde_json::{Value, json};
use signal_hook::consts::{SIGINT, SIGTERM};
use signal_hook::iterator::Signals;

use self::commands::Commands;
use self::state::{Incoming, Ownership, Shared, Wake};
use crate::parameters::Settings;
use crate::qmp::socket::ControlSocket;
use crate::qmp::{Hub, Server};

/// How long clients are given to read what is left when the process ends.
const DRAIN_LIMIT: Duration = Duration::from_secs(2);

/// How long the claim store may take to be told that the machine is free.
const FREE_LIMIT: Duration = Duration::from_secs(5);

/// After a move: for so long at least its end can still be asked for,
const LINGER: Duration = Duration::from_millis(300);

/// and for so long at most while clients are still connected.
const LINGER_FOR_CLIENTS: Duration = Duration::from_secs(2);

const LINGER_POLL: Duration = Duration::from_millis(5);

/// Why the process has nothing left to do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum End {
    /// The machine has moved to this URI.
    Moved(String),
    /// The guest has powered off.
    PoweredOff(String),
    /// The guest could not be run on.
    Faulted(String),
    /// By its claims the machine is another's: what was here of it is dropped.
    Lost(String),
    /// A person has said that the copy here is never to run.
    Abandoned,
    /// Somebody asked for it.
    Stopped(StopCause),
}

/// Who asked for the end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum StopCause {
    /// A client of the control socket.
    Client,
    /// SIGTERM or SIGINT.
    Signal,
}

impl fmt::Display for StopCause {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            StopCause::Client => "stopped, as a client of the control socket asked",
            StopCause::Signal => "stopped, as a signal asked",
        })
    }
}

/// Keeps one machine, or waits for it.
pub struct Keeper {
    shared: Arc<Shared>,
    server: Server,
    wakes: Receiver<Wake>,
    /// How the process is to end once the running move has.
    pending: Option<End>,
    /// A signal has made the guest's power button be pressed.
    asked_to_power_down: bool,
}

/// For other threads: what a keeper is told from outside. Clones are the same keeper.
#[derive(Clone)]
pub struct KeeperHandle(Arc<Shared>);

impl Keeper {
    /// Starts to answer `socket`, still without a machine. `name` is told until one is there. Takes over SIGTERM and
    /// SIGINT.
    pub fn start(socket: ControlSocket, name: &str, settings: Settings, hub: Hub) -> io::Result<Self> {
        let (wake, wakes) = channel();
        forward_signals(wake.clone())?;
        let shared = Arc::new(Shared::new(name.to_owned(), settings, hub.clone(), wake));
        let server = Server::start(socket, Arc::new(Commands(Arc::clone(&shared))), hub)?;
        Ok(Keeper { shared, server, wakes, pending: None, asked_to_power_down: false })
    }

    /// For other threads.
    pub fn handle(&self) -> KeeperHandle {
        KeeperHandle(Arc::clone(&self.shared))
    }

    /// Keeps the machine until there is nothing left to keep. What clients are to know has been delivered when this
    /// returns, and the machine has been stopped.
    pub fn run(mut self) -> End {
        let end = loop {
            // The keeper itself holds a sender: this cannot fail.
            let Ok(wake) = self.wakes.recv() else { break End::Stopped(StopCause::Client) };
            if let Some(end) = self.woken(wake) {
                break end;
            }
        };
        self.finish(&end);
        end
    }

    fn woken(&mut self, wake: Wake) -> Option<End> {
        match wake {
            Wake::Machine(event) => self.machine_event(event),
            Wake::MoveEnded => self.move_ended(),
            Wake::Lost(why) => Some(End::Lost(why)),
            Wake::Abandoned => Some(End::Abandoned),
            Wake::Forced => {
                // Whatever was asked for before: this is a person's last word.
                self.pending = None;
                None
            }
            Wake::Quit => self.asked_to_end(StopCause::Client),
            Wake::Signal => self.signalled(),
        }
    }

    fn machine_event(&mut self, event: MachineEvent) -> Option<End> {
        match event {
            MachineEvent::Reset => {
                self.shared.hub.publish("RESET", json!({ "guest": true, "reason": "guest-reset" }));
                None
            }
            MachineEvent::Shutdown { why } => self.end_when_settled(End::PoweredOff(why)),
            MachineEvent::Fault { text } => self.end_when_settled(End::Faulted(text)),
        }
    }

    fn move_ended(&mut self) -> Option<End> {
        if let Ownership::Moved(uri) = &self.shared.state().ownership {
            return Some(End::Moved(uri.clone()));
        }
        if !self.shared.is_settled() {
            return None;
        }
        match self.pending.take() {
            // The signal came while the machine was being moved: it is still here, and is asked now.
            Some(End::Stopped(StopCause::Signal)) => self.power_down_or_end(),
            end => end,
        }
    }

    /// The first signal asks the guest to power down, the second one stops it. A move comes before either: see
    /// [`Keeper::asked_to_end`].
    fn signalled(&mut self) -> Option<End> {
        if self.shared.state().is_in_doubt() {
            tracing::warn!(
                "nobody knows yet who has the machine, and its memory may be here alone: this process stays until that is known, or a \
                 person decides (`godwit-sender abandon`, `resume --force`)"
            );
            return None;
        }
        if self.shared.is_settled() && !self.asked_to_power_down {
            return self.power_down_or_end();
        }
        self.asked_to_end(StopCause::Signal)
    }

    /// Asks the guest to power down: its end comes as an event. Nobody waits for a guest that does not listen.
    fn power_down_or_end(&mut self) -> Option<End> {
        let stopped = Some(End::Stopped(StopCause::Signal));
        let Ok(machine) = self.shared.machine_at_rest() else { return stopped };
        match machine.powerdown() {
            Ok(true) => {
                self.asked_to_power_down = true;
                self.shared.hub.publish("POWERDOWN", Value::Null);
                tracing::warn!("the guest was asked to power down; a second signal stops it");
                None
            }
            Ok(false) => {
                tracing::warn!("the guest does not listen to its power button: it is stopped, not powered down");
                stopped
            }
            Err(error) => {
                tracing::warn!("the guest cannot be asked to power down: {}", crate::error_chain(&error));
                stopped
            }
        }
    }

    /// The first time, a running move is called off and its end awaited; the second time there is no waiting unless
    /// the machine is being handed over.
    fn asked_to_end(&mut self, cause: StopCause) -> Option<End> {
        let impatient = self.pending.is_some();
        let end = self.end_when_settled(End::Stopped(cause));
        match end {
            None if impatient && !self.shared.is_handing_over() => self.pending.take(),
            end => end,
        }
    }

    fn end_when_settled(&mut self, end: End) -> Option<End> {
        self.shared.call_off_moves();
        if self.shared.is_settled() {
            return Some(end);
        }
        self.pending = Some(end);
        None
    }

    fn finish(&self, end: &End) {
        let hub = &self.shared.hub;
        let shutdown = |guest: bool, reason: &str| json!({ "guest": guest, "reason": reason });
        match end {
            End::Moved(_) => self.linger(),
            End::PoweredOff(_) => hub.publish("SHUTDOWN", shutdown(true, "guest-shutdown")),
            End::Faulted(text) => {
                hub.publish("GODWIT_FAULT", json!({ "text": text }));
                hub.publish("SHUTDOWN", shutdown(true, "guest-panic"));
            }
            End::Lost(text) => {
                hub.publish("GODWIT_LOST", json!({ "text": text }));
                hub.publish("SHUTDOWN", shutdown(false, "host-error"));
            }
            End::Abandoned => hub.publish("SHUTDOWN", shutdown(false, "host-qmp-quit")),
            End::Stopped(StopCause::Client) => hub.publish("SHUTDOWN", shutdown(false, "host-qmp-quit")),
            End::Stopped(StopCause::Signal) => hub.publish("SHUTDOWN", shutdown(false, "host-signal")),
        }
        let machine = self.shared.state().machine.clone();
        let at_rest = machine.is_none_or(|machine| machine.stop());
        // Only now: nobody here will write to its disks any more. After a fault that is not sure.
        let holding = self.shared.state().holding.clone().filter(|_| at_rest);
        if let (Some(holding), End::PoweredOff(_) | End::Stopped(_)) = (holding, end)
            && let Err(why) = holding.free(FREE_LIMIT)
        {
            tracing::error!("other hosts cannot see that the machine is free: {why}");
        }
        hub.drain(DRAIN_LIMIT);
    }

    /// Stays a moment, so that whoever polls sees how the move ended.
    fn linger(&self) {
        let begin = Instant::now();
        while begin.elapsed() < LINGER || (self.server.client_count() > 0 && begin.elapsed() < LINGER_FOR_CLIENTS) {
            thread::sleep(LINGER_POLL);
        }
    }
}

impl KeeperHandle {
    /// From here on `machine` is kept. `arrived`: it came from another host.
    pub fn adopt(&self, machine: Machine, arrived: bool) -> io::Result<()> {
        let events = machine.events();
        let wake = self.0.wake.clone();
        thread::Builder::new().name("machine-events".into()).spawn(move || {
            for event in events {
                if wake.send(Wake::Machine(event)).is_err() {
                    return;
                }
            }
        })?;
        let running = godwit_core::SourceMachine::is_running(&machine);
        let filling = machine.is_filling();
        let status = if filling { "postcopy-active" } else { "completed" };
        {
            let mut state = self.0.state();
            state.name = machine.config().name.clone();
            state.machine = Some(machine);
            state.incoming = None;
            (state.arrived, state.filling) = (arrived, filling);
        }
        self.0.incoming_settled.notify_all();
        if arrived {
            self.0.hub.publish("MIGRATION", json!({ "status": status }));
            let _ = self.0.wake.send(Wake::MoveEnded);
        }
        if running {
            self.0.hub.publish("RESUME", Value::Null);
        }
        Ok(())
    }

    /// The machine that is about to be adopted has claims.
    pub fn hold(&self, holding: Arc<Holding>) {
        self.0.state().holding = Some(holding);
    }

    /// The machine that was coming in is another's, by its claims: the process has nothing to keep.
    pub fn lost(&self, why: &str) {
        self.0.state().incoming = None;
        self.0.incoming_settled.notify_all();
        self.0.hub.publish("MIGRATION", json!({ "status": "failed" }));
        let _ = self.0.wake.send(Wake::Lost(why.to_owned()));
    }

    /// A machine begins to come in from `peer`; `hang_up` turns it away, and `abandon` says of one that has been handed over,
    /// while the claims do not say whose it is, that the copy here is never to run.
    pub fn incoming_begins(&self, peer: &str, hang_up: Arc<dyn HangUp>, abandon: Arc<AtomicBool>) {
        let peer = peer.to_owned();
        self.0.state().incoming = Some(Incoming { peer, phase: None, hang_up, abandon, decision: None });
        self.0.hub.publish("MIGRATION", json!({ "status": "setup" }));
    }

    /// The machine that comes in has got so far.
    pub fn incoming_phase(&self, phase: Phase) {
        let status = moves::status_of(phase);
        let before = {
            let mut state = self.0.state();
            let Some(incoming) = &mut state.incoming else { return };
            if incoming.phase != Some(phase) {
                incoming.decision = None;
            }
            incoming.phase.replace(phase).map_or("setup", moves::status_of)
        };
        // That it is here is told with the machine.
        if status != before && phase <= Phase::Commit {
            self.0.hub.publish("MIGRATION", json!({ "status": status }));
        }
    }

    /// A machine that has come in gets the rest of its memory, and that has got so far.
    pub fn filling_phase(&self, phase: Phase) {
        self.0.hub.publish("MIGRATION", json!({ "status": moves::status_of(phase) }));
        if phase == Phase::Completed {
            self.0.state().filling = false;
            let _ = self.0.wake.send(Wake::MoveEnded);
        }
    }

    /// Something was decided about the machine that comes in, or is waited for.
    pub fn incoming_decision(&self, text: &str) {
        if let Some(incoming) = &mut self.0.state().incoming {
            incoming.decision = Some(text.to_owned());
        }
        self.0.incoming_settled.notify_all();
        self.0.hub.publish("GODWIT_DECISION", json!({ "text": text }));
    }

    /// Nothing came of the machine that was coming in.
    pub fn incoming_failed(&self, why: &str) {
        self.0.state().incoming = None;
        self.0.incoming_settled.notify_all();
        self.0.hub.publish("MIGRATION", json!({ "status": "failed" }));
        self.0.hub.publish("GODWIT_INCOMING_ENDED", json!({ "text": why }));
        let _ = self.0.wake.send(Wake::MoveEnded);
    }

    /// Who this process is busy with, for a peer that is turned away.
    pub fn busy_with(&self) -> Option<String> {
        let state = self.0.state();
        match (&state.machine, &state.incoming) {
            (Some(machine), _) => Some(format!("it keeps the machine `{}`", machine.config().name)),
            (None, Some(incoming)) => Some(format!("it is taking in a machine from {}", incoming.peer)),
            (None, None) => None,
        }
    }

    /// A machine is coming in at the moment.
    pub fn is_taking_in(&self) -> bool {
        self.0.state().incoming.is_some()
    }

    /// Tells an event of the program's own.
    pub fn publish(&self, name: &str, data: Value) {
        self.0.hub.publish(name, data);
    }
}

impl Shared {
    /// Calls off whatever move can still be called off, in either direction.
    fn call_off_moves(&self) {
        let state = self.state();
        if let Some(current) = state.active_move().cloned() {
            drop(state);
            if let Err(CancelError::Committed(to)) = current.cancel() {
                tracing::warn!("the machine is being handed over to {to}: waiting for the end of that");
            }
        } else if let Some(incoming) = &state.incoming {
            match is_handover(incoming.phase) {
                true => tracing::warn!("a machine is being handed over by {}: waiting for its end", incoming.peer),
                false => incoming.hang_up.hang_up(),
            }
        } else if state.filling {
            tracing::warn!(
                "some of the machine's memory is still to come from where it was: waiting for that. Asked once more, this process ends, and \
                 the guest is lost"
            );
        }
    }

    /// No move is running, and it is known who has the machine.
    fn is_settled(&self) -> bool {
        let state = self.state();
        state.active_move().is_none() && state.incoming.is_none() && !state.filling && !state.is_in_doubt()
    }

    /// A move is running that cannot be called off any more, or was and nobody knows how it ended.
    fn is_handing_over(&self) -> bool {
        let state = self.state();
        if state.is_in_doubt() {
            return true;
        }
        let outgoing = state.active_move().and_then(|current| current.engine.progress().phase);
        let incoming = state.incoming.as_ref().and_then(|incoming| incoming.phase);
        outgoing.is_some_and(|phase| !phase.before_commit()) || is_handover(incoming)
    }
}

/// From its *ready* on, the receiving end cannot tell whether it already owns the machine.
fn is_handover(phase: Option<Phase>) -> bool {
    phase.is_some_and(|phase| phase >= Phase::State)
}

fn forward_signals(wake: Sender<Wake>) -> io::Result<()> {
    let mut signals = Signals::new([SIGTERM, SIGINT])?;
    thread::Builder::new().name("signals".into()).spawn(move || {
        for _ in signals.forever() {
            if wake.send(Wake::Signal).is_err() {
                return;
            }
        }
    })?;
    Ok(())
}
