//! CPUID as the guest sees it.
//!
//! What KVM supports, less what a machine's state does not cover (nested virtualisation, performance counters), plus the
//! machine's own topology: one package of single-threaded cores, LAPIC id = vCPU number.

mod features;

use kvm_bindings::{CpuId, KVM_CPUID_FLAG_SIGNIFCANT_INDEX, KVM_MAX_CPUID_ENTRIES, kvm_cpuid_entry2};
use kvm_ioctls::{Cap, Kvm};
use serde::{Deserialize, Serialize};

use crate::error::VmmError;

pub(crate) use features::{Feature, missing};

const FUNCTION_FEATURES: u32 = 1;
const FUNCTION_CACHES: u32 = 4;
const FUNCTION_PERFORMANCE: u32 = 0xa;
const FUNCTION_TOPOLOGY: u32 = 0xb;
const FUNCTION_TOPOLOGY_V2: u32 = 0x1f;
const FUNCTION_KVM: u32 = 0x4000_0000;
const FUNCTION_TIMING: u32 = 0x4000_0010;
const FUNCTION_AMD_FEATURES: u32 = 0x8000_0001;
const FUNCTION_AMD_SIZES: u32 = 0x8000_0008;
const FUNCTION_AMD_SVM: u32 = 0x8000_000a;
const FUNCTION_AMD_TOPOLOGY: u32 = 0x8000_001e;
const FUNCTION_AMD_PERFORMANCE: u32 = 0x8000_0022;

const ECX_VMX: u32 = 1 << 5;
const ECX_PDCM: u32 = 1 << 15;
/// "There is a hypervisor": what makes a guest look for KVM's leaves (0x4000_0000 and on). KVM leaves it to the VMM.
const ECX_HYPERVISOR: u32 = 1 << 31;
const ECX_TSC_DEADLINE: u32 = 1 << 24;
const EDX_HTT: u32 = 1 << 28;
const AMD_ECX_CMP_LEGACY: u32 = 1 << 1;
const AMD_ECX_SVM: u32 = 1 << 2;
const AMD_ECX_PERFCTR_CORE: u32 = 1 << 23;

/// The rate of KVM's LAPIC timer: one tick a nanosecond.
const LAPIC_KHZ: u32 = 1_000_000;

/// One entry of the CPUID table.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Leaf {
    pub(crate) function: u32,
    pub(crate) index: u32,
    /// KVM's flags: whether the index matters.
    pub(crate) flags: u32,
    pub(crate) eax: u32,
    pub(crate) ebx: u32,
    pub(crate) ecx: u32,
    pub(crate) edx: u32,
}

impl From<&kvm_cpuid_entry2> for Leaf {
    fn from(entry: &kvm_cpuid_entry2) -> Self {
        let &kvm_cpuid_entry2 { function, index, flags, eax, ebx, ecx, edx, .. } = entry;
        Self { function, index, flags, eax, ebx, ecx, edx }
    }
}

impl From<&Leaf> for kvm_cpuid_entry2 {
    fn from(leaf: &Leaf) -> Self {
        let &Leaf { function, index, flags, eax, ebx, ecx, edx } = leaf;
        Self { function, index, flags, eax, ebx, ecx, edx, ..Default::default() }
    }
}

/// What this host offers to a guest of `vcpus` vCPUs whose TSC runs at `tsc_khz`: everything but what differs from one
/// vCPU to the next.
pub(crate) fn offered(kvm: &Kvm, vcpus: u32, tsc_khz: u32) -> Result<Vec<Leaf>, VmmError> {
    let supported = kvm
        .get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)
        .map_err(VmmError::kvm("cannot read the CPU features that KVM supports"))?;
    let mut supported: Vec<_> = supported.as_slice().iter().map(Leaf::from).collect();
    // KVM tells of it elsewhere, since it needs a LAPIC in the kernel, which every machine has. Without it a guest would
    // have to measure its LAPIC's frequency, against a timer that the ACPI tables do not let it have.
    if kvm.check_extension(Cap::TscDeadlineTimer) {
        let features = supported.iter_mut().filter(|leaf| leaf.function == FUNCTION_FEATURES);
        features.for_each(|leaf| leaf.ecx |= ECX_TSC_DEADLINE);
    }
    Ok(shape(supported, vcpus, tsc_khz))
}

