//! The destination's side of a handover: when it may run the guest, and when it must drop it.
//!
//! ```text
//!         loaded          commit             claim won             started
//!  loading ────→ waiting ──────────→ claiming ──────────→ starting ─────────→ marking ──→ over: it is ours
//!    │ link lost    │ link lost         │ claim taken, abandoned by a person
//!    └──────────────┴───────────────────┴─→ over: dropped
//! ```
//!
//! Until it has claimed, it runs nothing, writes no disk and announces nothing. Once told to claim, it stays until it
//! knows: a broken link changes nothing, and a claim of unknown outcome may be ours.

use super::attempt::{Attempt, RightToRun, Verdict};
use super::claim::{Claim, Claimant, Epoch, Marker, Nonce};
use super::rules::Rules;
use super::store::{ClaimAnswer, MarkAnswer, Occupant};
use crate::plants::Plant;

/// What the destination is told.
#[derive(Debug, Clone)]
pub enum Input {
    /// Everything has arrived, is what was sent, and has been loaded.
    Loaded,
    /// *Commit* has arrived: this epoch is to be claimed with this nonce.
    Commit(Epoch, Nonce),
    /// The source is lost, or has called the move off.
    Lost,
    /// A person says that the copy here is never to run. The claim may still take effect: it is then as if this end had died.
    Abandon,
    /// The answer to [`Action::Claim`], in time or late.
    Claimed(ClaimAnswer),
    /// The guest runs.
    Started,
    /// The answer to [`Action::Mark`].
    Marked(MarkAnswer),
    /// Time has passed since [`Action::Wait`].
    Retry,
}

/// What the destination is to do, in this order.
#[derive(Debug)]
pub enum Action {
    /// Tell the source that the machine is ready to run.
    SendReady,
    /// Claim; the answer is [`Input::Claimed`].
    Claim(Claim),
    /// Let the guest run; the answer is [`Input::Started`].
    Run(RightToRun),
    /// Tell the network.
    Announce,
    /// Add a marker; the answer is [`Input::Marked`].
    Mark(Epoch, Marker),
    /// Tell the source; without waiting for the marker, which is there in case this gets lost.
    SendRunning(Epoch),
    /// Give [`Input::Retry`] after [`super::RETRY_GAP`].
    Wait,
    /// The machine is not ours: drop it, and hang up.
    Drop(Dropped),
    /// Tell the user that an outcome is unknown and is being found out; why.
    Report(String),
}

/// Why a machine was dropped.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Dropped {
    /// The move ended before *commit*.
    NotCommitted,
    /// *Commit* was for another epoch than the one after the source's.
    WrongEpoch(Epoch),
    /// The epoch is another's.
    Taken(Occupant),
    /// The claim could not be made, and nothing is left in doubt; why.
    CannotClaim(String),
    /// A person has said that it is never to run here. The claim may be this end's or become so.
    Abandoned,
}

/// The destination's side of one handover.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct DestinationHandover {
    me: Claimant,
    epoch: Epoch,
    /// Memory is still to come when the guest goes on.
    incomplete: bool,
    rules: Rules,
    state: State,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash)]
enum State {
    Loading,
    Waiting,
    Claiming(Attempt),
    Starting(Epoch),
    Marking(Epoch),
    Over,
}

impl DestinationHandover {
    /// A machine is coming in. `epoch` is to be claimed: the one after the source's, whose claim this end has seen itself
    /// in preflight.
    pub fn new(me: Claimant, epoch: Epoch, rules: Rules) -> Self {
        Self { me, epoch, incomplete: false, rules, state: State::Loading }
    }

    /// The guest is to go on before all of its memory is there: the claim says so.
    pub fn without_all_memory(&mut self) {
        self.incomplete = true;
    }

    /// Whether the move can still be called off by the source.
    pub fn before_commit(&self) -> bool {
        matches!(self.state, State::Loading | State::Waiting)
    }

