//! Godwit's benches, and what they share with other measurements.

pub mod dirty_ring;
pub mod raw;