/// The table of vCPU `id`, made from what the host offers.
pub(crate) fn for_vcpu(offered: &[Leaf], id: u32) -> Vec<Leaf> {
    let mut table = offered.to_vec();
    for leaf in &mut table {
        match leaf.function {
            FUNCTION_FEATURES => leaf.ebx = (leaf.ebx & 0x00ff_ffff) | id << 24,
            FUNCTION_TOPOLOGY | FUNCTION_TOPOLOGY_V2 => leaf.edx = id,
            FUNCTION_AMD_TOPOLOGY => (leaf.eax, leaf.ebx) = (id, id & 0xff),
            _ => {}
        }
    }
    table
}

/// The table as KVM takes it.
pub(crate) fn for_kvm(table: &[Leaf]) -> Result<CpuId, VmmError> {
    let entries: Vec<kvm_cpuid_entry2> = table.iter().map(kvm_cpuid_entry2::from).collect();
    CpuId::from_entries(&entries)
        .map_err(|_| VmmError::Status(format!("{} CPUID entries are more than KVM takes", entries.len())))
}

fn shape(mut table: Vec<Leaf>, vcpus: u32, tsc_khz: u32) -> Vec<Leaf> {
    table.retain(|leaf| {
        !matches!(leaf.function, FUNCTION_TOPOLOGY | FUNCTION_TOPOLOGY_V2 | FUNCTION_TIMING | FUNCTION_AMD_PERFORMANCE)
    });
    let id_bits = id_bits(vcpus);
    for leaf in &mut table {
        match leaf.function {
            FUNCTION_FEATURES => {
                leaf.ebx = (leaf.ebx & 0x0000_ffff) | vcpus.min(255) << 16;
                leaf.ecx = leaf.ecx & !(ECX_VMX | ECX_PDCM) | ECX_HYPERVISOR;
                leaf.edx = with(leaf.edx, EDX_HTT, vcpus > 1);
            }
            // Cores per package and threads per cache: none shared beyond the last level.
            FUNCTION_CACHES if leaf.eax & 0x1f != 0 => {
                let level = leaf.eax >> 5 & 7;
                let sharing = if level >= 3 { vcpus - 1 } else { 0 };
                leaf.eax = (leaf.eax & 0x3fff) | (sharing & 0xfff) << 14 | (((1 << id_bits) - 1) & 0x3f) << 26;
            }
            FUNCTION_PERFORMANCE | FUNCTION_AMD_SVM => {
                (leaf.eax, leaf.ebx, leaf.ecx, leaf.edx) = (0, 0, 0, 0);
            }
            FUNCTION_KVM => leaf.eax = leaf.eax.max(FUNCTION_TIMING),
            FUNCTION_AMD_FEATURES => {
                leaf.ecx &= !(AMD_ECX_SVM | AMD_ECX_PERFCTR_CORE);
                leaf.ecx = with(leaf.ecx, AMD_ECX_CMP_LEGACY, vcpus > 1 && leaf.ecx & AMD_ECX_CMP_LEGACY != 0);
            }
            FUNCTION_AMD_SIZES => leaf.ecx = (vcpus - 1).min(255) | id_bits << 12,
            FUNCTION_AMD_TOPOLOGY => leaf.ecx = 0,
            _ => {}
        }
    }
    table.extend(topology(vcpus, id_bits));
    table.push(Leaf { eax: tsc_khz, ebx: LAPIC_KHZ, ..plain(FUNCTION_TIMING) });
    table
}

/// The extended topology: one thread a core, all cores in one package.
fn topology(vcpus: u32, id_bits: u32) -> [Leaf; 3] {
    const LEVEL_THREAD: u32 = 1 << 8;
    const LEVEL_CORE: u32 = 2 << 8;
    let level = |index, eax, ebx, kind| Leaf {
        index,
        flags: KVM_CPUID_FLAG_SIGNIFCANT_INDEX,
        eax,
        ebx,
        ecx: kind | index,
        ..plain(FUNCTION_TOPOLOGY)
    };
    [level(0, 0, 1, LEVEL_THREAD), level(1, id_bits, vcpus, LEVEL_CORE), level(2, 0, 0, 0)]
}

