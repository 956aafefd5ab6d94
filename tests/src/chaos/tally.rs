//! What came of all episodes, in numbers.

use std::collections::BTreeMap;

use serde_json::{Value, json};
use strum::{Display, VariantArray};

use super::kind::Kind;

/// How a move ended, as seen from outside.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Display, VariantArray)]
#[strum(serialize_all = "snake_case")]
pub enum Outcome {
    /// The destination runs the guest.
    Moved,
    /// The source runs it.
    Stayed,
    /// The command said that this needs a person, though nobody was killed.
    Person,
    /// Nobody runs it: who had it was killed.
    OwnerKilled,
}

/// What must never happen.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Display, VariantArray)]
#[strum(serialize_all = "snake_case")]
pub enum Crime {
    /// Two processes ran the guest at the same time, or an earlier one after a later one.
    TwoRunning,
    /// A living process that was entitled to run the guest did not, within the handover's time limit after the fault was healed.
    NoneRunning,
    /// Memory of the guest is not as the guest left it.
    GuestCheckFailed,
    /// Memory of the stopped source was not what had been sent last.
    AuditFailed,
    /// What the programs say, what the claims say and what is seen do not agree, or something hangs.
    Contradiction,
}

/// One crime, in words.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Violation {
    /// Which.
    pub crime: Crime,
    /// What was seen.
    pub text: String,
}

/// One episode, in numbers.
#[derive(Debug, Clone)]
pub struct Result {
    /// How the move ended.
    pub outcome: Outcome,
    /// The faults that struck, and whether each struck between the pause and *running*.
    pub struck: Vec<(Kind, bool)>,
    /// What the source said of the end.
    pub said: String,
    /// What must not have happened.
    pub violations: Vec<Violation>,
}

/// All episodes so far.
#[derive(Debug, Clone, Default)]
pub struct Tally {
    moves: u64,
    faults_in_handover: u64,
    kinds: BTreeMap<Kind, u64>,
    outcomes: BTreeMap<Outcome, u64>,
    crimes: BTreeMap<Crime, u64>,
}

impl Tally {
    /// Adds an episode.
    pub fn add(&mut self, result: &Result) {
        self.moves += 1;
        *self.outcomes.entry(result.outcome).or_default() += 1;
        for &(kind, in_handover) in &result.struck {
            *self.kinds.entry(kind).or_default() += 1;
            self.faults_in_handover += u64::from(in_handover);
        }
        for violation in &result.violations {
            *self.crimes.entry(violation.crime).or_default() += 1;
        }
    }

    /// Moves that were tried.
    pub fn moves(&self) -> u64 {
        self.moves
    }

    /// Faults that struck.
    pub fn faults(&self) -> u64 {
        self.kinds.values().sum()
    }

    /// Of those, the ones between the pause and *running*.
    pub fn faults_in_handover(&self) -> u64 {
        self.faults_in_handover
    }

    /// How often one kind struck.
    pub fn of_kind(&self, kind: Kind) -> u64 {
        self.kinds.get(&kind).copied().unwrap_or(0)
    }

    /// How often moves ended so.
    pub fn of_outcome(&self, outcome: Outcome) -> u64 {
        self.outcomes.get(&outcome).copied().unwrap_or(0)
    }

    /// Nothing happened that must not.
    pub fn is_clean(&self) -> bool {
        self.crimes.is_empty()
    }

    /// For programs.
    pub fn json(&self) -> Value {
        let kinds: BTreeMap<String, u64> = self.kinds.iter().map(|(kind, &count)| (kind.to_string(), count)).collect();
        let outcomes: BTreeMap<String, u64> =
            Outcome::VARIANTS.iter().map(|&outcome| (outcome.to_string(), self.of_outcome(outcome))).collect();
        let mut json = json!({
            "moves": self.moves,
            "faults": self.faults(),
            "faults_in_handover": self.faults_in_handover,
            "kinds": kinds,
            "outcomes": outcomes,
            "owner_killed": self.of_outcome(Outcome::OwnerKilled),
        });
        for crime in Crime::VARIANTS {
            json[crime.to_string()] = json!(self.crimes.get(crime).copied().unwrap_or(0));
        }
        json
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn everything_is_counted_under_the_names_that_are_fixed() {
        let mut tally = Tally::default();
        let struck = vec![(Kind::LinkDown, true), (Kind::Cancel, false)];
        tally.add(&Result { outcome: Outcome::Moved, struck, said: String::new(), violations: Vec::new() });
        assert!(tally.is_clean());
        let violations = vec![Violation { crime: Crime::TwoRunning, text: "two".into() }];
        tally.add(&Result {
            outcome: Outcome::OwnerKilled,
            struck: vec![(Kind::LinkDown, true)],
            said: String::new(),
            violations,
        });
        assert!(!tally.is_clean());
        let expected = json!({
            "moves": 2, "faults": 3, "faults_in_handover": 2, "kinds": { "cancel": 1, "link-down": 2 },
            "outcomes": { "moved": 1, "stayed": 0, "person": 0, "owner_killed": 1 }, "owner_killed": 1,
            "two_running": 1, "none_running": 0, "guest_check_failed": 0, "audit_failed": 0, "contradiction": 0,
        });
        assert_eq!(tally.json(), expected);
    }
}
