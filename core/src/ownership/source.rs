//! The source's side of a handover: when it may run its guest again, and when it may let go of it.
//!
//! ```text
//!            give up, link lost                 claim won
//!  paused ─────────────────────→ resumed ←──────────────────┐
//!    │ commit                                               │
//!    ↓            destination lost              claim taken │
//! committed ─────────────────────→ claiming ────────────────┴→ watching
//!    │ running                        │ running                   │ running, marker
//!    └────────────────────────────────┴───────────────────────────┼→ over: it has moved
//!                                                                 │ newer epoch
//!                                                                 ├→ over: started anew elsewhere
//!                                                                 │ a person's word
//!                                                                 └→ look once more, claim the next → resumed
//! ```
//!
//! *Commit* ends the right to run in epoch e for good. From then on the only way back is to claim e + 1 before the
//! destination does; once that has claimed it, the guest that is paused here never runs again, unless a person knows what no
//! protocol can: that the destination died before it ran the guest. Even then the next epoch is claimed first.

use super::attempt::{Attempt, RightToRun, Verdict};
use super::claim::{Claim, Claimant, Epoch, Nonce};
use super::rules::Rules;
use super::store::{ClaimAnswer, Occupant, Reading, Record};
use crate::plants::Plant;

/// What the source is told.
#[derive(Debug, Clone)]
pub enum Input {
    /// The destination is ready and everything else is in order: ownership is to pass.
    Commit,
    /// The move has come to nothing, or is called off.
    GiveUp,
    /// The destination is lost: its link is broken, it is silent for too long, it says that it has given up, or a person says so.
    Lost,
    /// The destination says that it runs the guest, in this epoch.
    Running(Epoch),
    /// A person says that the owner of this epoch, which was shown, is dead and has never run the guest. It is for now: if the store
    /// does not answer, nothing comes of it.
    Force(Epoch),
    /// The answer to [`Action::Claim`], in time or late.
    Claimed(ClaimAnswer),
    /// The answer to [`Action::Look`].
    Seen(Reading),
    /// Time has passed since [`Action::Wait`].
    Retry,
}

/// What the source is to do.
#[derive(Debug)]
pub enum Action {
    /// Send *commit*: the destination is to claim this epoch with this nonce.
    SendCommit(Epoch, Nonce),
    /// Claim; the answer is [`Input::Claimed`].
    Claim(Claim),
    /// Look up the newest claim; the answer is [`Input::Seen`].
    Look,
    /// Give [`Input::Retry`] after [`super::RETRY_GAP`].
    Wait,
    /// Let the guest run again.
    Resume(RightToRun),
    /// The guest runs at the destination, or has: end it here.
    Moved,
    /// The destination had the epoch, and the machine has since been claimed anew from there, from its disks: by a restart or by
    /// a person. What is paused here never runs again: end it, and say who has the machine.
    Superseded(Box<Record>),
    /// Tell the user how things stand.
    Report(Report),
}

/// How things stand while nobody knows who has the guest.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Report {
    /// The claim is undecided, or cannot be made; why. It is tried again.
    Undecided(String),
    /// The epoch is taken, and no sign that the guest runs there has been seen yet. After `--handover-timeout`: unknown, needs a person.
    Taken(Occupant),
    /// The store cannot be read; why. It is tried again.
    Unreadable(String),
    /// No epoch can follow.
    LastEpoch,
}

/// The source's side of one handover.
// What holds a right can be copied only in tests.
#[cfg_attr(test, derive(Clone))]
#[derive(Debug, PartialEq, Eq, Hash)]
pub struct SourceHandover {
    me: Claimant,
    rules: Rules,
    state: State,
}

#[cfg_attr(test, derive(Clone))]
#[derive(Debug, PartialEq, Eq, Hash)]
enum State {
    Paused(RightToRun, Nonces),
    Committed(Attempt),
    Claiming(Attempt),
    Watching(Watched),
    /// A person's word has been taken: the store is asked once more, and then the next epoch is claimed.
    Forcing(Watched, Option<Attempt>),
    Over,
}

