//! How guest RAM is numbered.
//!
//! Three numbers name a page. Its *frame* (guest-physical address / 4096) is what crosses the wire. Its *region* and
//! the page in it is what the dirty log speaks. Its *slot* is what this engine's own tables are indexed by: regions
//! one after the other, each padded to a whole number of stripes, so that a stripe is always 8 words of a bitmap.

use crate::machine::RegionDescription;
use crate::memory::PAGE_SIZE;

/// Pages in a stripe (2 MiB): the unit that belongs to one channel and is visited as one.
pub const STRIPE_PAGES: usize = 512;
/// Bitmap words in a stripe.
pub const STRIPE_WORDS: usize = STRIPE_PAGES / 64;
/// The dirty bits of one stripe.
pub type StripeBits = [u64; STRIPE_WORDS];

/// The most RAM that a description may ask for: 64 TiB. Bounds what a peer can make us reckon with.
pub const MAX_MEMORY_BYTES: u64 = 64 << 40;
/// The most regions that a description may have.
pub const MAX_REGIONS: usize = 64;

/// Why a memory layout from a peer is no layout.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum LayoutError {
    /// None, or more than [`MAX_REGIONS`].
    #[error("{0} memory regions; 1 to {MAX_REGIONS} are possible")]
    RegionCount(usize),
    /// Address or size is not a multiple of the page size, or the size is 0.
    #[error("memory region at {0:#x} of {1:#x} bytes is not made of whole pages")]
    Unaligned(u64, u64),
    /// Not in ascending order, or overlapping.
    #[error("memory region at {0:#x} overlaps the one before it or is out of order")]
    Overlap(u64),
    /// More than [`MAX_MEMORY_BYTES`], or beyond the address space.
    #[error("memory region at {0:#x} of {1:#x} bytes is too large")]
    TooLarge(u64, u64),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Region {
    first_frame: u64,
    pages: u64,
    first_stripe: usize,
}

/// The regions of guest RAM, cut into stripes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Layout {
    regions: Vec<Region>,
    stripes: usize,
}

/// Up to 2 MiB of guest RAM.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Stripe {
    /// Number of the region.
    pub region: usize,
    /// Its first page, counted from the start of the region.
    pub first_page: u64,
    /// Its first frame.
    pub first_frame: u64,
    /// Its first slot.
    pub first_slot: usize,
    /// Pages in it; only a region's last stripe has fewer than [`STRIPE_PAGES`].
    pub pages: usize,
}

impl Layout {
    /// Checks a description's regions and numbers their pages.
    pub fn new(regions: &[RegionDescription]) -> Result<Self, LayoutError> {
        if regions.is_empty() || regions.len() > MAX_REGIONS {
            return Err(LayoutError::RegionCount(regions.len()));
        }
        let mut layout = Self { regions: Vec::with_capacity(regions.len()), stripes: 0 };
        let (mut free_from, mut total) = (0u64, 0u64);
        for region in regions {
            let (address, size) = (region.guest_address, region.size_bytes);
            if size == 0 || address % PAGE_SIZE as u64 != 0 || size % PAGE_SIZE as u64 != 0 {
                return Err(LayoutError::Unaligned(address, size));
            }
            if address < free_from {
                return Err(LayoutError::Overlap(address));
            }
            free_from = address.checked_add(size).ok_or(LayoutError::TooLarge(address, size))?;
            total = total.saturating_add(size);
            if total > MAX_MEMORY_BYTES {
                return Err(LayoutError::TooLarge(address, size));
            }
            let pages = size / PAGE_SIZE as u64;
            layout.regions.push(Region {
                first_frame: address / PAGE_SIZE as u64,
                pages,
                first_stripe: layout.stripes,
            });
            layout.stripes += pages.div_ceil(STRIPE_PAGES as u64) as usize;
        }
        Ok(layout)
    }

    /// Number of stripes.
    pub fn stripes(&self) -> usize {
        self.stripes
    }

    /// Number of slots: stripes × 512, the padding of short stripes included.
    pub fn slots(&self) -> usize {
        self.stripes * STRIPE_PAGES
    }

    /// Number of pages.
    pub fn pages(&self) -> u64 {
        self.regions.iter().map(|region| region.pages).sum()
    }

    /// Number of regions.
    pub fn regions(&self) -> usize {
        self.regions.len()
    }

    /// Pages in a region.
    pub fn region_pages(&self, region: usize) -> u64 {
        self.regions[region].pages
    }

    /// The first stripe of a region.
    pub fn region_first_stripe(&self, region: usize) -> usize {
        self.regions[region].first_stripe
    }

    /// Stripe number `index`, which must be less than [`Layout::stripes`].
    pub fn stripe(&self, index: usize) -> Stripe {
        let region = self.regions.partition_point(|region| region.first_stripe <= index) - 1;
        let Region { first_frame, pages, first_stripe } = self.regions[region];
        let first_page = ((index - first_stripe) * STRIPE_PAGES) as u64;
        Stripe {
            region,
            first_page,
            first_frame: first_frame + first_page,
            first_slot: index * STRIPE_PAGES,
            pages: (pages - first_page).min(STRIPE_PAGES as u64) as usize,
        }
    }

