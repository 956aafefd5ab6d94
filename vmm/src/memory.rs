//! Guest RAM: where it lies in the guest, and what it is made of here.
//!
//! ```text
//!  made here ──────────────────► owned ───────────────► let go of: its guest is about to go on elsewhere, in this very memory
//!                                ▲   ▲                      │
//!                                │   └────── taken back ────┘
//!  handed over (memfds) ──► only looked at ──┐ again, for what it holds by now
//!                              ▲─────────────┘
//! ```
//!
//! Memory that is only looked at can be read. What is written to it, by this process or by KVM, stays here as a copy of the page and is
//! forgotten with the next step: whoever owns the memory never sees it. What has been let go of is neither read nor written by a paused
//! machine; mapping it in another way would take long, in the pause, where much of it is in use.

mod filling;
mod mapping;
mod userfault;

use std::io::Write;
use std::sync::{Arc, Mutex};

use godwit_core::bitmap::PageBits;
use godwit_core::machine::RegionDescription;
use godwit_core::memory_files::MemoryFile;
use godwit_core::{FillableMemory, GuestMemory, PAGE_SIZE, PageRun};
use vm_memory::bitmap::Bitmap;
use vm_memory::{
    Address, Bytes, FileOffset, GuestAddress, GuestMemoryBackend, GuestMemoryRegion, GuestRegionMmap,
    MemoryRegionAddress, MmapRegion,
};

use self::filling::Filling;
pub(crate) use self::filling::objection as filling_objection;
use self::mapping::Sharing;
use crate::config::MemoryBacking;
use crate::error::VmmError;
use crate::sync::lock;

/// Where the hole for 32-bit devices (interrupt controllers, MMIO) begins: 3 GiB.
pub(crate) const GAP_START: u64 = 3 << 30;

/// Where it ends and RAM goes on: 4 GiB.
pub(crate) const GAP_END: u64 = 4 << 30;

/// How much is copied at once.
const COPY_BYTES: usize = 64 << 10;

/// One region of guest RAM, for whoever looks at it from outside.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RamRegion {
    /// First guest-physical address.
    pub guest_address: u64,
    /// Length in bytes.
    pub size_bytes: u64,
    /// Where it is mapped in this process.
    pub host_address: u64,
    /// `private` or `memfd`.
    pub kind: &'static str,
}

/// The regions of a machine with `size_bytes` of RAM: up to the 32-bit gap, and beyond it.
pub(crate) fn layout(size_bytes: u64) -> Vec<RegionDescription> {
    let low = size_bytes.min(GAP_START);
    let mut regions = vec![RegionDescription { guest_address: 0, size_bytes: low }];
    if size_bytes > low {
        regions.push(RegionDescription { guest_address: GAP_END, size_bytes: size_bytes - low });
    }
    regions
}

/// Memory as a machine's is made here, without the machine: for whoever measures what this host can do with it. It reads as zeros.
pub fn guest_memory(size_bytes: u64, backing: MemoryBacking, huge_pages: bool) -> Result<GuestMemory, VmmError> {
    Ok(Ram::new(size_bytes, backing, huge_pages)?.memory)
}

/// The memory of one machine: one mapping per region.
#[derive(Clone)]
pub(crate) struct Ram {
    memory: GuestMemory,
    backing: MemoryBacking,
    hold: Arc<Mutex<Hold>>,
    /// Pages may be missing.
    filling: Arc<Mutex<Option<Arc<Filling>>>>,
}

/// Whose the memory is.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Hold {
    /// This process's.
    Owned,
    /// Another process's guest runs in it: it is only looked at.
    LookedAt,
    /// Another process's guest is about to run in it. The page at this place, if any, stays here as it is now.
    LetGo(Option<GuestAddress>),
}

impl Ram {
    /// Maps RAM that reads as zeros.
    pub(crate) fn new(size_bytes: u64, backing: MemoryBacking, huge_pages: bool) -> Result<Self, VmmError> {
        let map = |region: RegionDescription| Ok((region, mapping::map(region.size_bytes, backing, huge_pages)?));
        Self::of(layout(size_bytes).into_iter().map(map), backing)
    }

