//! A machine that exists here.
//!
//! ```text
//!            boot                    resume
//!   (nothing) ───► paused ◄──────────────────────► running ───► shut down   (the guest's end)
//!   (a peer)  ───►                   pause            │    └──► faulted     (KVM's or ours)
//!            prepare, load                            └─ reset: booted again, in place
//!   any of them ───► stopped   (its threads have ended)
//! ```
//!
//! Whatever concerns all vCPUs at once (pause, resume, save, load, reset) holds one lock, on whatever thread it is done.
//! What a vCPU finds out by itself goes as a notice to the machine's own thread.

mod announce;
mod build;
mod control;
mod events;
mod persist;
mod reset;
mod throttle;

use std::io::Write;
use std::sync::mpsc::Receiver;
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use godwit_core::machine::Hold;
use godwit_core::{
    DirtyLog, FillableMemory, GuestMemory, Inquiry, LoadContext, MachineDescription, MachineError, PageRun, Section,
    SourceMachine,
};

pub use self::announce::Announced;
use self::announce::Announcer;
pub(crate) use self::build::{Arriving, host_tsc_khz};
use self::events::{Life, Subscribers};
pub(crate) use self::reset::BootFiles;
use self::reset::PowerOn;
use self::throttle::Throttle;
use crate::config::MachineConfig;
use crate::description::{Identity, describe};
use crate::devices::Devices;
use crate::disks::DiskInquiry;
use crate::error::{VmmError, chain};
use crate::kvm::{KvmDirtyLog, Vm};
use crate::memory::{Ram, RamRegion};
use crate::sync::lock;
use crate::vcpu::Vcpu;

/// How long a disk may take to be flushed ahead of a pause: nothing waits for it.
const SETTLE_LIMIT: Duration = Duration::from_secs(10);

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

/// A machine that exists here. Cheap to clone; when the last clone is dropped it is stopped.
#[derive(Clone)]
pub struct Machine {
    inner: Arc<Inner>,
}

struct Inner {
    config: MachineConfig,
    identity: Identity,
    power_on: PowerOn,
    boot_files: BootFiles,
    vm: Arc<Vm>,
    ram: Ram,
    dirty_log: KvmDirtyLog,
    devices: Arc<Devices>,
    vcpus: Arc<[Vcpu]>,
    throttle: Throttle,
    announcer: Announcer,
    life: Arc<Mutex<Life>>,
    subscribers: Subscribers,
    /// Held by whatever concerns all vCPUs at once.
    whole: Mutex<()>,
    supervisor: Mutex<Option<JoinHandle<()>>>,
}

impl Machine {
    /// Builds a machine and starts it, unless told not to.
    pub fn boot(config: &MachineConfig, options: &BootOptions) -> Result<Self, VmmError> {
        let mut config = config.clone();
        config.make_disk_paths_absolute()?;
        config.validate()?;
        let machine = Self::build(&config, None, BootFiles::Any)?;
        machine.inner.load_boot_image()?;
        if !options.start_paused {
            machine.inner.resume()?;
        }
        Ok(machine)
    }

    /// Its definition.
    pub fn config(&self) -> &MachineConfig {
        &self.inner.config
    }

    /// Whether it runs.
    pub fn status(&self) -> MachineStatus {
        lock(&self.inner.life).status()
    }

    /// Its RAM.
    pub fn ram(&self) -> Vec<RamRegion> {
        self.inner.ram.regions()
    }

    /// Its vCPUs.
    pub fn cpus(&self) -> Vec<CpuInfo> {
        self.inner.vcpus.iter().map(|vcpu| CpuInfo { index: vcpu.id(), thread_id: vcpu.thread_id() }).collect()
    }

    /// Guest memory from `guest_address` on, which must all be RAM. While the guest runs, a snapshot of no instant.
    pub fn read_memory(&self, guest_address: u64, length: usize) -> Result<Vec<u8>, VmmError> {
        self.inner.ram.read(guest_address, length)
    }

    /// The same, into a writer (`pmemsave`).
    pub fn write_memory_to(&self, guest_address: u64, length: u64, to: &mut dyn Write) -> Result<(), VmmError> {
        self.inner.ram.write_to(guest_address, length, to)
    }

    /// For tests that play a driver: a 32-bit write to a device's register, as a vCPU would make it.
    pub fn write_device_register(&self, guest_address: u64, value: u32) {
        self.inner.devices.mmio().write(guest_address, &value.to_le_bytes());
    }

    /// What it does by itself from here on. A shutdown or fault that has already happened is told again.
    pub fn events(&self) -> Receiver<MachineEvent> {
        self.inner.subscribers.subscribe()
    }

