//! Building a machine: memory, VM, devices, vCPUs, in this order.

use std::sync::mpsc;
use std::sync::{Arc, Mutex};
use std::thread;

use kvm_ioctls::VcpuFd;

use super::events::{Life, Subscribers};
use super::reset::{BootFiles, PowerOn};
use super::throttle::Throttle;
use super::{Inner, Machine};
use crate::config::MachineConfig;
use crate::cpuid;
use crate::description::Identity;
use crate::devices::Devices;
use crate::error::VmmError;
use crate::kvm::{KvmDirtyLog, Vm, install_kick_handler};
use crate::memory::Ram;
use crate::preflight::same_tsc_frequency;
use crate::sync::lock;
use crate::vcpu::state::StateShape;
use crate::vcpu::{Notify, Vcpu, msr};

impl Machine {
    /// Builds a machine whose vCPUs are as at power-on and do not run. With `identity`, it shows a guest from elsewhere what
    /// that guest has been shown before.
    pub(crate) fn build(
        config: &MachineConfig,
        identity: Option<Identity>,
        boot_files: BootFiles,
    ) -> Result<Self, VmmError> {
        install_kick_handler()?;
        let ram = Ram::new(config.memory.bytes(), config.memory_backing, config.huge_pages)?;
        let kvm = Vm::open_kvm()?;
        let vm = Arc::new(Vm::new(&kvm)?);
        vm.set_memory(ram.guest(), false)?;
        let devices = Arc::new(Devices::new(vm.fd(), &config.serial)?);
        let fds = create_vcpus(&vm, config.vcpus)?;
        let identity = match identity {
            Some(identity) => identity,
            None => own_identity(&kvm, &vm, &fds, config.vcpus)?,
        };
        prepare_vcpus(&vm, &fds, &identity)?;
        let identity = with_msrs(&kvm, &fds, identity)?;
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

fn create_vcpus(vm: &Vm, count: u32) -> Result<Vec<VcpuFd>, VmmError> {
    let create =
        |id| vm.fd().create_vcpu(u64::from(id)).map_err(VmmError::kvm(format!("cannot create vCPU {id} of {count}")));
    (0..count).map(create).collect()
}

/// What a guest that starts here is shown.
fn own_identity(kvm: &kvm_ioctls::Kvm, vm: &Vm, fds: &[VcpuFd], vcpus: u32) -> Result<Identity, VmmError> {
    let tsc_khz = host_tsc_khz(fds)?;
    let offered = cpuid::offered(kvm, vcpus, tsc_khz)?;
    let cpuid = (0..vcpus).map(|id| cpuid::for_vcpu(&offered, id)).collect();
    Ok(Identity { cpuid, shape: StateShape { msrs: Vec::new(), xsave_bytes: vm.xsave_bytes() }, tsc_khz })
}

/// What has to be set before a vCPU's state, once for its life: CPUID and the TSC's frequency.
fn prepare_vcpus(vm: &Vm, fds: &[VcpuFd], identity: &Identity) -> Result<(), VmmError> {
    let host_tsc_khz = host_tsc_khz(fds)?;
    for (id, (fd, table)) in fds.iter().zip(&identity.cpuid).enumerate() {
        // Only if needed: a frequency that KVM refuses is remembered by some versions all the same.
        if !same_tsc_frequency(identity.tsc_khz, host_tsc_khz) && vm.tsc_control() {
            fd.set_tsc_khz(identity.tsc_khz)
                .map_err(VmmError::kvm(format!("cannot set the TSC's frequency to {} kHz", identity.tsc_khz)))?;
        }
        fd.set_cpuid2(&cpuid::for_kvm(table)?).map_err(VmmError::kvm(format!("KVM refuses the CPUID of vCPU {id}")))?;
    }
    Ok(())
}

/// The MSRs are known only once CPUID is set: for a guest that starts here they are found out, for one from elsewhere they
/// have been agreed on.
fn with_msrs(kvm: &kvm_ioctls::Kvm, fds: &[VcpuFd], mut identity: Identity) -> Result<Identity, VmmError> {
    if let (Some(fd), true) = (fds.first(), identity.shape.msrs.is_empty()) {
        identity.shape.msrs = msr::state_list(kvm, fd)?;
    }
    Ok(identity)
}

fn host_tsc_khz(fds: &[VcpuFd]) -> Result<u32, VmmError> {
    let first = fds.first().ok_or_else(|| VmmError::Status("a machine has at least one vCPU".into()))?;
    first.get_tsc_khz().map_err(VmmError::kvm("cannot read the TSC's frequency (is the host's TSC stable?)"))
}