    /// Maps RAM that is handed over, to be only looked at.
    pub(crate) fn handed_over(files: Vec<MemoryFile>, huge_pages: bool) -> Result<Self, VmmError> {
        let map = |MemoryFile { region, file, offset }: MemoryFile| {
            let file = FileOffset::new(file, offset);
            Ok((region, mapping::map_over(region.size_bytes, Some(file), huge_pages)?))
        };
        let ram = Self::of(files.into_iter().map(map), MemoryBacking::Memfd)?;
        *lock(&ram.hold) = Hold::LookedAt;
        ram.look_again()?;
        Ok(ram)
    }

    fn of(
        mapped: impl Iterator<Item = Result<(RegionDescription, MmapRegion<PageBits>), VmmError>>,
        backing: MemoryBacking,
    ) -> Result<Self, VmmError> {
        let mut regions = Vec::new();
        for mapped in mapped {
            let (region, mapping) = mapped?;
            let region = GuestRegionMmap::new(mapping, GuestAddress(region.guest_address))
                .ok_or_else(|| VmmError::Status("a RAM region wraps around the address space".into()))?;
            regions.push(region);
        }
        let memory = GuestMemory::from_regions(regions).map_err(VmmError::memory("cannot lay out guest memory"))?;
        Ok(Self { memory, backing, hold: Arc::new(Mutex::new(Hold::Owned)), filling: Arc::default() })
    }

    /// Looks at the memory, if it is only looked at, as it is now: what was written to it before is forgotten.
    pub(crate) fn look_again(&self) -> Result<(), VmmError> {
        match *lock(&self.hold) {
            Hold::LookedAt => self.remap(Sharing::CopiedOnWrite),
            Hold::Owned | Hold::LetGo(_) => Ok(()),
        }
    }

    /// The memory is about to be another process's. The page at `kept` stays here as it is now, for whoever looks at it from outside.
    pub(crate) fn let_go(&self, kept: Option<GuestAddress>) -> Result<(), VmmError> {
        let mut hold = lock(&self.hold);
        if let Some(page) = kept {
            self.remap_page(page, Sharing::CopiedOnWrite)?;
            // Now it can be taken back, whatever becomes of the rest.
            *hold = Hold::LetGo(kept);
            let byte: u8 = self.memory.read_obj(page).map_err(VmmError::memory("cannot read guest memory"))?;
            self.memory.write_obj(byte, page).map_err(VmmError::memory("cannot copy a page of guest memory"))?;
        }
        *hold = Hold::LetGo(kept);
        Ok(())
    }

    /// The memory is this process's from here on, if it was not.
    pub(crate) fn own(&self) -> Result<(), VmmError> {
        let mut hold = lock(&self.hold);
        match *hold {
            Hold::LookedAt => self.remap(Sharing::Written)?,
            Hold::LetGo(Some(page)) => self.remap_page(page, Sharing::Written)?,
            Hold::LetGo(None) | Hold::Owned => {}
        }
        *hold = Hold::Owned;
        Ok(())
    }

    /// Forgets what the `missing` pages hold; they are put in place while the guest runs.
    pub(crate) fn fill_later(
        &self,
        missing: &mut dyn Iterator<Item = PageRun>,
    ) -> Result<Arc<dyn FillableMemory>, VmmError> {
        let filling = Arc::new(Filling::begin(&self.memory, missing)?);
        *lock(&self.filling) = Some(Arc::clone(&filling));
        Ok(filling)
    }

    /// Whether pages may be missing.
    pub(crate) fn is_filling(&self) -> bool {
        lock(&self.filling).as_ref().is_some_and(|filling| filling.is_under_way())
    }

    /// Nobody uses this memory any more: what was missing is not wanted.
    pub(crate) fn end_filling(&self) -> Result<(), VmmError> {
        lock(&self.filling).take().map_or(Ok(()), |filling| filling.end())
    }

