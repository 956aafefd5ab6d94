//! Guest memory that is filled while its guest runs in it.
//!
//! First the kernel is told to provide no page by itself any more, but to say who needs one; then what is missing is discarded. In the other order
//! a page of zeros could take the place of a missing one in between: whoever reads it (also another process) gets one, and so does
//! khugepaged when it makes a huge page. Pages that nothing was ever written to are not there either, and are asked for like those that are missing.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use godwit_core::bitmap::PageBits;
use godwit_core::{FillableMemory, GuestMemory, MachineError, PAGE_SIZE, PageIndex, PageRun, Placed};
use vm_memory::{GuestMemoryBackend, GuestMemoryRegion, GuestRegionMmap};

use super::mapping;
use super::userfault::Userfault;
use crate::error::VmmError;

/// Why this host cannot serve faults, if it cannot.
pub(crate) fn objection(huge_pages: bool) -> Option<String> {
    if huge_pages {
        return Some(
            "memory of reserved huge pages (--huge-pages) can be filled in pieces of 2 MiB only, where pages are sent by 4 KiB".into(),
        );
    }
    let error = Userfault::open().err()?;
    Some(format!(
        "page faults of the kernel's own cannot be served here, as this process may not: it needs CAP_SYS_PTRACE or \
         vm.unprivileged_userfaultfd = 1 (userfaultfd: {error})"
    ))
}

/// See the module.
pub(crate) struct Filling {
    faults: Userfault,
    memory: GuestMemory,
    over: AtomicBool,
}

impl Filling {
    /// Discards what is missing, and serves no fault yet.
    pub(super) fn begin(memory: &GuestMemory, missing: &mut dyn Iterator<Item = PageRun>) -> Result<Self, VmmError> {
        let faults = Userfault::open().map_err(VmmError::os("cannot open a userfaultfd"))?;
        let filling = Self { faults, memory: memory.clone(), over: AtomicBool::new(false) };
        for region in filling.memory.iter() {
            let registered = filling.faults.register(region.as_ptr(), region.len() as usize);
            registered.map_err(VmmError::os("cannot hear of faults in guest memory"))?;
        }
        for PageRun { region, pages } in missing {
            let bytes = pages.start.checked_mul(PAGE_SIZE as u64).zip(pages.end.checked_mul(PAGE_SIZE as u64));
            let region = filling.memory.iter().nth(region);
            let Some((region, (start, end))) =
                region.zip(bytes).filter(|(region, (start, end))| start <= end && *end <= region.len())
            else {
                return Err(VmmError::Status(format!("pages {pages:?} are not guest memory")));
            };
            mapping::discard(region, start as usize, (end - start) as usize)?;
        }
        Ok(filling)
    }

    /// Whether pages may still be missing.
    pub(crate) fn is_under_way(&self) -> bool {
        !self.over.load(Ordering::Acquire)
    }

    /// The kernel provides pages again, of zeros.
    pub(super) fn end(&self) -> Result<(), VmmError> {
        if self.over.swap(true, Ordering::AcqRel) {
            return Ok(());
        }
        self.memory.iter().try_for_each(|region| {
            let unregistered = self.faults.unregister(region.as_ptr(), region.len() as usize);
            unregistered.map_err(VmmError::os("cannot let the kernel provide guest memory again"))
        })
    }

    fn page_at(&self, address: u64) -> Option<PageIndex> {
        self.memory.iter().enumerate().find_map(|(number, region)| {
            let offset = address.checked_sub(region.as_ptr() as u64).filter(|offset| *offset < region.len())?;
            Some(PageIndex { region: number, page: offset / PAGE_SIZE as u64 })
        })
    }

    fn address_of(&self, page: PageIndex) -> Result<u64, VmmError> {
        let lies_in = |region: &&GuestRegionMmap<PageBits>| page.page < region.len() / PAGE_SIZE as u64;
        match self.memory.iter().nth(page.region).filter(lies_in) {
            Some(region) => Ok(region.as_ptr() as u64 + page.page * PAGE_SIZE as u64),
            None => Err(VmmError::Status(format!("{page:?} is not guest memory"))),
        }
    }
}

