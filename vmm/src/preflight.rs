//! Whether a host can take a machine in: a comparison of what the machine needs and what the host has, free of side effects.

pub(crate) mod net;

use godwit_core::Refusal;

use crate::config::{ByteSize, MemoryBacking};
use crate::cpuid::{self, Leaf};
use crate::description::Described;

/// How far two TSC frequencies may be apart to count as the same: what KVM tolerates without scaling.
const TSC_TOLERANCE_PPM: u64 = 250;

/// What a host has.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct HostFacts {
    /// CPUID as a guest would see it here.
    pub(crate) offered: Vec<Leaf>,
    /// The MSRs that a vCPU with the guest's CPUID has here.
    pub(crate) msrs: Vec<u32>,
    /// Bytes in the XSAVE area.
    pub(crate) xsave_bytes: usize,
    /// Frequency of the host's TSC.
    pub(crate) tsc_khz: u32,
    /// Whether a guest's TSC may run at another one.
    pub(crate) tsc_scaling: bool,
    /// The most vCPUs that KVM allows.
    pub(crate) max_vcpus: u32,
    /// The memory that there is.
    pub(crate) memory: MemoryFacts,
}

/// What memory a host has to give.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct MemoryFacts {
    /// Available without swapping (MemAvailable).
    pub(crate) available_bytes: u64,
    /// In free 2 MiB pages of the reserve.
    pub(crate) huge_free_bytes: u64,
    /// What may still be promised, if the host does not overcommit (vm.overcommit_memory = 2).
    pub(crate) commit_left_bytes: Option<u64>,
}

/// Every reason why the host cannot take the machine in. Memory that is `handed_over` is there already.
pub(crate) fn refusals(machine: &Described, host: &HostFacts, handed_over: bool) -> Vec<Refusal> {
    let mut refusals = cpu(machine, host);
    refusals.extend(msrs(machine, host));
    refusals.extend(tsc(machine, host));
    if !handed_over {
        refusals.extend(memory(machine, &host.memory));
    }
    refusals
}

/// Whether a guest with a TSC of one frequency can run on another without scaling.
pub(crate) fn same_tsc_frequency(guest_khz: u32, host_khz: u32) -> bool {
    u64::from(guest_khz.abs_diff(host_khz)) * 1_000_000 <= u64::from(host_khz) * TSC_TOLERANCE_PPM
}

fn cpu(machine: &Described, host: &HostFacts) -> Vec<Refusal> {
    let mut reasons = Vec::new();
    // The tables of a machine's vCPUs differ in topology only.
    if let Some(guest) = machine.identity.cpuid.first() {
        reasons.extend(cpuid::missing(guest, &host.offered));
    }
    if machine.identity.shape.xsave_bytes > host.xsave_bytes {
        let (guest, host) = (machine.identity.shape.xsave_bytes, host.xsave_bytes);
        reasons.push(format!("the guest's XSAVE area has {guest} bytes, this host's has {host}"));
    }
    if machine.config.vcpus > host.max_vcpus {
        reasons.push(format!("the machine has {} vCPUs, KVM allows {} here", machine.config.vcpus, host.max_vcpus));
    }
    reasons.into_iter().map(|reason| Refusal::new("cpu", reason)).collect()
}

fn msrs(machine: &Described, host: &HostFacts) -> Option<Refusal> {
    let needed = machine.identity.shape.msrs.iter();
    let lacking: Vec<_> =
        needed.filter(|index| !host.msrs.contains(index)).map(|index| format!("{index:#x}")).collect();
    (!lacking.is_empty()).then(|| {
        Refusal::new("msr", format!("the guest's state has MSRs that this host lacks: {}", lacking.join(", ")))
    })
}

fn tsc(machine: &Described, host: &HostFacts) -> Option<Refusal> {
    let guest_khz = machine.identity.tsc_khz;
    if host.tsc_scaling || same_tsc_frequency(guest_khz, host.tsc_khz) {
        return None;
    }
    Some(Refusal::new(
        "tsc",
        format!("the guest's TSC runs at {guest_khz} kHz, this host's at {} kHz and cannot be scaled", host.tsc_khz),
    ))
}