    fn remap(&self, sharing: Sharing) -> Result<(), VmmError> {
        self.memory.iter().try_for_each(|region| mapping::remap(region, 0..region.size(), sharing))
    }

    fn remap_page(&self, page: GuestAddress, sharing: Sharing) -> Result<(), VmmError> {
        let (region, MemoryRegionAddress(offset)) = self
            .memory
            .to_region_addr(page)
            .ok_or_else(|| VmmError::Status(format!("there is no guest memory at {:#x}", page.raw_value())))?;
        mapping::remap(region, offset as usize..offset as usize + PAGE_SIZE, sharing)
    }

    /// As the engine sees it.
    pub(crate) fn guest(&self) -> &GuestMemory {
        &self.memory
    }

    /// Its regions as they are mapped here.
    pub(crate) fn regions(&self) -> Vec<RamRegion> {
        let kind = match self.backing {
            MemoryBacking::Private => "private",
            MemoryBacking::Memfd => "memfd",
        };
        self.memory
            .iter()
            .map(|region| RamRegion {
                guest_address: region.start_addr().raw_value(),
                size_bytes: region.len(),
                host_address: region.as_ptr() as u64,
                kind,
            })
            .collect()
    }

    /// Copies guest memory out, through a small buffer.
    pub(crate) fn write_to(&self, address: u64, length: u64, to: &mut dyn Write) -> Result<(), VmmError> {
        self.check_range(address, length)?;
        let mut buffer = vec![0; COPY_BYTES.min(usize::try_from(length).unwrap_or(COPY_BYTES))];
        let mut done = 0;
        while done < length {
            let chunk = (length - done).min(buffer.len() as u64) as usize;
            self.memory
                .read_slice(&mut buffer[..chunk], GuestAddress(address + done))
                .map_err(VmmError::memory(format!("cannot read guest memory at {:#x}", address + done)))?;
            to.write_all(&buffer[..chunk]).map_err(VmmError::os("cannot write out guest memory"))?;
            done += chunk as u64;
        }
        Ok(())
    }

    /// Whether all of a range is RAM, before anything is allocated for it.
    fn check_range(&self, address: u64, length: u64) -> Result<(), VmmError> {
        let is_ram = usize::try_from(length).is_ok_and(|length| self.memory.check_range(GuestAddress(address), length));
        if is_ram {
            return Ok(());
        }
        Err(VmmError::Status(format!("guest memory from {address:#x} on, {length} bytes, is not all RAM")))
    }

    /// Makes all of RAM read as zeros again and gives its pages back to the host. Every page counts as written.
    pub(crate) fn clear(&self) -> Result<(), VmmError> {
        if *lock(&self.hold) != Hold::Owned {
            return Err(VmmError::Status("guest memory is another process's: it cannot be cleared here".into()));
        }
        // What was missing is not wanted any more.
        self.end_filling()?;
        for region in self.memory.iter() {
            let length = region.len() as usize;
            mapping::discard(region, 0, length)?;
            // After the pages have changed: what marks them earlier may be harvested too early.
            region.bitmap().mark_dirty(0, length);
        }
        Ok(())
    }

    /// A copy of guest memory.
    pub(crate) fn read(&self, address: u64, length: usize) -> Result<Vec<u8>, VmmError> {
        self.check_range(address, length as u64)?;
        let mut bytes = vec![0; length];
        self.memory
            .read_slice(&mut bytes, GuestAddress(address))
            .map_err(VmmError::memory(format!("cannot read guest memory at {address:#x}")))?;
        Ok(bytes)
    }
}

