//! Whole moves in one thread and virtual time: both ends, the claim store and the links between them, and whatever goes wrong.
//!
//! The control planes, the page scheduler, encoders and decoders, the messages' framing and the rules of ownership are those of life
//! (godwit-core). Modelled are what they are driven by: processes, streams, storage, a guest with memory, a dirty log and a disk.
//! Everything random comes from one seed, so a run can be repeated step by step.
//!
//! | module | what |
//! |---|---|
//! | [`verdict`] | one seed from beginning to end, and what must hold |
//! | [`campaign`] | many seeds |
//! | `setup` | what a seed is like: machine, options, faults |
//! | `world` | processes and what happens to them, in order of time |
//! | `source`, `destination`, `filling`, `people` | what drives the two ends, starts and persons |
//! | `faults` | what goes wrong |
//! | `network`, `link`, `store`, `machine` | streams, messages on them, claims, a guest |
//! | `truth` | what the guest has really written |
//! | `agenda`, `event`, `chance`, `trace` | virtual time, what can happen, randomness, the record |

pub mod campaign;
pub mod verdict;

mod agenda;
mod chance;
mod destination;
mod event;
mod faults;
mod filling;
mod invariants;
mod link;
mod machine;
mod network;
mod people;
mod process;
mod setup;
mod source;
mod store;
mod trace;
mod truth;
mod world;
