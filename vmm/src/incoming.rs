//! A machine that is being taken in.

use std::path::PathBuf;

use godwit_core::{
    DestinationHost, DestinationMachine, GuestMemory, LoadContext, MachineDescription, MachineError, Refusal, Section,
};

use crate::config::SerialTarget;
use crate::machine::Machine;

/// What this host lets an incoming machine use. Nothing else that the peer names is touched.
#[derive(Debug, Clone, Default)]
pub struct HostOptions {
    /// What the machine's serial port is connected to here.
    pub serial: SerialTarget,
    /// Folders from which a kernel and initial RAM disk may be read again when the guest reboots.
    pub boot_file_dirs: Vec<PathBuf>,
    /// For tests: CPU features to leave out of what this host has, such as `avx2`.
    pub mask_cpu_features: Vec<String>,
    /// For tests: pretend this TSC frequency (and no scaling).
    pub pretend_tsc_khz: Option<u32>,
}

/// This host, as a place for a machine to move to.
#[derive(Debug, Default)]
pub struct KvmHost {
    /// What an incoming machine may use.
    pub options: HostOptions,
}

impl KvmHost {
    /// This host, with these options.
    pub fn new(options: HostOptions) -> Self {
        Self { options }
    }
}

impl DestinationHost for KvmHost {
    type Machine = IncomingMachine;

    fn check(&mut self, _description: &MachineDescription) -> Vec<Refusal> {
        Vec::new()
    }

    fn prepare(&mut self, _description: &MachineDescription) -> Result<IncomingMachine, MachineError> {
        unimplemented!()
    }
}

/// A machine that is being filled with another one's memory and state.
pub struct IncomingMachine {
    machine: Machine,
}

impl IncomingMachine {
    /// The machine, once it is owned: running if it was started, paused otherwise.
    pub fn into_machine(self) -> Machine {
        self.machine
    }
}

impl DestinationMachine for IncomingMachine {
    fn memory(&self) -> GuestMemory {
        unimplemented!()
    }

    fn load(&mut self, _sections: &[Section], _context: &LoadContext) -> Result<(), MachineError> {
        unimplemented!()
    }

    fn start(&mut self) -> Result<(), MachineError> {
        unimplemented!()
    }
}
