//! The pages that are still to be sent.

use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering};

use vm_memory::{GuestMemoryBackend, GuestRegionMmap, MmapRegion};

use crate::bitmap::PageBits;
use crate::layout::{Layout, STRIPE_WORDS, StripeBits};
use crate::machine::{DirtyLog, MachineError};
use crate::memory::GuestMemory;
use crate::plants::{Plant, planted};

/// From how many pages in a stripe on that the VMM has marked since the last harvest some may have been discarded: a guest gives
/// back large pieces, devices write small ones, and looking for holes costs time.
const HOLES_FROM_PAGES: u32 = 64;

/// One bit for every slot: set by harvests, taken by the channels' workers.
///
/// The order that loses nothing: a worker takes a stripe's bits, clears exactly those in the dirty log, and copies
/// the pages last. A write after the clear is logged again; one before it is in the copy. Harvests only OR bits in.
#[derive(Debug)]
pub struct Pending {
    bits: PageBits,
    /// Stripes in which pages may have been discarded since they were last visited.
    holes: Vec<AtomicBool>,
}

impl Pending {
    /// Nothing pending.
    pub fn new(layout: &Layout) -> Self {
        Self {
            bits: PageBits::new(layout.stripes()),
            holes: (0..layout.stripes()).map(|_| AtomicBool::new(false)).collect(),
        }
    }

    /// Marks every page.
    pub fn fill(&self, layout: &Layout) {
        for index in 0..layout.stripes() {
            self.merge(index, &layout.stripe(index).all());
        }
    }

    /// ORs bits into a stripe. Returns how many were not set before.
    pub fn merge(&self, stripe: usize, bits: &StripeBits) -> u64 {
        if planted(Plant::HarvestOverwrites) {
            self.bits.take(stripe);
        }
        self.bits.set(stripe, bits)
    }

    /// The first stripe from `from` on that may have something pending, of those that are a multiple of `step` away from it.
    pub fn next(&self, from: usize, step: usize) -> Option<usize> {
        self.bits.next(from, step)
    }

    /// Takes a stripe's bits, leaving none.
    pub fn take(&self, stripe: usize) -> StripeBits {
        self.bits.take(stripe)
    }

    /// Takes the bits in some of a stripe's words, leaving the others.
    pub fn take_words(&self, stripe: usize, words: Range<usize>) -> StripeBits {
        self.bits.take_words(stripe, words)
    }

    /// Whether pages of a stripe may have been discarded since this was last asked.
    pub fn take_holes(&self, stripe: usize) -> bool {
        self.holes[stripe].swap(false, Ordering::AcqRel)
    }

    /// A stripe's bits, which stay.
    pub fn get(&self, stripe: usize) -> StripeBits {
        self.bits.get(stripe)
    }

    /// The stripes that may have something pending.
    pub fn stripes(&self) -> impl Iterator<Item = usize> + '_ {
        self.bits.stripes()
    }

    /// Forgets all of it.
    pub fn clear(&self) {
        self.bits.clear();
    }

    /// Pages pending.
    pub fn count(&self) -> u64 {
        self.bits.count()
    }
}

/// Collects dirty bits from the two places where they arise: the dirty log for the guest's own writes, and the memory's
/// bitmap for the writes that the VMM made on its devices' behalf (invariant 3: no byte is lost).
pub struct Harvester {
    /// Zeros between harvests.
    words: Vec<Vec<u64>>,
}

impl Harvester {
    /// A harvester for memory of this layout.
    pub fn new(layout: &Layout) -> Self {
        let words = (0..layout.regions()).map(|region| vec![0; layout.region_pages(region).div_ceil(64) as usize]);
        Self { words: words.collect() }
    }

