//! Godwit's control.
