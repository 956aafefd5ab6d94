//! What a process holds of a machine: its claim, the right to run that came with it, and, while a move hands it over, the
//! handover in its place.
//!
//! One lock guards all of it, and it is not held during calls to the store: whoever asks whether the guest may run gets an
//! answer at once.

use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use super::attempt::RightToRun;
use super::claim::{Claim, Claimant, Epoch, Marker, Nonce};
use super::host::Host;
use super::rules::Rules;
use super::source::{Action, Input, Nonces, Report, SourceHandover};
use super::store::{MarkAnswer, Reading, Record};
use super::timed::Timed;
use super::{CALL_LIMIT, RETRY_GAP};

/// How often whoever waits for a decision says so.
const TELL_GAP: Duration = Duration::from_secs(5);

/// A machine's claims, as the process that has it sees them.
pub struct Holding {
    directory: PathBuf,
    me: Claimant,
    now: Mutex<Now>,
    life: Option<Life>,
}

/// What there is only in life.
struct Life {
    store: Timed,
    /// The process counts as alive for as long as it holds a machine.
    _host: Arc<Host>,
}

struct Now {
    /// Ours, the last that was won.
    claim: Claim,
    state: State,
    /// A person's word about the owner of this epoch, not yet taken up.
    forced: Option<Epoch>,
    /// Drawn for the next handover; `None`: it draws its own.
    nonces: Option<Nonces>,
}

enum State {
    /// The guest may run here.
    Held(RightToRun),
    /// It is being handed over; with which nonce it would be claimed back.
    Handing(Box<SourceHandover>, Nonce),
    /// It has moved.
    Moved,
    /// It was claimed anew, from where it had moved to.
    Superseded(Box<Record>),
    /// It was ended here, or given up by a person.
    Ended,
}

/// What is to be done next to find out who has the machine.
#[derive(Debug)]
pub enum Next {
    /// Claim; the answer is [`Input::Claimed`].
    Claim(Claim),
    /// Look up the newest claim; the answer is [`Input::Seen`].
    Look,
    /// Give [`Input::Retry`] after [`RETRY_GAP`].
    Wait,
    /// Nothing: this is how it stands.
    Settled(Settlement),
}

/// How a handover stands.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Settlement {
    /// The guest may run here again, in this epoch.
    Resumed(Epoch),
    /// It has run at the destination.
    Moved,
    /// The machine has been claimed anew since: the copy here is out of date.
    Superseded(Box<Record>),
    /// It is still not known; what is.
    Undecided(String),
}

impl Holding {
    /// The machine of `claim`, which was won with `right`.
    pub fn new(directory: PathBuf, store: Timed, host: Arc<Host>, claim: Claim, right: RightToRun) -> Self {
        Self { life: Some(Life { store, _host: host }), ..Self::modelled(directory, claim, right) }
    }

    /// The same without a store: whoever simulates one asks it what [`Holding::settling`] says.
    pub fn modelled(directory: PathBuf, claim: Claim, right: RightToRun) -> Self {
        let me = claim.claimant.clone();
        let now = Now { claim, state: State::Held(right), forced: None, nonces: None };
        Self { directory, me, now: Mutex::new(now), life: None }
    }

    /// For simulations: the next handover has these nonces, not random ones.
    pub fn draw(&self, nonces: Nonces) {
        self.now().nonces = Some(nonces);
    }

    /// Where the claims are.
    pub fn directory(&self) -> &Path {
        &self.directory
    }

    /// The last claim that was won here.
    pub fn claim(&self) -> Claim {
        self.now().claim.clone()
    }

    /// Whether the guest may run here.
    pub fn may_run(&self) -> bool {
        matches!(self.now().state, State::Held(_))
    }

    /// The newest claim, as the store shows it now.
    pub fn newest(&self, limit: Duration) -> Reading {
        match &self.life {
            Some(Life { store, .. }) => store.newest(limit),
            None => Reading::Unknown("there is no store to ask".into()),
        }
    }