    /// ORs all that is dirty into `pending` and returns how many pages that adds. Clears the VMM's bitmap, whose bits are now
    /// pending, but nothing in the log.
    pub fn harvest(
        &mut self,
        layout: &Layout,
        log: &dyn DirtyLog,
        memory: &GuestMemory,
        pending: &Pending,
    ) -> Result<u64, MachineError> {
        let mut added = 0;
        for (region, (words, mapping)) in self.words.iter_mut().zip(memory.iter()).enumerate() {
            log.harvest(region, words)?;
            let first_stripe = layout.region_first_stripe(region);
            let mut merge = |index: usize, mut bits: StripeBits| {
                let stripe = first_stripe + index;
                bits.iter_mut().zip(layout.stripe(stripe).all()).for_each(|(word, all)| *word &= all);
                added += pending.merge(stripe, &bits);
            };
            for (index, chunk) in words.chunks_mut(STRIPE_WORDS).enumerate() {
                // All words at once, which the compiler vectorises: in an idle round this is all there is.
                if chunk.iter().fold(0, |any, word| any | word) != 0 || planted(Plant::HarvestOverwrites) {
                    let mut bits = StripeBits::default();
                    bits[..chunk.len()].copy_from_slice(chunk);
                    chunk.fill(0);
                    merge(index, bits);
                }
            }
            if !planted(Plant::ForgetVmmWrites) {
                let written = vmm_writes(mapping);
                for index in written.stripes() {
                    let bits = written.take(index);
                    if bits.iter().map(|word| word.count_ones()).sum::<u32>() >= HOLES_FROM_PAGES {
                        pending.holes[first_stripe + index].store(true, Ordering::Release);
                    }
                    merge(index, bits);
                }
            }
        }
        Ok(added)
    }
}

/// What the VMM wrote. Its page size is the host's base page size, which is that of the dirty log on x86-64.
fn vmm_writes(region: &GuestRegionMmap<PageBits>) -> &PageBits {
    let region: &MmapRegion<PageBits> = region;
    region.bitmap()
}

