//! One data channel's receiving side: the decoder, and applying what it decodes, without I/O, threads or a clock.
//!
//! Whoever drives it asks what is wanted ([`ReceivingChannel::wants`]), brings exactly that, and hears what is to be done. It
//! outlives its link: after a break, [`ReceivingChannel::reattach`] notes what may be half written.

use std::io;

use crate::chunk::Base;
use crate::decoder::{ChannelDecoder, DecodeError, Decoded, Delta, Pages, Wants};
use crate::delta;
use crate::memory::PAGE_SIZE;
use crate::plants::{Plant, planted};
use crate::table::{Page, PageHasher, PageTable};
use crate::view::MemoryView;

/// What all channels of a move share at the destination.
pub struct DestinationPages {
    /// The memory that is being filled; all zeros at first.
    pub view: MemoryView,
    /// What was last applied.
    pub table: PageTable,
    /// Hashes pages for the table.
    pub hasher: PageHasher,
}

/// What came of what was brought.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Received {
    /// Nothing is to be done.
    Nothing,
    /// These pages will come soon: memory for them can be made ready.
    Coming(Pages),
    /// All before this mark has been applied: acknowledge it.
    Mark(u64),
    /// The channel has ended, complete; its share of the table's sum.
    Ended(u64),
}

/// The receiving side of one data channel.
pub struct ReceivingChannel {
    decoder: ChannelDecoder,
    /// By how much this channel has made the table's sum grow.
    sum: u64,
    page: Box<Page>,
}

impl ReceivingChannel {
    /// Data channel `index` of `channels`, which may only touch its own stripes.
    pub fn new(pages: &DestinationPages, index: usize, channels: usize) -> io::Result<Self> {
        let decoder = ChannelDecoder::new(pages.view.shared_layout(), index, channels)?;
        Ok(Self { decoder, sum: 0, page: Box::new([0; PAGE_SIZE]) })
    }

    /// What is needed next. Pages are wanted in guest memory itself ([`MemoryView::pages`]).
    pub fn wants(&self) -> Wants {
        self.decoder.wants()
    }

    /// Takes the bytes that were wanted.
    pub fn handle_bytes(&mut self, pages: &DestinationPages, bytes: &[u8]) -> Result<Received, DecodeError> {
        let mut apply = Apply { pages, sum: &mut self.sum };
        match self.decoder.handle_bytes(bytes)? {
            Decoded::Incomplete | Decoded::Placed(_) => {}
            Decoded::Contents(run, contents) => apply.contents(run, contents),
            Decoded::Zero(runs) => runs.iter().for_each(|run| apply.zero(*run)),
            Decoded::Deltas(deltas) => {
                for Delta { page: run, base, bytes: range } in deltas {
                    apply.delta(*run, *base, &bytes[range.clone()], &mut self.page)?;
                }
            }
            Decoded::Coming(pages) => return Ok(Received::Coming(pages)),
            Decoded::Mark(mark) => return Ok(Received::Mark(mark)),
            Decoded::End => return Ok(Received::Ended(self.sum)),
        }
        Ok(Received::Nothing)
    }

    /// The pages that were wanted stand in guest memory.
    pub fn handle_pages(&mut self, pages: &DestinationPages) -> Result<Received, DecodeError> {
        if let Decoded::Placed(run) = self.decoder.handle_pages()? {
            Apply { pages, sum: &mut self.sum }.placed(run, &mut self.page);
        }
        Ok(Received::Nothing)
    }

    /// By how much this channel has made the table's sum grow, over all links.
    pub fn sum(&self) -> u64 {
        self.sum
    }

    /// Its link broke, and it is to go on over another. Pages that were wanted may be half written; they are among those
    /// that the source sends again.
    pub fn reattach(&mut self, pages: &DestinationPages) {
        if let Wants::Pages { slot, pages: count } = self.wants()
            && !planted(Plant::TrustTornPages)
        {
            for slot in slot..slot + count {
                self.sum = self.sum.wrapping_add(pages.table.set_torn(slot).growth);
            }
        }
        self.decoder.restart();
    }
}

struct Apply<'c> {
    pages: &'c DestinationPages,
    sum: &'c mut u64,
}