/// The epoch that was passed on, and who has it.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
struct Watched {
    epoch: Epoch,
    occupant: Occupant,
    /// For a claim of the epoch after it.
    ours: Nonce,
}

/// Two random numbers, drawn for one handover.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Nonces {
    /// For the destination's claim.
    pub theirs: Nonce,
    /// For the claim of the source, should it come to that.
    pub ours: Nonce,
}

impl Nonces {
    /// Two that no other handover has.
    pub fn random() -> Self {
        Self { theirs: Nonce::random(), ours: Nonce::random() }
    }
}

impl SourceHandover {
    /// The guest has been paused, and its right to run taken from it.
    pub fn new(right: RightToRun, me: Claimant, nonces: Nonces, rules: Rules) -> Self {
        Self { me, rules, state: State::Paused(right, nonces) }
    }

    /// Whether the move can still be called off.
    pub fn before_commit(&self) -> bool {
        matches!(self.state, State::Paused(..))
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
            (State::Paused(right, nonces), Input::Commit) => self.commit(right, nonces),
            (State::Paused(right, _), Input::GiveUp | Input::Lost) => (State::Over, vec![Action::Resume(right)]),

            (State::Committed(attempt), Input::Lost) => self.take_back(attempt),
            (State::Committed(attempt) | State::Claiming(attempt), Input::Running(epoch))
                if epoch == attempt.claim().epoch =>
            {
                (State::Over, vec![Action::Moved])
            }
            (State::Watching(watched) | State::Forcing(watched, _), Input::Running(epoch))
                if epoch == watched.epoch =>
            {
                (State::Over, vec![Action::Moved])
            }

            (State::Claiming(attempt), Input::Claimed(answer)) => self.claimed(attempt, answer),
            (State::Claiming(attempt), Input::Retry) => {
                let claim = attempt.claim().clone();
                (State::Claiming(attempt), vec![Action::Claim(claim)])
            }
            // Only a planted fault looks before it has claimed.
            (State::Claiming(attempt), Input::Seen(reading)) => self.trust_absence(attempt, reading),

            (State::Watching(watched), Input::Seen(reading)) => watched.seen(reading),
            (State::Watching(watched), Input::Retry) => (State::Watching(watched), vec![Action::Look]),
            (State::Watching(watched), Input::Force(epoch)) if epoch == watched.epoch => {
                (State::Forcing(watched, None), vec![Action::Look])
            }

            (State::Forcing(watched, None), Input::Seen(reading)) => self.force(watched, reading),
            (State::Forcing(watched, None), Input::Retry) => (State::Forcing(watched, None), vec![Action::Look]),
            (State::Forcing(watched, Some(attempt)), Input::Claimed(answer)) => forced(watched, attempt, answer),
            (State::Forcing(watched, Some(attempt)), Input::Retry) => {
                let claim = attempt.claim().clone();
                (State::Forcing(watched, Some(attempt)), vec![Action::Claim(claim)])
            }

            // Late answers, and what has no place: nothing here can be decided by them.
            (state, _) => (state, Vec::new()),
        }
    }

    fn commit(&self, right: RightToRun, nonces: Nonces) -> (State, Vec<Action>) {
        let Some(next) = right.epoch().next() else {
            return (State::Over, vec![Action::Report(Report::LastEpoch), Action::Resume(right)]);
        };
        let attempt = Attempt::new(self.me.claim(next, nonces.ours), self.rules);
        (State::Committed(attempt), vec![Action::SendCommit(next, nonces.theirs)])
    }

    fn take_back(&self, attempt: Attempt) -> (State, Vec<Action>) {
        if self.rules.broken(Plant::ResumeWithoutClaim) {
            return (State::Over, vec![Action::Resume(attempt.taken_for_granted())]);
        }
        let action = match self.rules.broken(Plant::TrustAbsence) {
            true => Action::Look,
            false => Action::Claim(attempt.claim().clone()),
        };
        (State::Claiming(attempt), vec![action])
    }

    fn claimed(&self, mut attempt: Attempt, answer: ClaimAnswer) -> (State, Vec<Action>) {
        match attempt.answer(answer) {
            Verdict::Won(right) => (State::Over, vec![Action::Resume(right)]),
            Verdict::Taken(_) if self.rules.broken(Plant::ClaimIsMoved) => (State::Over, vec![Action::Moved]),
            Verdict::Taken(occupant) => {
                let report = Action::Report(Report::Taken(occupant.clone()));
                let Claim { epoch, nonce: ours, .. } = *attempt.claim();
                (State::Watching(Watched { epoch, occupant, ours }), vec![report, Action::Look])
            }
            Verdict::NotDone(why) | Verdict::Undecided(why) => {
                (State::Claiming(attempt), vec![Action::Report(Report::Undecided(why)), Action::Wait])
            }
        }
    }

    /// The store has been asked once more: the person's word holds as long as nothing there says otherwise.
    fn force(&self, watched: Watched, reading: Reading) -> (State, Vec<Action>) {
        let next = match (&reading, watched.epoch.next()) {
            (Reading::Newest(Some(record)), Some(next)) if record.epoch == watched.epoch && !record.has_run() => next,
            _ => return watched.seen(reading),
        };
        let attempt = Attempt::new(self.me.claim(next, watched.ours), self.rules);
        if self.rules.broken(Plant::ForceWithoutClaim) {
            return (State::Over, vec![Action::Resume(attempt.taken_for_granted())]);
        }
        let claim = attempt.claim().clone();
        (State::Forcing(watched, Some(attempt)), vec![Action::Claim(claim)])
    }

    fn trust_absence(&self, attempt: Attempt, reading: Reading) -> (State, Vec<Action>) {
        if !self.rules.broken(Plant::TrustAbsence) {
            return (State::Claiming(attempt), Vec::new());
        }
        match reading {
            Reading::Newest(Some(record)) if record.epoch < attempt.claim().epoch => {
                (State::Over, vec![Action::Resume(attempt.taken_for_granted())])
            }
            _ => {
                let claim = attempt.claim().clone();
                (State::Claiming(attempt), vec![Action::Claim(claim)])
            }
        }
    }
}

