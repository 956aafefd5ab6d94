//! Godwit's tests.
