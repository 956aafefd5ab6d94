//! A process on a host: what it is, what it holds, and the part it plays.

use std::sync::Arc;
use std::time::Duration;

use godwit_core::ownership::destination::DestinationHandover;
use godwit_core::ownership::start::Start;
use godwit_core::ownership::{Claimant, Holding};

use crate::destination::DestinationEnd;
use crate::filling::FillingEnd;
use crate::machine::Machine;
use crate::source::SourceEnd;

/// A process.
pub struct Process {
    /// Where it runs.
    pub host: usize,
    /// As whom it claims.
    pub claimant: Claimant,
    /// It has not died, nor ended.
    pub alive: bool,
    /// Grows with every part it plays: what was due in an earlier one is nobody's concern.
    pub part: u64,
    /// What it does.
    pub role: Role,
    /// The machine it has.
    pub machine: Option<Arc<Machine>>,
    /// Its guest has a next thing to do.
    pub guest_goes_on: bool,
    /// Its right to it.
    pub holding: Option<Arc<Holding>>,
    /// It still has to say in the store that its guest has run.
    pub marking: Option<DestinationHandover>,
}

/// What a process does.
pub enum Role {
    /// It waits for a machine.
    Listening,
    /// It has a machine, and no move is under way.
    Keeping,
    /// It sends its machine away.
    Source(Box<SourceEnd>),
    /// It takes a machine in.
    Destination(Box<DestinationEnd>),
    /// It has a machine whose guest runs, and takes in the rest of its memory.
    Filling(Box<FillingEnd>),
    /// It finds out whether it may start its machine.
    Starting(Box<Start>),
    /// It has sent *commit* and does not know what became of it.
    Watching,
    /// It has ended, or is just being looked at.
    Over,
}

impl Role {
    /// The sending end, to be put back once something has been done with it. Any other role stays.
    pub fn take_source(&mut self) -> Option<Box<SourceEnd>> {
        match std::mem::replace(self, Self::Over) {
            Self::Source(end) => Some(end),
            other => {
                *self = other;
                None
            }
        }
    }

    /// The same for the receiving end.
    pub fn take_destination(&mut self) -> Option<Box<DestinationEnd>> {
        match std::mem::replace(self, Self::Over) {
            Self::Destination(end) => Some(end),
            other => {
                *self = other;
                None
            }
        }
    }

    /// The same for what it becomes in post-copy.
    pub fn take_filling(&mut self) -> Option<Box<FillingEnd>> {
        match std::mem::replace(self, Self::Over) {
            Self::Filling(end) => Some(end),
            other => {
                *self = other;
                None
            }
        }
    }

    /// The same for a start.
    pub fn take_start(&mut self) -> Option<Box<Start>> {
        match std::mem::replace(self, Self::Over) {
            Self::Starting(start) => Some(start),
            other => {
                *self = other;
                None
            }
        }
    }

    /// In a word.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Listening => "listening",
            Self::Keeping => "keeping",
            Self::Source(_) => "sending",
            Self::Destination(_) => "receiving",
            Self::Filling(_) => "filling",
            Self::Starting(_) => "starting",
            Self::Watching => "watching",
            Self::Over => "over",
        }
    }
}

impl Process {
    /// Whether it runs the guest.
    pub fn runs(&self) -> bool {
        self.alive && self.machine.as_ref().is_some_and(|machine| machine.runs())
    }
}

/// When each end of a control link looks for silence and deadlines.
pub const TICK: Duration = Duration::from_millis(250);
