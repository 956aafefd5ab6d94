//! One bit for every page, in two levels.
//!
//! Above the bits of each stripe (2 MiB) is one that says whether any of them may be set. Whoever looks for bits that are set reads
//! one word for 128 MiB of memory in which there are none: what is idle costs next to nothing, however large it is.

use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};

use vm_memory::bitmap::{Bitmap, NewBitmap, RefSlice, WithBitmapSlice};

use crate::layout::{STRIPE_PAGES, STRIPE_WORDS, StripeBits};
use crate::memory::PAGE_SIZE;

/// Bits that any number of threads set and take, by stripes.
///
/// As a bitmap of vm-memory it notes what is written through it. Stripes are counted from its own first page.
#[derive(Debug, Default)]
pub struct PageBits {
    words: Vec<AtomicU64>,
    /// One bit for every stripe. Set after the stripe's bits and cleared before they are taken: so no bit is ever overlooked for
    /// longer than it takes to set it, and a stripe without any may be looked at in vain.
    stripes: Vec<AtomicU64>,
}

impl PageBits {
    /// None set, in so many stripes.
    pub fn new(stripes: usize) -> Self {
        let zeros = |count: usize| (0..count).map(|_| AtomicU64::new(0)).collect();
        Self { words: zeros(stripes * STRIPE_WORDS), stripes: zeros(stripes.div_ceil(64)) }
    }

    /// ORs bits into a stripe. Returns how many were not set before.
    pub fn set(&self, stripe: usize, bits: &StripeBits) -> u64 {
        let mut added = 0;
        for (word, bits) in self.words[stripe * STRIPE_WORDS..].iter().zip(bits) {
            if *bits != 0 {
                let before = word.fetch_or(*bits, Ordering::AcqRel);
                added += u64::from((bits & !before).count_ones());
            }
        }
        if *bits != StripeBits::default() {
            self.note(stripe);
        }
        added
    }

    /// Takes a stripe's bits, leaving none.
    pub fn take(&self, stripe: usize) -> StripeBits {
        let bit = 1 << (stripe % 64);
        let summary = &self.stripes[stripe / 64];
        if read(summary) & bit == 0 {
            return StripeBits::default();
        }
        summary.fetch_and(!bit, Ordering::AcqRel);
        let words = &self.words[stripe * STRIPE_WORDS..][..STRIPE_WORDS];
        std::array::from_fn(|index| match read(&words[index]) {
            0 => 0,
            _ => words[index].swap(0, Ordering::AcqRel),
        })
    }

    /// Takes the bits in some of a stripe's words, leaving the others.
    pub fn take_words(&self, stripe: usize, words: Range<usize>) -> StripeBits {
        let within = |index: usize| words.contains(&index);
        if self.get(stripe).iter().enumerate().all(|(index, bits)| within(index) || *bits == 0) {
            return self.take(stripe);
        }
        let of_stripe = &self.words[stripe * STRIPE_WORDS..][..STRIPE_WORDS];
        std::array::from_fn(|index| if within(index) { of_stripe[index].swap(0, Ordering::AcqRel) } else { 0 })
    }

    /// Whether the bit of a slot is set.
    pub fn is_set(&self, slot: usize) -> bool {
        read(&self.words[slot / 64]) >> (slot % 64) & 1 == 1
    }

    /// Clears the bit of a slot; true if it was set.
    pub fn unset(&self, slot: usize) -> bool {
        let bit = 1 << (slot % 64);
        self.words[slot / 64].fetch_and(!bit, Ordering::AcqRel) & bit != 0
    }

    /// A stripe's bits, which stay.
    pub fn get(&self, stripe: usize) -> StripeBits {
        let words = &self.words[stripe * STRIPE_WORDS..][..STRIPE_WORDS];
        std::array::from_fn(|index| read(&words[index]))
    }

    /// The first stripe from `from` on in which bits may be set, of those that are a multiple of `step` away from it.
    pub fn next(&self, from: usize, step: usize) -> Option<usize> {
        let mut stripe = from;
        loop {
            match read(self.stripes.get(stripe / 64)?) >> (stripe % 64) {
                0 => stripe = (stripe / 64 + 1) * 64,
                rest => {
                    stripe += rest.trailing_zeros() as usize;
                    if (stripe - from).is_multiple_of(step) {
                        return Some(stripe);
                    }
                    stripe += 1;
                }
            }
        }
    }

    /// The stripes in which bits may be set.
    pub fn stripes(&self) -> impl Iterator<Item = usize> + '_ {
        std::iter::successors(self.next(0, 1), |stripe| self.next(stripe + 1, 1))
    }

    /// How many bits are set.
    pub fn count(&self) -> u64 {
        let in_stripe = |stripe| self.get(stripe).iter().map(|word| u64::from(word.count_ones())).sum::<u64>();
        self.stripes().map(in_stripe).sum()
    }

    /// Forgets them all.
    pub fn clear(&self) {
        for stripe in self.stripes() {
            self.take(stripe);
        }
    }

    fn note(&self, stripe: usize) {
        self.stripes[stripe / 64].fetch_or(1 << (stripe % 64), Ordering::AcqRel);
    }
}

