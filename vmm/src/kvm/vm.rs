//! One VM: its file descriptor, capabilities, memory slots and in-kernel chips.

use godwit_core::GuestMemory;
use kvm_bindings::{
    KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, KVM_CAP_PMU_CAPABILITY, KVM_DIRTY_LOG_INITIALLY_SET,
    KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE, KVM_MEM_LOG_DIRTY_PAGES, KVM_PIT_SPEAKER_DUMMY, KVM_PMU_CAP_DISABLE,
    kvm_enable_cap, kvm_pit_config, kvm_userspace_memory_region, kvm_xsave,
};
use kvm_ioctls::{Cap, Kvm, VmFd};
use vm_memory::{Address, GuestMemoryBackend, GuestMemoryRegion};

use crate::error::VmmError;
use crate::memory::host_address;

/// Three pages that Intel hosts need for real mode, below the BIOS area and outside RAM.
const TSS_ADDRESS: usize = 0xfffb_d000;

/// The page after next that the same hosts need for an identity map.
const IDENTITY_MAP_ADDRESS: u64 = 0xfffb_c000;

/// What a machine cannot do without, and what it is called.
const REQUIRED: [(Cap, &str); 9] = [
    (Cap::Irqchip, "in-kernel interrupt controllers"),
    (Cap::Pit2, "an in-kernel timer (PIT2)"),
    (Cap::UserMemory, "user memory regions"),
    (Cap::ImmediateExit, "immediate exit"),
    (Cap::VcpuEvents, "vCPU events"),
    (Cap::MpState, "multiprocessor state"),
    (Cap::Xcrs, "extended control registers"),
    (Cap::Irqfd, "irqfd"),
    (Cap::GetTscKhz, "the TSC's frequency"),
];

/// A VM.
pub(crate) struct Vm {
    fd: VmFd,
    xsave_bytes: usize,
    tsc_control: bool,
}

impl Vm {
    /// Opens /dev/kvm.
    pub(crate) fn open_kvm() -> Result<Kvm, VmmError> {
        Kvm::new().map_err(VmmError::kvm("cannot open /dev/kvm (is KVM loaded, and may this user use it?)"))
    }

    /// Every capability that this host lacks.
    pub(crate) fn missing(kvm: &Kvm) -> Vec<&'static str> {
        let manual = kvm.check_extension_raw(u64::from(KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2));
        let mut missing: Vec<_> =
            REQUIRED.iter().filter(|(cap, _)| !kvm.check_extension(*cap)).map(|(_, name)| *name).collect();
        if manual & (INITIALLY_SET as i32) != INITIALLY_SET as i32 {
            missing.push("a dirty log with manual protection, initially set (Linux 5.7)");
        }
        if kvm.check_extension_raw(u64::from(kvm_bindings::KVM_CAP_VCPU_ATTRIBUTES)) == 0 {
            missing.push("TSC offsets of vCPUs (Linux 5.16)");
        }
        missing
    }

    /// Creates a VM with interrupt controllers and timer, and no memory or vCPUs yet.
    pub(crate) fn new(kvm: &Kvm) -> Result<Self, VmmError> {
        if let Some(missing) = Self::missing(kvm).first() {
            return Err(VmmError::Missing(missing));
        }
        let fd = kvm.create_vm().map_err(VmmError::kvm("cannot create a VM"))?;
        fd.set_tss_address(TSS_ADDRESS).map_err(VmmError::kvm("cannot place the VM's TSS"))?;
        fd.set_identity_map_address(IDENTITY_MAP_ADDRESS)
            .map_err(VmmError::kvm("cannot place the VM's identity map"))?;
        fd.create_irq_chip().map_err(VmmError::kvm("cannot create the interrupt controllers"))?;
        // With a dummy speaker port: Linux calibrates its clock with the timer's channel 2 through it.
        fd.create_pit2(kvm_pit_config { flags: KVM_PIT_SPEAKER_DUMMY, ..Default::default() })
            .map_err(VmmError::kvm("cannot create the timer"))?;
        enable(&fd, KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, INITIALLY_SET)
            .map_err(VmmError::kvm("cannot set up the dirty log"))?;
        // Performance counters are not part of a machine's state: the guest shall not see any.
        if fd.check_extension_raw(u64::from(KVM_CAP_PMU_CAPABILITY)) & KVM_PMU_CAP_DISABLE as i32 != 0 {
            enable(&fd, KVM_CAP_PMU_CAPABILITY, u64::from(KVM_PMU_CAP_DISABLE))
                .map_err(VmmError::kvm("cannot turn the guest's performance counters off"))?;
        }
        let xsave_bytes = usize::try_from(fd.check_extension_int(Cap::Xsave2)).unwrap_or(0).max(size_of::<kvm_xsave>());
        let tsc_control = fd.check_extension(Cap::TscControl);
        Ok(Self { fd, xsave_bytes, tsc_control })
    }

    /// The VM's file descriptor.
    pub(crate) fn fd(&self) -> &VmFd {
        &self.fd
    }

    /// Bytes in a vCPU's XSAVE area.
    pub(crate) fn xsave_bytes(&self) -> usize {
        self.xsave_bytes
    }

    /// Whether a vCPU's TSC may run at another frequency than the host's.
    pub(crate) fn tsc_control(&self) -> bool {
        self.tsc_control
    }

    /// Gives the VM its memory: slot n is region n. With `log`, the guest's writes are logged.
    pub(crate) fn set_memory(&self, memory: &GuestMemory, log: bool) -> Result<(), VmmError> {
        for (slot, region) in memory.iter().enumerate() {
            let slot_region = kvm_userspace_memory_region {
                slot: slot as u32,
                flags: if log { KVM_MEM_LOG_DIRTY_PAGES } else { 0 },
                guest_phys_addr: region.start_addr().raw_value(),
                memory_size: region.len(),
                userspace_addr: host_address(region)?,
            };
            // SAFETY: the range is a mapping of this process. Should it be unmapped before the VM is gone, KVM drops it from
            // the guest too (MMU notifier), so that the guest can never reach memory that is used for something else.
            unsafe { self.fd.set_user_memory_region(slot_region) }
                .map_err(VmmError::kvm(format!("cannot set memory slot {slot}")))?;
        }
        Ok(())
    }
}

const INITIALLY_SET: u64 = (KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE | KVM_DIRTY_LOG_INITIALLY_SET) as u64;

fn enable(fd: &VmFd, cap: u32, argument: u64) -> Result<(), kvm_ioctls::Error> {
    let mut enable = kvm_enable_cap { cap, ..Default::default() };
    enable.args[0] = argument;
    fd.enable_cap(&enable)
}
