//! The state of a vCPU: saving it, checking it, loading it.
//!
//! The order matters. Saving begins with the multiprocessor state (asking for it makes KVM take pending INIT and SIPI into
//! account) and ends with the events. Loading: system registers (CPUID has been set when the vCPU was made), LAPIC, MSRs with
//! the TSC deadline last, general registers, events.

use kvm_bindings::{kvm_debugregs, kvm_lapic_state, kvm_mp_state, kvm_regs, kvm_sregs, kvm_vcpu_events, kvm_xcrs};
use kvm_ioctls::VcpuFd;
use serde::{Deserialize, Serialize};

use super::msr::{self, Msr};
use crate::error::VmmError;
use crate::kvm::{exact_abi, set_xsave, xsave};

/// Version of the layout of section `vcpu/N`.
pub(crate) const VERSION: u16 = 1;

/// The state of one vCPU, version 1. KVM's structures are those of the kernel's ABI, byte for byte.
#[derive(Clone, Serialize, Deserialize)]
pub(crate) struct VcpuState {
    mp_state: u32,
    #[serde(with = "exact_abi")]
    regs: kvm_regs,
    #[serde(with = "exact_abi")]
    sregs: kvm_sregs,
    #[serde(with = "exact_abi")]
    lapic: kvm_lapic_state,
    #[serde(with = "exact_abi")]
    xcrs: kvm_xcrs,
    #[serde(with = "exact_abi")]
    debugregs: kvm_debugregs,
    xsave: Vec<u8>,
    msrs: Vec<Msr>,
    #[serde(with = "exact_abi")]
    events: kvm_vcpu_events,
}

/// What saving and loading need to know of the machine.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct StateShape {
    /// The MSRs that make up a vCPU's state.
    pub(crate) msrs: Vec<u32>,
    /// Bytes in the XSAVE area.
    pub(crate) xsave_bytes: usize,
}

impl VcpuState {
    /// The state of a vCPU that is not in KVM_RUN and has nothing left to complete.
    pub(crate) fn save(vcpu: &VcpuFd, shape: &StateShape) -> Result<Self, VmmError> {
        let mp_state = vcpu.get_mp_state().map_err(VmmError::kvm("cannot read the multiprocessor state"))?.mp_state;
        let regs = vcpu.get_regs().map_err(VmmError::kvm("cannot read the registers"))?;
        let sregs = vcpu.get_sregs().map_err(VmmError::kvm("cannot read the system registers"))?;
        let xsave = xsave(vcpu, shape.xsave_bytes).map_err(VmmError::kvm("cannot read the XSAVE area"))?;
        let xcrs = vcpu.get_xcrs().map_err(VmmError::kvm("cannot read the extended control registers"))?;
        let debugregs = vcpu.get_debug_regs().map_err(VmmError::kvm("cannot read the debug registers"))?;
        let lapic = vcpu.get_lapic().map_err(VmmError::kvm("cannot read the LAPIC"))?;
        let msrs = msr::read(vcpu, &shape.msrs)?;
        let events = vcpu.get_vcpu_events().map_err(VmmError::kvm("cannot read the pending events"))?;
        Ok(Self { mp_state, regs, sregs, lapic, xcrs, debugregs, xsave, msrs, events })
    }

    /// Whether this can be the state of a vCPU of `shape`: what KVM does not check by itself.
    pub(crate) fn check(&self, shape: &StateShape) -> Result<(), String> {
        let indices = self.msrs.iter().map(|msr| msr.index);
        if !indices.eq(shape.msrs.iter().copied()) {
            return Err("its MSRs are not those that were agreed on".into());
        }
        if self.xsave.len() > shape.xsave_bytes || !self.xsave.len().is_multiple_of(4) {
            return Err(format!("{} bytes of XSAVE area, this host has {}", self.xsave.len(), shape.xsave_bytes));
        }
        if self.xcrs.nr_xcrs as usize > self.xcrs.xcrs.len() {
            return Err(format!("{} extended control registers", self.xcrs.nr_xcrs));
        }
        Ok(())
    }

    /// Puts it into a vCPU that is not in KVM_RUN.
    pub(crate) fn load(&self, vcpu: &VcpuFd, shape: &StateShape) -> Result<(), VmmError> {
        vcpu.set_sregs(&self.sregs).map_err(VmmError::kvm("cannot set the system registers"))?;
        vcpu.set_mp_state(kvm_mp_state { mp_state: self.mp_state })
            .map_err(VmmError::kvm(format!("cannot set the multiprocessor state {}", self.mp_state)))?;
        vcpu.set_lapic(&self.lapic).map_err(VmmError::kvm("cannot set the LAPIC"))?;
        msr::write(vcpu, &self.msrs)?;
        vcpu.set_xcrs(&self.xcrs).map_err(VmmError::kvm("cannot set the extended control registers"))?;
        set_xsave(vcpu, &self.xsave, shape.xsave_bytes).map_err(VmmError::kvm("cannot set the XSAVE area"))?;
        vcpu.set_debug_regs(&self.debugregs).map_err(VmmError::kvm("cannot set the debug registers"))?;
        vcpu.set_regs(&self.regs).map_err(VmmError::kvm("cannot set the registers"))?;
        vcpu.set_vcpu_events(&self.events).map_err(VmmError::kvm("cannot set the pending events"))?;
        Ok(())
    }
}
