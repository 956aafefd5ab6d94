//! Which CPU features the guest sees that a host does not offer, by name.

use std::fmt;

use super::Leaf;

/// A register of CPUID's answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Register {
    Eax,
    Ebx,
    Ecx,
    Edx,
}

use Register::{Eax, Ebx, Ecx, Edx};

impl fmt::Display for Register {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Eax => "eax",
            Ebx => "ebx",
            Ecx => "ecx",
            Edx => "edx",
        })
    }
}

/// One CPU feature: a bit of one register.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Feature {
    function: u32,
    index: u32,
    register: Register,
    bit: u32,
}

impl Feature {
    /// The feature of this name (as in /proc/cpuinfo).
    pub(crate) fn named(name: &str) -> Option<Self> {
        NAMES.iter().find_map(|&(function, index, register, names)| {
            let bit = names.iter().find(|(_, known)| *known == name)?.0;
            Some(Self { function, index, register, bit })
        })
    }

    /// Takes the feature out of a table.
    pub(crate) fn hide(self, table: &mut [Leaf]) {
        for leaf in table.iter_mut().filter(|leaf| (leaf.function, leaf.index) == (self.function, self.index)) {
            let register = match self.register {
                Eax => &mut leaf.eax,
                Ebx => &mut leaf.ebx,
                Ecx => &mut leaf.ecx,
                Edx => &mut leaf.edx,
            };
            *register &= !(1 << self.bit);
        }
    }

    fn name(self) -> Option<&'static str> {
        let (.., names) = NAMES.iter().find(|(function, index, register, _)| {
            (*function, *index, *register) == (self.function, self.index, self.register)
        })?;
        names.iter().find(|(bit, _)| *bit == self.bit).map(|(_, name)| *name)
    }
}

impl fmt::Display for Feature {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { function, index, register, bit } = self;
        match self.name() {
            Some(name) => write!(f, "{name} (leaf {function:#x}")?,
            None => write!(f, "an unnamed feature (leaf {function:#x}")?,
        }
        if *index != 0 {
            write!(f, ".{index}")?;
        }
        write!(f, " {register} bit {bit})")
    }
}

/// Every reason why a CPU that offers `host` cannot go on running a guest that was started with `guest`.
pub(crate) fn missing(guest: &[Leaf], host: &[Leaf]) -> Vec<String> {
    let mut reasons = Vec::new();
    let (guest_vendor, host_vendor) = (vendor(guest), vendor(host));
    if guest_vendor != host_vendor {
        reasons.push(format!("the guest was started on {guest_vendor}, this host is {host_vendor}"));
    }
    for &(function, index, register, mask) in COMPARED {
        let [wanted, offered] = [guest, host].map(|table| value(table, function, index, register) & mask);
        let lacking = wanted & !offered;
        let bits = (0..32).filter(|bit| lacking & 1 << bit != 0);
        reasons.extend(bits.map(|bit| {
            format!("the guest uses {}, this host does not offer it", Feature { function, index, register, bit })
        }));
    }
    reasons.extend(sizes(guest, host));
    reasons.extend(xsave_layout(guest, host));
    reasons
}

/// Widths of addresses: a guest may use all that it was told of.
fn sizes(guest: &[Leaf], host: &[Leaf]) -> Vec<String> {
    const SIZES: u32 = 0x8000_0008;
    let width = |table, shift: u32| value(table, SIZES, 0, Eax) >> shift & 0xff;
    [("physical", 0), ("virtual", 8)]
        .into_iter()
        .filter(|(_, shift)| width(guest, *shift) > width(host, *shift))
        .map(|(kind, shift)| {
            format!(
                "the guest uses {} bits of {kind} address, this host has {}",
                width(guest, shift),
                width(host, shift)
            )
        })
        .collect()
}

