//! The chips that live in the kernel: two PICs, an I/O APIC and a timer. (LAPICs belong to the vCPUs.)

use kvm_bindings::{KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE, kvm_irqchip, kvm_pit_state2};
use kvm_ioctls::VmFd;
use serde::{Deserialize, Serialize};

use crate::error::VmmError;
use crate::kvm::exact_abi;

/// Version of the layout of section `irqchip`.
pub(crate) const IRQCHIP_VERSION: u16 = 1;

/// Version of the layout of section `pit`.
pub(crate) const PIT_VERSION: u16 = 1;

/// The state of the interrupt controllers, version 1.
#[derive(Clone, Serialize, Deserialize)]
pub(crate) struct IrqchipState {
    #[serde(with = "exact_abi")]
    pic_master: kvm_irqchip,
    #[serde(with = "exact_abi")]
    pic_slave: kvm_irqchip,
    #[serde(with = "exact_abi")]
    ioapic: kvm_irqchip,
}

impl IrqchipState {
    /// Reads all three.
    pub(crate) fn save(vm: &VmFd) -> Result<Self, VmmError> {
        let read = |chip_id| {
            let mut chip = kvm_irqchip { chip_id, ..Default::default() };
            vm.get_irqchip(&mut chip).map_err(VmmError::kvm("cannot read the interrupt controllers"))?;
            Ok::<_, VmmError>(chip)
        };
        Ok(Self {
            pic_master: read(KVM_IRQCHIP_PIC_MASTER)?,
            pic_slave: read(KVM_IRQCHIP_PIC_SLAVE)?,
            ioapic: read(KVM_IRQCHIP_IOAPIC)?,
        })
    }

    /// Whether each chip is in its place.
    pub(crate) fn check(&self) -> Result<(), String> {
        let ids = [self.pic_master.chip_id, self.pic_slave.chip_id, self.ioapic.chip_id];
        if ids == [KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE, KVM_IRQCHIP_IOAPIC] {
            return Ok(());
        }
        Err(format!("unknown interrupt controllers {ids:?}"))
    }

    /// Puts them back.
    pub(crate) fn load(&self, vm: &VmFd) -> Result<(), VmmError> {
        for chip in [&self.pic_master, &self.pic_slave, &self.ioapic] {
            vm.set_irqchip(chip).map_err(VmmError::kvm("cannot set the interrupt controllers"))?;
        }
        Ok(())
    }
}

/// Masks all lines of the PICs, as firmware does before it starts a kernel: one that is told of no PICs would never do it, and
/// take what they let through for something else.
pub(crate) fn mask_pics(vm: &VmFd) -> Result<(), VmmError> {
    for chip_id in [KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE] {
        let failed = || VmmError::kvm("cannot mask the PICs");
        let mut chip = kvm_irqchip { chip_id, ..Default::default() };
        vm.get_irqchip(&mut chip).map_err(failed())?;
        chip.chip.pic.imr = u8::MAX;
        vm.set_irqchip(&chip).map_err(failed())?;
    }
    Ok(())
}

/// The state of the timer, version 1.
#[derive(Clone, Serialize, Deserialize)]
pub(crate) struct PitState {
    #[serde(with = "exact_abi")]
    pit: kvm_pit_state2,
}

impl PitState {
    /// Reads it.
    pub(crate) fn save(vm: &VmFd) -> Result<Self, VmmError> {
        Ok(Self { pit: vm.get_pit2().map_err(VmmError::kvm("cannot read the timer"))? })
    }

    /// Puts it back.
    pub(crate) fn load(&self, vm: &VmFd) -> Result<(), VmmError> {
        vm.set_pit2(&self.pit).map_err(VmmError::kvm("cannot set the timer"))
    }
}