    /// The guest has been paused to be handed over: its right to run is taken from it. Does nothing if that has been done.
    pub fn begin_handover(&self) {
        let mut now = self.now();
        now.state = match std::mem::replace(&mut now.state, State::Ended) {
            State::Held(right) => {
                let nonces = now.nonces.take().unwrap_or_else(Nonces::random);
                let handover = SourceHandover::new(right, self.me.clone(), nonces, Rules::default());
                State::Handing(Box::new(handover), nonces.ours)
            }
            other => other,
        };
    }

    /// The move has come to nothing before *commit*: whether the guest may run here.
    pub fn give_up_handover(&self) -> bool {
        self.step(Input::GiveUp);
        self.may_run()
    }

    /// Ownership is to pass: the epoch to be claimed by the destination, and with which nonce. `None` if there is nothing to pass.
    pub fn commit(&self) -> Option<(Epoch, Nonce)> {
        self.step(Input::Commit).into_iter().find_map(|action| match action {
            Action::SendCommit(epoch, nonce) => Some((epoch, nonce)),
            _ => None,
        })
    }

    /// The destination says that it runs the guest.
    pub fn running(&self) {
        let next = self.now().claim.epoch.next();
        if let Some(epoch) = next {
            self.step(Input::Running(epoch));
        }
    }

    /// A person says that the owner of `epoch` is dead and has never run the guest. Whoever is in [`Holding::settle`] takes this up: the
    /// store is asked once more, and the guest may run here if the next epoch is won. Nothing comes of it if the store does not answer.
    pub fn force(&self, epoch: Epoch) {
        self.now().forced = Some(epoch);
    }

    /// A person says that the copy here is never to run: from now on it has no way to. Does nothing, and gives `false`, unless it has
    /// been handed over and nobody knows yet who has it.
    pub fn abandon(&self) -> bool {
        let mut now = self.now();
        let in_doubt = matches!(&now.state, State::Handing(handover, _) if !handover.before_commit());
        if in_doubt {
            now.state = State::Ended;
        }
        in_doubt
    }

    /// The destination is lost after *commit*, or has been for a while: what is to be asked of the store to find out who has the machine, and
    /// what there is to tell a person. Begins with [`Input::Lost`], and goes on with each answer.
    pub fn settling(&self, input: Input) -> (Next, Option<String>) {
        // A person's word is heard when it is time to ask again.
        let forced = matches!(input, Input::Retry).then(|| self.now().forced.take()).flatten();
        let mut actions = self.step(forced.map_or(input, Input::Force));
        if actions.is_empty() {
            // It had no place: the destination has been lost before. Then it is time to ask again.
            actions = self.step(Input::Retry);
        }
        let (mut next, mut told) = (Next::Wait, None);
        for action in actions {
            match action {
                Action::Claim(claim) => next = Next::Claim(claim),
                Action::Look => next = Next::Look,
                Action::Report(report) => told = Some(text(&report)),
                Action::Wait | Action::SendCommit(..) | Action::Resume(_) | Action::Moved | Action::Superseded(_) => {}
            }
        }
        let now = self.now();
        let settled = match &now.state {
            State::Handing(..) => return (next, told),
            State::Held(_) => Settlement::Resumed(now.claim.epoch),
            State::Moved => Settlement::Moved,
            State::Superseded(record) => Settlement::Superseded(record.clone()),
            State::Ended => Settlement::Undecided("the machine was ended here".into()),
        };
        (Next::Settled(settled), told)
    }

    /// [`Holding::settling`] in life: asks, until then at the latest if there is an end to it. May be called again as long as it
    /// is undecided.
    pub fn settle(&self, until: Option<Instant>, mut tell: impl FnMut(&str)) -> Settlement {
        let Some(Life { store, .. }) = &self.life else {
            return Settlement::Undecided("there is no store to ask".into());
        };
        let mut last = String::from("the claim store has not been asked yet");
        let mut told: Option<Instant> = None;
        let mut input = Input::Lost;
        loop {
            let (next, report) = self.settling(input);
            if let Some(text) = report {
                if text != last || told.is_none_or(|told| told.elapsed() >= TELL_GAP) {
                    tell(&text);
                    told = Some(Instant::now());
                }
                last = text;
            }
            input = match next {
                Next::Claim(claim) => Input::Claimed(store.claim(&claim, CALL_LIMIT)),
                Next::Look => Input::Seen(store.newest(CALL_LIMIT)),
                Next::Wait if until.is_some_and(|until| Instant::now() + RETRY_GAP > until) => {
                    return Settlement::Undecided(last);
                }
                Next::Wait => {
                    thread::sleep(RETRY_GAP);
                    Input::Retry
                }
                Next::Settled(settlement) => return settlement,
            };
        }
    }

