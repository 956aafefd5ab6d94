//! What the source's control plane is told, and what it answers.

use std::time::Duration;

use crate::channel::SessionToken;
use crate::fit::Seen;
use crate::machine::{Hold, MachineDescription, Refusal, Section};
use crate::message::{Message, TimedStep};
use crate::ownership::Settlement;
use crate::phase::Phase;
use crate::progress::RoundReport;
use crate::source::SourceOutcome;
use crate::source::sending::BrokenOff;

/// What the driver tells.
#[derive(Debug)]
pub enum Input {
    /// The peer sent a message.
    Message(Message),
    /// The control link or a data channel broke; why.
    LinkLost(String),
    /// [`Action::Reconnect`] or [`Action::ReopenData`] has come to nothing.
    Unreachable {
        /// Why.
        why: String,
        /// Whoever held the session is there no more.
        gone: bool,
    },
    /// An action has been carried out.
    Done(Done),
    /// An action failed; what and why.
    Failed(String),
    /// Somebody wants the move called off.
    Cancel,
    /// Somebody says go on.
    Proceed,
    /// Somebody wants the guest to go on at the destination before all of its memory is there.
    PostCopy,
    /// A person says that the destination is not to be waited for any more, in post-copy.
    Abandon,
    /// A test lets go of its hold.
    Release,
    /// The downtime limit was changed.
    DowntimeLimit(Duration),
    /// What the first pass has been so far.
    Looked(RoundSent),
    /// Time has passed.
    Tick,
}

/// Actions that take time, done.
#[derive(Debug)]
pub enum Done {
    /// The control channel is open.
    Connected,
    /// The machine was described, and what it asks the destination.
    Described(MachineDescription, Vec<u8>),
    /// Memory was not offered to the destination.
    NotOffered(NotOffered),
    /// The destination's answer was judged: every reason against the move.
    Judged(Vec<Refusal>),
    /// Pausing, saving and resuming were rehearsed.
    Rehearsed {
        /// The state, soon stale.
        sections: Vec<Section>,
        /// How long the guest was paused for it.
        pause: Duration,
    },
    /// All data channels are open.
    DataOpened {
        /// Whether a cap is in force.
        capped: bool,
    },
    /// What was open is closed, and what is not known to have arrived is pending again.
    BrokenOff(BrokenOff),
    /// All data channels are open again, and what has been dirtied since is pending.
    Reattached {
        /// How many pages that adds to those that were pending.
        dirtied_pages: u64,
    },
    /// A probe was acknowledged.
    Probed {
        /// What was sent.
        bytes: u64,
        /// Until it was acknowledged.
        duration: Duration,
    },
    /// What would have made the pause longer is done.
    Flushed,
    /// The dirty log runs and every page is pending.
    LogStarted,
    /// A round has been sent and the dirty pages counted.
    RoundSent(RoundSent),
    /// Everything sent has been acknowledged.
    QueueEmpty,
    /// The guest is paused, its state saved, the last dirty pages are pending.
    Stopped {
        /// Its state.
        sections: Vec<Section>,
        /// How long each step took.
        steps: Vec<TimedStep>,
    },
    /// The machine's memory is not touched here any more.
    LetGo,
    /// The channels for pages are open, and what is missing at the destination is known.
    PagesOpened,
    /// All channels have ended.
    FinalSent {
        /// The sum of the page table.
        sum: u64,
    },
    /// The guest is as it was before the move.
    Restored(Result<(), String>),
    /// The stopped guest's memory was hashed against the table.
    Audited(String),
    /// The claims say, or do not say yet, who has the machine.
    Settled(Settlement),
}

/// Why memory was not offered.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum NotOffered {
    /// No files can be passed on over this link.
    Link,
    /// The machine's memory is not made of files that can be handed over; why.
    Memory(String),
}