/// Where the parts of the XSAVE area lie: the guest has them laid out as its first host did.
fn xsave_layout(guest: &[Leaf], host: &[Leaf]) -> Vec<String> {
    const XSAVE: u32 = 0xd;
    let parts = guest.iter().filter(|leaf| leaf.function == XSAVE && leaf.index >= 2 && leaf.eax != 0);
    parts
        .filter_map(|part| {
            let offered =
                host.iter().find(|leaf| (leaf.function, leaf.index) == (XSAVE, part.index) && leaf.eax != 0)?;
            let same = (part.eax, part.ebx) == (offered.eax, offered.ebx);
            (!same).then(|| format!("part {} of the XSAVE area is laid out differently on this host", part.index))
        })
        .collect()
}

fn value(table: &[Leaf], function: u32, index: u32, register: Register) -> u32 {
    let leaf = table.iter().find(|leaf| (leaf.function, leaf.index) == (function, index));
    leaf.map_or(0, |leaf| match register {
        Eax => leaf.eax,
        Ebx => leaf.ebx,
        Ecx => leaf.ecx,
        Edx => leaf.edx,
    })
}

fn vendor(table: &[Leaf]) -> String {
    let Some(leaf) = table.iter().find(|leaf| leaf.function == 0) else { return "an unknown CPU".into() };
    let bytes: Vec<u8> = [leaf.ebx, leaf.edx, leaf.ecx].iter().flat_map(|word| word.to_le_bytes()).collect();
    bytes.iter().map(|byte| if byte.is_ascii_graphic() { char::from(*byte) } else { '?' }).collect()
}

/// OSXSAVE and OSPKE show what the guest's kernel has switched on, not what the CPU can do; HTT shows the topology.
const NOT_OSXSAVE: u32 = !(1 << 27);
const NOT_OSPKE: u32 = !(1 << 4);
const NOT_HTT: u32 = !(1 << 28);

/// Registers that are sets of features: a host must offer every bit that the guest has been shown.
const COMPARED: &[(u32, u32, Register, u32)] = &[
    (0x1, 0, Ecx, NOT_OSXSAVE),
    (0x1, 0, Edx, NOT_HTT),
    // Always-running LAPIC timer.
    (0x6, 0, Eax, 1 << 2),
    (0x7, 0, Ebx, !0),
    (0x7, 0, Ecx, NOT_OSPKE),
    (0x7, 0, Edx, !0),
    (0x7, 1, Eax, !0),
    (0x7, 1, Edx, !0),
    (0x7, 2, Edx, !0),
    (0xd, 0, Eax, !0),
    (0xd, 0, Edx, !0),
    (0xd, 1, Eax, !0),
    (0xd, 1, Ecx, !0),
    (0x14, 0, Ebx, !0),
    (0x4000_0001, 0, Eax, !0),
    (0x8000_0001, 0, Ecx, !0),
    (0x8000_0001, 0, Edx, !0),
    (0x8000_0007, 0, Edx, !0),
    (0x8000_0008, 0, Ebx, !0),
    (0x8000_0021, 0, Eax, !0),
];

type Names = (u32, u32, Register, &'static [(u32, &'static str)]);

