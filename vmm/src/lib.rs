//! Godwit's vmm.