/// Pages that lie in a range of bytes in part count whole; what lies outside of the bitmap is left out.
impl Bitmap for PageBits {
    fn mark_dirty(&self, offset: usize, length: usize) {
        if length == 0 {
            return;
        }
        let last = (offset.saturating_add(length - 1) / PAGE_SIZE).min((self.words.len() * 64).saturating_sub(1));
        let mut page = offset / PAGE_SIZE;
        while page <= last && page / 64 < self.words.len() {
            let end = last.min(page | 63);
            let bits = (u64::MAX >> (63 - (end - page))) << (page % 64);
            self.words[page / 64].fetch_or(bits, Ordering::AcqRel);
            self.note(page / STRIPE_PAGES);
            page = end + 1;
        }
    }

    fn dirty_at(&self, offset: usize) -> bool {
        let page = offset / PAGE_SIZE;
        self.words.get(page / 64).is_some_and(|word| read(word) >> (page % 64) & 1 == 1)
    }

    fn slice_at(&self, offset: usize) -> <Self as WithBitmapSlice<'_>>::S {
        RefSlice::new(self, offset)
    }
}

impl<'a> WithBitmapSlice<'a> for PageBits {
    type S = RefSlice<'a, Self>;
}

impl NewBitmap for PageBits {
    fn with_len(length: usize) -> Self {
        Self::new(length.div_ceil(STRIPE_PAGES * PAGE_SIZE))
    }
}

fn read(word: &AtomicU64) -> u64 {
    #[cfg(test)]
    tests::WORDS_READ.set(tests::WORDS_READ.get() + 1);
    word.load(Ordering::Acquire)
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::layout::set_bits;
    use proptest::prelude::*;
    use std::cell::Cell;
    use std::collections::BTreeSet;

    std::thread_local! {
        /// By this thread, of all bitmaps.
        pub(crate) static WORDS_READ: Cell<usize> = const { Cell::new(0) };
    }

    const STRIPES: usize = 130;

    #[derive(Debug, Clone)]
    enum Do {
        Set(usize, usize),
        Mark(usize, usize),
        Take(usize),
        Clear,
    }

    fn anything() -> impl Strategy<Value = Do> {
        let bytes = STRIPES * STRIPE_PAGES * PAGE_SIZE;
        prop_oneof![
            4 => (0..STRIPES, 0..STRIPE_PAGES).prop_map(|(stripe, page)| Do::Set(stripe, page)),
            4 => (0..bytes + (8 << 20), 0usize..6 << 20).prop_map(|(offset, length)| Do::Mark(offset, length)),
            2 => (0..STRIPES).prop_map(Do::Take),
            1 => Just(Do::Clear),
        ]
    }

    fn pages_of(stripe: usize, bits: &StripeBits) -> impl Iterator<Item = usize> {
        set_bits(bits).map(move |page| stripe * STRIPE_PAGES + page)
    }

    proptest! {
        #[test]
        fn what_was_set_and_not_taken_is_found(steps in prop::collection::vec(anything(), 0..40), step in 1usize..5) {
            let bits = PageBits::new(STRIPES);
            let mut truth = BTreeSet::new();
            for what in steps {
                match what {
                    Do::Set(stripe, page) => {
                        let mut one = StripeBits::default();
                        one[page / 64] = 1 << (page % 64);
                        let added = bits.set(stripe, &one);
                        prop_assert_eq!(added == 1, truth.insert(stripe * STRIPE_PAGES + page));
                    }
                    Do::Mark(offset, length) => {
                        bits.mark_dirty(offset, length);
                        let pages = offset / PAGE_SIZE..(offset + length).div_ceil(PAGE_SIZE);
                        truth.extend(pages.take(length).filter(|page| *page < STRIPES * STRIPE_PAGES));
                    }
                    Do::Take(stripe) => {
                        let taken: Vec<_> = pages_of(stripe, &bits.take(stripe)).collect();
                        let first = stripe * STRIPE_PAGES;
                        let expected: Vec<_> = truth.range(first..first + STRIPE_PAGES).copied().collect();
                        prop_assert_eq!(&taken, &expected);
                        truth.retain(|page| !expected.contains(page));
                    }
                    Do::Clear => {
                        bits.clear();
                        truth.clear();
                    }
                }
                prop_assert_eq!(bits.count(), truth.len() as u64);
            }
            // Every stripe is found by the one of `step` who looks for it.
            let mut found = BTreeSet::new();
            for first in 0..step {
                let mut from = first;
                while let Some(stripe) = bits.next(from, step) {
                    prop_assert_eq!(stripe % step, first);
                    found.extend(pages_of(stripe, &bits.get(stripe)));
                    from = stripe + step;
                }
            }
            prop_assert_eq!(&found, &truth);
            prop_assert!((0..STRIPES * STRIPE_PAGES).all(|page| bits.dirty_at(page * PAGE_SIZE) == truth.contains(&page)));
        }
    }

    #[test]
    fn bits_that_are_set_while_others_are_taken_are_not_lost() {
        const EACH: usize = 200_000;
        let bits = PageBits::new(1);
        let (mut taken, mut added) = (0, 0);
        std::thread::scope(|scope| {
            let setter = scope.spawn(|| {
                let set = |page: usize| {
                    let mut one = StripeBits::default();
                    one[page % 8] = 1 << (page % 64);
                    bits.set(0, &one)
                };
                (0..EACH).map(set).sum::<u64>()
            });
            while !setter.is_finished() {
                taken += set_bits(&bits.take(0)).count() as u64;
            }
            added = setter.join().unwrap();
        });
        taken += set_bits(&bits.take(0)).count() as u64;
        assert_eq!(taken, added);
    }
}