fn plain(function: u32) -> Leaf {
    Leaf { function, index: 0, flags: 0, eax: 0, ebx: 0, ecx: 0, edx: 0 }
}

/// Bits that the ids of this many vCPUs take up.
fn id_bits(vcpus: u32) -> u32 {
    vcpus.max(1).next_power_of_two().trailing_zeros()
}

fn with(register: u32, bits: u32, on: bool) -> u32 {
    if on { register | bits } else { register & !bits }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn host() -> Vec<Leaf> {
        vec![
            Leaf { ebx: 0x0702_0800, ecx: !0, edx: !0, ..plain(FUNCTION_FEATURES) },
            Leaf { eax: 0x0730_0404, ebx: 8, ecx: 3, edx: 0x603, ..plain(FUNCTION_PERFORMANCE) },
            Leaf { edx: 7, flags: 1, ..plain(FUNCTION_TOPOLOGY) },
            Leaf { eax: 0x4000_0001, ..plain(FUNCTION_KVM) },
            Leaf { ecx: !0, ..plain(FUNCTION_AMD_FEATURES) },
            Leaf { eax: 1, ..plain(FUNCTION_AMD_SVM) },
            Leaf { ..plain(FUNCTION_AMD_TOPOLOGY) },
        ]
    }

    fn leaf(table: &[Leaf], function: u32, index: u32) -> Leaf {
        *table.iter().find(|leaf| leaf.function == function && leaf.index == index).unwrap()
    }

    #[test]
    fn what_a_machine_does_not_carry_is_hidden() {
        let table = shape(host(), 4, 2_000_000);
        assert_eq!(leaf(&table, 1, 0).ecx & ECX_VMX, 0);
        assert_eq!(leaf(&table, FUNCTION_AMD_FEATURES, 0).ecx & AMD_ECX_SVM, 0);
        assert_eq!(leaf(&table, FUNCTION_AMD_SVM, 0).eax, 0);
        assert_eq!(leaf(&table, FUNCTION_PERFORMANCE, 0).eax, 0);
    }

    #[test]
    fn a_guest_is_told_to_look_for_its_hypervisor() {
        let bare = vec![plain(FUNCTION_FEATURES)];
        assert_eq!(leaf(&shape(bare, 1, 2_000_000), FUNCTION_FEATURES, 0).ecx, ECX_HYPERVISOR);
    }

    #[test]
    fn each_vcpu_has_its_own_lapic_id_everywhere() {
        let offered = shape(host(), 4, 2_000_000);
        for id in 0..4 {
            let table = for_vcpu(&offered, id);
            assert_eq!(leaf(&table, 1, 0).ebx >> 24, id);
            assert_eq!(leaf(&table, FUNCTION_AMD_TOPOLOGY, 0).eax, id);
            for level in 0..3 {
                assert_eq!(leaf(&table, FUNCTION_TOPOLOGY, level).edx, id);
            }
        }
        assert_eq!(leaf(&offered, FUNCTION_TOPOLOGY, 1).ebx, 4);
        assert_eq!(leaf(&offered, FUNCTION_TOPOLOGY, 1).eax, 2);
        assert_eq!(leaf(&offered, 1, 0).ebx >> 16 & 0xff, 4);
    }

    #[test]
    fn the_guest_is_told_its_tsc_frequency() {
        let table = shape(host(), 1, 2_596_148);
        assert_eq!(leaf(&table, FUNCTION_TIMING, 0).eax, 2_596_148);
        assert_eq!(leaf(&table, FUNCTION_KVM, 0).eax, FUNCTION_TIMING);
    }

    #[test]
    fn ids_take_as_many_bits_as_they_need() {
        for (vcpus, bits) in [(1, 0), (2, 1), (3, 2), (4, 2), (5, 3), (254, 8)] {
            assert_eq!(id_bits(vcpus), bits, "{vcpus} vCPUs");
        }
    }
}