/// Names as Linux has them in /proc/cpuinfo.
const NAMES: &[Names] = &[
    (
        0x1,
        0,
        Ecx,
        &[
            (0, "sse3"),
            (1, "pclmulqdq"),
            (3, "monitor"),
            (5, "vmx"),
            (9, "ssse3"),
            (12, "fma"),
            (13, "cx16"),
            (17, "pcid"),
            (19, "sse4_1"),
            (20, "sse4_2"),
            (21, "x2apic"),
            (22, "movbe"),
            (23, "popcnt"),
            (24, "tsc_deadline_timer"),
            (25, "aes"),
            (26, "xsave"),
            (28, "avx"),
            (29, "f16c"),
            (30, "rdrand"),
            (31, "hypervisor"),
        ],
    ),
    (
        0x1,
        0,
        Edx,
        &[
            (0, "fpu"),
            (1, "vme"),
            (2, "de"),
            (3, "pse"),
            (4, "tsc"),
            (5, "msr"),
            (6, "pae"),
            (7, "mce"),
            (8, "cx8"),
            (9, "apic"),
            (11, "sep"),
            (12, "mtrr"),
            (13, "pge"),
            (14, "mca"),
            (15, "cmov"),
            (16, "pat"),
            (17, "pse36"),
            (19, "clflush"),
            (23, "mmx"),
            (24, "fxsr"),
            (25, "sse"),
            (26, "sse2"),
            (27, "ss"),
        ],
    ),
    (0x6, 0, Eax, &[(2, "arat")]),
    (
        0x7,
        0,
        Ebx,
        &[
            (0, "fsgsbase"),
            (1, "tsc_adjust"),
            (3, "bmi1"),
            (4, "hle"),
            (5, "avx2"),
            (7, "smep"),
            (8, "bmi2"),
            (9, "erms"),
            (10, "invpcid"),
            (11, "rtm"),
            (14, "mpx"),
            (16, "avx512f"),
            (17, "avx512dq"),
            (18, "rdseed"),
            (19, "adx"),
            (20, "smap"),
            (21, "avx512ifma"),
            (23, "clflushopt"),
            (24, "clwb"),
            (28, "avx512cd"),
            (29, "sha_ni"),
            (30, "avx512bw"),
            (31, "avx512vl"),
        ],
    ),
    (
        0x7,
        0,
        Ecx,
        &[
            (1, "avx512vbmi"),
            (2, "umip"),
            (3, "pku"),
            (5, "waitpkg"),
            (6, "avx512_vbmi2"),
            (8, "gfni"),
            (9, "vaes"),
            (10, "vpclmulqdq"),
            (11, "avx512_vnni"),
            (12, "avx512_bitalg"),
            (14, "avx512_vpopcntdq"),
            (16, "la57"),
            (22, "rdpid"),
            (24, "bus_lock_detect"),
            (25, "cldemote"),
            (27, "movdiri"),
            (28, "movdir64b"),
        ],
    ),
    (
        0x7,
        0,
        Edx,
        &[
            (2, "avx512_4vnniw"),
            (3, "avx512_4fmaps"),
            (4, "fsrm"),
            (8, "avx512_vp2intersect"),
            (10, "md_clear"),
            (14, "serialize"),
            (16, "tsxldtrk"),
            (22, "amx_bf16"),
            (23, "avx512_fp16"),
            (24, "amx_tile"),
            (25, "amx_int8"),
            (26, "spec_ctrl"),
            (27, "intel_stibp"),
            (28, "flush_l1d"),
            (29, "arch_capabilities"),
            (31, "ssbd"),
        ],
    ),
    (0x7, 1, Eax, &[(4, "avx_vnni"), (5, "avx512_bf16"), (7, "cmpccxadd"), (21, "amx_fp16"), (23, "avx_ifma")]),
    (
        0xd,
        0,
        Eax,
        &[
            (0, "XSAVE state of x87"),
            (1, "XSAVE state of SSE"),
            (2, "XSAVE state of AVX"),
            (5, "XSAVE state of AVX-512 masks"),
            (6, "XSAVE state of AVX-512 (low)"),
            (7, "XSAVE state of AVX-512 (high)"),
            (9, "XSAVE state of PKRU"),
            (17, "XSAVE state of AMX configuration"),
            (18, "XSAVE state of AMX tiles"),
        ],
    ),
    (0xd, 1, Eax, &[(0, "xsaveopt"), (1, "xsavec"), (2, "xgetbv1"), (3, "xsaves"), (4, "xfd")]),
    (
        0x4000_0001,
        0,
        Eax,
        &[
            (0, "kvm_clocksource"),
            (1, "kvm_nop_io_delay"),
            (3, "kvm_clocksource2"),
            (4, "kvm_async_pf"),
            (5, "kvm_steal_time"),
            (6, "kvm_pv_eoi"),
            (7, "kvm_pv_unhalt"),
            (9, "kvm_pv_tlb_flush"),
            (10, "kvm_async_pf_vmexit"),
            (11, "kvm_pv_send_ipi"),
            (12, "kvm_poll_control"),
            (13, "kvm_pv_sched_yield"),
            (14, "kvm_async_pf_int"),
            (15, "kvm_msi_ext_dest_id"),
            (24, "kvm_clocksource_stable"),
        ],
    ),
    (
        0x8000_0001,
        0,
        Ecx,
        &[
            (0, "lahf_lm"),
            (1, "cmp_legacy"),
            (2, "svm"),
            (4, "cr8_legacy"),
            (5, "abm"),
            (6, "sse4a"),
            (7, "misalignsse"),
            (8, "3dnowprefetch"),
            (9, "osvw"),
            (11, "xop"),
            (16, "fma4"),
            (21, "tbm"),
            (22, "topoext"),
            (23, "perfctr_core"),
        ],
    ),
    (
        0x8000_0001,
        0,
        Edx,
        &[
            (11, "syscall"),
            (20, "nx"),
            (22, "mmxext"),
            (25, "fxsr_opt"),
            (26, "pdpe1gb"),
            (27, "rdtscp"),
            (29, "lm"),
            (30, "3dnowext"),
            (31, "3dnow"),
        ],
    ),
    (0x8000_0007, 0, Edx, &[(8, "constant_tsc")]),
    (
        0x8000_0008,
        0,
        Ebx,
        &[
            (0, "clzero"),
            (2, "xsaveerptr"),
            (9, "wbnoinvd"),
            (12, "ibpb"),
            (14, "ibrs"),
            (15, "stibp"),
            (24, "ssbd"),
            (25, "virt_ssbd"),
            (26, "ssb_no"),
            (28, "psfd"),
        ],
    ),
];

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn any_table() -> impl Strategy<Value = Vec<Leaf>> {
        let functions =
            prop::sample::select(vec![(0, 0), (1, 0), (7, 0), (7, 1), (0xd, 2), (0x8000_0001, 0), (0x8000_0008, 0)]);
        let leaf = (functions, any::<[u32; 4]>()).prop_map(|((function, index), [eax, ebx, ecx, edx])| Leaf {
            function,
            index,
            flags: 0,
            eax,
            ebx,
            ecx,
            edx,
        });
        prop::collection::vec(leaf, 0..12).prop_map(|mut table| {
            table.sort_by_key(|leaf| (leaf.function, leaf.index));
            table.dedup_by_key(|leaf| (leaf.function, leaf.index));
            table
        })
    }

    fn named(name: &str) -> Feature {
        Feature::named(name).unwrap()
    }

    #[test]
    fn a_feature_that_the_host_lacks_is_named_with_its_place() {
        let guest = [Leaf { function: 7, index: 0, flags: 0, eax: 0, ebx: 1 << 5, ecx: 0, edx: 0 }];
        let reasons = missing(&guest, &[]);
        assert!(reasons[0].contains("avx2 (leaf 0x7 ebx bit 5)"), "{reasons:?}");
        assert_eq!(reasons.len(), 1);
    }

    #[test]
    fn what_the_guest_has_switched_on_is_not_a_feature() {
        let guest = [Leaf { function: 1, index: 0, flags: 0, eax: 0, ebx: 0, ecx: 1 << 27, edx: 1 << 28 }];
        assert_eq!(missing(&guest, &[]), Vec::<String>::new());
    }

    #[test]
    fn wider_addresses_and_other_xsave_layouts_are_refused() {
        let guest = [
            Leaf { function: 0xd, index: 9, flags: 1, eax: 8, ebx: 0xa80, ecx: 0, edx: 0 },
            Leaf { function: 0x8000_0008, index: 0, flags: 0, eax: 0x3930, ebx: 0, ecx: 0, edx: 0 },
        ];
        let mut host = guest;
        host[0].ebx = 0x980;
        host[1].eax = 0x302e;
        let reasons = missing(&guest, &host);
        assert_eq!(reasons.len(), 3, "{reasons:?}");
    }

    proptest! {
        #[test]
        fn a_host_that_offers_the_same_is_good_enough(table in any_table()) {
            prop_assert_eq!(missing(&table, &table), Vec::<String>::new());
        }

        #[test]
        fn hiding_a_feature_that_the_guest_uses_is_always_found(mut table in any_table(), which in 0usize..3) {
            let name = ["avx2", "sse4_2", "lm"][which];
            let guest = table.clone();
            named(name).hide(&mut table);
            let found = missing(&guest, &table).iter().any(|reason| reason.contains(&format!("uses {name} ")));
            let used = guest != table;
            prop_assert_eq!(found, used);
        }
    }
}
