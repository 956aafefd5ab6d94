//! Building a machine: memory, VM, devices, vCPUs, in this order.

use std::sync::mpsc;
use std::sync::{Arc, Mutex};
use std::thread;

use godwit_core::memory_files::MemoryFile;
use kvm_ioctls::VcpuFd;

use super::announce::Announcer;
use super::events::{Life, Subscribers};
use super::reset::{BootFiles, PowerOn};
use super::throttle::Throttle;
use super::{Inner, Machine};
use crate::chips::mask_pics;
use crate::config::MachineConfig;
use crate::cpuid::{self, Leaf};
use crate::description::Identity;
use crate::devices::Devices;
use crate::devices::layout::DeviceLayout;
use crate::error::VmmError;
use crate::kvm::{KvmDirtyLog, ReadyVm, Vm, install_kick_handler};
use crate::memory::Ram;
use crate::preflight::same_tsc_frequency;
use crate::sync::lock;
use crate::vcpu::state::StateShape;
use crate::vcpu::{Notify, Vcpu, msr};

/// What a guest from elsewhere brings along.
pub(crate) struct Arriving {
    pub(crate) identity: Identity,
    /// The features that its virtio drivers have accepted so far, by place.
    pub(crate) accepted_features: Vec<u64>,
    /// Its memory, if that is handed over.
    pub(crate) memory: Option<Vec<MemoryFile>>,
    /// A VM to build it in, if one has been made already.
    pub(crate) vm: Option<ReadyVm>,
}

impl Machine {
    /// Builds a machine whose vCPUs are as at power-on and do not run. For a guest from elsewhere it shows what `arriving` says
    /// that the guest has been shown before.
    pub(crate) fn build(
        config: &MachineConfig,
        mut arriving: Option<Arriving>,
        boot_files: BootFiles,
    ) -> Result<Self, VmmError> {
        install_kick_handler()?;
        let ram = match arriving.as_mut().and_then(|arriving| arriving.memory.take()) {
            Some(files) => Ram::handed_over(files, config.huge_pages)?,
            None => Ram::new(config.memory.bytes(), config.memory_backing, config.huge_pages)?,
        };
        let ReadyVm { vm, vcpu } = match arriving.as_mut().and_then(|arriving| arriving.vm.take()) {
            Some(vm) => vm,
            None => ReadyVm::new()?,
        };
        let vm = Arc::new(vm);
        vm.set_memory(ram.guest(), false)?;
        let (layout, accepted_features) = match &arriving {
            Some(arriving) => (arriving.identity.layout.clone(), Some(arriving.accepted_features.as_slice())),
            None => (DeviceLayout::new(config.virtio_devices()), None),
        };
        let devices = Arc::new(Devices::new(vm.fd(), ram.guest(), &layout, config, accepted_features)?);
        mask_pics(vm.fd())?;
        let fds = create_vcpus(&vm, vcpu, config.vcpus)?;
        let identity = match arriving {
            Some(Arriving { identity, .. }) => {
                show_cpus(&vm, &fds, &identity.cpuid, identity.tsc_khz)?;
                identity
            }
            None => own_identity(&vm, &fds, layout)?,
        };
        let power_on = PowerOn::save(vm.fd(), &fds, &identity.shape)?;

        let life = Arc::new(Mutex::new(Life::new()));
        let (notices, noticed) = mpsc::channel();
        let recorded = Arc::clone(&life);
        let notify: Notify = Arc::new(move |notice| {
            lock(&recorded).note(&notice);
            // Nobody listens to a machine that is being stopped.
            let _ = notices.send(notice);
        });
        let vcpus = (0..)
            .zip(fds)
            .map(|(id, fd)| Vcpu::spawn(id, fd, Arc::clone(&devices), Arc::clone(&notify)))
            .collect::<Result<Arc<[_]>, _>>()?;
        drop(notify);

        let dirty_log = KvmDirtyLog::new(Arc::clone(&vm), ram.guest().clone());
        let throttle = Throttle::new(Arc::clone(&vcpus));
        let inner = Arc::new(Inner {
            config: config.clone(),
            identity,
            power_on,
            boot_files,
            vm,
            ram,
            dirty_log,
            devices,
            vcpus,
            throttle,
            announcer: Announcer::default(),
            life,
            subscribers: Subscribers::default(),
            whole: Mutex::new(()),
            supervisor: Mutex::new(None),
        });
        let watched = Arc::downgrade(&inner);
        let supervisor = thread::Builder::new()
            .name("machine".into())
            .spawn(move || {
                // Ends when the last vCPU's thread has.
                for notice in noticed {
                    let Some(machine) = watched.upgrade() else { return };
                    machine.attend_to(notice);
                }
            })
            .map_err(VmmError::os("cannot start the machine's thread"))?;
        *lock(&inner.supervisor) = Some(supervisor);
        Ok(Self { inner })
    }
}

fn create_vcpus(vm: &Vm, first: VcpuFd, count: u32) -> Result<Vec<VcpuFd>, VmmError> {
    let create =
        |id| vm.fd().create_vcpu(u64::from(id)).map_err(VmmError::kvm(format!("cannot create vCPU {id} of {count}")));
    std::iter::once(Ok(first)).chain((1..count).map(create)).collect()
}

/// Shows the vCPUs of a guest that starts here what this host has, and finds out what their state is made of.
fn own_identity(vm: &Vm, fds: &[VcpuFd], layout: DeviceLayout) -> Result<Identity, VmmError> {
    let kvm = Vm::open_kvm()?;
    let vcpus = fds.len() as u32;
    let tsc_khz = first(fds).and_then(host_tsc_khz)?;
    let offered = cpuid::offered(&kvm, vcpus, tsc_khz)?;
    let cpuid: Vec<_> = (0..vcpus).map(|id| cpuid::for_vcpu(&offered, id)).collect();
    show_cpus(vm, fds, &cpuid, tsc_khz)?;
    // Which MSRs a vCPU has is known only once it has its CPUID.
    let shape = StateShape { msrs: msr::state_list(&kvm, first(fds)?)?, xsave_bytes: vm.xsave_bytes() };
    Ok(Identity { cpuid, shape, tsc_khz, layout })
}

/// Sets what comes before a vCPU's state, once for its life: CPUID and the TSC's frequency.
fn show_cpus(vm: &Vm, fds: &[VcpuFd], cpuid: &[Vec<Leaf>], tsc_khz: u32) -> Result<(), VmmError> {
    let host_tsc_khz = first(fds).and_then(host_tsc_khz)?;
    for (id, (fd, table)) in fds.iter().zip(cpuid).enumerate() {
        // Only if needed: a frequency that KVM refuses is remembered by some versions all the same.
        if !same_tsc_frequency(tsc_khz, host_tsc_khz) && vm.tsc_control() {
            fd.set_tsc_khz(tsc_khz)
                .map_err(VmmError::kvm(format!("cannot set the TSC's frequency to {tsc_khz} kHz")))?;
        }
        fd.set_cpuid2(&cpuid::for_kvm(table)?).map_err(VmmError::kvm(format!("KVM refuses the CPUID of vCPU {id}")))?;
    }
    Ok(())
}

/// The frequency of the host's TSC.
pub(crate) fn host_tsc_khz(vcpu: &VcpuFd) -> Result<u32, VmmError> {
    vcpu.get_tsc_khz().map_err(VmmError::kvm("cannot read the TSC's frequency (is the host's TSC stable?)"))
}

fn first(fds: &[VcpuFd]) -> Result<&VcpuFd, VmmError> {
    fds.first().ok_or_else(|| VmmError::Status("a machine has at least one vCPU".into()))
}
