//! Where boot data lies in guest memory, and the map of memory that a guest is given.

use godwit_core::GuestMemory;
use vm_memory::{Address, GuestMemoryBackend, GuestMemoryRegion};

use crate::memory::GAP_START;

/// Segment descriptors.
pub(super) const GDT: u64 = 0x500;
/// PVH: start info, then the list of modules, then the memory map.
pub(super) const PVH_START_INFO: u64 = 0x6000;
/// PVH: the list of modules.
pub(super) const PVH_MODULES: u64 = 0x6040;
/// PVH: the memory map.
pub(super) const PVH_MEMORY_MAP: u64 = 0x7000;
/// Linux: boot_params ("the zero page").
pub(super) const BOOT_PARAMS: u64 = 0x7000;
/// Linux: page tables that map the first 4 GiB to themselves; six pages.
pub(super) const PAGE_TABLES: u64 = 0x9000;
/// The command line.
pub(super) const CMDLINE: u64 = 0x2_0000;
/// The ACPI tables, the RSDP first: in the area below 1 MiB that a guest searches if it is not told.
pub(super) const ACPI_TABLES: u64 = 0xe_0000;
/// Where a PC's first instruction lies as real mode sees it (ffff:0000). Linux jumps there to reboot a machine with hardware-reduced
/// ACPI and no EFI (`efi_reboot_required` and BOOT_BIOS in arch/x86/kernel/reboot.c): the reset register is not asked.
pub(super) const BIOS_ENTRY: u64 = 0xf_fff0;
/// All the BIOS that there is: `mov al, 0xfe; out 0x64, al` pulses the reset line of the keyboard controller; then `hlt`, for ever.
pub(super) const BIOS: [u8; 7] = [0xb0, 0xfe, 0xe6, 0x64, 0xf4, 0xeb, 0xfd];
/// End of the memory below 1 MiB that a guest may use.
const LOW_USABLE_END: u64 = 0x9_fc00;
/// Where memory for kernels begins: 1 MiB.
pub(super) const HIGH_MEMORY: u64 = 0x10_0000;

/// What a range of the memory map is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum RangeKind {
    /// RAM that the guest may use.
    Ram,
    /// Addresses to stay away from.
    Reserved,
}

impl RangeKind {
    /// The number that both e820 and PVH have for it.
    pub(super) fn number(self) -> u32 {
        match self {
            RangeKind::Ram => 1,
            RangeKind::Reserved => 2,
        }
    }
}

/// One range of the memory map.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Range {
    pub(super) start: u64,
    pub(super) size_bytes: u64,
    pub(super) kind: RangeKind,
}

/// The map of memory: RAM, less what a PC has just below 1 MiB.
pub(super) fn memory_map(memory: &GuestMemory) -> Vec<Range> {
    let ram = |start, end| Range { start, size_bytes: end - start, kind: RangeKind::Ram };
    let mut map = vec![
        ram(0, LOW_USABLE_END),
        Range { start: LOW_USABLE_END, size_bytes: HIGH_MEMORY - LOW_USABLE_END, kind: RangeKind::Reserved },
    ];
    for region in memory.iter() {
        let (start, end) = (region.start_addr().raw_value(), region.last_addr().raw_value() + 1);
        map.push(ram(start.max(HIGH_MEMORY), end));
    }
    map
}

/// End of RAM below the 32-bit gap.
pub(super) fn low_memory_end(memory: &GuestMemory) -> u64 {
    let ends = memory.iter().map(|region| region.last_addr().raw_value() + 1);
    ends.filter(|end| *end <= GAP_START).max().unwrap_or(0)
}

/// The highest page-aligned address from `floor` on at which `size_bytes` end below `ceiling`.
pub(super) fn highest_place(size_bytes: u64, floor: u64, ceiling: u64) -> Option<u64> {
    let address = ceiling.checked_sub(size_bytes)? & !0xfff;
    (address >= floor).then_some(address)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::MemoryBacking;
    use crate::memory::{GAP_END, Ram};

    #[test]
    fn the_memory_map_leaves_out_the_gap_and_the_bios_area() {
        let ram = Ram::new(4 << 30, MemoryBacking::Private, false).unwrap();
        let map = memory_map(ram.guest());
        let usable: Vec<_> =
            map.iter().filter(|r| r.kind == RangeKind::Ram).map(|r| (r.start, r.start + r.size_bytes)).collect();
        assert_eq!(usable, [(0, 0x9_fc00), (0x10_0000, GAP_START), (GAP_END, GAP_END + (1 << 30))]);
        assert_eq!(low_memory_end(ram.guest()), GAP_START);
    }

    #[test]
    fn the_way_to_reboot_lies_where_real_mode_looks_and_where_no_guest_puts_anything() {
        let (segment, offset) = (0xffff, 0);
        assert_eq!(BIOS_ENTRY, (segment << 4) + offset);
        let end = BIOS_ENTRY + BIOS.len() as u64;
        let ram = Ram::new(64 << 20, MemoryBacking::Private, false).unwrap();
        for range in memory_map(ram.guest()).into_iter().filter(|range| range.kind == RangeKind::Ram) {
            assert!(end <= range.start || range.start + range.size_bytes <= BIOS_ENTRY, "{range:x?}");
        }
    }

    #[test]
    fn a_place_is_found_only_if_there_is_room() {
        assert_eq!(highest_place(0x1001, 0x1000, 0x8000), Some(0x6000));
        assert_eq!(highest_place(0x7000, 0x1000, 0x8000), Some(0x1000));
        assert_eq!(highest_place(0x7001, 0x1000, 0x8000), None);
        assert_eq!(highest_place(u64::MAX, 0, 0x8000), None);
    }
}
