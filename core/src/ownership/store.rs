//! What storage must be able to do to keep claims, and what its answers mean.

use std::time::SystemTime;

use super::claim::{Claim, Epoch, Marker};

/// A place for claims that both hosts share.
///
/// Entries are created, exclusively, and never changed or deleted. Calls may hang for as long as the storage likes: whoever
/// needs an answer in time asks through [`super::timed::Timed`].
pub trait ClaimStore: Send {
    /// Creates the claim's entry unless there is one.
    fn claim(&self, claim: &Claim) -> ClaimAnswer;

    /// Looks up the newest claim and its markers.
    fn newest(&self) -> Reading;

    /// Adds a marker to an epoch. The caller owns the epoch.
    fn mark(&self, epoch: Epoch, marker: Marker) -> MarkAnswer;
}

/// What became of a claim.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum ClaimAnswer {
    /// The entry is ours.
    Created,
    /// There was an entry already. That of an earlier call of ours says so itself.
    Exists(Occupant),
    /// This call has done nothing and will do nothing; why.
    Failed(String),
    /// It may have taken effect, may do so later, or never; why.
    Unknown(String),
}

/// What became of a marker.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum MarkAnswer {
    /// It is there.
    Marked,
    /// It may be there or not; why.
    Unknown(String),
}

/// What was found in the store.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Reading {
    /// The newest claim that could be seen. There may be newer ones, and there may be markers that were not seen:
    /// absence proves nothing.
    Newest(Option<Record>),
    /// Nothing can be said; why.
    Unknown(String),
}

/// An epoch, as it was found.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Record {
    /// Its number.
    pub epoch: Epoch,
    /// Whose it is.
    pub occupant: Occupant,
    /// When it was claimed, by the storage's clock; for people only.
    pub since: Option<SystemTime>,
    /// Whether `n.running` is there.
    pub running: bool,
    /// Whether `n.free` is there.
    pub free: bool,
    /// Whether all of the guest's memory is known to be there: it always was, or `n.complete` is there.
    pub complete: bool,
}

impl Record {
    /// Whether the guest is known to have run in this epoch.
    pub fn has_run(&self) -> bool {
        // Only who has the machine can free it.
        self.running || self.free
    }
}

/// What holds an epoch.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Occupant {
    /// A claim.
    Claim(Claim),
    /// Something that is no claim: nobody can say whose. What it is.
    Foreign(String),
}

impl std::fmt::Display for Occupant {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Claim(Claim { claimant, epoch, .. }) => {
                write!(
                    formatter,
                    "epoch {epoch} of {} is host {}'s (instance {})",
                    claimant.machine, claimant.host, claimant.instance
                )
            }
            Self::Foreign(what) => write!(formatter, "{what}"),
        }
    }
}
