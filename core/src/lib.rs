//! Godwit's migration engine.
//!
//! This crate moves a running virtual machine from one process to another by pre-copy. It knows nothing
//! of KVM, of sockets or of command lines: a VMM gives it a [`SourceMachine`] or a [`DestinationHost`],
//! a transport gives it [`Channel`]s, and it does the rest.
//!
//! Where to look:
//!
//! | module | what |
//! |---|---|
//! | [`machine`] | the traits that a VMM implements to be moved |
//! | [`channel`] | the byte streams that a transport provides |
//! | [`source`], [`destination`] | the two ends: start a move, steer it, hear how it ended |
//! | [`source::control`], [`destination::control`] | their control planes, without I/O: told what happened, they say what to do |
//! | [`source::sending`], [`destination::receiving`] | the two sides of one data channel, without I/O |
//! | [`phase`] | the phases of a move, in order |
//! | [`ownership`] | who may run a machine: claims on shared storage, the rules of the handover |
//! | [`progress`] | what a move says of itself while it runs and when it has ended |
//! | [`policy`], [`pacer`] | when to stop the guest, and the bandwidth cap: pure arithmetic |
//! | [`estimate`] | what is measured of a running guest, without moving it |
//! | [`predict`] | how a move will go, before it begins |
//! | [`fit`] | what a move under way learns of its guest, and how it will go on by that |
//! | [`message`], [`chunk`], [`encoder`], [`decoder`] | the wire, without I/O |
//! | [`delta`], [`bases`] | pages as differences from what was sent before |
//! | [`layout`], [`bitmap`], [`pending`], [`table`] | how pages are numbered, which are to be sent, which were |
//! | [`postcopy`] | pages that follow when the guest runs at the destination already |
//! | [`memory_files`] | memory handed over as the files behind it, on one host |
//! | [`view`], [`touched`], [`audit`] | guest memory by pages, which of it was ever used, whether it is what was sent |

pub mod audit;
pub mod bases;
pub mod bitmap;
pub mod channel;
pub mod chunk;
pub mod codec;
pub mod decoder;
pub mod delta;
pub mod destination;
pub mod encoder;
pub mod estimate;
pub mod fit;
pub mod layout;
pub mod machine;
pub mod memory;
pub mod memory_files;
pub mod message;
pub mod ownership;
pub mod pacer;
pub mod pending;
pub mod phase;
pub mod plants;
pub mod policy;
pub mod postcopy;
pub mod predict;
pub mod progress;
pub mod source;
pub mod table;
pub mod touched;
pub mod view;

mod link;
mod output;
mod priority;
mod random;
mod sync;

pub use channel::{Channel, ChannelReader, ChannelWriter, Delivery, Dial, HangUp, IncomingData, SessionToken};
pub use machine::{
    DestinationHost, DestinationMachine, DirtyLog, FillableMemory, Inquiry, LoadContext, MachineDescription,
    MachineError, PageIndex, PageRun, Placed, Refusal, Section, SourceMachine, Verdict,
};
pub use memory::{GuestMemory, PAGE_SIZE};
pub use phase::Phase;
