//! Booting: a kernel into memory, and the first vCPU to its entry point.
//!
//! Two ways, told apart by the file: a PVH ELF image (32-bit entry, start info) and a bzImage (64-bit entry, boot_params). The
//! other vCPUs wait for the first one's INIT and SIPI.

mod layout;
mod linux;
mod pvh;
mod registers;

use std::fs::File;
use std::io::{Cursor, Read, Seek};
use std::path::{Path, PathBuf};

use godwit_core::GuestMemory;
use vm_memory::{Bytes, GuestAddress, ReadVolatile};

pub(crate) use registers::Entry;

use crate::config::MachineConfig;
use crate::devices::acpi;
use crate::devices::layout::DeviceLayout;
use crate::error::VmmError;
use crate::workload;

/// Where the 32-bit magic of a bzImage's header lies.
const BZIMAGE_MAGIC_OFFSET: usize = 0x202;
const BZIMAGE_MAGIC: &[u8] = b"HdrS";
const ELF_MAGIC: &[u8] = b"\x7fELF";

/// Loads what the machine is to boot into its memory, and says where the first vCPU begins.
pub(crate) fn load(config: &MachineConfig, devices: &DeviceLayout, memory: &GuestMemory) -> Result<Entry, VmmError> {
    let entry = load_kernel(config, memory)?;
    // Last: an image that lies where the tables belong is not to be found by a guest that looks for them.
    let tables = acpi::image(layout::ACPI_TABLES as u32, config.vcpus, devices);
    memory
        .write_slice(&tables, GuestAddress(layout::ACPI_TABLES))
        .map_err(VmmError::memory("the ACPI tables do not fit into memory"))?;
    memory
        .write_slice(&layout::BIOS, GuestAddress(layout::BIOS_ENTRY))
        .map_err(VmmError::memory("the way to reboot does not fit into memory"))?;
    Ok(entry)
}

fn load_kernel(config: &MachineConfig, memory: &GuestMemory) -> Result<Entry, VmmError> {
    match &config.kernel {
        Some(path) => {
            let mut image = open(path)?;
            Loader { path, memory, cmdline: &config.cmdline, initrd: config.initrd.as_deref() }.load(&mut image)
        }
        None => {
            let image = workload::elf(&config.writer.clone().unwrap_or_default());
            Loader { path: Path::new("the workload guest"), memory, cmdline: "", initrd: None }
                .load(&mut Cursor::new(image))
        }
    }
}

/// Loads one kernel.
struct Loader<'a> {
    path: &'a Path,
    memory: &'a GuestMemory,
    cmdline: &'a str,
    initrd: Option<&'a Path>,
}

/// Where something lies in guest memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Placed {
    address: u64,
    size_bytes: u64,
}

impl Loader<'_> {
    fn load(&self, image: &mut (impl Read + Seek + ReadVolatile)) -> Result<Entry, VmmError> {
        let mut head = Vec::new();
        let limit = (BZIMAGE_MAGIC_OFFSET + BZIMAGE_MAGIC.len()) as u64;
        image
            .by_ref()
            .take(limit)
            .read_to_end(&mut head)
            .map_err(|error| self.error(format!("cannot read it: {error}")))?;
        if head.starts_with(ELF_MAGIC) {
            return self.load_pvh(image, &head);
        }
        if head.get(BZIMAGE_MAGIC_OFFSET..) == Some(BZIMAGE_MAGIC) {
            return self.load_linux(image);
        }
        Err(self.error("it is neither an ELF image nor a bzImage"))
    }

    /// Puts the command line where the guest will look for it.
    fn place_cmdline(&self) -> Result<(), VmmError> {
        let bytes = [self.cmdline.as_bytes(), &[0]].concat();
        self.write(&bytes, layout::CMDLINE)
    }

    /// Puts the initial RAM disk, if there is one, as high as it may lie, above `floor` and below `ceiling`.
    fn place_initrd(&self, floor: u64, ceiling: u64) -> Result<Option<Placed>, VmmError> {
        let Some(path) = self.initrd else { return Ok(None) };
        let error = |reason: String| VmmError::Boot { path: path.to_owned(), reason };
        let mut file = open(path)?;
        let size_bytes = file.metadata().map_err(|source| error(format!("cannot read it: {source}")))?.len();
        let ceiling = ceiling.min(layout::low_memory_end(self.memory));
        let address = layout::highest_place(size_bytes, floor, ceiling)
            .ok_or_else(|| error(format!("{size_bytes} bytes do not fit into memory beside the kernel")))?;
        self.memory
            .read_exact_volatile_from(GuestAddress(address), &mut file, size_bytes as usize)
            .map_err(|source| error(format!("cannot load it: {source}")))?;
        Ok(Some(Placed { address, size_bytes }))
    }

    fn write(&self, bytes: &[u8], address: u64) -> Result<(), VmmError> {
        self.memory
            .write_slice(bytes, GuestAddress(address))
            .map_err(|error| self.error(format!("boot data does not fit into memory: {error}")))
    }

    fn error(&self, reason: impl Into<String>) -> VmmError {
        VmmError::Boot { path: self.path.to_owned(), reason: reason.into() }
    }
}

fn open(path: &Path) -> Result<File, VmmError> {
    let error = |reason: String| VmmError::Boot { path: PathBuf::from(path), reason };
    let file = File::open(path).map_err(|source| error(format!("cannot open it: {source}")))?;
    match file.metadata() {
        Ok(metadata) if metadata.is_file() => Ok(file),
        _ => Err(error("it is not a regular file".into())),
    }
}
