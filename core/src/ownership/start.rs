//! When a machine may be started: at every boot, after every crash, and when a person takes it over.
//!
//! ```text
//!  look ──→ may the newest claim be followed? ──→ claim the next ──→ run
//!                 │ no        ↑ taken meanwhile         │
//!                 ↓           └─────────────────────────┘
//!              refused
//! ```
//!
//! The newest claim may be followed if its epoch was ended cleanly, or if it is this host's and its process is proven
//! dead, or if a person has said that *this very claim's* owner is dead. Then the next epoch is claimed: whatever was not
//! seen, or has changed meanwhile, is found out by that and by nothing else.

use super::attempt::{Attempt, RightToRun, Verdict};
use super::claim::{Claim, Claimant, Epoch, Nonce};
use super::rules::Rules;
use super::store::{ClaimAnswer, Occupant, Reading, Record};
use crate::plants::Plant;

/// So often may another be quicker before the start is refused: somebody else is starting it too.
const MAX_RACES: u32 = 8;

/// How a machine is to be started.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Mode {
    /// It has been started before: without any claim to be seen, the storage is not what it should be.
    Existing,
    /// It is new: there may be no claim yet.
    New,
    /// A person has looked and says that the owner of this epoch is dead.
    TakeOver(Epoch),
}

/// Whether the process that made a claim lives. Asked only of processes of this host since its last boot.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Liveness {
    /// Its lock file is held.
    Alive,
    /// Its lock file is free.
    Dead,
    /// There is no telling.
    Unknown,
}

/// What a start is told.
#[derive(Debug, Clone)]
pub enum Input {
    /// The answer to [`Action::Look`].
    Seen(Reading),
    /// The answer to [`Action::Examine`].
    Examined(Liveness),
    /// The answer to [`Action::Claim`], in time or late.
    Claimed(ClaimAnswer),
    /// Time has passed since [`Action::Wait`].
    Retry,
}

/// What a start is to do.
#[derive(Debug)]
pub enum Action {
    /// Look up the newest claim; the answer is [`Input::Seen`].
    Look,
    /// Find out whether the process that made this claim lives; the answer is [`Input::Examined`].
    Examine(Claim),
    /// Claim; the answer is [`Input::Claimed`].
    Claim(Claim),
    /// Start the guest.
    Run(RightToRun),
    /// Give [`Input::Retry`] after [`super::RETRY_GAP`].
    Wait,
    /// Tell the user that an outcome is unknown and is being found out; why.
    Report(String),
    /// The machine may not start.
    Refuse(Refused),
}

/// Why a machine may not start.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Refused {
    /// It has been started before, and yet no claim can be seen.
    NoClaims,
    /// It is another host's, or nobody can say whose; with `--take-ownership` a person can decide.
    Others(Box<Record>),
    /// A process of this host has it.
    AliveHere(Box<Record>),
    /// The claims are another machine's.
    OtherMachine(Box<Record>),
    /// The person's word was about an older claim than the newest.
    Changed(Box<Record>),
    /// The claim could not be made, and nothing is left in doubt; why.
    CannotClaim(String),
    /// Others claim it all the time.
    Contended,
    /// No epoch can follow.
    LastEpoch,
}

/// One attempt to start a machine.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Start {
    me: Claimant,
    nonce: Nonce,
    mode: Mode,
    rules: Rules,
    races: u32,
    state: State,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash)]
enum State {
    /// Looking for the newest claim, known to be this one at least.
    Looking(Option<Epoch>),
    Examining(Record),
    Claiming(Attempt),
    Over,
}

impl Start {
    /// A start, and the first thing to do. The nonce is random.
    pub fn new(me: Claimant, nonce: Nonce, mode: Mode, rules: Rules) -> (Self, Action) {
        (Self { me, nonce, mode, rules, races: 0, state: State::Looking(None) }, Action::Look)
    }