    /// Presses its reset button: it boots again in place, and runs or stays paused as it did. [`Machine::events`] tells.
    ///
    /// # Errors
    /// If it has ended, or cannot boot again, which is its end.
    pub fn reset(&self) -> Result<(), VmmError> {
        self.inner.reset()
    }

    /// Presses its power button: asks the guest to switch itself off. Whether and when it does is its own business;
    /// [`Machine::events`] tells. A machine that is paused is asked when it goes on, wherever that is.
    ///
    /// False if the guest does not listen to the button (it has no driver for it, or none yet): then nothing was pressed.
    ///
    /// # Errors
    /// If it has ended.
    pub fn powerdown(&self) -> Result<bool, VmmError> {
        self.inner.powerdown()
    }

    /// Tells its networks where it is, in several rounds: which frames the first of them had, by interface. Neighbours and switches
    /// that knew it elsewhere find it here from then on.
    ///
    /// # Errors
    /// If it does not run.
    pub fn announce(&self) -> Result<Vec<Announced>, VmmError> {
        self.inner.announce()
    }

    /// Stops it for good and waits until its threads have ended. Stopping a stopped machine does nothing. False: it lacks pages, and something
    /// waits for one that does not come. That ends with this process; until then it may still write to disks.
    pub fn stop(&self) -> bool {
        self.inner.stop()
    }

    /// The machine comes from elsewhere: its networks are to be told when it runs here for the first time.
    pub(crate) fn announce_at_first_resume(&self) {
        self.inner.announcer.expect();
    }

    /// It is this process's from here on, and so is memory that was handed over.
    pub(crate) fn own_memory(&self) -> Result<(), VmmError> {
        self.inner.ram.own()
    }

    /// Whether it came from elsewhere, and some of its memory is still to come.
    pub fn is_filling(&self) -> bool {
        self.inner.ram.is_filling()
    }

    /// Forgets what the `missing` pages hold; they are put in place while the guest runs.
    pub(crate) fn fill_later(
        &self,
        missing: &mut dyn Iterator<Item = PageRun>,
    ) -> Result<Arc<dyn FillableMemory>, VmmError> {
        self.inner.ram.fill_later(missing)
    }

    /// Loads state into a machine that has not run yet.
    pub(crate) fn load(&self, sections: &[Section], context: &LoadContext) -> Result<(), VmmError> {
        self.inner.load(sections, context)
    }

    /// Drops what this host's page cache holds of disks that are accessed through it.
    pub(crate) fn forget_cached_disks(&self) {
        if self.inner.config.unsafe_cache {
            self.inner.devices.disks().iter().for_each(|disk| disk.forget_cached());
        }
    }
}

impl SourceMachine for Machine {
    fn describe(&self) -> Result<MachineDescription, MachineError> {
        let accepted = self.inner.devices.accepted_features();
        let taps = self.inner.devices.nets().iter().map(|net| net.port()).collect();
        Ok(describe(&self.inner.config, &self.inner.identity, accepted, taps)?)
    }

    fn inquire(&self) -> Result<Box<dyn Inquiry>, MachineError> {
        let locks = self.inner.devices.disks().iter().map(|disk| disk.image_lock()).collect();
        Ok(Box::new(DiskInquiry::new(&self.inner.config, locks)?))
    }

    fn memory(&self) -> GuestMemory {
        self.inner.ram.guest().clone()
    }

    fn dirty_log(&self) -> &dyn DirtyLog {
        &self.inner.dirty_log
    }

    fn is_running(&self) -> bool {
        self.status() == MachineStatus::Running
    }

    fn pause(&self, limit: Duration) -> Result<(), MachineError> {
        Ok(self.inner.pause(limit)?)
    }

    fn save(&self) -> Result<Vec<Section>, MachineError> {
        Ok(self.inner.save()?)
    }

    fn let_go_of_memory(&self) -> Result<(), MachineError> {
        Ok(self.inner.let_go_of_memory()?)
    }

    fn take_back_memory(&self) -> Result<(), MachineError> {
        Ok(self.own_memory()?)
    }

    fn resume(&self) -> Result<(), MachineError> {
        Ok(self.inner.resume()?)
    }

    fn throttle(&self, hold: Hold) {
        self.inner.throttle.set(hold);
    }

    fn settle(&self) {
        for disk in self.inner.devices.disks() {
            if let Err(error) = disk.sync(Instant::now() + SETTLE_LIMIT) {
                tracing::warn!("before the pause: {}", chain(&error));
            }
        }
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        self.stop();
    }
}
