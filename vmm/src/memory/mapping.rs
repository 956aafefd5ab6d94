//! Mapping, advising and discarding one region of guest RAM.

use std::fs::File;
use std::io;
use std::os::fd::FromRawFd;
use std::ptr;

use vm_memory::bitmap::AtomicBitmap;
use vm_memory::bitmap::NewBitmap;
use vm_memory::mmap::MmapRegionBuilder;
use vm_memory::{FileOffset, GuestMemoryRegion, GuestRegionMmap, MmapRegion};

use crate::config::MemoryBacking;
use crate::error::VmmError;

/// What transparent huge pages need a mapping to start at a multiple of.
const HUGE_PAGE_BYTES: usize = 2 << 20;

/// Maps `size_bytes` that read as zeros.
pub(super) fn map(
    size_bytes: u64,
    backing: MemoryBacking,
    huge_pages: bool,
) -> Result<MmapRegion<AtomicBitmap>, VmmError> {
    let size = usize::try_from(size_bytes)
        .map_err(|_| VmmError::Status(format!("{size_bytes} bytes do not fit into this host's address space")))?;
    // Huge pages are reserved: if there are too few, mapping fails now and not the guest later. Others are not: their number is
    // no limit on hosts that overcommit.
    let reserve = if huge_pages { 0 } else { libc::MAP_NORESERVE };
    let builder = MmapRegionBuilder::new_with_bitmap(size, AtomicBitmap::with_len(size))
        .with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE)
        .with_hugetlbfs(huge_pages);
    let builder = match backing {
        MemoryBacking::Private => {
            let huge = if huge_pages { libc::MAP_HUGETLB } else { 0 };
            builder.with_mmap_flags(libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | reserve | huge)
        }
        MemoryBacking::Memfd => builder
            .with_mmap_flags(libc::MAP_SHARED | reserve)
            .with_file_offset(FileOffset::new(memfd(size_bytes, huge_pages)?, 0)),
    };
    let gap = AlignedGap::make(size);
    let mapping = builder.build().map_err(|error| {
        let hint =
            if huge_pages { " (does the host have enough 2 MiB pages? see /proc/sys/vm/nr_hugepages)" } else { "" };
        VmmError::Memory {
            what: format!("cannot map {size_bytes} bytes of guest memory{hint}"),
            source: Box::new(error),
        }
    })?;
    drop(gap);
    if !huge_pages {
        advise(&mapping, libc::MADV_HUGEPAGE, "transparent huge pages");
    }
    // A guest's memory is its owner's business, and makes for very large core dumps.
    advise(&mapping, libc::MADV_DONTDUMP, "leaving it out of core dumps");
    Ok(mapping)
}

/// Makes pages of a region read as zeros again.
pub(super) fn discard(region: &GuestRegionMmap<AtomicBitmap>, offset: usize, length: usize) -> Result<(), VmmError> {
    assert!(offset.checked_add(length).is_some_and(|end| end as u64 <= region.len()), "outside of the region");
    // Shared memory keeps its pages in the file: there they have to be punched out.
    let advice = if region.file_offset().is_some() { libc::MADV_REMOVE } else { libc::MADV_DONTNEED };
    // SAFETY: the range lies in the region's own mapping, as was checked, which lives as long as `region`. Guest memory is
    // only ever accessed as volatile, so that its contents may change under any reader.
    let result = unsafe { libc::madvise(region.as_ptr().add(offset).cast(), length, advice) };
    if result == 0 { Ok(()) } else { Err(VmmError::os("cannot clear guest memory")(io::Error::last_os_error())) }
}

fn memfd(size_bytes: u64, huge_pages: bool) -> Result<File, VmmError> {
    let huge = if huge_pages { libc::MFD_HUGETLB | libc::MFD_HUGE_2MB } else { 0 };
    // SAFETY: the name is a C string and the flags are plain numbers.
    let fd = unsafe { libc::memfd_create(c"guest-memory".as_ptr(), libc::MFD_CLOEXEC | huge) };
    if fd < 0 {
        return Err(VmmError::os("cannot create a memfd for guest memory")(io::Error::last_os_error()));
    }
    // SAFETY: `fd` has just been opened and nobody else owns it.
    let file = unsafe { File::from_raw_fd(fd) };
    file.set_len(size_bytes).map_err(VmmError::os(format!("cannot size the memfd to {size_bytes} bytes")))?;
    Ok(file)
}

/// Gives the kernel advice that it may ignore and that does not change what memory holds.
fn advise(mapping: &MmapRegion<AtomicBitmap>, advice: libc::c_int, what: &str) {
    // SAFETY: the range is exactly the mapping, and the advice does not change what it holds.
    let result = unsafe { libc::madvise(mapping.as_ptr().cast(), mapping.size(), advice) };
    if result != 0 {
        tracing::debug!("guest memory, {what}: {}", io::Error::last_os_error());
    }
}

/// A hole in the address space that fits a mapping at a multiple of [`HUGE_PAGE_BYTES`], kept open by guards on both sides
/// until the mapping is made.
///
/// Kernels before 6.7 place mappings at any page, and vm-memory takes no address. The kernel puts a mapping into the highest
/// hole that is large enough: this makes one whose bounds are aligned. If another thread's mapping takes it, memory still
/// works, with fewer huge pages.
struct AlignedGap {
    guards: [(*mut libc::c_void, usize); 2],
}

impl AlignedGap {
    fn make(size: usize) -> Option<Self> {
        let total = size.checked_add(HUGE_PAGE_BYTES)?;
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
        // SAFETY: a new mapping at an address of the kernel's choice touches no existing memory.
        let base = unsafe { libc::mmap(ptr::null_mut(), total, libc::PROT_NONE, flags, -1, 0) };
        if base == libc::MAP_FAILED {
            return None;
        }
        let before = base.align_offset(HUGE_PAGE_BYTES);
        let start = base.wrapping_byte_add(before);
        let end = start.wrapping_byte_add(size);
        // SAFETY: `start..end` lies within the mapping made above, which nobody else knows of.
        unsafe { libc::munmap(start, size) };
        Some(Self { guards: [(base, before), (end, total - before - size)] })
    }
}

impl Drop for AlignedGap {
    fn drop(&mut self) {
        for (address, length) in self.guards {
            if length > 0 {
                // SAFETY: the guard is this object's own mapping and nobody refers to it.
                unsafe { libc::munmap(address, length) };
            }
        }
    }
}
