//! Who may run a machine: claims on storage that both hosts share, and the rules of the handover.
//!
//! Two hosts and a network that can fail cannot agree by messages (the Two Generals' problem), so the storage that both
//! share decides: *epoch* n belongs to whoever created entry n first, and entries are never changed or deleted.
//!
//! | module | what |
//! |---|---|
//! | [`claim`] | the text of a claim, epochs, the names of entries |
//! | [`store`] | what storage must be able to do, and what its answers mean |
//! | [`directory`] | claims as symbolic links in a directory |
//! | [`timed`] | calls that may hang, with a time limit |
//! | [`source`], [`destination`] | the rules of a handover, at either end |
//! | [`start`] | the rules by which a machine may be started at all |
//! | [`instance`], [`host`] | whether a process of this host that made a claim still lives; this one |
//! | [`modelled`] | a store in memory, for models and simulations |
//! | [`mod@begin`], [`holding`] | the rules in life: a start, and what a process holds of a machine |
//!
//! The three rules modules are state machines without I/O, threads or a clock: they are given inputs and answer with
//! actions. The same ones run in life and in the model check.

pub mod begin;
pub mod claim;
pub mod destination;
pub mod directory;
pub mod holding;
pub mod host;
pub mod instance;
pub mod modelled;
pub mod source;
pub mod start;
pub mod store;
pub mod timed;

mod attempt;
mod rules;

#[cfg(test)]
mod model;

use std::time::Duration;

pub use attempt::RightToRun;
pub use begin::begin;
pub use claim::{Claim, Claimant, Epoch, Marker, Name, Nonce};
pub use holding::{Holding, Settlement};
pub use host::Host;
pub use rules::Rules;

/// How long to wait before an undecided call is made again, or the store is looked at again.
pub const RETRY_GAP: Duration = Duration::from_millis(500);

/// How long a call to the store may take before its outcome counts as unknown.
pub const CALL_LIMIT: Duration = Duration::from_secs(2);
