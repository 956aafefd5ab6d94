//! A machine that is being taken in.

mod facts;
pub(crate) mod places;
mod taps;

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;

use godwit_core::memory_files::MemoryFile;
use godwit_core::{
    DestinationHost, DestinationMachine, FillableMemory, GuestMemory, LoadContext, MachineDescription, MachineError,
    PageRun, Refusal, Section, SourceMachine, Verdict,
};

use rustix::fs::fstatfs;

use crate::config::{MachineConfig, MemoryBacking, SerialTarget};
use crate::description::Described;
use crate::disks::{self, DiskVerdict};
use crate::kvm::ReadyVm;
use crate::machine::{Arriving, BootFiles, Machine};
use crate::memory::filling_objection;
use crate::preflight;
use crate::state;

/// What a file system of huge pages says that it is (linux/magic.h).
const HUGETLBFS_MAGIC: rustix::fs::FsWord = 0x9584_58f6;

/// What this host lets an incoming machine use. Nothing else that the peer names is touched.
#[derive(Debug, Clone, Default)]
pub struct HostOptions {
    /// Folders in which disks may be opened.
    pub disk_dirs: Vec<PathBuf>,
    /// Where the disk with this id lies here, if not at the same path. The path may be opened.
    pub map_disks: BTreeMap<String, PathBuf>,
    /// Taps that may be opened.
    pub allow_taps: Vec<String>,
    /// Which tap stands for the interface with this id here, if not the one of the same name. It may be opened.
    pub map_nets: BTreeMap<String, String>,
    /// Let disks go through this host's page cache, which may be stale.
    pub unsafe_cache: bool,
    /// Do not announce the machine on its networks when it runs here.
    pub no_announce: bool,
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
    /// What has been found out about its disks: the files made for that exist as long as this does.
    disks: DiskVerdict,
    /// Its memory, if that is handed over.
    memory: Option<Vec<MemoryFile>>,
    /// What it will be built in.
    vm: Option<ReadyVm>,
}

impl KvmHost {
    /// This host, with these options.
    pub fn new(options: HostOptions) -> Self {
        Self { options, ..Self::default() }
    }

    /// The same with a VM that has been made already.
    pub fn with_vm(options: HostOptions, vm: Option<ReadyVm>) -> Self {
        Self { options, vm, ..Self::default() }
    }
}

impl KvmHost {
    /// Everything about what a machine brings from outside of it: first whether it may be opened here.
    fn check_disks(&self, config: &MachineConfig, question: &[u8]) -> DiskVerdict {
        let (machine, options) = (config.clone(), self.options.clone());
        match disks::with_storage(move || places::find(&machine, &options)) {
            Ok(Ok(here)) => DiskVerdict::new(&here, question),
            Ok(Err(refusals)) => DiskVerdict::refused(refusals),
            Err(why) => DiskVerdict::refused(vec![Refusal::new("disk", why)]),
        }
    }
}

impl DestinationHost for KvmHost {
    type Machine = IncomingMachine;

    fn check(&mut self, description: &MachineDescription, question: &[u8]) -> Verdict {
        let mut refusals = Vec::new();
        if let Err(reason) = facts::check_serial(&self.options.serial) {
            refusals.push(Refusal::new("serial", reason));
        }
        match Described::read(description) {
            Err(reason) => refusals.push(Refusal::new("machine", reason)),
            Ok(machine) => {
                let unusable = state::unusable(&description.sections, machine.identity.counts());
                refusals.extend(unusable.into_iter().map(|reason| Refusal::new("state", reason)));
                self.disks = self.check_disks(&machine.config, question);
                refusals.append(&mut self.disks.refusals);
                refusals.extend(taps::check(&machine, &self.options));
                let memory = self.memory.as_deref();
                refusals.extend(memory.and_then(|files| memory_objection(&machine.config, files)));
                match facts::gather(&machine, &self.options, &mut self.vm) {
                    Err(mut lacking) => refusals.append(&mut lacking),
                    Ok(host) => refusals.extend(preflight::refusals(&machine, &host, memory.is_some())),
                }
            }
        }
        let DiskVerdict { warnings, evidence, .. } = &self.disks;
        Verdict { refusals, warnings: warnings.clone(), evidence: evidence.clone() }
    }

    fn take_memory(&mut self, files: Vec<MemoryFile>) -> Result<(), String> {
        self.memory = Some(files);
        Ok(())
    }

    fn check_filling(&mut self, description: &MachineDescription) -> Result<(), Refusal> {
        let huge_pages = Described::read(description).is_ok_and(|machine| machine.config.huge_pages);
        filling_objection(huge_pages).map_or(Ok(()), |reason| Err(Refusal::new("post-copy", reason)))
    }

    fn prepare(&mut self, description: &MachineDescription) -> Result<IncomingMachine, MachineError> {
        let Described { config, identity, accepted_features, .. } =
            Described::read(description).map_err(MachineError::new)?;
        // The source has seen what it wanted to see.
        self.disks = DiskVerdict::default();
        let config = places::find(&config, &self.options).map_err(|refusals| {
            let reasons: Vec<_> = refusals.iter().map(ToString::to_string).collect();
            MachineError::new(reasons.join("; "))
        })?;
        let boot_files = BootFiles::Under(self.options.boot_file_dirs.clone());
        let (memory, vm) = (self.memory.take(), self.vm.take());
        let machine = Machine::build(&config, Some(Arriving { identity, accepted_features, memory, vm }), boot_files)?;
        if !self.options.no_announce {
            machine.announce_at_first_resume();
        }
        Ok(IncomingMachine { machine, loaded: false })
    }
}

/// Why the files are not the memory that the machine's definition speaks of, if they are not: it is mapped as that says.
fn memory_objection(config: &MachineConfig, files: &[MemoryFile]) -> Option<Refusal> {
    let huge = |file: &MemoryFile| fstatfs(&file.file).is_ok_and(|stat| stat.f_type == HUGETLBFS_MAGIC);
    let fits =
        config.memory_backing == MemoryBacking::Memfd && files.iter().all(|file| huge(file) == config.huge_pages);
    (!fits).then(|| Refusal::new("memory", "the files that were handed over are not of the kind that the machine has"))
}

/// A machine that is being filled with another one's memory and state.
pub struct IncomingMachine {
    machine: Machine,
    loaded: bool,
}

impl IncomingMachine {
    /// The machine, once it is owned: running if it was started, paused otherwise.
    pub fn into_machine(self) -> Machine {
        self.machine
    }
}

impl DestinationMachine for IncomingMachine {
    fn memory(&self) -> GuestMemory {
        self.machine.memory()
    }

    fn load(&mut self, sections: &[Section], context: &LoadContext) -> Result<(), MachineError> {
        self.loaded = false;
        self.machine.load(sections, context)?;
        // What the source wrote last may be older here.
        self.machine.forget_cached_disks();
        self.loaded = true;
        Ok(())
    }

    fn fill_later(
        &mut self,
        missing: &mut dyn Iterator<Item = PageRun>,
    ) -> Result<Arc<dyn FillableMemory>, MachineError> {
        Ok(self.machine.fill_later(missing)?)
    }

    fn own_memory(&mut self) -> Result<(), MachineError> {
        Ok(self.machine.own_memory()?)
    }

    fn start(&mut self) -> Result<(), MachineError> {
        if !self.loaded {
            return Err(MachineError::new("a machine without state cannot be started"));
        }
        self.machine.resume()
    }
}
