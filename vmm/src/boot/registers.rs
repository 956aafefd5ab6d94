//! The first vCPU's registers at its entry point.

use kvm_bindings::{kvm_regs, kvm_segment};
use kvm_ioctls::VcpuFd;

use super::layout;
use crate::error::VmmError;

const CR0_PE: u64 = 1 << 0;
const CR0_ET: u64 = 1 << 4;
const CR0_PG: u64 = 1 << 31;
const CR4_PAE: u64 = 1 << 5;
const EFER_LME: u64 = 1 << 8;
const EFER_LMA: u64 = 1 << 10;
/// The bit of RFLAGS that is always set.
const RFLAGS_FIXED: u64 = 1 << 1;

/// The selectors that Linux's boot protocol asks for.
const BOOT_CODE: u16 = 0x10;
const BOOT_DATA: u16 = 0x18;
const BOOT_TASK: u16 = 0x20;

/// Descriptors for those selectors: flat 64-bit code, flat data, a task segment.
const GDT: [u64; 5] = [0, 0, 0x00af_9b00_0000_ffff, 0x00cf_9300_0000_ffff, 0x008f_8b00_0000_ffff];

const PAGE: usize = 4096;
/// Present, writable.
const TABLE_ENTRY: u64 = 0b11;
/// Present, writable, a 2 MiB page.
const HUGE_PAGE_ENTRY: u64 = 0b1000_0011;
const GIBIBYTES_MAPPED: usize = 4;

/// Where and how a guest begins.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Entry {
    /// 32-bit protected mode without paging; EBX is the address of the start info.
    Pvh {
        /// First instruction.
        entry: u32,
        /// Address of the start info.
        start_info: u64,
    },
    /// 64-bit mode with memory mapped to itself; RSI is the address of boot_params.
    Linux64 {
        /// First instruction.
        entry: u64,
        /// Address of boot_params.
        boot_params: u64,
    },
}

impl Entry {
    /// Puts a vCPU there that is as it was at power-on.
    pub(crate) fn apply(&self, vcpu: &VcpuFd) -> Result<(), VmmError> {
        let mut sregs = vcpu.get_sregs().map_err(VmmError::kvm("cannot read the system registers"))?;
        let long_mode = matches!(self, Entry::Linux64 { .. });
        let data = segment(BOOT_DATA, 0b0011, false);
        sregs.cs = segment(BOOT_CODE, 0b1011, long_mode);
        (sregs.ds, sregs.es, sregs.fs, sregs.gs, sregs.ss) = (data, data, data, data, data);
        sregs.tr = task_segment();
        sregs.cr0 = CR0_PE | CR0_ET;
        sregs.cr4 = 0;
        (sregs.gdt.base, sregs.gdt.limit) = (layout::GDT, size_of_val(&GDT) as u16 - 1);
        (sregs.idt.base, sregs.idt.limit) = (0, 0);
        let regs = match *self {
            Entry::Pvh { entry, start_info } => {
                kvm_regs { rip: u64::from(entry), rbx: start_info, ..Default::default() }
            }
            Entry::Linux64 { entry, boot_params } => {
                sregs.cr0 |= CR0_PG;
                sregs.cr3 = layout::PAGE_TABLES;
                sregs.cr4 |= CR4_PAE;
                sregs.efer |= EFER_LME | EFER_LMA;
                kvm_regs { rip: entry, rsi: boot_params, ..Default::default() }
            }
        };
        vcpu.set_sregs(&sregs).map_err(VmmError::kvm("cannot set the system registers"))?;
        vcpu.set_regs(&kvm_regs { rflags: RFLAGS_FIXED, ..regs }).map_err(VmmError::kvm("cannot set the registers"))
    }
}

/// The descriptors that Linux's boot protocol expects in memory.
pub(super) fn linux_gdt() -> Vec<u8> {
    GDT.iter().flat_map(|descriptor| descriptor.to_le_bytes()).collect()
}

/// Page tables for [`layout::PAGE_TABLES`] that map the first 4 GiB to themselves.
pub(super) fn identity_page_tables() -> Vec<u8> {
    let tables = layout::PAGE_TABLES;
    let table_at = |page: usize| tables + (page * PAGE) as u64;
    let mut entries = vec![0u64; (2 + GIBIBYTES_MAPPED) * PAGE / 8];
    entries[0] = table_at(1) | TABLE_ENTRY;
    for gibibyte in 0..GIBIBYTES_MAPPED {
        entries[PAGE / 8 + gibibyte] = table_at(2 + gibibyte) | TABLE_ENTRY;
    }
    for (page, entry) in entries[2 * PAGE / 8..].iter_mut().enumerate() {
        *entry = (page as u64) << 21 | HUGE_PAGE_ENTRY;
    }
    entries.iter().flat_map(|entry| entry.to_le_bytes()).collect()
}

/// A flat code or data segment.
fn segment(selector: u16, type_: u8, long_mode: bool) -> kvm_segment {
    kvm_segment {
        base: 0,
        limit: u32::MAX,
        selector,
        type_,
        present: 1,
        dpl: 0,
        db: u8::from(!long_mode),
        s: 1,
        l: u8::from(long_mode),
        g: 1,
        ..Default::default()
    }
}

fn task_segment() -> kvm_segment {
    kvm_segment { limit: 0xffff, selector: BOOT_TASK, type_: 0b1011, present: 1, ..Default::default() }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Walks the tables as a CPU does.
    fn translate(tables: &[u8], address: u64) -> u64 {
        let entry = |table: u64, index: u64| {
            let at = (table - layout::PAGE_TABLES + index * 8) as usize;
            u64::from_le_bytes(tables[at..at + 8].try_into().unwrap())
        };
        let pointers = entry(layout::PAGE_TABLES, address >> 39 & 511) & !0xfff;
        let directory = entry(pointers, address >> 30 & 511) & !0xfff;
        let page = entry(directory, address >> 21 & 511);
        assert_eq!(page & HUGE_PAGE_ENTRY, HUGE_PAGE_ENTRY);
        (page & !0x1f_ffff) + (address & 0x1f_ffff)
    }

    #[test]
    fn page_tables_map_memory_to_itself() {
        let tables = identity_page_tables();
        for address in [0, 0x7000, 0x10_0200, (1 << 30) + 5, (4u64 << 30) - 1] {
            assert_eq!(translate(&tables, address), address);
        }
    }

    #[test]
    fn page_tables_stay_clear_of_the_command_line() {
        assert!(layout::PAGE_TABLES + identity_page_tables().len() as u64 <= layout::CMDLINE);
    }
}
