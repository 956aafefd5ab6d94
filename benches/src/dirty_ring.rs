//! KVM's dirty ring: a vCPU's list of the pages that it has written, as an alternative to the dirty bitmap.
//!
//! KVM appends a page when the vCPU writes it for the first time since it was protected. Whoever reads the ring marks entries as harvested, in order;
//! KVM_RESET_DIRTY_RINGS then protects their pages again and frees their places. A vCPU whose ring is full leaves KVM_RUN. See the kernel's
//! documentation, virt/kvm/api.rst, KVM_CAP_DIRTY_LOG_RING.

use std::io;
use std::os::fd::AsRawFd;
use std::ptr::{self, NonNull};
use std::slice;
use std::sync::atomic::Ordering::{Acquire, Relaxed, Release};
use std::sync::atomic::{AtomicU32, AtomicU64};

use kvm_bindings::{KVM_DIRTY_LOG_PAGE_OFFSET, KVMIO, kvm_dirty_gfn};
use kvm_ioctls::{VcpuFd, VmFd};
use vmm_sys_util::ioctl::ioctl;
use vmm_sys_util::ioctl_io_nr;

/// Private: what the macro makes has no documentation.
mod request {
    use super::*;

    ioctl_io_nr!(KVM_RESET_DIRTY_RINGS, KVMIO, 0xc7);
}

/// `KVM_DIRTY_GFN_F_DIRTY` and `KVM_DIRTY_GFN_F_RESET` (not in kvm-bindings): KVM has filled the entry in; it has been harvested.
const DIRTY: u32 = 1 << 0;
const HARVESTED: u32 = 1 << 1;

const PAGE_BYTES: usize = 4096;

/// Bytes of one entry: a ring is sized in bytes when it is enabled.
pub const ENTRY_BYTES: usize = size_of::<kvm_dirty_gfn>();

/// `struct kvm_dirty_gfn`. The kernel writes it while we read, so that every field is atomic.
#[repr(C)]
#[derive(Debug, Default)]
struct Entry {
    flags: AtomicU32,
    slot: AtomicU32,
    offset: AtomicU64,
}

const _: () = assert!(size_of::<Entry>() == ENTRY_BYTES && align_of::<Entry>() == align_of::<kvm_dirty_gfn>());

/// A page that was written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DirtyPage {
    /// The memory slot.
    pub slot: u32,
    /// The page's number in the slot.
    pub offset: u64,
}

/// The ring of one vCPU.
#[derive(Debug)]
pub struct DirtyRing {
    entries: NonNull<Entry>,
    length: usize,
    next: usize,
}

// SAFETY: the mapping belongs to the process, not to a thread, and is only reached through the ring.
unsafe impl Send for DirtyRing {}

impl DirtyRing {
    /// Maps the ring of `vcpu`, whose VM was created with rings of `length` entries.
    pub fn map(vcpu: &VcpuFd, length: usize) -> io::Result<Self> {
        let offset = KVM_DIRTY_LOG_PAGE_OFFSET as libc::off_t * PAGE_BYTES as libc::off_t;
        let (protection, flags) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_SHARED);
        // SAFETY: a new mapping at an address of the kernel's choice touches no other memory.
        let mapped =
            unsafe { libc::mmap(ptr::null_mut(), length * ENTRY_BYTES, protection, flags, vcpu.as_raw_fd(), offset) };
        match NonNull::new(mapped) {
            Some(entries) if mapped != libc::MAP_FAILED => Ok(Self { entries: entries.cast(), length, next: 0 }),
            _ => Err(io::Error::last_os_error()),
        }
    }

    /// Harvests what is new: how many pages. Their places are free again after [`reset`].
    pub fn harvest(&mut self, page: impl FnMut(DirtyPage)) -> usize {
        // SAFETY: the mapping has this many entries and lives as long as `self`; any bit pattern is a valid entry.
        let entries = unsafe { slice::from_raw_parts(self.entries.as_ptr(), self.length) };
        harvest(entries, &mut self.next, page)
    }
}