    /// What all its claims carry.
    pub fn nonce(&self) -> Nonce {
        self.nonce
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

    fn step(&mut self, state: State, input: Input) -> (State, Vec<Action>) {
        match (state, input) {
            (State::Looking(at_least), Input::Seen(Reading::Newest(newest))) => self.seen(at_least, newest),
            (State::Looking(at_least), Input::Seen(Reading::Unknown(why))) => {
                (State::Looking(at_least), vec![Action::Report(why), Action::Wait])
            }
            (State::Looking(at_least), Input::Retry) => (State::Looking(at_least), vec![Action::Look]),

            (State::Examining(record), Input::Examined(Liveness::Dead)) => self.follow(&record),
            (State::Examining(record), Input::Examined(Liveness::Alive)) => {
                refuse(Refused::AliveHere(Box::new(record)))
            }
            (State::Examining(record), Input::Examined(Liveness::Unknown)) => refuse(Refused::Others(Box::new(record))),

            (State::Claiming(attempt), Input::Claimed(answer)) => self.claimed(attempt, answer),
            (State::Claiming(attempt), Input::Retry) => {
                let claim = attempt.claim().clone();
                (State::Claiming(attempt), vec![Action::Claim(claim)])
            }

            (state, _) => (state, Vec::new()),
        }
    }

    fn seen(&mut self, at_least: Option<Epoch>, newest: Option<Record>) -> (State, Vec<Action>) {
        // A listing from before the claim that is known to exist: it is looked for again.
        if newest.as_ref().map(|record| record.epoch) < at_least {
            return (State::Looking(at_least), vec![Action::Wait]);
        }
        let Some(record) = newest else {
            return match self.mode {
                Mode::New => self.claim(Epoch::FIRST),
                Mode::Existing | Mode::TakeOver(_) => refuse(Refused::NoClaims),
            };
        };
        if self.rules.broken(Plant::StartFromAnyClaim) {
            return self.follow(&record);
        }
        let claim = match &record.occupant {
            Occupant::Claim(claim) if claim.claimant.machine != self.me.machine => {
                return refuse(Refused::OtherMachine(Box::new(record)));
            }
            Occupant::Claim(claim) => Some(claim),
            Occupant::Foreign(_) => None,
        };
        match (claim, self.mode) {
            (Some(_), _) if record.free => self.follow(&record),
            (_, Mode::TakeOver(epoch)) if epoch == record.epoch => self.follow(&record),
            (_, Mode::TakeOver(_)) => refuse(Refused::Changed(Box::new(record))),
            (Some(claim), _) if claim.claimant.host != self.me.host => refuse(Refused::Others(Box::new(record))),
            (Some(claim), _) if claim.claimant.boot_id != self.me.boot_id => self.follow(&record),
            (Some(claim), _) => {
                let action = Action::Examine(claim.clone());
                (State::Examining(record), vec![action])
            }
            (None, _) => refuse(Refused::Others(Box::new(record))),
        }
    }

    /// The newest claim may be followed.
    fn follow(&mut self, newest: &Record) -> (State, Vec<Action>) {
        let Some(next) = newest.epoch.next() else { return refuse(Refused::LastEpoch) };
        if self.rules.broken(Plant::RunOnOldClaim) {
            let old = Attempt::new(self.me.claim(newest.epoch, self.nonce), self.rules);
            return (State::Over, vec![Action::Run(old.taken_for_granted())]);
        }
        self.claim(next)
    }

    fn claim(&mut self, epoch: Epoch) -> (State, Vec<Action>) {
        let claim = self.me.claim(epoch, self.nonce);
        (State::Claiming(Attempt::new(claim.clone(), self.rules)), vec![Action::Claim(claim)])
    }

    fn claimed(&mut self, mut attempt: Attempt, answer: ClaimAnswer) -> (State, Vec<Action>) {
        match attempt.answer(answer) {
            Verdict::Won(right) => (State::Over, vec![Action::Run(right)]),
            Verdict::Taken(_) if self.races == MAX_RACES => refuse(Refused::Contended),
            Verdict::Taken(_) => {
                self.races += 1;
                (State::Looking(Some(attempt.claim().epoch)), vec![Action::Look])
            }
            Verdict::NotDone(why) => refuse(Refused::CannotClaim(why)),
            Verdict::Undecided(why) => (State::Claiming(attempt), vec![Action::Report(why), Action::Wait]),
        }
    }
}

fn refuse(why: Refused) -> (State, Vec<Action>) {
    (State::Over, vec![Action::Refuse(why)])
}

#[cfg(test)]
mod tests {
    use super::*;

    fn claimant(host: &str, boot_id: &str, instance: &str) -> Claimant {
        let name = |text: &str| text.parse().unwrap();
        Claimant { machine: name("m"), host: name(host), boot_id: name(boot_id), instance: name(instance) }
    }

    fn me() -> Claimant {
        claimant("here", "boot2", "me")
    }

    fn epoch(n: u64) -> Epoch {
        Epoch::new(n).unwrap()
    }

    fn claim_of(claimant: Claimant, n: u64) -> Record {
        let occupant = Occupant::Claim(claimant.claim(epoch(n), Nonce(7)));
        Record { epoch: epoch(n), occupant, since: None, running: false, free: false, complete: true }
    }

    /// What comes of a start that sees this.
    fn start(mode: Mode, newest: Option<Record>) -> (Start, Action) {
        let (mut start, first) = Start::new(me(), Nonce(1), mode, Rules::default());
        assert!(matches!(first, Action::Look));
        let mut actions = start.handle(Input::Seen(Reading::Newest(newest)));
        assert_eq!(actions.len(), 1);
        (start, actions.remove(0))
    }

    fn claims(action: &Action, n: u64) -> bool {
        matches!(action, Action::Claim(claim) if *claim == me().claim(epoch(n), Nonce(1)))
    }

    #[test]
    fn a_free_machine_is_claimed_by_anybody() {
        let free = Record { free: true, ..claim_of(claimant("there", "boot1", "other"), 4) };
        assert!(claims(&start(Mode::Existing, Some(free)).1, 5));
    }