impl Apply<'_> {
    /// Pages read straight into guest memory: hashed from there, so that what counts is what stands there.
    fn placed(&mut self, run: Pages, page: &mut Page) {
        for index in 0..run.pages {
            self.pages.view.pages(run.slot + index, 1).copy_to(&mut page[..]);
            self.note(run, index, self.pages.hasher.page(run.frame + index as u64, page));
        }
    }

    fn contents(&mut self, run: Pages, contents: &[Page]) {
        for (index, page) in contents.iter().enumerate() {
            self.pages.view.write_page(run.slot + index, page);
            self.note(run, index, self.pages.hasher.page(run.frame + index as u64, page));
        }
    }

    /// Memory is made of zeros: a page is written only if something else was applied there before, so that zeros
    /// take up no memory.
    fn zero(&mut self, run: Pages) {
        for index in 0..run.pages {
            let zero = self.pages.hasher.zero(run.frame + index as u64);
            if self.pages.table.entry(run.slot + index).is_some_and(|entry| entry != zero) {
                self.pages.view.write_page(run.slot + index, &[0; PAGE_SIZE]);
            }
            self.note(run, index, zero);
        }
    }

    /// The base is what stands in memory, where nobody but this channel writes, or zeros.
    fn delta(&mut self, run: Pages, base: Base, difference: &[u8], page: &mut Page) -> Result<(), DecodeError> {
        match base {
            Base::Sent if self.pages.table.is_torn(run.slot) => return Err(DecodeError::NoBase(run.frame)),
            Base::Sent => {
                self.pages.view.pages(run.slot, 1).copy_to(&mut page[..]);
            }
            Base::Zeros => page.fill(0),
        }
        delta::apply(page, difference).map_err(|error| DecodeError::Delta { frame: run.frame, error })?;
        self.pages.view.write_page(run.slot, page);
        self.note(run, 0, self.pages.hasher.page(run.frame, page));
        Ok(())
    }

    fn note(&mut self, run: Pages, index: usize, entry: u64) {
        *self.sum = self.sum.wrapping_add(self.pages.table.set(run.slot + index, entry).growth);
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::encoder::{ChannelEncoder, Encoded};
    use crate::layout::Layout;
    use crate::machine::RegionDescription;
    use crate::memory::GuestMemory;
    use proptest::prelude::*;
    use vm_memory::GuestAddress;

    fn pages() -> DestinationPages {
        let memory = GuestMemory::from_ranges(&[(GuestAddress(0), 2 << 20)]).unwrap();
        let layout = Arc::new(Layout::new(&[RegionDescription { guest_address: 0, size_bytes: 2 << 20 }]).unwrap());
        DestinationPages {
            table: PageTable::new(&layout),
            view: MemoryView::new(memory, layout).unwrap(),
            hasher: PageHasher::new(1, true),
        }
    }

    fn feed(channel: &mut ReceivingChannel, pages: &DestinationPages, mut bytes: &[u8]) -> Result<(), DecodeError> {
        while !bytes.is_empty() {
            match channel.wants() {
                Wants::Bytes(count) => {
                    let (now, later) = bytes.split_at(count);
                    channel.handle_bytes(pages, now)?;
                    bytes = later;
                }
                Wants::Pages { slot, pages: count } => {
                    let (now, later) = bytes.split_at(count * PAGE_SIZE);
                    pages.view.pages(slot, count).copy_from(now);
                    channel.handle_pages(pages)?;
                    bytes = later;
                }
                Wants::Nothing => panic!("bytes after the end"),
            }
        }
        Ok(())
    }

    proptest! {
        /// Version after version of a few pages, each against the one before: what stands at the destination is the last.
        #[test]
        fn differences_build_on_what_was_applied(
            versions in prop::collection::vec(prop::collection::btree_map(0usize..512, (0usize..512, any::<u64>()), 0..6), 1..8),
        ) {
            let pages = pages();
            let mut channel = ReceivingChannel::new(&pages, 0, 1).unwrap();
            let mut encoder = ChannelEncoder::new(None).unwrap();
            let mut truth = vec![[0u8; PAGE_SIZE]; 512];
            for version in versions {
                encoder.begin_stripe(0);
                for (offset, (word, value)) in version {
                    let base = truth[offset];
                    truth[offset][word * 8..][..8].copy_from_slice(&value.to_le_bytes());
                    let encoded = encoder.page_with_base(offset, &base, |copy| *copy = truth[offset]);
                    prop_assert_eq!(encoded == Encoded::Same, base == truth[offset]);
                }
                encoder.end_stripe();
                feed(&mut channel, &pages, encoder.bytes()).unwrap();
                encoder.clear();
            }
            let mut arrived = [0; PAGE_SIZE];
            for (slot, page) in truth.iter().enumerate() {
                pages.view.pages(slot, 1).copy_to(&mut arrived[..]);
                prop_assert!(arrived == *page, "page {}", slot);
            }
            prop_assert_eq!(channel.sum, pages.table.sum());
        }

        #[test]
        fn invariant_5_differences_that_cannot_be_are_refused(payload in prop::collection::vec(any::<u8>(), 4..64), count in 1usize..4) {
            use crate::chunk::{Chunk, DELTA_BYTES};
            prop_assume!(payload.len() >= count * DELTA_BYTES);
            let pages = pages();
            let mut channel = ReceivingChannel::new(&pages, 0, 1).unwrap();
            let header = Chunk::Delta { frame: 0, pages: count, length: payload.len() }.encode();
            channel.handle_bytes(&pages, &header).unwrap();
            // Whatever it says: applied or refused, and never a page beyond the first stripe.
            let _ = channel.handle_bytes(&pages, &payload);
        }
    }

    #[test]
    fn a_difference_from_a_torn_page_is_refused() {
        let pages = pages();
        let mut channel = ReceivingChannel::new(&pages, 0, 1).unwrap();
        let mut encoder = ChannelEncoder::new(None).unwrap();
        encoder.begin_stripe(0);
        encoder.page(3, |copy| copy.fill(7));
        encoder.end_stripe();
        channel.handle_bytes(&pages, &encoder.bytes()[..24]).unwrap();
        channel.reattach(&pages);
        encoder.restart();
        encoder.begin_stripe(0);
        encoder.page_with_base(3, &[7; PAGE_SIZE], |copy| {
            copy.fill(7);
            copy[0] = 1;
        });
        encoder.end_stripe();
        assert!(matches!(feed(&mut channel, &pages, encoder.bytes()), Err(DecodeError::NoBase(3))));
    }
}