    /// Whether nothing more is to come.
    pub fn is_over(&self) -> bool {
        self.state == State::Over
    }

    /// Takes in what has happened.
    #[must_use]
    pub fn handle(&mut self, input: Input) -> Vec<Action> {
        let state = std::mem::replace(&mut self.state, State::Over);
        let (state, actions) = self.step(state, input);
        self.state = state;
        actions
    }

    fn step(&self, state: State, input: Input) -> (State, Vec<Action>) {
        match (state, input) {
            (State::Loading, Input::Loaded) if self.rules.broken(Plant::ClaimBeforeCommit) => {
                let early = self.me.claim(self.epoch, Nonce(0));
                (State::Waiting, vec![Action::Claim(early), Action::SendReady])
            }
            (State::Loading, Input::Loaded) => (State::Waiting, vec![Action::SendReady]),
            (State::Waiting, Input::Commit(epoch, _)) if epoch != self.epoch => {
                (State::Over, vec![Action::Drop(Dropped::WrongEpoch(epoch))])
            }
            (State::Waiting, Input::Commit(epoch, nonce)) => {
                let claim = Claim { incomplete: self.incomplete, ..self.me.claim(epoch, nonce) };
                let attempt = Attempt::new(claim, self.rules);
                if self.rules.broken(Plant::RunBeforeClaim) {
                    let right = attempt.taken_for_granted();
                    return (State::Starting(epoch), vec![Action::Claim(attempt.claim().clone()), Action::Run(right)]);
                }
                self.claim(attempt)
            }
            (State::Loading | State::Waiting, Input::Lost) => (State::Over, vec![Action::Drop(Dropped::NotCommitted)]),

            (State::Claiming(attempt), Input::Claimed(answer)) => self.claimed(attempt, answer),
            (State::Claiming(attempt), Input::Retry) => self.claim(attempt),
            (State::Claiming(_), Input::Abandon) => (State::Over, vec![Action::Drop(Dropped::Abandoned)]),

            (State::Starting(epoch), Input::Started) => {
                let mark = Action::Mark(epoch, Marker::Running);
                (State::Marking(epoch), vec![Action::Announce, mark, Action::SendRunning(epoch)])
            }

            (State::Marking(_), Input::Marked(MarkAnswer::Marked)) => (State::Over, Vec::new()),
            (State::Marking(epoch), Input::Marked(MarkAnswer::Unknown(why))) => {
                (State::Marking(epoch), vec![Action::Report(why), Action::Wait])
            }
            (State::Marking(epoch), Input::Retry) => {
                (State::Marking(epoch), vec![Action::Mark(epoch, Marker::Running)])
            }

            // A lost link after *commit*, late answers, and what has no place.
            (state, _) => (state, Vec::new()),
        }
    }

    fn claim(&self, attempt: Attempt) -> (State, Vec<Action>) {
        let claim = attempt.claim().clone();
        (State::Claiming(attempt), vec![Action::Claim(claim)])
    }

    fn claimed(&self, mut attempt: Attempt, answer: ClaimAnswer) -> (State, Vec<Action>) {
        match attempt.answer(answer) {
            Verdict::Won(right) => (State::Starting(right.epoch()), vec![Action::Run(right)]),
            Verdict::Taken(Occupant::Claim(found)) if self.rules.broken(Plant::ForgetEpoch) => {
                let next = found.epoch.next().unwrap_or(Epoch::FIRST);
                self.claim(Attempt::new(self.me.claim(next, attempt.claim().nonce), self.rules))
            }
            Verdict::Taken(occupant) => (State::Over, vec![Action::Drop(Dropped::Taken(occupant))]),
            Verdict::NotDone(why) => (State::Over, vec![Action::Drop(Dropped::CannotClaim(why))]),
            Verdict::Undecided(why) => (State::Claiming(attempt), vec![Action::Report(why), Action::Wait]),
        }
    }
}