impl FillableMemory for Filling {
    fn wait_for_need(&self, limit: Duration, needed: &mut Vec<PageIndex>) -> Result<bool, MachineError> {
        let mut addresses = Vec::new();
        self.faults.wait(limit, &mut addresses).map_err(VmmError::os("cannot hear of faults in guest memory"))?;
        needed.extend(addresses.into_iter().filter_map(|address| self.page_at(address)));
        Ok(self.is_under_way())
    }

    fn place(&self, page: PageIndex, contents: Option<&[u8; PAGE_SIZE]>) -> Result<Placed, MachineError> {
        let address = self.address_of(page)?;
        let placed = self.faults.place(address, contents);
        Ok(placed.map_err(VmmError::os("cannot put a page of guest memory in place"))?)
    }

    fn complete(&self) -> Result<(), MachineError> {
        Ok(self.end()?)
    }
}

#[cfg(test)]
mod tests {
    use std::thread;

    use vm_memory::{Bytes, GuestAddress};

    use super::*;
    use crate::config::MemoryBacking;
    use crate::memory::Ram;

    #[test]
    fn reserved_huge_pages_cannot_be_filled_by_the_page() {
        assert!(objection(true).is_some_and(|why| why.contains("--huge-pages")));
    }

    #[test]
    fn nothing_takes_the_place_of_a_missing_page_while_pages_are_discarded() {
        if let Some(why) = objection(false) {
            return eprintln!("not tested: {why}");
        }
        for backing in [MemoryBacking::Private, MemoryBacking::Memfd] {
            for _ in 0..10 {
                let ram = Ram::new(4 << 20, backing, false).unwrap();
                ram.guest().write_slice(&[7; 4 << 20], GuestAddress(0)).unwrap();
                // Somebody reads the first page all the time, until it changes.
                let reader = thread::spawn({
                    let ram = ram.clone();
                    move || (0..).map(|_| ram.read(0, 1).unwrap()[0]).find(|byte| *byte != 7)
                });
                let mut apart = (0..512).map(|index| PageRun { region: 0, pages: 2 * index..2 * index + 1 });
                let filling = ram.fill_later(&mut apart).unwrap();
                let placed = filling.place(PageIndex { region: 0, page: 0 }, Some(&[9; PAGE_SIZE])).unwrap();
                assert_eq!((placed, reader.join().unwrap()), (Placed::Now, Some(9)), "{backing:?}");
                filling.complete().unwrap();
            }
        }
    }

    #[test]
    fn whoever_touches_a_missing_page_waits_for_it_and_finds_nothing_stale() {
        if let Some(why) = objection(false) {
            return eprintln!("not tested: {why}");
        }
        for backing in [MemoryBacking::Private, MemoryBacking::Memfd] {
            let ram = Ram::new(4 << 20, backing, false).unwrap();
            ram.guest().write_slice(&[7; 4 << 20], GuestAddress(0)).unwrap();
            let filling = ram.fill_later(&mut [PageRun { region: 0, pages: 5..8 }].into_iter()).unwrap();
            assert!(ram.fill_later(&mut [PageRun { region: 0, pages: 1023..1025 }].into_iter()).is_err());
            assert_eq!(ram.read(0x4000, 1).unwrap(), [7], "{backing:?}");
            let waiting = thread::spawn({
                let ram = ram.clone();
                move || ram.read(0x6000, 2).unwrap()
            });
            let mut needed = Vec::new();
            while needed.is_empty() {
                assert!(filling.wait_for_need(Duration::from_secs(5), &mut needed).unwrap());
            }
            let page = PageIndex { region: 0, page: 6 };
            assert_eq!(needed, [page]);
            assert!(!waiting.is_finished());
            assert_eq!(filling.place(page, Some(&[9; PAGE_SIZE])).unwrap(), Placed::Now);
            assert_eq!(waiting.join().unwrap(), [9, 9]);
            assert_eq!(filling.place(page, Some(&[1; PAGE_SIZE])).unwrap(), Placed::Already);
            assert_eq!(filling.place(PageIndex { page: 7, ..page }, None).unwrap(), Placed::Now);
            filling.complete().unwrap();
            assert_eq!(filling.place(PageIndex { page: 5, ..page }, None).unwrap(), Placed::NotWanted);
            let read = |page: u64| ram.read(page << 12, 1).unwrap()[0];
            assert_eq!([4, 5, 6, 7, 8].map(read), [7, 0, 9, 0, 7], "{backing:?}");
        }
    }
}
