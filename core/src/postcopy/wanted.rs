//! What the destination still lacks, and who waits for it.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard};
use std::time::Duration;

use super::latency::Latencies;
use super::missing::{Missing, missing_parts};
use crate::bitmap::PageBits;
use crate::layout::{Layout, StripeBits};
use crate::plants::{Plant, planted};
use crate::sync::lock;

/// The pages that are missing. Shared by the threads that hear of faults and those that put pages in place.
#[derive(Debug)]
pub struct Wanted {
    bits: PageBits,
    left: AtomicU64,
    waiting: Mutex<Waiting>,
}

#[derive(Debug, Default)]
struct Waiting {
    /// Pages that were asked for and have not come, and since when.
    since: BTreeMap<usize, Duration>,
    latencies: Latencies,
}

/// What is to be done about a page that somebody needs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Answer {
    /// Ask the source for it.
    Ask,
    /// That has been done.
    Wait,
    /// Nothing was ever there, or it is in place by now: zeros, unless there is a page.
    Zeros,
}

impl Wanted {
    /// Nothing is missing yet.
    pub fn new(layout: &Layout) -> Self {
        Self { bits: PageBits::new(layout.stripes()), left: AtomicU64::new(0), waiting: Mutex::default() }
    }

    /// These pages of a stripe are missing, too.
    pub fn add(&self, stripe: usize, bits: &StripeBits) {
        self.left.fetch_add(self.bits.set(stripe, bits), Ordering::AcqRel);
    }

    /// The missing pages of a stripe.
    pub fn stripe(&self, stripe: usize) -> StripeBits {
        self.bits.get(stripe)
    }

    /// Whether a page is missing.
    pub fn is_missing(&self, slot: usize) -> bool {
        self.bits.is_set(slot)
    }

    /// Pages that are missing.
    pub fn left(&self) -> u64 {
        self.left.load(Ordering::Acquire)
    }

    /// Somebody needs a page that is not there.
    pub fn needed(&self, slot: usize, now: Duration) -> Answer {
        let mut waiting = self.waiting();
        if !self.bits.is_set(slot) {
            return Answer::Zeros;
        }
        match waiting.since.insert(slot, now) {
            None => {
                if planted(Plant::ForgetMissingPage) && self.bits.unset(slot) {
                    self.left.fetch_sub(1, Ordering::AcqRel);
                }
                Answer::Ask
            }
            Some(since) => {
                waiting.since.insert(slot, since);
                Answer::Wait
            }
        }
    }

    /// A page is in place. Only now does it count as there: before, whoever needs it must not be told otherwise. True for the last one.
    pub fn placed(&self, slot: usize, now: Duration) -> bool {
        let mut waiting = self.waiting();
        if let Some(since) = waiting.since.remove(&slot) {
            waiting.latencies.note(now.saturating_sub(since));
        }
        self.bits.unset(slot) && self.left.fetch_sub(1, Ordering::AcqRel) == 1
    }

    /// Nothing is wanted any more.
    pub fn forget(&self) {
        let mut waiting = self.waiting();
        waiting.since.clear();
        self.bits.clear();
        self.left.store(0, Ordering::Release);
    }

    /// Pages that were asked for and have not come: asked for again over new links.
    pub fn unanswered(&self) -> Vec<usize> {
        match planted(Plant::ForgetWanted) {
            true => Vec::new(),
            false => self.waiting().since.keys().copied().collect(),
        }
    }

    /// Since when the page has been waited for that has been for the longest.
    pub fn longest_wait(&self) -> Option<Duration> {
        self.waiting().since.values().min().copied()
    }

    /// How long faults took.
    pub fn latencies(&self) -> Latencies {
        self.waiting().latencies.clone()
    }

    /// What is missing, as it is told to the source.
    pub fn parts(&self, layout: &Layout) -> Vec<Missing> {
        missing_parts(layout, |stripe| self.stripe(stripe))
    }

    fn waiting(&self) -> MutexGuard<'_, Waiting> {
        lock(&self.waiting)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::layout::STRIPE_PAGES;
    use crate::machine::RegionDescription;
    use proptest::prelude::*;

    fn layout() -> Layout {
        Layout::new(&[RegionDescription { guest_address: 0, size_bytes: 4 << 20 }]).unwrap()
    }

    fn ms(ms: u64) -> Duration {
        Duration::from_millis(ms)
    }

    #[test]
    fn a_page_is_asked_for_once_and_again_after_a_break() {
        let wanted = Wanted::new(&layout());
        wanted.add(0, &[0b110, 0, 0, 0, 0, 0, 0, 0]);
        assert_eq!(wanted.needed(1, ms(5)), Answer::Ask);
        assert_eq!(wanted.needed(1, ms(6)), Answer::Wait);
        assert_eq!(wanted.needed(0, ms(6)), Answer::Zeros, "it was never missing");
        assert_eq!((wanted.unanswered(), wanted.longest_wait()), (vec![1], Some(ms(5))));
        assert!(!wanted.placed(1, ms(8)));
        assert_eq!(wanted.needed(1, ms(9)), Answer::Zeros, "if there is none: the guest gave it back");
        assert!(!wanted.placed(1, ms(9)), "it comes twice");
        assert_eq!((wanted.left(), wanted.unanswered(), wanted.longest_wait()), (1, vec![], None));
        assert!(wanted.placed(2, ms(10)), "the last one");
        assert!(!wanted.placed(2, ms(10)));
        assert_eq!((wanted.latencies().count(), wanted.latencies().max_us()), (1, 3000));
    }

    proptest! {
        #[test]
        fn the_last_page_is_the_last(slots in prop::collection::btree_set(0..2 * STRIPE_PAGES, 1..60), twice in any::<bool>()) {
            let wanted = Wanted::new(&layout());
            for slot in &slots {
                let mut bits = StripeBits::default();
                bits[slot % STRIPE_PAGES / 64] = 1 << (slot % 64);
                wanted.add(slot / STRIPE_PAGES, &bits);
                wanted.add(slot / STRIPE_PAGES, &bits);
            }
            let mut left = slots.len();
            for slot in slots {
                prop_assert_eq!(wanted.left(), left as u64);
                left -= 1;
                prop_assert_eq!(wanted.placed(slot, ms(0)), left == 0);
                if twice {
                    prop_assert!(!wanted.placed(slot, ms(0)));
                }
            }
        }
    }
}
