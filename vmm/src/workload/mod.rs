//! The workload guest: a small bare-metal image that rewrites memory at a chosen rate, and the
//! check that every page of it is what its last write made it.
//!
//! `docs/workload-guest.md` describes the guest's header page, its write rules and the check so
//! that an independent checker can be written from it.

mod config;
mod image;
#[path = "../../guest/layout.rs"]
pub mod layout;
#[path = "../../guest/rules.rs"]
mod rules;

pub use config::{Contents, Order, ParseChoiceError, ParseRateError, Rate, WriteUnit, WriterConfig};
pub use image::elf;
