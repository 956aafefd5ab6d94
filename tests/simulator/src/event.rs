//! What can happen in the world.

use godwit_core::SessionToken;
use godwit_core::ownership::Epoch;
use godwit_core::ownership::modelled::Answer;

use crate::network::ConnectionId;

/// Something that happens at a moment of virtual time.
#[derive(Debug)]
pub enum Event {
    /// A guest does something, if it runs: that of this process.
    Guest(usize),
    /// A disk write of a process's guest has been carried out.
    DiskWrite(usize, u64),
    /// Bytes arrive at a side of a connection.
    Arrives(ConnectionId, usize),
    /// A side learns that a connection is broken, or that the other side has hung up.
    Broken(ConnectionId, usize),
    /// A connection has got no answer for too long.
    Expires(ConnectionId),
    /// There may be something to be read on a side of a connection.
    Readable(ConnectionId, usize),
    /// A side hangs up.
    Close(ConnectionId, usize),
    /// A call to the claim store takes effect.
    StoreEffect(usize),
    /// Its answer is back.
    StoreAnswer(usize, Answer),
    /// Whoever has called has waited long enough.
    StoreTimeOut(usize),
    /// A process tries again to say in the store that its guest has run.
    Mark(usize),
    /// A process tries again to say in the store that all of its guest's memory is there.
    MarkComplete(usize),
    /// Something in a process is due. The number tells one part that the process plays from the next.
    Wake(usize, u64, Wake),
    /// A fault.
    Fault(usize),
    /// A person does something.
    Person(Act),
}

/// What is due in a process.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Wake {
    /// Deadlines and silence are looked at.
    Tick,
    /// It is time to say "still here".
    Ping,
    /// A channel could be opened, or not: over which links, what for, and whether the other host answers.
    Dialled(u32, Dial, bool),
    /// The machine's thread has done what it was asked to.
    Job,
    /// A data channel may go on, over these links.
    Channel(u32, usize),
    /// The channel for pages that nobody has asked for may go on, over these links.
    Push(u32),
    /// The time of [`godwit_core::ownership::RETRY_GAP`] has passed.
    Retry,
}

/// What a source opens a channel for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Dial {
    /// A new move.
    First,
    /// One whose links have broken: its session's token.
    Again(SessionToken),
    /// Data channels: their token.
    Data(SessionToken),
    /// The channels for pages of post-copy: the same token.
    Pages(SessionToken),
}

/// Who answers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reached {
    /// Nobody.
    Nobody,
    /// Somebody who knows nothing of it.
    Stranger,
    /// Whoever was meant.
    Peer,
}

/// What a person, or what a person has set up, does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Act {
    /// Sends the machine away, to this host.
    Migrate(usize),
    /// Calls the move off.
    Cancel,
    /// Says go on.
    Proceed,
    /// Wants the guest to go on at the destination before its memory is there.
    PostCopy,
    /// Says that a source in post-copy need not wait for its destination any more: the process.
    Abandon(usize),
    /// Ends a process whose guest waits for pages that nobody has any more.
    Quit(usize),
    /// Starts the machine on a host: `run`.
    Run(usize),
    /// The same, knowing that the owner of this epoch is dead: `run --take-ownership`.
    TakeOwnership(usize, Epoch),
    /// Says that the owner of this epoch died before it ran the guest: `resume --force`, where the source still has it.
    Force(Epoch),
    /// Looks whether it is time to end.
    Look,
}
