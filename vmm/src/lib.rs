//! Godwit's KVM machine: small, real, and ready to be moved.
//!
//! A [`Machine`] is booted from a [`MachineConfig`] or taken in from another host as an [`IncomingMachine`] that a
//! [`KvmHost`] builds. It implements the engine's traits and knows nothing of how it is moved.
//!
//! | module | what |
//! |---|---|
//! | [`config`] | what a machine is made of, and MACHINE.toml |
//! | [`machine`] | a machine that exists here: run, pause, look inside, stop |
//! | [`incoming`] | a machine that is being taken in |
//! | [`workload`] | the guest that rewrites memory at a chosen rate, and its check |

mod boot;
mod chips;
mod clock;
pub mod config;
mod cpuid;
mod description;
mod devices;
mod disks;
pub mod error;
pub mod incoming;
mod kvm;
pub mod machine;
mod memory;
mod preflight;
mod state;
mod sync;
mod vcpu;
pub mod workload;

pub use config::{ConfigError, MachineConfig};
pub use error::VmmError;
pub use incoming::{HostOptions, IncomingMachine, KvmHost};
pub use kvm::ReadyVm;
pub use machine::{Announced, BootOptions, CpuInfo, Machine, MachineEvent, MachineStatus};
pub use memory::{RamRegion, guest_memory};
