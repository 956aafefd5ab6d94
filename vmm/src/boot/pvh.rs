//! The PVH protocol: an ELF image with a note that gives a 32-bit entry point, and a start info structure.

use std::io::{Read, Seek};

use linux_loader::configurator::{BootConfigurator, BootParams, pvh::PvhBootConfigurator};
use linux_loader::loader::{Elf, KernelLoader, elf::PvhBootCapability};
use linux_loader::start_info::{XEN_HVM_START_MAGIC_VALUE, hvm_memmap_table_entry, hvm_modlist_entry, hvm_start_info};
use vm_memory::{Address, GuestAddress, ReadVolatile};

use super::{Entry, Loader, layout};
use crate::error::VmmError;

const ELF_CLASS_64: u8 = 2;

impl Loader<'_> {
    /// Loads an ELF image and what its entry point is told.
    pub(super) fn load_pvh(
        &self,
        image: &mut (impl Read + Seek + ReadVolatile),
        head: &[u8],
    ) -> Result<Entry, VmmError> {
        if head.get(4) != Some(&ELF_CLASS_64) {
            return Err(self.error("it is a 32-bit ELF image; only 64-bit ones can be loaded"));
        }
        let loaded = Elf::load(self.memory, None, image, Some(GuestAddress(layout::HIGH_MEMORY)))
            .map_err(|error| self.error(format!("cannot load the ELF image: {error}")))?;
        let PvhBootCapability::PvhEntryPresent(entry) = loaded.pvh_boot_cap else {
            return Err(self.error("the ELF image has no PVH entry point (Linux: CONFIG_PVH)"));
        };
        let entry = u32::try_from(entry.raw_value()).map_err(|_| self.error("its PVH entry point is above 4 GiB"))?;

        self.place_cmdline()?;
        let initrd = self.place_initrd(loaded.kernel_end, u64::MAX)?;
        let map: Vec<_> = layout::memory_map(self.memory)
            .iter()
            .map(|range| hvm_memmap_table_entry {
                addr: range.start,
                size: range.size_bytes,
                type_: range.kind.number(),
                reserved: 0,
            })
            .collect();
        let modules: Vec<_> = initrd
            .iter()
            .map(|initrd| hvm_modlist_entry { paddr: initrd.address, size: initrd.size_bytes, ..Default::default() })
            .collect();
        let start_info = hvm_start_info {
            magic: XEN_HVM_START_MAGIC_VALUE,
            version: 1,
            nr_modules: modules.len() as u32,
            modlist_paddr: if modules.is_empty() { 0 } else { layout::PVH_MODULES },
            cmdline_paddr: layout::CMDLINE,
            rsdp_paddr: layout::ACPI_TABLES,
            memmap_paddr: layout::PVH_MEMORY_MAP,
            memmap_entries: map.len() as u32,
            ..Default::default()
        };
        let mut params = BootParams::new(&start_info, GuestAddress(layout::PVH_START_INFO));
        params.set_sections(&map, GuestAddress(layout::PVH_MEMORY_MAP));
        if !modules.is_empty() {
            params.set_modules(&modules, GuestAddress(layout::PVH_MODULES));
        }
        PvhBootConfigurator::write_bootparams(&params, self.memory)
            .map_err(|error| self.error(format!("boot data does not fit into memory: {error}")))?;
        Ok(Entry::Pvh { entry, start_info: layout::PVH_START_INFO })
    }
}
