//! The workload guest: a small bare-metal image that rewrites memory at a chosen rate, and the
//! check that every page of it is what its last write made it.
//!
//! `docs/workload-guest.md` describes the guest's header page, its write rules and the check so
//! that an independent checker can be written from it.

mod access;
mod check;
mod config;
mod header;
mod image;
#[path = "../../guest/layout.rs"]
pub mod layout;
#[allow(dead_code, reason = "the guest uses the rest")]
#[path = "../../guest/rules.rs"]
mod rules;

pub use access::{FileMemory, GuestRange, GuestRead, GuestWrite};
pub use check::{CheckError, CheckReport, Mismatch, MismatchKind, Mismatches, Place, check};
pub use config::{Contents, Order, ParseChoiceError, ParseRateError, Rate, WriteUnit, WriterConfig};
pub use header::{Header, HeaderError, HeaderPage, Status};
pub use image::elf;

#[cfg(test)]
mod model;
#[cfg(test)]
mod tests;
#[cfg(test)]
#[path = "../../guest/writer.rs"]
mod writer;
