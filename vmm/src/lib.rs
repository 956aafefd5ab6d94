//! Godwit's vmm.

pub mod workload;