impl Watched {
    /// The epoch is another's: only a sign that the guest has run there, or that the machine has gone on, ends the wait.
    fn seen(self, reading: Reading) -> (State, Vec<Action>) {
        let report = match reading {
            Reading::Newest(Some(record)) if record.epoch == self.epoch && record.has_run() => {
                return (State::Over, vec![Action::Moved]);
            }
            Reading::Newest(Some(record)) if record.epoch > self.epoch => {
                return (State::Over, vec![Action::Superseded(Box::new(record))]);
            }
            Reading::Newest(_) => Report::Taken(self.occupant.clone()),
            Reading::Unknown(why) => Report::Unreadable(why),
        };
        (State::Watching(self), vec![Action::Report(report), Action::Wait])
    }
}

/// The epoch after the destination's was claimed, on a person's word.
fn forced(watched: Watched, mut attempt: Attempt, answer: ClaimAnswer) -> (State, Vec<Action>) {
    match attempt.answer(answer) {
        Verdict::Won(right) => (State::Over, vec![Action::Resume(right)]),
        // Somebody else was quicker: the next look shows who.
        Verdict::Taken(_) => (State::Watching(watched), vec![Action::Look]),
        Verdict::NotDone(why) => (State::Watching(watched), vec![Action::Report(Report::Undecided(why)), Action::Wait]),
        // It may be ours already: there is no way back from here.
        Verdict::Undecided(why) => {
            (State::Forcing(watched, Some(attempt)), vec![Action::Report(Report::Undecided(why)), Action::Wait])
        }
    }
}
