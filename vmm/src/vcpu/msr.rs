//! Model-specific registers: which ones make up a vCPU's state, and reading and writing them without losing one.

use kvm_bindings::{KVM_MAX_MSR_ENTRIES, Msrs, kvm_msr_entry};
use kvm_ioctls::{Kvm, VcpuFd};
use serde::{Deserialize, Serialize};

use crate::error::VmmError;

/// The time-stamp counter: part of the clock's state, not of a vCPU's.
pub(crate) const TSC: u32 = 0x10;
const TSC_DEADLINE: u32 = 0x6e0;
const MTRR_PHYSICAL: std::ops::Range<u32> = 0x200..0x210;
const MTRR_FIXED: [u32; 11] = [0x250, 0x258, 0x259, 0x268, 0x269, 0x26a, 0x26b, 0x26c, 0x26d, 0x26e, 0x26f];
const MTRR_DEFAULT_TYPE: u32 = 0x2ff;
const PAT: u32 = 0x277;
const TSC_AUX: u32 = 0xc000_0103;
const MCG_CAP: u32 = 0x179;
const MC0_CTL: u32 = 0x400;

/// The most entries that a peer may send: far more than KVM has.
pub(crate) const MAX_MSRS: usize = 4096;

/// One register and what it holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Msr {
    pub(crate) index: u32,
    pub(crate) data: u64,
}

/// The registers that make up the state of a vCPU like `vcpu`: KVM's list and what it leaves out (the MTRRs above all), as far
/// as this vCPU has them. The TSC deadline comes last: it fires against a TSC that has to be there before it.
pub(crate) fn state_list(kvm: &Kvm, vcpu: &VcpuFd) -> Result<Vec<u32>, VmmError> {
    let listed = kvm.get_msr_index_list().map_err(VmmError::kvm("cannot read KVM's list of MSRs"))?;
    let mut indices = listed.as_slice().to_vec();
    indices.extend(MTRR_PHYSICAL.chain(MTRR_FIXED).chain([MTRR_DEFAULT_TYPE, PAT, TSC_AUX]));
    indices.extend(machine_check_banks(vcpu));
    indices.retain(|index| *index != TSC);
    indices.sort_unstable_by_key(|index| (*index == TSC_DEADLINE, *index));
    indices.dedup();
    readable(vcpu, indices)
}

/// Reads registers. That one of them cannot be read is an error.
pub(crate) fn read(vcpu: &VcpuFd, indices: &[u32]) -> Result<Vec<Msr>, VmmError> {
    let mut msrs = Vec::with_capacity(indices.len());
    for chunk in indices.chunks(KVM_MAX_MSR_ENTRIES) {
        let (values, done) = read_some(vcpu, chunk)?;
        if let Some(index) = chunk.get(done) {
            return Err(VmmError::Status(format!("KVM does not let MSR {index:#x} be read")));
        }
        msrs.extend(values);
    }
    Ok(msrs)
}

/// Writes registers, in this order. That one of them cannot be written is an error.
pub(crate) fn write(vcpu: &VcpuFd, msrs: &[Msr]) -> Result<(), VmmError> {
    for chunk in msrs.chunks(KVM_MAX_MSR_ENTRIES) {
        let entries: Vec<_> = chunk.iter().map(|msr| entry(msr.index, msr.data)).collect();
        let done = vcpu.set_msrs(&for_kvm(&entries)?).map_err(VmmError::kvm("cannot write MSRs"))?;
        if let Some(Msr { index, data }) = chunk.get(done) {
            return Err(VmmError::Status(format!("KVM does not let MSR {index:#x} be set to {data:#x}")));
        }
    }
    Ok(())
}

/// Control, status, address and miscellaneous registers of each bank.
fn machine_check_banks(vcpu: &VcpuFd) -> std::ops::Range<u32> {
    let banks = read(vcpu, &[MCG_CAP]).map_or(0, |msrs| msrs.iter().map(|msr| msr.data & 0xff).sum());
    MC0_CTL..MC0_CTL + 4 * banks as u32
}

/// Those of `indices` that can be read. KVM stops at the first that cannot.
pub(crate) fn readable(vcpu: &VcpuFd, mut indices: Vec<u32>) -> Result<Vec<u32>, VmmError> {
    let mut known_good = 0;
    while known_good < indices.len() {
        let end = indices.len().min(known_good + KVM_MAX_MSR_ENTRIES);
        let (_, done) = read_some(vcpu, &indices[known_good..end])?;
        known_good += done;
        if known_good < end {
            indices.remove(known_good);
        }
    }
    Ok(indices)
}

/// Reads as many registers as KVM lets be read, and says how many.
fn read_some(vcpu: &VcpuFd, indices: &[u32]) -> Result<(Vec<Msr>, usize), VmmError> {
    let entries: Vec<_> = indices.iter().map(|index| entry(*index, 0)).collect();
    let mut msrs = for_kvm(&entries)?;
    let done = vcpu.get_msrs(&mut msrs).map_err(VmmError::kvm("cannot read MSRs"))?;
    let values = msrs.as_slice().iter().take(done).map(|entry| Msr { index: entry.index, data: entry.data }).collect();
    Ok((values, done))
}

fn entry(index: u32, data: u64) -> kvm_msr_entry {
    kvm_msr_entry { index, data, ..Default::default() }
}

fn for_kvm(entries: &[kvm_msr_entry]) -> Result<Msrs, VmmError> {
    Msrs::from_entries(entries).map_err(|_| VmmError::Status(format!("{} MSRs are too many at once", entries.len())))
}
