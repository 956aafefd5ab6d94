//! A machine that exists here.

use std::io::Write;
use std::sync::Arc;
use std::sync::mpsc::Receiver;
use std::time::Duration;

use godwit_core::{DirtyLog, GuestMemory, MachineDescription, MachineError, Section, SourceMachine};

use crate::config::MachineConfig;
use crate::error::VmmError;
use crate::memory::RamRegion;

/// How to boot.
#[derive(Debug, Clone, Default)]
pub struct BootOptions {
    /// Do not run until [`SourceMachine::resume`].
    pub start_paused: bool,
}

/// Whether a machine runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum MachineStatus {
    /// Its vCPUs run.
    Running,
    /// It is paused (or has not been started yet).
    Paused,
    /// The guest has powered off or crashed: its vCPUs will not run again.
    Shutdown,
    /// KVM or the VMM could not go on running it.
    Faulted,
    /// It has been stopped for good: no vCPU is left.
    Stopped,
}

/// Something that a machine did by itself.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum MachineEvent {
    /// The guest rebooted; it has been booted again, in place.
    Reset,
    /// The guest is at its end, and why.
    Shutdown {
        /// What happened, with the registers of the vCPU where it did.
        why: String,
    },
    /// The guest cannot be run on.
    Fault {
        /// What happened, with the registers of the vCPU where it did.
        text: String,
    },
}

/// A vCPU, for whoever looks at it from outside.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CpuInfo {
    /// Its number.
    pub index: u32,
    /// The thread that runs it.
    pub thread_id: i32,
}

/// A machine that exists here. Cheap to clone; the last clone that is dropped stops it.
#[derive(Clone)]
pub struct Machine {
    _inner: Arc<()>,
}

impl Machine {
    /// Builds a machine and starts it, unless told not to.
    pub fn boot(_config: &MachineConfig, _options: &BootOptions) -> Result<Self, VmmError> {
        Err(VmmError::Missing("everything"))
    }

    /// Its definition.
    pub fn config(&self) -> &MachineConfig {
        unimplemented!()
    }

    /// Whether it runs.
    pub fn status(&self) -> MachineStatus {
        unimplemented!()
    }

    /// Its RAM.
    pub fn ram(&self) -> Vec<RamRegion> {
        unimplemented!()
    }

    /// Its vCPUs.
    pub fn cpus(&self) -> Vec<CpuInfo> {
        unimplemented!()
    }

    /// Guest memory from `guest_address` on, which must all be RAM. While the guest runs, a snapshot of no instant.
    pub fn read_memory(&self, _guest_address: u64, _length: usize) -> Result<Vec<u8>, VmmError> {
        unimplemented!()
    }

    /// The same, into a writer (`pmemsave`).
    pub fn write_memory_to(&self, _guest_address: u64, _length: u64, _to: &mut dyn Write) -> Result<(), VmmError> {
        unimplemented!()
    }

    /// What it does by itself from here on. A shutdown or fault that has already happened is told again.
    pub fn events(&self) -> Receiver<MachineEvent> {
        unimplemented!()
    }

    /// Stops it for good and waits until its threads have ended. Stopping a stopped machine does nothing.
    pub fn stop(&self) {
        unimplemented!()
    }
}

impl SourceMachine for Machine {
    fn describe(&self) -> Result<MachineDescription, MachineError> {
        unimplemented!()
    }

    fn memory(&self) -> GuestMemory {
        unimplemented!()
    }

    fn dirty_log(&self) -> &dyn DirtyLog {
        unimplemented!()
    }

    fn is_running(&self) -> bool {
        unimplemented!()
    }

    fn pause(&self, _limit: Duration) -> Result<(), MachineError> {
        unimplemented!()
    }

    fn save(&self) -> Result<Vec<Section>, MachineError> {
        unimplemented!()
    }

    fn resume(&self) -> Result<(), MachineError> {
        unimplemented!()
    }

    fn throttle(&self, _share: f64) {
        unimplemented!()
    }
}
