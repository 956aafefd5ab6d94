//! KVM as this machine uses it: the VM with its memory slots, and the few calls that kvm-ioctls lacks.

mod abi;
mod alarm;
mod dirty_log;
mod ioctls;
mod kick;
mod ready;
mod stats;
mod vm;

pub(crate) use abi::exact as exact_abi;
pub(crate) use alarm::Alarm;
pub(crate) use dirty_log::KvmDirtyLog;
pub(crate) use ioctls::{internal_error_text, line_is_unmasked, set_tsc_offset, set_xsave, tsc_offset, xsave};
pub(crate) use kick::{install_kick_handler, kick, receive_kicks};
pub use ready::ReadyVm;
pub(crate) use stats::FaultCounter;
pub(crate) use vm::Vm;
