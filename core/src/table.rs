//! The table of page hashes that both ends keep (invariant 4: what arrived is what was last sent).
//!
//! Each end holds 8 bytes for every page: a 64-bit hash of what was last sent, or applied, there. The hash is XXH3
//! seeded per move and bound to the frame number, so that two pages cannot change places. What the two ends compare
//! is the sum of all entries modulo 2^64, kept up as pages pass so that nothing is added up in the pause.

use std::sync::atomic::{AtomicU64, Ordering};

use twox_hash::XxHash3_64;

use crate::layout::Layout;
use crate::memory::PAGE_SIZE;

/// The contents of one page.
pub type Page = [u8; PAGE_SIZE];

/// Never sent: the destination's page is as it was made, zero.
const NEVER: u64 = 0;

/// Half written: equal to no contents, so that whatever comes next is written.
const TORN: u64 = u64::MAX;

/// Hashes pages for one move.
#[derive(Debug, Clone, Copy)]
pub struct PageHasher {
    seed: u64,
    zero: u64,
    verify: bool,
}

impl PageHasher {
    /// A hasher for the move that `seed` was drawn for. Without `verify` it does not read contents: entries then only
    /// tell pages of zeros from others.
    pub fn new(seed: u64, verify: bool) -> Self {
        Self { seed, zero: XxHash3_64::oneshot_with_seed(seed, &[0; PAGE_SIZE]), verify }
    }

    /// The entry for a page with these contents.
    pub fn page(&self, frame: u64, page: &Page) -> u64 {
        match self.verify {
            true => bind(XxHash3_64::oneshot_with_seed(self.seed, page), frame),
            false => match self.zero(frame) ^ 1 {
                NEVER | TORN => 2,
                entry => entry,
            },
        }
    }

    /// The entry for a page of zeros.
    pub fn zero(&self, frame: u64) -> u64 {
        bind(self.zero, frame)
    }
}

/// Binds a content hash to a frame: the finaliser of splitmix64 (Steele et al., 2014) over their combination.
/// Never [`NEVER`] or [`TORN`].
fn bind(hash: u64, frame: u64) -> u64 {
    let mut x = hash ^ frame.wrapping_mul(0x9e37_79b9_7f4a_7c15);
    x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    (x ^ (x >> 31)).clamp(NEVER + 1, TORN - 1)
}

/// What an entry has given way to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Replaced {
    /// By how much the table's sum grew (modulo 2^64).
    pub growth: u64,
    /// Whether the page had been sent or applied before.
    pub was_sent: bool,
}

/// One entry for every slot. Entries of one stripe are written by one thread at a time: the stripe's channel's.
#[derive(Debug)]
pub struct PageTable {
    entries: Vec<AtomicU64>,
}

impl PageTable {
    /// A table in which nothing was ever sent.
    pub fn new(layout: &Layout) -> Self {
        Self { entries: (0..layout.slots()).map(|_| AtomicU64::new(NEVER)).collect() }
    }

    /// Records what was sent or applied.
    pub fn set(&self, slot: usize, entry: u64) -> Replaced {
        let before = self.entries[slot].swap(entry, Ordering::Relaxed);
        Replaced { growth: entry.wrapping_sub(before), was_sent: before != NEVER }
    }

    /// Records that nobody knows what a page contains: its link broke while it was being written.
    pub fn set_torn(&self, slot: usize) -> Replaced {
        self.set(slot, TORN)
    }

    /// Whether nobody knows what a page contains.
    pub fn is_torn(&self, slot: usize) -> bool {
        self.entries[slot].load(Ordering::Relaxed) == TORN
    }

    /// The entry of a page, `None` if it was never sent.
    pub fn entry(&self, slot: usize) -> Option<u64> {
        match self.entries[slot].load(Ordering::Relaxed) {
            NEVER => None,
            entry => Some(entry),
        }
    }

    /// The sum of all entries modulo 2^64, added up afresh.
    #[cfg(test)]
    pub fn sum(&self) -> u64 {
        self.entries.iter().fold(0, |sum, entry| sum.wrapping_add(entry.load(Ordering::Relaxed)))
    }
}

/// Whether a page is all zeros.
pub fn is_zero(page: &Page) -> bool {
    // In blocks, so that the compiler vectorises each and a page that differs early is left early.
    page.chunks_exact(256).all(|block| block.iter().fold(0, |all, byte| all | byte) == 0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::machine::RegionDescription;
    use proptest::prelude::*;

    #[test]
    fn an_entry_depends_on_seed_frame_and_every_bit() {
        let hasher = PageHasher::new(7, true);
        let mut page = [0; PAGE_SIZE];
        assert_eq!(hasher.page(3, &page), hasher.zero(3));
        assert_ne!(hasher.zero(3), hasher.zero(4));
        assert_ne!(hasher.zero(3), PageHasher::new(8, true).zero(3));
        page[4095] = 1;
        assert_ne!(hasher.page(3, &page), hasher.zero(3));
    }

    #[test]
    fn zero_test_sees_every_byte() {
        let mut page = [0; PAGE_SIZE];
        assert!(is_zero(&page));
        for index in 0..PAGE_SIZE {
            page[index] = 0x80;
            assert!(!is_zero(&page), "byte {index}");
            page[index] = 0;
        }
    }

    proptest! {
        #[test]
        fn growth_adds_up_to_the_sum(writes in prop::collection::vec((0usize..512, 1u64..), 0..200)) {
            let layout = Layout::new(&[RegionDescription { guest_address: 0, size_bytes: 2 << 20 }]).unwrap();
            let table = PageTable::new(&layout);
            let kept = writes.iter().fold(0u64, |sum, &(slot, entry)| sum.wrapping_add(table.set(slot, entry).growth));
            prop_assert_eq!(kept, table.sum());
        }
    }
}