/// Forgets what the VMM wrote so far: everything is about to be sent anyway.
pub fn forget_vmm_writes(memory: &GuestMemory) {
    memory.iter().for_each(|region| vmm_writes(region).clear());
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bitmap::tests::WORDS_READ;
    use crate::layout::set_bits;
    use crate::machine::RegionDescription;
    use vm_memory::{Bytes, GuestAddress};

    /// A log that reports the same pages for ever.
    struct Fixed(Vec<Vec<u64>>);

    impl DirtyLog for Fixed {
        fn start(&self) -> Result<(), MachineError> {
            Ok(())
        }
        fn stop(&self) -> Result<(), MachineError> {
            Ok(())
        }
        fn harvest(&self, region: usize, words: &mut [u64]) -> Result<(), MachineError> {
            words.iter_mut().zip(&self.0[region]).for_each(|(word, dirty)| *word |= dirty);
            Ok(())
        }
        fn clear(&self, _: usize, _: u64, _: &[u64]) -> Result<(), MachineError> {
            Ok(())
        }
    }

    #[test]
    fn invariant_3_guest_and_vmm_writes_are_both_harvested_and_nothing_is_taken_twice() {
        let ranges = [(0u64, 3 << 20), (4 << 30, 1 << 20)];
        let regions: Vec<_> = ranges
            .iter()
            .map(|&(guest_address, size)| RegionDescription { guest_address, size_bytes: size as u64 })
            .collect();
        let layout = Layout::new(&regions).unwrap();
        let memory = GuestMemory::from_ranges(&ranges.map(|(address, size)| (GuestAddress(address), size))).unwrap();
        forget_vmm_writes(&memory);
        memory.write_obj(1u8, GuestAddress(600 * 4096)).unwrap();
        memory.write_obj(1u8, GuestAddress((4 << 30) + 5 * 4096)).unwrap();
        let mut log = Fixed(vec![vec![0; 12], vec![0; 4]]);
        log.0[0][0] = 0b10;
        log.0[1][3] = 1 << 63;
        let pending = Pending::new(&layout);
        let mut harvester = Harvester::new(&layout);
        harvester.harvest(&layout, &log, &memory, &pending).unwrap();
        assert_eq!(pending.count(), 4);
        let take = |stripe| set_bits(&pending.take(stripe)).collect::<Vec<_>>();
        assert_eq!((take(0), take(1), take(2)), (vec![1], vec![88], vec![5, 255]));
        assert_eq!(pending.count(), 0);
        harvester.harvest(&layout, &log, &memory, &pending).unwrap();
        assert_eq!(pending.count(), 2, "the VMM's writes were taken, the log's are not cleared by a harvest");
    }

    /// What does not shrink with the number of dirty pages is one pass over the log's words. All else that a round does to bits
    /// goes by the upper level.
    #[test]
    fn an_idle_round_over_a_tebibyte_reads_a_word_for_128_mib() {
        const BYTES: u64 = 1 << 40;
        let layout = Layout::new(&[RegionDescription { guest_address: 0, size_bytes: BYTES }]).unwrap();
        // Nobody touches it: only its bitmap takes up memory.
        let memory = GuestMemory::from_ranges(&[(GuestAddress(0), BYTES as usize)]).unwrap();
        let (pending, mut harvester) = (Pending::new(&layout), Harvester::new(&layout));
        let mut round = |log: &dyn DirtyLog, channels: usize| {
            let before = WORDS_READ.get();
            let added = harvester.harvest(&layout, log, &memory, &pending).unwrap();
            assert_eq!(pending.count(), added);
            for channel in 0..channels {
                let mut from = channel;
                while let Some(stripe) = pending.next(from, channels) {
                    pending.take(stripe);
                    from = stripe + channels;
                }
            }
            assert_eq!(pending.count(), 0);
            (added, WORDS_READ.get() - before)
        };
        let idle = Fixed(vec![vec![]]);
        let upper_words = (BYTES >> 27) as usize;
        for channels in [1, 4] {
            // Those of the VMM's writes, of what is pending for each channel, and of it for both counts.
            assert_eq!(round(&idle, channels), (0, upper_words * (3 + channels)));
        }
        (0..100u64).for_each(|page| memory.write_obj(1u8, GuestAddress(page << 33)).unwrap());
        let (added, read) = round(&idle, 1);
        assert!(added == 100 && read < upper_words * 4 + 100 * 40, "{added}: {read}");
        assert_eq!(round(&idle, 1), (0, upper_words * 4), "what was taken is not looked at again");
    }

    #[test]
    fn holes_are_looked_for_where_the_vmm_has_marked_many_pages() {
        let regions = [RegionDescription { guest_address: 0, size_bytes: 6 << 20 }];
        let layout = Layout::new(&regions).unwrap();
        let memory = GuestMemory::from_ranges(&[(GuestAddress(0), 6 << 20)]).unwrap();
        forget_vmm_writes(&memory);
        // A few pages of the first stripe, none of the second, a large piece of the third.
        memory.write_slice(&[0; 63 << 12], GuestAddress(0)).unwrap();
        memory.write_slice(&[0; 64 << 12], GuestAddress((4 << 20) + (100 << 12))).unwrap();
        let pending = Pending::new(&layout);
        Harvester::new(&layout).harvest(&layout, &Fixed(vec![vec![!0; 24]]), &memory, &pending).unwrap();
        assert_eq!([0, 1, 2].map(|stripe| pending.take_holes(stripe)), [false, false, true]);
        assert!(!pending.take_holes(2));
    }

    #[test]
    fn fill_marks_every_page_and_no_padding() {
        let layout = Layout::new(&[RegionDescription { guest_address: 0, size_bytes: 700 * 4096 }]).unwrap();
        let pending = Pending::new(&layout);
        pending.fill(&layout);
        assert_eq!(pending.count(), 700);
    }
}
