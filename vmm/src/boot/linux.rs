//! Linux's 64-bit boot protocol: a bzImage, boot_params, and page tables that map memory to itself.

use std::io::{Read, Seek};

use linux_loader::bootparam::{boot_e820_entry, boot_params, setup_header};
use linux_loader::configurator::{BootConfigurator, BootParams, linux::LinuxBootConfigurator};
use linux_loader::loader::{BzImage, KernelLoader};
use vm_memory::{Address, GuestAddress, ReadVolatile};

use super::{Entry, Loader, layout, registers};
use crate::error::VmmError;

/// The first version of the protocol with a 64-bit entry point: 2.12.
const FIRST_64_BIT_VERSION: u16 = 0x20c;
/// The kernel has a 64-bit entry point.
const XLF_KERNEL_64: u16 = 1;
/// From the start of the protected-mode code to the 64-bit entry point.
const ENTRY_64_OFFSET: u64 = 0x200;
/// A boot loader without an assigned number.
const LOADER_UNDEFINED: u8 = 0xff;

impl Loader<'_> {
    /// Loads a bzImage and what its 64-bit entry point needs.
    pub(super) fn load_linux(&self, image: &mut (impl Read + Seek + ReadVolatile)) -> Result<Entry, VmmError> {
        let loaded = BzImage::load(self.memory, None, image, Some(GuestAddress(layout::HIGH_MEMORY)))
            .map_err(|error| self.error(format!("cannot load the bzImage: {error}")))?;
        let header = loaded.setup_header.ok_or_else(|| self.error("it has no setup header"))?;
        let kernel_end = self.check_header(&header, loaded.kernel_end)?;

        self.place_cmdline()?;
        let initrd = self.place_initrd(kernel_end, u64::from(header.initrd_addr_max) + 1)?;
        let mut params = boot_params { hdr: header, ..Default::default() };
        params.hdr.type_of_loader = LOADER_UNDEFINED;
        params.hdr.cmd_line_ptr = layout::CMDLINE as u32;
        params.acpi_rsdp_addr = layout::ACPI_TABLES;
        if let Some(initrd) = initrd {
            // Below 4 GiB, as everything that `place_initrd` finds.
            params.hdr.ramdisk_image = initrd.address as u32;
            params.hdr.ramdisk_size = initrd.size_bytes as u32;
        }
        let map = layout::memory_map(self.memory);
        for (entry, range) in params.e820_table.iter_mut().zip(&map) {
            *entry = boot_e820_entry { addr: range.start, size: range.size_bytes, r#type: range.kind.number() };
        }
        params.e820_entries = map.len() as u8;
        LinuxBootConfigurator::write_bootparams(
            &BootParams::new(&params, GuestAddress(layout::BOOT_PARAMS)),
            self.memory,
        )
        .map_err(|error| self.error(format!("boot data does not fit into memory: {error}")))?;
        self.write(&registers::identity_page_tables(), layout::PAGE_TABLES)?;
        self.write(&registers::linux_gdt(), layout::GDT)?;
        Ok(Entry::Linux64 { entry: loaded.kernel_load.raw_value() + ENTRY_64_OFFSET, boot_params: layout::BOOT_PARAMS })
    }

    /// Whether the kernel can be booted here, and where the memory ends that it needs before it knows of any other.
    fn check_header(&self, header: &setup_header, image_end: u64) -> Result<u64, VmmError> {
        let (version, flags) = (header.version, header.xloadflags);
        if version < FIRST_64_BIT_VERSION || flags & XLF_KERNEL_64 == 0 {
            return Err(self.error("the bzImage has no 64-bit entry point"));
        }
        let (preferred, init_size) = (header.pref_address, u64::from(header.init_size));
        let end = preferred.saturating_add(init_size).max(image_end);
        if end > layout::low_memory_end(self.memory) {
            return Err(self.error(format!("the kernel needs memory up to {end:#x} to unpack itself")));
        }
        let cmdline_size = header.cmdline_size as usize;
        if self.cmdline.len() > cmdline_size {
            return Err(self.error(format!("its command line may have {cmdline_size} bytes")));
        }
        Ok(end)
    }
}
