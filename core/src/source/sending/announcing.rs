//! In the first pass, what comes next: so that the destination can make memory ready before the pages are there.

use super::SourcePages;
use crate::encoder::ChannelEncoder;
use crate::layout::{STRIPE_PAGES, Stripe};
use crate::table::{Page, is_zero};

/// How far ahead, in stripes of a channel. Huge pages are made several times as fast as a link fills them: 32 MiB give whoever makes
/// them the time to be kept from a core for a while.
const AHEAD: usize = 16;

/// How many pages of a stripe are looked at. It is announced if at least half of them hold something: then it has been touched all over, and the
/// destination needs no more memory for all of it than the source has.
const LOOKED_AT: usize = 8;

/// What a channel has announced.
#[derive(Debug, Clone, Copy)]
pub(super) struct Announcing {
    /// The destination knows what to do with it.
    wanted: bool,
    /// The stripes of the channel before this one were looked at.
    looked_until: usize,
}

impl Announcing {
    pub(super) fn new(wanted: bool) -> Self {
        Self { wanted, looked_until: 0 }
    }

    /// Stripe `index` is about to be sent: announces what follows it on the same channel. Each stripe is looked at once.
    pub(super) fn announce(&mut self, index: usize, pages: &SourcePages, encoder: &mut ChannelEncoder) {
        if !self.wanted {
            return;
        }
        let layout = pages.view.layout();
        let from = self.looked_until.max(index + pages.channels);
        let until = index + AHEAD * pages.channels + 1;
        self.looked_until = self.looked_until.max(until);
        for next in (index..until.min(layout.stripes())).step_by(pages.channels).filter(|next| *next >= from) {
            let stripe = layout.stripe(next);
            if is_full(&stripe, pages) {
                encoder.coming(stripe.first_frame, stripe.pages);
            }
        }
    }
}

/// Whether a stripe holds something all over, by a few of its pages.
fn is_full(stripe: &Stripe, pages: &SourcePages) -> bool {
    let mut page: Page = [0; _];
    let holds = |offset: &usize| {
        let offset = *offset;
        let alone = Stripe {
            first_page: stripe.first_page + offset as u64,
            first_frame: stripe.first_frame + offset as u64,
            first_slot: stripe.first_slot + offset,
            pages: 1,
            ..*stripe
        };
        // What was never touched is not read: that would make the kernel provide it.
        pages.touched.of(&alone)[0] & 1 == 1 && {
            pages.view.copy_page(stripe, offset, &mut page);
            !is_zero(&page)
        }
    };
    let looked_at = (0..stripe.pages).step_by(STRIPE_PAGES / LOOKED_AT);
    looked_at.filter(holds).take(LOOKED_AT / 2).count() == LOOKED_AT / 2
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use vm_memory::GuestAddress;

    use super::*;
    use crate::chunk::Chunk;
    use crate::layout::{Layout, StripeBits};
    use crate::machine::RegionDescription;
    use crate::memory::{GuestMemory, PAGE_SIZE};
    use crate::pending::Pending;
    use crate::table::{PageHasher, PageTable};
    use crate::touched::TouchedPages;
    use crate::view::MemoryView;

    const STRIPES: usize = 3 * AHEAD;
    const CHANNELS: usize = 2;

    /// Every third stripe was never touched.
    struct TwoOfThree;

    impl TouchedPages for TwoOfThree {
        fn of(&self, stripe: &Stripe) -> StripeBits {
            match stripe.first_slot / STRIPE_PAGES % 3 {
                2 => StripeBits::default(),
                _ => stripe.all(),
            }
        }
    }

    fn pages() -> SourcePages {
        let size = STRIPES * STRIPE_PAGES * PAGE_SIZE;
        let layout = Arc::new(Layout::new(&[RegionDescription { guest_address: 0, size_bytes: size as u64 }]).unwrap());
        let memory = GuestMemory::from_ranges(&[(GuestAddress(0), size)]).unwrap();
        let view = MemoryView::new(memory, Arc::clone(&layout)).unwrap();
        for slot in (0..layout.slots()).step_by(STRIPE_PAGES / LOOKED_AT) {
            view.write_page(slot, &[1; PAGE_SIZE]);
        }
        SourcePages {
            view,
            pending: Pending::new(&layout),
            table: PageTable::new(&layout),
            hasher: PageHasher::new(1, true),
            touched: Box::new(TwoOfThree),
            channels: CHANNELS,
        }
    }

    #[test]
    fn each_stripe_of_the_channel_is_announced_once_and_not_long_before_it_is_sent() {
        let pages = pages();
        let mut encoder = ChannelEncoder::new(None).unwrap();
        let mut announcing = Announcing::new(true);
        let mut announced = Vec::new();
        for index in (1..STRIPES).step_by(CHANNELS) {
            announcing.announce(index, &pages, &mut encoder);
            let new = encoder.bytes().as_chunks().0.iter().map(|header| match Chunk::decode(header) {
                Ok(Chunk::Coming { frame, pages: STRIPE_PAGES }) => frame as usize / STRIPE_PAGES,
                other => panic!("{other:?}"),
            });
            let new: Vec<usize> = new.collect();
            assert!(
                new.iter().all(|stripe| (index + 1..=index + AHEAD * CHANNELS).contains(stripe)),
                "{index}: {new:?}"
            );
            announced.extend(new);
            encoder.clear();
        }
        let expected: Vec<usize> = (3..STRIPES).step_by(CHANNELS).filter(|stripe| stripe % 3 != 2).collect();
        assert_eq!(announced, expected);
    }

    #[test]
    fn a_destination_that_does_not_know_of_it_is_told_nothing() {
        let mut encoder = ChannelEncoder::new(None).unwrap();
        Announcing::new(false).announce(0, &pages(), &mut encoder);
        assert_eq!(encoder.output_bytes(), 0);
    }
}
