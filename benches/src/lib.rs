//! Godwit's benches.
