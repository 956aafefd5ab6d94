//! Godwit's transport.