    #[test]
    fn another_host_s_machine_is_refused_until_a_person_has_looked_at_this_very_claim() {
        let theirs = claim_of(claimant("there", "boot1", "other"), 4);
        let refused = |mode| match start(mode, Some(theirs.clone())).1 {
            Action::Refuse(why) => why,
            action => panic!("{action:?}"),
        };
        assert_eq!(refused(Mode::Existing), Refused::Others(Box::new(theirs.clone())));
        assert_eq!(refused(Mode::New), Refused::Others(Box::new(theirs.clone())));
        assert_eq!(refused(Mode::TakeOver(epoch(3))), Refused::Changed(Box::new(theirs.clone())));
        assert!(claims(&start(Mode::TakeOver(epoch(4)), Some(theirs.clone())).1, 5));
    }

    #[test]
    fn a_boot_of_this_host_ends_its_claims_and_nothing_less_than_a_free_lock_does_within_one() {
        assert!(claims(&start(Mode::Existing, Some(claim_of(claimant("here", "boot1", "old"), 4))).1, 5));
        let same_boot = claim_of(claimant("here", "boot2", "old"), 4);
        for (liveness, may) in [(Liveness::Dead, true), (Liveness::Alive, false), (Liveness::Unknown, false)] {
            let (mut start, action) = start(Mode::Existing, Some(same_boot.clone()));
            assert!(matches!(action, Action::Examine(_)), "{action:?}");
            let actions = start.handle(Input::Examined(liveness));
            assert_eq!(claims(&actions[0], 5), may, "{actions:?}");
            assert_eq!(matches!(actions[0], Action::Refuse(_)), !may, "{actions:?}");
        }
    }

    #[test]
    fn an_empty_directory_is_a_new_machine_s_alone() {
        assert!(claims(&start(Mode::New, None).1, 1));
        assert!(matches!(start(Mode::Existing, None).1, Action::Refuse(Refused::NoClaims)));
        assert!(matches!(start(Mode::TakeOver(epoch(1)), None).1, Action::Refuse(Refused::NoClaims)));
    }

    #[test]
    fn another_machine_s_claims_and_foreign_entries_are_refused() {
        let mut stranger = claimant("here", "boot1", "old");
        stranger.machine = "other".parse().unwrap();
        let record = Record { free: true, ..claim_of(stranger, 4) };
        assert!(matches!(start(Mode::Existing, Some(record)).1, Action::Refuse(Refused::OtherMachine(_))));
        // Free or not: whoever made it did not follow the rules.
        let foreign = Record { occupant: Occupant::Foreign("x".into()), free: true, ..claim_of(me(), 4) };
        assert!(matches!(start(Mode::Existing, Some(foreign)).1, Action::Refuse(Refused::Others(_))));
    }

    #[test]
    fn what_was_taken_meanwhile_is_looked_at_again_until_it_is_seen() {
        let (mut start, _) = start(Mode::Existing, Some(claim_of(claimant("here", "boot1", "old"), 4)));
        let theirs = claim_of(claimant("there", "boot1", "other"), 5);
        let actions = start.handle(Input::Claimed(ClaimAnswer::Exists(theirs.occupant.clone())));
        assert!(matches!(actions[..], [Action::Look]), "{actions:?}");
        let stale = claim_of(claimant("here", "boot1", "old"), 4);
        let actions = start.handle(Input::Seen(Reading::Newest(Some(stale))));
        assert!(matches!(actions[..], [Action::Wait]), "a listing that is known to be stale: {actions:?}");
        assert!(matches!(start.handle(Input::Retry)[..], [Action::Look]));
        let actions = start.handle(Input::Seen(Reading::Newest(Some(theirs.clone()))));
        assert!(matches!(&actions[..], [Action::Refuse(Refused::Others(record))] if **record == theirs));
    }

    #[test]
    fn nothing_runs_while_a_claim_is_in_doubt() {
        let (mut start, _) = start(Mode::Existing, Some(claim_of(claimant("here", "boot1", "old"), 4)));
        for answer in [ClaimAnswer::Unknown("slow".into()), ClaimAnswer::Failed("full".into())] {
            let actions = start.handle(Input::Claimed(answer));
            assert!(matches!(actions[..], [Action::Report(_), Action::Wait]), "{actions:?}");
        }
        assert!(claims(&start.handle(Input::Retry)[0], 5), "the same claim, with the same nonce");
        let ours = ClaimAnswer::Exists(Occupant::Claim(me().claim(epoch(5), Nonce(1))));
        let actions = start.handle(Input::Claimed(ours));
        assert!(matches!(&actions[..], [Action::Run(right)] if right.epoch() == epoch(5)), "{actions:?}");
    }

    #[test]
    fn no_epoch_follows_the_last() {
        let last = claim_of(claimant("here", "boot1", "old"), u64::MAX);
        assert!(matches!(start(Mode::Existing, Some(last)).1, Action::Refuse(Refused::LastEpoch)));
    }
}