/// What a round has been.
#[derive(Debug, Clone, Default)]
pub struct RoundSent {
    /// How long it took.
    pub duration: Duration,
    /// Pages sent or noted as zero.
    pub pages: u64,
    /// Of those, pages that had been sent before.
    pub again: u64,
    /// What they take on the wire.
    pub wire_bytes: u64,
    /// Pages dirty now.
    pub dirty_pages: u64,
    /// Bytes sent and not acknowledged.
    pub queued_bytes: u64,
    /// What the destination takes to write those of its pages that are not acknowledged.
    pub applying: Duration,
    /// How long the harvest took.
    pub harvest: Duration,
    /// Whether a cap was in force at some time in it.
    pub capped: bool,
    /// Most pages went as a few words each, over a link that takes them at once: how long they took says what pages cost at a core, and
    /// nothing of the link but that it takes at least as much.
    pub by_pages: bool,
    /// What is dirty where, and for how long it has had time to be.
    pub seen: Seen,
}

/// What the driver is to do. All but the first group answer with a [`Done`] or [`Input::Failed`].
#[derive(Debug)]
pub enum Action {
    /// Tell the observer.
    Enter(Phase),
    /// Tell the observer.
    RoundEnded(RoundReport),
    /// Tell the observer.
    Say(String),
    /// Send a message.
    Send(Message),
    /// Let the workers leave their round; it then ends as usual.
    CutRound,
    /// Let them finish rounds again.
    UncutRounds,
    /// Hold the vCPUs back that write, from now on.
    Throttle(Hold),
    /// Hang up, and end the workers.
    HangUp,
    /// Say which pages are missing at the destination: all that are pending.
    SendMissing,
    /// Send pages that are needed at the destination.
    Serve,
    /// Send all others, too.
    Push,
    /// The end.
    Finish(Box<SourceOutcome>),

    /// Open the control channel.
    Connect,
    /// Describe the machine, and find out what it asks.
    Describe,
    /// Offer the files behind the machine's memory to the destination, which answers with a message, or say why not.
    OfferMemory,
    /// Judge the destination's answer.
    Judge(Vec<u8>),
    /// Pause, save, resume, with the clock running.
    Rehearse,
    /// Open the data channels.
    OpenData {
        /// What they show.
        token: SessionToken,
        /// Seed of the page hashes.
        table_seed: u64,
    },
    /// The links broke: close what is left of them, end the workers, let the guest run on if told so, and make pending again what
    /// is not known to have arrived.
    BreakOff {
        /// Let it run.
        resume: bool,
    },
    /// Open the control channel again.
    Reconnect {
        /// What it shows.
        token: SessionToken,
    },
    /// Open the data channels again, then collect what has been dirtied.
    ReopenData {
        /// What they show.
        token: SessionToken,
    },
    /// In post-copy the links broke: close what is left of them. What is missing is not known any more.
    LeavePages,
    /// Open the channels for pages.
    OpenPages {
        /// What they show.
        token: SessionToken,
    },
    /// Do what would make the pause longer.
    Flush,
    /// Send so many bytes that mean nothing, and a mark.
    Probe(u64),
    /// Start the dirty log.
    StartLog,
    /// Visit every stripe.
    Round {
        /// The first pass leaves untouched pages out.
        first: bool,
    },
    /// Say when everything sent has been acknowledged.
    AwaitQueue,
    /// Lift the throttle, pause, save, and harvest if the dirty log runs.
    StopGuest,
    /// Send what is left, without cap, and end the channels.
    SendFinal,
    /// Send nothing more, and end the channels: what is left follows later.
    EndChannels,
    /// Let go of the machine's memory: the destination may take it over from here on.
    LetGo,
    /// Resume the guest if told so, stop the log, lift the throttle.
    Restore {
        /// Let it run.
        resume: bool,
    },
    /// Hash the stopped guest's memory against the table.
    Audit,
    /// The destination is lost after *commit*: find out from the claims who has the machine, for so long at most.
    Settle(Duration),
}