    /// The slot of the first of `count` consecutive frames, if all of them are RAM of one region.
    pub fn slot_of(&self, frame: u64, count: u64) -> Option<usize> {
        let region = self.regions.partition_point(|region| region.first_frame <= frame).checked_sub(1)?;
        let Region { first_frame, pages, first_stripe } = self.regions[region];
        let page = frame - first_frame;
        let end = page.checked_add(count)?;
        (end <= pages).then_some(first_stripe * STRIPE_PAGES + page as usize)
    }

    /// The stripe that a slot lies in.
    pub fn stripe_of_slot(slot: usize) -> usize {
        slot / STRIPE_PAGES
    }
}

impl Stripe {
    /// One bit for each of its pages.
    pub fn all(&self) -> StripeBits {
        std::array::from_fn(|word| match self.pages.saturating_sub(word * 64) {
            0 => 0,
            rest @ 1..64 => (1 << rest) - 1,
            _ => u64::MAX,
        })
    }
}

/// The positions of the bits that are set, ascending.
pub fn set_bits(bits: &StripeBits) -> impl Iterator<Item = usize> + '_ {
    bits.iter().enumerate().flat_map(|(index, &word)| {
        std::iter::successors(Some(word), |rest| Some(rest & rest.wrapping_sub(1)))
            .take_while(|rest| *rest != 0)
            .map(move |rest| index * 64 + rest.trailing_zeros() as usize)
    })
}

/// Clears the lowest bit that is set and returns its position.
pub fn take_first_bit(bits: &mut StripeBits) -> Option<usize> {
    let (index, word) = bits.iter_mut().enumerate().find(|(_, word)| **word != 0)?;
    let bit = word.trailing_zeros() as usize;
    *word &= *word - 1;
    Some(index * 64 + bit)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn region(guest_address: u64, size_bytes: u64) -> RegionDescription {
        RegionDescription { guest_address, size_bytes }
    }

    #[test]
    fn numbers_pages_across_a_gap() {
        let layout = Layout::new(&[region(0, 3 << 20), region(4 << 30, 1 << 20)]).unwrap();
        assert_eq!((layout.stripes(), layout.pages()), (3, 1024));
        assert_eq!(
            layout.stripe(1),
            Stripe { region: 0, first_page: 512, first_frame: 512, first_slot: 512, pages: 256 }
        );
        assert_eq!(layout.stripe(2).first_frame, (4 << 30) / 4096);
        assert_eq!(layout.slot_of((4 << 30) / 4096, 256), Some(1024));
        assert_eq!(layout.slot_of((4 << 30) / 4096, 257), None);
        assert_eq!(layout.slot_of(767, 2), None, "a run never crosses the end of a region");
        assert_eq!(layout.slot_of(u64::MAX, u64::MAX), None);
    }

    #[test]
    fn refuses_what_is_no_layout() {
        assert!(Layout::new(&[]).is_err());
        assert!(Layout::new(&[region(0, 0)]).is_err());
        assert!(Layout::new(&[region(1, 4096)]).is_err());
        assert!(Layout::new(&[region(0, 8192), region(4096, 4096)]).is_err());
        assert!(Layout::new(&[region(u64::MAX - 4095, 8192)]).is_err());
        assert!(Layout::new(&[region(0, 1 << 60)]).is_err());
    }

    proptest! {
        #[test]
        fn every_frame_has_one_slot(sizes in prop::collection::vec((1u64..2000, 0u64..3000), 1..6)) {
            let mut address = 0;
            let regions: Vec<_> = sizes.iter().map(|&(pages, gap)| {
                let made = region(address, pages * 4096);
                address += (pages + gap) * 4096;
                made
            }).collect();
            let layout = Layout::new(&regions).unwrap();
            let mut seen = 0;
            for index in 0..layout.stripes() {
                let stripe = layout.stripe(index);
                for offset in set_bits(&stripe.all()) {
                    let slot = layout.slot_of(stripe.first_frame + offset as u64, 1);
                    prop_assert_eq!(slot, Some(index * STRIPE_PAGES + offset));
                    seen += 1;
                }
            }
            prop_assert_eq!(seen, layout.pages());
        }

        #[test]
        fn set_bits_are_those_that_are_set(bits in prop::array::uniform8(any::<u64>())) {
            let found: Vec<_> = set_bits(&bits).collect();
            let expected: Vec<_> = (0..512).filter(|bit| bits[bit / 64] >> (bit % 64) & 1 == 1).collect();
            prop_assert_eq!(&found, &expected);
            let mut rest = bits;
            let taken: Vec<_> = std::iter::from_fn(|| take_first_bit(&mut rest)).collect();
            prop_assert_eq!(taken, expected);
        }
    }
}