/// Makes pages of guest memory, whole ones, read as zeros, and gives them back to the host. Afterwards they count as written.
///
/// Huge pages of the host's reserve stay: they were reserved so that the guest never lacks them, and somebody else may take what
/// is given back. They are overwritten.
pub(crate) fn discard(memory: &GuestMemory, address: GuestAddress, length: usize) -> Result<(), VmmError> {
    let all_in_one = |offset: &MemoryRegionAddress, region: &GuestRegionMmap<PageBits>| {
        offset.checked_add(length as u64).is_some_and(|end| end.raw_value() <= region.len())
    };
    let place = memory.to_region_addr(address).filter(|(region, offset)| all_in_one(offset, region));
    let Some((region, offset)) = place else {
        return Err(VmmError::Status(format!("{length} bytes from {address:?} on are not one piece of RAM")));
    };
    let offset = offset.raw_value() as usize;
    let result = match region.is_hugetlbfs() {
        Some(true) => overwrite(memory, address, length),
        _ => mapping::discard(region, offset, length),
    };
    // After the pages have changed: what marks them earlier may be harvested too early. Also after an error: some may have gone.
    region.bitmap().mark_dirty(offset, length);
    result
}

fn overwrite(memory: &GuestMemory, address: GuestAddress, length: usize) -> Result<(), VmmError> {
    static ZEROS: [u8; COPY_BYTES] = [0; COPY_BYTES];
    for done in (0..length).step_by(COPY_BYTES) {
        let chunk = &ZEROS[..COPY_BYTES.min(length - done)];
        memory
            .write_slice(chunk, address.unchecked_add(done as u64))
            .map_err(VmmError::memory("cannot overwrite guest memory"))?;
    }
    Ok(())
}

/// The host address of a region's first byte, for KVM.
pub(crate) fn host_address(region: &impl GuestMemoryRegion) -> Result<u64, VmmError> {
    let pointer = region
        .get_host_address(MemoryRegionAddress(0))
        .map_err(VmmError::memory("guest memory has no host address"))?;
    Ok(pointer as u64)
}

#[cfg(test)]
mod tests {
    use godwit_core::memory_files;
    use proptest::prelude::*;

    use super::*;
    use crate::config::{MAX_MEMORY_BYTES, MIN_MEMORY_BYTES};

    proptest! {
        #[test]
        fn the_layout_holds_all_of_memory_and_leaves_the_gap_free(
            pages in MIN_MEMORY_BYTES / 4096..=MAX_MEMORY_BYTES / 4096
        ) {
            let regions = layout(pages * 4096);
            prop_assert_eq!(regions.iter().map(|r| r.size_bytes).sum::<u64>(), pages * 4096);
            let mut end = 0;
            for region in regions {
                prop_assert!(region.guest_address >= end && region.size_bytes > 0);
                end = region.guest_address + region.size_bytes;
                prop_assert!(end <= GAP_START || region.guest_address >= GAP_END);
            }
        }
    }

    #[test]
    fn memory_reads_as_zeros_again_after_a_clear_and_counts_as_written() {
        for backing in [MemoryBacking::Private, MemoryBacking::Memfd] {
            let ram = Ram::new(4 << 20, backing, false).unwrap();
            ram.guest().write_obj(7u8, GuestAddress(0x5000)).unwrap();
            let region = ram.guest().iter().next().unwrap();
            let mapping: &MmapRegion<PageBits> = region;
            mapping.bitmap().clear();
            ram.clear().unwrap();
            assert_eq!(ram.read(0x5000, 1).unwrap(), [0], "{backing:?}");
            assert!(mapping.bitmap().dirty_at(0) && mapping.bitmap().dirty_at((4 << 20) - 1));
        }
    }

    #[test]
    fn discarded_pages_and_no_others_read_as_zeros_and_count_as_written() {
        for backing in [MemoryBacking::Private, MemoryBacking::Memfd] {
            let ram = Ram::new(4 << 20, backing, false).unwrap();
            ram.guest().write_slice(&[7; 4 << 20], GuestAddress(0)).unwrap();
            let mapping: &MmapRegion<PageBits> = ram.guest().iter().next().unwrap();
            mapping.bitmap().clear();
            discard(ram.guest(), GuestAddress(0x5000), 0x3000).unwrap();
            let is_zero = |page: u64| ram.read(page << 12, 4096).unwrap() == [0; 4096];
            let is_dirty = |page: u64| mapping.bitmap().dirty_at((page << 12) as usize);
            let discarded = |page| (5..8).contains(&page);
            assert!((0..1024).all(|page| is_zero(page) == discarded(page)), "{backing:?}");
            assert!((0..1024).all(|page| is_dirty(page) == discarded(page)), "{backing:?}");
            for (address, length) in [(4 << 20, 4096), ((4 << 20) - 4096, 8192), (u64::MAX - 4095, 4096)] {
                assert!(discard(ram.guest(), GuestAddress(address), length).is_err());
            }
        }
    }