fn memory(machine: &Described, host: &MemoryFacts) -> Option<Refusal> {
    let needed = machine.config.memory.bytes();
    let refusal = |what: &str, has: u64| {
        let mib = has >> 20;
        Refusal::new("memory", format!("the machine needs {} of {what}, this host has {mib} MiB", ByteSize(needed)))
    };
    if machine.config.huge_pages {
        return (needed > host.huge_free_bytes)
            .then(|| refusal("free 2 MiB pages (/proc/sys/vm/nr_hugepages)", host.huge_free_bytes));
    }
    if needed > host.available_bytes {
        return Some(refusal("available memory", host.available_bytes));
    }
    match host.commit_left_bytes {
        Some(left) if needed > left && machine.config.memory_backing == MemoryBacking::Private => {
            Some(refusal("memory that may still be committed (vm.overcommit_memory is 2)", left))
        }
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::config::{GuestKind, MachineConfig};
    use crate::cpuid::Feature;
    use crate::description::Identity;
    use crate::devices::layout::DeviceLayout;
    use crate::vcpu::state::StateShape;

    fn leaf(function: u32, value: u32) -> Leaf {
        Leaf { function, index: 0, flags: 0, eax: 0, ebx: value, ecx: value, edx: value }
    }

    fn machine() -> Described {
        let shape = StateShape { msrs: vec![0x174, 0x2ff], xsave_bytes: 4096 };
        let cpuid = vec![vec![leaf(0, 0x4141_4141), leaf(1, 0xf7ff_ff00), leaf(7, 0xff00_ff00)]];
        Described {
            config: MachineConfig { guest: Some(GuestKind::Writer), ..Default::default() },
            identity: Identity { cpuid, shape, tsc_khz: 2_000_000, layout: DeviceLayout::new(1) },
            accepted_features: vec![0],
            taps: Vec::new(),
        }
    }

    fn host() -> HostFacts {
        let Identity { cpuid, shape, tsc_khz, .. } = machine().identity;
        HostFacts {
            offered: cpuid[0].clone(),
            msrs: shape.msrs,
            xsave_bytes: shape.xsave_bytes,
            tsc_khz,
            tsc_scaling: false,
            max_vcpus: 8,
            memory: MemoryFacts { available_bytes: 2 << 30, huge_free_bytes: 0, commit_left_bytes: None },
        }
    }

    #[test]
    fn a_host_like_the_first_one_is_good_enough() {
        assert_eq!(refusals(&machine(), &host(), false), Vec::new());
    }

    #[test]
    fn every_reason_is_given_at_once() {
        let mut machine = machine();
        machine.config.vcpus = 9;
        let mut host = host();
        Feature::named("avx512f").unwrap().hide(&mut host.offered);
        Feature::named("aes").unwrap().hide(&mut host.offered);
        host.msrs.clear();
        host.tsc_khz = 2_600_000;
        host.memory.available_bytes = 1;
        let reasons: Vec<_> = refusals(&machine, &host, false).iter().map(ToString::to_string).collect();
        for expected in
            ["aes (leaf 0x1 ecx bit 25)", "9 vCPUs", "0x174, 0x2ff", "2600000 kHz", "1G of available memory"]
        {
            assert!(reasons.iter().any(|reason| reason.contains(expected)), "{expected} in {reasons:?}");
        }
    }

    #[test]
    fn huge_pages_and_strict_overcommit_are_counted() {
        let mut with_huge_pages = machine();
        with_huge_pages.config.huge_pages = true;
        assert!(refusals(&with_huge_pages, &host(), false)[0].reason.contains("2 MiB pages"));
        let mut strict = host();
        strict.memory.commit_left_bytes = Some(1 << 20);
        assert!(refusals(&machine(), &strict, false)[0].reason.contains("overcommit"));
        let mut memfd = machine();
        memfd.config.memory_backing = MemoryBacking::Memfd;
        assert_eq!(refusals(&memfd, &strict, false), Vec::new());
    }

    proptest! {
        #[test]
        fn a_tsc_is_refused_only_beyond_the_tolerance(guest in 1_000_000u32..6_000_000, ppm in 0u32..1000, scaling: bool) {
            let mut machine = machine();
            machine.identity.tsc_khz = guest;
            let mut host = host();
            host.tsc_scaling = scaling;
            host.tsc_khz = guest + (u64::from(guest) * u64::from(ppm) / 1_000_000) as u32;
            let refused = !refusals(&machine, &host, false).is_empty();
            prop_assert!(!refused || (!scaling && ppm > 240));
            prop_assert!(refused || scaling || ppm < 260);
        }

        #[test]
        fn a_missing_msr_is_always_named(msrs in prop::collection::btree_set(any::<u32>(), 1..20), which: prop::sample::Index) {
            let mut machine = machine();
            machine.identity.shape.msrs = msrs.iter().copied().collect();
            let mut host = host();
            host.msrs = machine.identity.shape.msrs.clone();
            prop_assert_eq!(refusals(&machine, &host, false), Vec::new());
            let gone = host.msrs.remove(which.index(msrs.len()));
            let named = refusals(&machine, &host, false)[0].reason.contains(&format!("{gone:#x}"));
            prop_assert!(named);
        }
    }
}
