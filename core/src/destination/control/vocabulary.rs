//! What the destination's control plane is told, and what it answers.

use std::time::Duration;

use crate::channel::SessionToken;
use crate::machine::{LoadContext, MachineDescription, Section, Verdict};
use crate::memory_files::MemoryOffer;
use crate::message::{Message, PrepareRequest, SharedClaims, TimedStep};
use crate::ownership::store::ClaimAnswer;
use crate::ownership::{Claim, Epoch, Nonce, RightToRun};
use crate::postcopy::Missing;

/// What the driver tells.
#[derive(Debug, Clone)]
pub enum Input {
    /// The peer sent a message.
    Message(Message),
    /// The control link broke, or nothing was heard for too long; why.
    LinkLost(String),
    /// The machine's memory was taken over, or why it cannot be.
    MemoryTaken(Result<MemoryOffer, String>),
    /// The machine was judged.
    Checked(Verdict),
    /// Whether the machine's memory can be filled while its guest runs: why not.
    FillingJudged(Option<String>),
    /// The machine was built and the rehearsed state loaded; how long the load took.
    Built(Result<Duration, String>),
    /// All data channels are open, or not.
    DataOpened(Result<(), String>),
    /// A data channel has ended, complete; its share of the table's sum.
    ChannelEnded {
        /// Sum modulo 2^64.
        sum: u64,
    },
    /// A data channel broke; why.
    ChannelLost(String),
    /// What a data channel or the control link carries cannot be believed; why.
    Nonsense(String),
    /// The source is back: a control channel of this session was opened.
    Returned {
        /// Drawn for the data channels to come.
        token: SessionToken,
    },
    /// The time since [`Action::AwaitReturn`] is up.
    NotReturned,
    /// This process is to take no machine in any more.
    Stop,
    /// A person says that the copy here is never to run.
    Abandon,
    /// State was loaded, or not.
    Loaded(Result<Vec<TimedStep>, String>),
    /// What became of the claim.
    Claimed(ClaimAnswer),
    /// Time has passed since [`Action::Wait`].
    Retry,
    /// In post-copy no page is missing any more.
    Filled,
    /// The machine runs, or not.
    Started(Result<Vec<TimedStep>, String>),
}

/// What the driver is to do.
#[derive(Debug)]
pub enum Action {
    /// Send a message.
    Send(Message),
    /// Take over the files that have come with this offer.
    TakeMemory(MemoryOffer),
    /// Judge the machine, answer what the source asks, and look for its claims.
    Check(MachineDescription, Vec<u8>, Option<SharedClaims>),
    /// Judge whether its memory could be filled while its guest runs, too.
    CheckFilling,
    /// Judge whether that can be now.
    JudgeFilling,
    /// Wait for the channels for pages.
    OpenPages {
        /// Their first index.
        first: u16,
    },
    /// Note pages that will be missing when the guest goes on.
    NoteMissing(Missing),
    /// Build it and load the rehearsal.
    Build {
        /// As it was agreed on.
        machine: MachineDescription,
        /// With what.
        request: PrepareRequest,
    },
    /// Wait for so many data channels and start their workers.
    OpenData {
        /// How many.
        channels: u16,
    },
    /// Close the data channels and end the workers; keep what has arrived. The source may still have a last word on the control link.
    Detach,
    /// Give [`Input::Returned`] when the source comes back, or [`Input::NotReturned`] after so long.
    AwaitReturn(Duration),
    /// Close the control link; from here on, the control channel that came back is the one.
    Attach,
    /// The source's round, for display.
    Round(u32),
    /// Load the state. If pages will be missing, those that are needed for it are asked for.
    Load(Vec<Section>, LoadContext),
    /// Claim it.
    Claim(Claim),
    /// Give [`Input::Retry`] after [`crate::ownership::RETRY_GAP`].
    Wait,
    /// Tell the user what cannot go on for now; why.
    Say(String),
    /// It is this end's, and so is its memory: let it run, or not.
    Start {
        /// Whether its vCPUs are to run.
        run: bool,
    },
    /// Say in the store that the guest has run.
    MarkRunning(Epoch),
    /// This end owns the machine.
    Own {
        /// Whether its vCPUs run.
        running: bool,
        /// The right to run it, and the nonce of the claim that won it.
        right: Option<(RightToRun, Nonce)>,
    },
    /// It has come to nothing; why. Drop whatever there is.
    GiveUp(String),
    /// The same after *commit*: the claim was lost.
    Lose(String),
}
