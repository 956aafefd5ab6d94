//! Godwit's benches, and what they share with other measurements.

pub mod raw;
