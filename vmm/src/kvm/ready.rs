//! A VM that is made before it is known for what machine.

use kvm_ioctls::VcpuFd;

use super::Vm;
use crate::error::VmmError;

/// A VM with its first vCPU and nothing else: no memory, no devices. Making one takes some 15 ms, undoing it 10, which a machine that is on its
/// way need not wait for.
pub struct ReadyVm {
    pub(crate) vm: Vm,
    pub(crate) vcpu: VcpuFd,
}

impl ReadyVm {
    /// Makes one.
    pub fn new() -> Result<Self, VmmError> {
        let vm = Vm::new(&Vm::open_kvm()?)?;
        let vcpu = vm.fd().create_vcpu(0).map_err(VmmError::kvm("cannot create a vCPU"))?;
        Ok(Self { vm, vcpu })
    }
}

impl std::fmt::Debug for ReadyVm {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.write_str("ReadyVm")
    }
}