impl Drop for DirtyRing {
    fn drop(&mut self) {
        // SAFETY: mapped by `map`, and nothing refers to it any more.
        unsafe { libc::munmap(self.entries.as_ptr().cast(), self.length * ENTRY_BYTES) };
    }
}

/// Protects all pages again that have been harvested from any ring of the VM: how many.
pub fn reset(vm: &VmFd) -> io::Result<usize> {
    // SAFETY: the call takes no argument.
    let pages = unsafe { ioctl(vm, request::KVM_RESET_DIRTY_RINGS()) };
    usize::try_from(pages).map_err(|_| io::Error::last_os_error())
}

/// Harvests entries from the one with the number `next` on, round and round, until one has nothing new.
fn harvest(entries: &[Entry], next: &mut usize, mut page: impl FnMut(DirtyPage)) -> usize {
    let mut harvested = 0;
    // At most once round: what has been harvested is not dirty any more before a reset.
    while let Some(entry) = entries.get(*next % entries.len().max(1)) {
        // KVM sets the flag after it has filled in the rest.
        if entry.flags.load(Acquire) & (DIRTY | HARVESTED) != DIRTY {
            break;
        }
        page(DirtyPage { slot: entry.slot.load(Relaxed), offset: entry.offset.load(Relaxed) });
        // From here on KVM may use the entry anew.
        entry.flags.store(HARVESTED, Release);
        *next = next.wrapping_add(1);
        harvested += 1;
    }
    harvested
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// KVM's side of a ring.
    struct Kernel {
        entries: Vec<Entry>,
        written: usize,
        reset: usize,
    }

    impl Kernel {
        fn new(length: usize) -> Self {
            Self { entries: (0..length).map(|_| Entry::default()).collect(), written: 0, reset: 0 }
        }

        /// False if the ring is full.
        fn push(&mut self, offset: u64) -> bool {
            if self.written - self.reset == self.entries.len() {
                return false;
            }
            let entry = &self.entries[self.written % self.entries.len()];
            entry.slot.store(3, Relaxed);
            entry.offset.store(offset, Relaxed);
            entry.flags.store(DIRTY, Release);
            self.written += 1;
            true
        }

        fn reset(&mut self) -> usize {
            let before = self.reset;
            while self.entries[self.reset % self.entries.len()].flags.load(Acquire) & HARVESTED != 0 {
                self.entries[self.reset % self.entries.len()].flags.store(0, Release);
                self.reset += 1;
            }
            self.reset - before
        }
    }

    #[test]
    fn a_full_ring_is_harvested_once() {
        let mut kernel = Kernel::new(4);
        let mut next = 0;
        assert!((0..4).all(|page| kernel.push(page)) && !kernel.push(4));
        let mut pages = Vec::new();
        assert_eq!(harvest(&kernel.entries, &mut next, |page| pages.push(page)), 4);
        assert_eq!(pages, [0, 1, 2, 3].map(|offset| DirtyPage { slot: 3, offset }));
        assert_eq!(harvest(&kernel.entries, &mut next, |_| ()), 0, "nothing is found twice");
        assert!(!kernel.push(4), "the places are free after a reset only");
        assert_eq!(kernel.reset(), 4);
        assert!(kernel.push(4));
        assert_eq!(harvest(&kernel.entries, &mut next, |_| ()), 1);
    }

    #[test]
    fn a_ring_without_entries_has_nothing() {
        assert_eq!(harvest(&[], &mut 0, |_| ()), 0);
    }

    proptest! {
        #[test]
        fn every_page_is_found_once_and_in_order(length in 1usize..40, steps in prop::collection::vec(0u8..4, 0..400)) {
            let mut kernel = Kernel::new(length);
            let (mut next, mut pushed, mut found) = (0, Vec::new(), Vec::new());
            for step in steps {
                match step {
                    0 | 1 => {
                        let page = pushed.len() as u64;
                        if kernel.push(page) {
                            pushed.push(page);
                        }
                    }
                    2 => { harvest(&kernel.entries, &mut next, |page| found.push(page.offset)); }
                    _ => { kernel.reset(); }
                }
            }
            harvest(&kernel.entries, &mut next, |page| found.push(page.offset));
            prop_assert_eq!(found, pushed);
        }
    }
}