    #[test]
    fn only_ram_can_be_read() {
        let ram = Ram::new(4 << 20, MemoryBacking::Private, false).unwrap();
        assert!(ram.read((4 << 20) - 1, 1).is_ok());
        assert!(ram.read((4 << 20) - 1, 2).is_err());
        assert!(ram.write_to(u64::MAX, 2, &mut Vec::new()).is_err());
        assert!(ram.write_to(0, u64::MAX, &mut Vec::new()).is_err());
        let mut out = Vec::new();
        ram.write_to(0x1000, 200_000, &mut out).unwrap();
        assert_eq!(out.len(), 200_000);
    }

    #[test]
    fn mappings_are_aligned_to_huge_pages() {
        let ram = Ram::new(64 << 20, MemoryBacking::Private, false).unwrap();
        assert_eq!(ram.regions()[0].host_address % (2 << 20), 0);
    }

    /// The same memory in another process, as far as memory can tell.
    fn handed_over(ram: &Ram) -> Ram {
        Ram::handed_over(memory_files::of(ram.guest()).unwrap(), false).unwrap()
    }

    #[test]
    fn memory_that_is_looked_at_is_read_and_never_written() {
        let source = Ram::new(4 << 20, MemoryBacking::Memfd, false).unwrap();
        source.guest().write_obj(1u8, GuestAddress(0x1000)).unwrap();
        let destination = handed_over(&source);
        let (here, there) = (|at| source.read(at, 1).unwrap()[0], |at| destination.read(at, 1).unwrap()[0]);
        assert_eq!(there(0x1000), 1);
        destination.guest().write_obj(7u8, GuestAddress(0x1000)).unwrap();
        assert_eq!((here(0x1000), there(0x1000)), (1, 7), "what is written stays in the copy");
        source.guest().write_obj(2u8, GuestAddress(0x1000)).unwrap();
        source.guest().write_obj(3u8, GuestAddress(0x2000)).unwrap();
        assert_eq!((there(0x1000), there(0x2000)), (7, 3));
        destination.look_again().unwrap();
        assert_eq!(there(0x1000), 2, "the copy is forgotten");
        assert!(destination.clear().is_err());
        destination.guest().write_obj(8u8, GuestAddress(0x3000)).unwrap();
        source.let_go(Some(GuestAddress(0x2000))).unwrap();
        destination.own().unwrap();
        assert_eq!(there(0x3000), 0, "what was written before is forgotten");
        destination.guest().write_obj(9u8, GuestAddress(0x1000)).unwrap();
        destination.guest().write_obj(9u8, GuestAddress(0x2000)).unwrap();
        assert_eq!((here(0x1000), here(0x2000)), (9, 3), "one page stays as it was");
        assert!(source.clear().is_err());
        assert!(destination.clear().is_ok());
    }

    #[test]
    fn memory_is_taken_back_and_handed_on() {
        let source = Ram::new(4 << 20, MemoryBacking::Memfd, false).unwrap();
        for kept in [None, Some(GuestAddress(0))] {
            source.let_go(kept).unwrap();
            source.own().unwrap();
        }
        source.guest().write_obj(5u8, GuestAddress(0)).unwrap();
        let next = handed_over(&source);
        next.own().unwrap();
        drop(source);
        let last = handed_over(&next);
        drop(next);
        assert_eq!(last.read(0, 1).unwrap(), [5]);
        assert_eq!(last.regions()[0].kind, "memfd");
    }
}
