//! One data channel's receiving side: the decoder, and applying what it decodes, without I/O, threads or a clock.
//!
//! Whoever drives it asks what is wanted ([`ReceivingChannel::wants`]), brings exactly that, and hears what is to be done. It
//! outlives its link: after a break, [`ReceivingChannel::reattach`] notes what may be half written.

use std::io;

use crate::decoder::{ChannelDecoder, DecodeError, Decoded, Pages, Wants};
use crate::memory::PAGE_SIZE;
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
        if let Wants::Pages { slot, pages: count } = self.wants() {
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

    fn note(&mut self, run: Pages, index: usize, entry: u64) {
        *self.sum = self.sum.wrapping_add(self.pages.table.set(run.slot + index, entry).growth);
    }
}
