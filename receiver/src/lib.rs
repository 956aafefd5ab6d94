//! Godwit's receiver.