    /// The machine has been ended cleanly and every disk is closed: anybody may start it from now on. Does nothing if it is not held.
    ///
    /// # Errors
    /// Why the store could not be told within `limit`.
    pub fn free(&self, limit: Duration) -> Result<(), String> {
        let (Some(epoch), Some(Life { store, .. })) = (self.give_up(), &self.life) else { return Ok(()) };
        let until = Instant::now() + limit;
        loop {
            let left = until.saturating_duration_since(Instant::now());
            match store.mark(epoch, Marker::Free, left.min(CALL_LIMIT)) {
                MarkAnswer::Marked => return Ok(()),
                MarkAnswer::Unknown(why) if left <= RETRY_GAP => return Err(why),
                MarkAnswer::Unknown(_) => thread::sleep(RETRY_GAP),
            }
        }
    }

    /// All of the machine's memory is there, in an epoch that was claimed without it. Tried on a thread of its own until the store has it:
    /// nothing waits for it.
    pub fn mark_complete(&self) {
        let (epoch, Some(Life { store, .. })) = (self.claim().epoch, &self.life) else { return };
        let store = store.clone();
        let marked = thread::Builder::new().name("claims-mark".into()).spawn(move || {
            while let MarkAnswer::Unknown(why) = store.mark(epoch, Marker::Complete, CALL_LIMIT) {
                tracing::warn!("the claims do not show yet that the guest's memory is complete: {why}");
                thread::sleep(RETRY_GAP);
            }
        });
        if let Err(error) = marked {
            tracing::error!("no thread could be started to say in the claims that memory is complete: {error}");
        }
    }

    /// The machine has been ended cleanly: the guest never runs again in this epoch, to which [`Marker::Free`] is to be added. `None` if it is
    /// not held.
    pub fn give_up(&self) -> Option<Epoch> {
        let mut now = self.now();
        match std::mem::replace(&mut now.state, State::Ended) {
            State::Held(right) => Some(right.give_up()),
            other => {
                now.state = other;
                None
            }
        }
    }

    /// Gives the handover an input, if there is one. What it says about the right to run is done at once.
    fn step(&self, input: Input) -> Vec<Action> {
        let mut now = self.now();
        let State::Handing(handover, ours) = &mut now.state else { return Vec::new() };
        let ours = *ours;
        let mut rest = Vec::new();
        for action in handover.handle(input) {
            match action {
                Action::Resume(right) => {
                    if right.epoch() != now.claim.epoch {
                        now.claim = self.me.claim(right.epoch(), ours);
                    }
                    now.state = State::Held(right);
                    return rest;
                }
                Action::Moved => {
                    now.state = State::Moved;
                    return rest;
                }
                Action::Superseded(record) => {
                    now.state = State::Superseded(record);
                    return rest;
                }
                action => rest.push(action),
            }
        }
        rest
    }

    fn now(&self) -> MutexGuard<'_, Now> {
        self.now.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl fmt::Debug for Holding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} in {}", self.now().claim, self.directory.display())
    }
}

fn text(report: &Report) -> String {
    match report {
        Report::Undecided(why) => format!("the machine cannot be claimed back yet, it is tried again: {why}"),
        Report::Taken(occupant) => {
            format!("{occupant}, and nothing shows yet that the guest has run there: watching for it")
        }
        Report::Unreadable(why) => format!("the claims cannot be read, it is tried again: {why}"),
        Report::LastEpoch => "no epoch can follow this machine's last".into(),
    }
}

#[cfg(test)]
mod tests;
