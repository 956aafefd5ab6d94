//! One attempt to claim an epoch: the only place where a right to run a machine comes from.

use super::claim::{Claim, Epoch};
use super::rules::Rules;
use super::store::{ClaimAnswer, Occupant};
use crate::plants::Plant;

/// The right to run a machine's guest in an epoch.
///
/// It cannot be made or copied, only won by claiming; whoever lets vCPUs run must hold it. A handover takes it away.
#[derive(Debug, PartialEq, Eq, Hash)]
#[cfg_attr(test, derive(Clone))]
#[must_use = "a right that is dropped is a guest that never runs again"]
pub struct RightToRun(Epoch);

impl RightToRun {
    /// The epoch it is good for.
    pub fn epoch(&self) -> Epoch {
        self.0
    }

    /// The machine has been ended cleanly: the right ends, and [`super::Marker::Free`] is to be added to its epoch.
    pub fn give_up(self) -> Epoch {
        self.0
    }

    /// What a planted fault makes up.
    fn stolen(epoch: Epoch) -> Self {
        Self(epoch)
    }

    #[cfg(test)]
    pub(super) fn for_test(epoch: Epoch) -> Self {
        Self(epoch)
    }
}

/// An attempt. All its calls carry the same nonce, so that the effect of any of them is known as ours.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(super) struct Attempt {
    claim: Claim,
    /// A call of unknown outcome has been made: only the entry itself can decide.
    in_doubt: bool,
    rules: Rules,
}

/// What is known of an attempt.
#[derive(Debug)]
pub(super) enum Verdict {
    Won(RightToRun),
    /// The epoch is taken by another.
    Taken(Occupant),
    /// Nothing was done, nothing will be.
    NotDone(String),
    Undecided(String),
}

impl Attempt {
    pub(super) fn new(claim: Claim, rules: Rules) -> Self {
        Self { claim, in_doubt: false, rules }
    }

    pub(super) fn claim(&self) -> &Claim {
        &self.claim
    }

    /// What a planted fault takes for granted.
    pub(super) fn taken_for_granted(&self) -> RightToRun {
        RightToRun::stolen(self.claim.epoch)
    }

    /// Takes in a call's answer.
    pub(super) fn answer(&mut self, answer: ClaimAnswer) -> Verdict {
        match answer {
            ClaimAnswer::Created => Verdict::Won(RightToRun(self.claim.epoch)),
            // A retransmitted request, or an earlier call of ours, has won.
            ClaimAnswer::Exists(Occupant::Claim(found))
                if found == self.claim && !self.rules.broken(Plant::IgnoreOwnNonce) =>
            {
                Verdict::Won(RightToRun(self.claim.epoch))
            }
            ClaimAnswer::Exists(occupant) => Verdict::Taken(occupant),
            ClaimAnswer::Unknown(why) if self.rules.broken(Plant::TimeoutIsFailure) => Verdict::NotDone(why),
            ClaimAnswer::Unknown(_) if self.rules.broken(Plant::TimeoutIsSuccess) => {
                Verdict::Won(self.taken_for_granted())
            }
            ClaimAnswer::Unknown(why) => {
                self.in_doubt = true;
                Verdict::Undecided(why)
            }
            ClaimAnswer::Failed(why) if self.in_doubt && !self.rules.broken(Plant::ForgetDoubt) => {
                Verdict::Undecided(why)
            }
            ClaimAnswer::Failed(why) => Verdict::NotDone(why),
        }
    }
}
