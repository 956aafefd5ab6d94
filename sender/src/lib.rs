//! Godwit's sender.
