//! A claim store in memory, for models and simulations: what calls do when they take effect. When that is, and whether anybody
//! still waits for the answer, is for the model to say.

use std::collections::{BTreeMap, BTreeSet};

use super::claim::{Claim, Epoch, Marker};
use super::store::{ClaimAnswer, MarkAnswer, Occupant, Reading, Record};

/// The entries.
#[derive(Debug, Clone, Default, PartialEq, Eq, Hash)]
pub struct ModelledStore {
    claims: BTreeMap<Epoch, Claim>,
    markers: BTreeSet<(Epoch, Marker)>,
}

/// A call.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Call {
    /// [`super::store::ClaimStore::claim`]
    Claim(Claim),
    /// [`super::store::ClaimStore::newest`]
    Look,
    /// [`super::store::ClaimStore::mark`]
    Mark(Epoch, Marker),
}

/// Its answer.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Answer {
    /// To [`Call::Claim`].
    Claimed(ClaimAnswer),
    /// To [`Call::Look`].
    Seen(Reading),
    /// To [`Call::Mark`].
    Marked(MarkAnswer),
}

impl Call {
    /// The answer when nobody knows what has become of it.
    pub fn unknown(&self, why: &str) -> Answer {
        match self {
            Self::Claim(_) => Answer::Claimed(ClaimAnswer::Unknown(why.into())),
            Self::Look => Answer::Seen(Reading::Unknown(why.into())),
            Self::Mark(..) => Answer::Marked(MarkAnswer::Unknown(why.into())),
        }
    }

    /// The answer when it has done nothing and will do nothing.
    pub fn failed(&self, why: &str) -> Answer {
        match self {
            Self::Claim(_) => Answer::Claimed(ClaimAnswer::Failed(why.into())),
            call => call.unknown(why),
        }
    }
}

impl ModelledStore {
    /// A call takes effect.
    pub fn take_effect(&mut self, call: &Call) -> Answer {
        match call {
            Call::Claim(claim) => Answer::Claimed(match self.claims.get(&claim.epoch) {
                Some(found) => ClaimAnswer::Exists(Occupant::Claim(found.clone())),
                None => {
                    self.claims.insert(claim.epoch, claim.clone());
                    ClaimAnswer::Created
                }
            }),
            Call::Look => Answer::Seen(Reading::Newest(self.newest(false))),
            Call::Mark(epoch, marker) => {
                self.markers.insert((*epoch, *marker));
                Answer::Marked(MarkAnswer::Marked)
            }
        }
    }

    /// A look that sees the store as it was a claim and its markers ago.
    pub fn stale_look(&self) -> Answer {
        Answer::Seen(Reading::Newest(self.newest(true)))
    }

    /// The newest claim.
    pub fn newest_claim(&self) -> Option<&Claim> {
        self.claims.values().next_back()
    }

    /// The newest claim before this epoch.
    pub fn before(&self, epoch: Epoch) -> Option<&Claim> {
        self.claims.range(..epoch).next_back().map(|(_, claim)| claim)
    }

    /// Whose an epoch is.
    pub fn claim_of(&self, epoch: Epoch) -> Option<&Claim> {
        self.claims.get(&epoch)
    }

    /// All claims, oldest first.
    pub fn claims(&self) -> impl DoubleEndedIterator<Item = &Claim> {
        self.claims.values()
    }

    /// Whether an epoch has this marker.
    pub fn is_marked(&self, epoch: Epoch, marker: Marker) -> bool {
        self.markers.contains(&(epoch, marker))
    }

    fn newest(&self, stale: bool) -> Option<Record> {
        let claim = self.claims.values().rev().nth(usize::from(stale))?;
        let marked = |marker| !stale && self.is_marked(claim.epoch, marker);
        Some(Record {
            epoch: claim.epoch,
            occupant: Occupant::Claim(claim.clone()),
            since: None,
            running: marked(Marker::Running),
            free: marked(Marker::Free),
            complete: !claim.incomplete || marked(Marker::Complete),
        })
    }
}
