//! Mapping, advising and discarding one region of guest RAM.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::AsRawFd;
use std::ptr;

use godwit_core::PAGE_SIZE;
use godwit_core::bitmap::PageBits;
use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, memfd_create};
use vm_memory::bitmap::NewBitmap;
use vm_memory::mmap::MmapRegionBuilder;
use vm_memory::{FileOffset, GuestMemoryRegion, GuestRegionMmap, MmapRegion};

use crate::config::MemoryBacking;
use crate::error::VmmError;

/// What transparent huge pages need a mapping to start at a multiple of.
const HUGE_PAGE_BYTES: usize = 2 << 20;

/// Maps `size_bytes` that read as zeros.
pub(super) fn map(size_bytes: u64, backing: MemoryBacking, huge_pages: bool) -> Result<MmapRegion<PageBits>, VmmError> {
    let file = match backing {
        MemoryBacking::Private => None,
        MemoryBacking::Memfd => Some(FileOffset::new(memfd(size_bytes, huge_pages)?, 0)),
    };
    map_over(size_bytes, file, huge_pages)
}

/// Maps `size_bytes` of a file, or of memory that is private to this process.
pub(super) fn map_over(
    size_bytes: u64,
    file: Option<FileOffset>,
    huge_pages: bool,
) -> Result<MmapRegion<PageBits>, VmmError> {
    let size = usize::try_from(size_bytes)
        .map_err(|_| VmmError::Status(format!("{size_bytes} bytes do not fit into this host's address space")))?;
    // Huge pages are reserved: if there are too few, mapping fails now and not the guest later. Others are not: their number is
    // no limit on hosts that overcommit.
    let reserve = if huge_pages { 0 } else { libc::MAP_NORESERVE };
    let builder = MmapRegionBuilder::new_with_bitmap(size, PageBits::with_len(size))
        .with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE)
        .with_hugetlbfs(huge_pages);
    let builder = match file {
        None => {
            let huge = if huge_pages { libc::MAP_HUGETLB } else { 0 };
            builder.with_mmap_flags(libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | reserve | huge)
        }
        Some(file) => builder.with_mmap_flags(libc::MAP_SHARED | reserve).with_file_offset(file),
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
    advise_all(&mapping, 0..size);
    Ok(mapping)
}

/// How memory that is made of a file is mapped.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Sharing {
    /// What is written is written to the file.
    Written,
    /// What is written stays here, as a copy of the page, until it is mapped anew.
    CopiedOnWrite,
}

/// Maps a part of the file behind a region anew, where it is mapped. Whoever uses the memory, KVM too, finds the new mapping at once. It
/// takes the longer, the more of that part was in use: half a second for a GiB, if KVM keeps shadow page tables.
pub(super) fn remap(mapping: &MmapRegion<PageBits>, part: Range<usize>, sharing: Sharing) -> Result<(), VmmError> {
    let page_bytes = if mapping.is_hugetlbfs() == Some(true) { HUGE_PAGE_BYTES } else { PAGE_SIZE };
    let aligned = part.start.is_multiple_of(page_bytes) && part.len().is_multiple_of(page_bytes);
    if !aligned || part.is_empty() || part.end > mapping.size() {
        return Err(VmmError::Status(format!("guest memory has no part {part:x?} that could be mapped by itself")));
    }
    let file = mapping.file_offset().ok_or_else(|| VmmError::Status("guest memory is not made of a file".into()))?;
    let flags = match sharing {
        Sharing::Written => mapping.flags(),
        // Nothing is reserved: what is copied is a page now and then.
        Sharing::CopiedOnWrite => (mapping.flags() & !libc::MAP_SHARED) | libc::MAP_PRIVATE | libc::MAP_NORESERVE,
    };
    let (address, fd) = (mapping.as_ptr().wrapping_add(part.start).cast(), file.file().as_raw_fd());
    let offset = file.start() + part.start as u64;
    // SAFETY: the range lies within the region's own mapping, which lives as long as `mapping` and is unmapped as a whole with it.
    // The file reaches as far as the region and is sealed against shrinking. Guest memory is only ever accessed as volatile, so
    // that its contents may change under any reader.
    let mapped =
        unsafe { libc::mmap(address, part.len(), mapping.prot(), flags | libc::MAP_FIXED, fd, offset as libc::off_t) };
    if mapped == libc::MAP_FAILED {
        return Err(VmmError::os("cannot map guest memory anew")(io::Error::last_os_error()));
    }
    advise_all(mapping, part);
    Ok(())
}

/// Makes pages of a region read as zeros again.
pub(super) fn discard(region: &GuestRegionMmap<PageBits>, offset: usize, length: usize) -> Result<(), VmmError> {
    assert!(offset.checked_add(length).is_some_and(|end| end as u64 <= region.len()), "outside of the region");
    // Shared memory keeps its pages in the file: there they have to be punched out.
    let advice = if region.file_offset().is_some() { libc::MADV_REMOVE } else { libc::MADV_DONTNEED };
    // SAFETY: the range lies in the region's own mapping, as was checked, which lives as long as `region`. Guest memory is
    // only ever accessed as volatile, so that its contents may change under any reader.
    let result = unsafe { libc::madvise(region.as_ptr().add(offset).cast(), length, advice) };
    if result == 0 { Ok(()) } else { Err(VmmError::os("cannot clear guest memory")(io::Error::last_os_error())) }
}

/// A file in memory that can neither shrink nor grow: another process that maps it can rely on that.
fn memfd(size_bytes: u64, huge_pages: bool) -> Result<File, VmmError> {
    let huge = if huge_pages { MemfdFlags::HUGETLB | MemfdFlags::HUGE_2MB } else { MemfdFlags::empty() };
    let create = || {
        let file = File::from(memfd_create("guest-memory", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING | huge)?);
        file.set_len(size_bytes)?;
        fcntl_add_seals(&file, SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL)?;
        Ok(file)
    };
    create().map_err(VmmError::os(format!("cannot create a memfd of {size_bytes} bytes for guest memory")))
}

/// What the kernel should know of guest memory.
fn advise_all(mapping: &MmapRegion<PageBits>, part: Range<usize>) {
    if mapping.is_hugetlbfs() != Some(true) {
        advise(mapping, &part, libc::MADV_HUGEPAGE, "transparent huge pages");
    }
    // A guest's memory is its owner's business, and makes for very large core dumps.
    advise(mapping, &part, libc::MADV_DONTDUMP, "leaving it out of core dumps");
}

/// Gives the kernel advice on a part of the mapping that it may ignore and that does not change what memory holds.
fn advise(mapping: &MmapRegion<PageBits>, part: &Range<usize>, advice: libc::c_int, what: &str) {
    let address = mapping.as_ptr().wrapping_add(part.start).cast();
    // SAFETY: the callers' ranges lie within the mapping, and the advice does not change what it holds.
    let result = unsafe { libc::madvise(address, part.len(), advice) };
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
