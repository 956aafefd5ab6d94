//! Guest memory by stripes and frames.

use std::io;
use std::sync::Arc;

use vm_memory::{GuestMemoryBackend, GuestMemoryRegion, MemoryRegionAddress, VolatileSlice};

use crate::layout::{Layout, STRIPE_PAGES, Stripe};
use crate::machine::MachineError;
use crate::memory::{GuestMemory, PAGE_SIZE};
use crate::table::Page;

/// A machine's memory together with the layout that both ends agreed on. Cheap to clone.
#[derive(Clone)]
pub struct MemoryView {
    memory: GuestMemory,
    layout: Arc<Layout>,
    /// Host address of each region's first byte; the mappings live as long as `memory`.
    bases: Arc<Vec<HostAddress>>,
}

#[derive(Clone, Copy)]
struct HostAddress(*mut u8);

// SAFETY: the address is of a mapping that `MemoryView::memory` keeps alive, and every access through it is volatile
// or of bytes that one thread at a time owns (see `MemoryView::pages`).
unsafe impl Send for HostAddress {}
// SAFETY: as above.
unsafe impl Sync for HostAddress {}

impl MemoryView {
    /// Joins memory and layout, which must describe the same regions.
    pub fn new(memory: GuestMemory, layout: Arc<Layout>) -> Result<Self, MachineError> {
        let fits = memory.num_regions() == layout.regions()
            && memory.iter().enumerate().all(|(index, region)| {
                let first = layout.stripe(layout.region_first_stripe(index)).first_frame;
                region.len() == layout.region_pages(index) * PAGE_SIZE as u64
                    && region.start_addr().0 == first * PAGE_SIZE as u64
            });
        if !fits {
            return Err(MachineError::new("the machine's memory is not as its description says"));
        }
        let bases = memory.iter().map(|region| region.get_host_address(MemoryRegionAddress(0)).map(HostAddress));
        let bases = bases
            .collect::<Result<_, _>>()
            .map_err(|error| MachineError::with_source("guest memory has no host address", error))?;
        Ok(Self { memory, layout, bases: Arc::new(bases) })
    }

    /// The memory itself.
    pub fn memory(&self) -> &GuestMemory {
        &self.memory
    }

    /// How it is numbered.
    pub fn layout(&self) -> &Layout {
        &self.layout
    }

    /// The same, to be kept.
    pub fn shared_layout(&self) -> Arc<Layout> {
        Arc::clone(&self.layout)
    }

    /// Copies a page once (volatile: the guest may be writing it).
    pub fn copy_page(&self, stripe: &Stripe, offset: usize, page: &mut Page) {
        debug_assert!(offset < stripe.pages);
        let first = stripe.first_page as usize + offset;
        self.slice(stripe.region, first, 1).copy_to(&mut page[..]);
    }

    /// Writes a page, without marking it dirty.
    pub fn write_page(&self, slot: usize, page: &Page) {
        self.pages(slot, 1).copy_from(&page[..]);
    }

    /// `count` pages from `slot` on, which [`Layout::slot_of`] has found to be RAM of one region. Writes through the
    /// slice are volatile and mark nothing dirty: at the destination there is nobody to tell.
    pub fn pages(&self, slot: usize, count: usize) -> VolatileSlice<'_, ()> {
        let stripe = self.layout.stripe(slot / STRIPE_PAGES);
        self.slice(stripe.region, stripe.first_page as usize + slot % STRIPE_PAGES, count)
    }

    /// Has the kernel provide the memory of `count` pages from `slot` on, which [`Layout::slot_of`] has found to be RAM of one region.
    /// Blocks until it is there. Whatever stands there stays; where nothing does, it reads as zeros, as before. Linux 5.14 and later.
    pub fn populate(&self, slot: usize, count: usize) -> io::Result<()> {
        let pages = self.pages(slot, count);
        // SAFETY: the pages lie in a mapping that `self.memory` keeps; to populate it changes nothing that can be read there, also while
        // others write (madvise(2), MADV_POPULATE_WRITE).
        match unsafe { libc::madvise(pages.ptr_guard_mut().as_ptr().cast(), pages.len(), libc::MADV_POPULATE_WRITE) } {
            0 => Ok(()),
            _ => Err(io::Error::last_os_error()),
        }
    }

    fn slice(&self, region: usize, first_page: usize, count: usize) -> VolatileSlice<'_, ()> {
        assert!((first_page + count) as u64 <= self.layout.region_pages(region), "pages outside of their region");
        // SAFETY: the base is that of a mapping of exactly the region's length (checked in `new`), which `self.memory`
        // keeps for as long as the slice borrows from `self`, and the range was checked to lie within it.
        unsafe { VolatileSlice::new(self.bases[region].0.add(first_page * PAGE_SIZE), count * PAGE_SIZE) }
    }
}
