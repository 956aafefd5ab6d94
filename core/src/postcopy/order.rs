//! In which order the source sends the pages that nobody has asked for.
//!
//! Near the latest fault first: the rest of its stripe from there on, then what came before it in the stripe; then near the fault before
//! that; and where there is none left, on from the last fault's stripe through memory and around.

use std::collections::VecDeque;

use crate::layout::{STRIPE_PAGES, StripeBits, set_bits};
use crate::pending::Pending;

/// So many faults are remembered; older ones say little about what is needed next.
const MOST_RECENT: usize = 32;

/// The order.
#[derive(Debug, Default)]
pub struct PushOrder {
    /// Slots of recent faults whose surroundings have not been looked at, the latest first.
    recent: VecDeque<usize>,
    /// The stripe that is being sent: what is left of it, and from where on.
    current: Option<Current>,
    /// The next stripe, where no fault says otherwise.
    next: usize,
}

#[derive(Debug)]
struct Current {
    stripe: usize,
    rest: StripeBits,
    from: usize,
}

impl PushOrder {
    /// This page is sent because it is needed: not again, then, and those near it are next.
    pub fn needed(&mut self, pending: &Pending, slot: usize) {
        self.put_back(pending);
        let stripe = slot / STRIPE_PAGES;
        let mut bits = pending.take(stripe);
        bits[slot % STRIPE_PAGES / 64] &= !(1 << (slot % 64));
        pending.merge(stripe, &bits);
        self.recent.retain(|recent| recent / STRIPE_PAGES != stripe);
        self.recent.push_front(slot);
        self.recent.truncate(MOST_RECENT);
        self.next = stripe + 1;
    }

    /// The next page to send.
    pub fn next(&mut self, pending: &Pending) -> Option<usize> {
        loop {
            if let Some(slot) = self.current.as_mut().and_then(Current::take) {
                return Some(slot);
            }
            let (stripe, from) = match self.recent.pop_front() {
                Some(slot) => (slot / STRIPE_PAGES, slot % STRIPE_PAGES),
                None => {
                    let stripe = pending.next(self.next, 1).or_else(|| pending.next(0, 1))?;
                    self.next = stripe + 1;
                    (stripe, 0)
                }
            };
            self.current = Some(Current { stripe, rest: pending.take(stripe), from });
        }
    }

    /// What was taken and not sent is pending as before.
    pub fn put_back(&mut self, pending: &Pending) {
        if let Some(Current { stripe, rest, .. }) = self.current.take() {
            pending.merge(stripe, &rest);
        }
    }
}

impl Current {
    fn take(&mut self) -> Option<usize> {
        let offset =
            set_bits(&self.rest).find(|offset| *offset >= self.from).or_else(|| set_bits(&self.rest).next())?;
        self.rest[offset / 64] &= !(1 << (offset % 64));
        Some(self.stripe * STRIPE_PAGES + offset)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::layout::Layout;
    use crate::machine::RegionDescription;
    use proptest::prelude::*;
    use std::collections::BTreeSet;

    const STRIPES: usize = 6;

    fn pending(slots: &BTreeSet<usize>) -> Pending {
        let size_bytes = (STRIPES as u64) * (2 << 20);
        let pending = Pending::new(&Layout::new(&[RegionDescription { guest_address: 0, size_bytes }]).unwrap());
        for slot in slots {
            let mut bits = StripeBits::default();
            bits[slot % STRIPE_PAGES / 64] = 1 << (slot % 64);
            pending.merge(slot / STRIPE_PAGES, &bits);
        }
        pending
    }

    #[test]
    fn what_is_near_the_latest_fault_comes_first() {
        let pending = pending(&[0, 1, 600, 700, 800, 1500, 1600].into());
        let mut order = PushOrder::default();
        assert_eq!(order.next(&pending), Some(0));
        order.needed(&pending, 1550);
        order.needed(&pending, 700);
        let rest: Vec<_> = std::iter::from_fn(|| order.next(&pending)).collect();
        assert_eq!(rest, [800, 600, 1600, 1500, 1]);
    }

    proptest! {
        /// Whatever is needed meanwhile: every page is sent once, and none that nobody lacks.
        #[test]
        fn every_page_is_sent_once(
            slots in prop::collection::btree_set(0..STRIPES * STRIPE_PAGES, 0..200),
            faults in prop::collection::vec((any::<bool>(), 0..STRIPES * STRIPE_PAGES), 0..300),
        ) {
            let pending = pending(&slots);
            let mut order = PushOrder::default();
            let mut sent = BTreeSet::new();
            for (is_fault, slot) in faults {
                match is_fault {
                    true => {
                        order.needed(&pending, slot);
                        sent.insert(slot);
                    }
                    false => {
                        if let Some(slot) = order.next(&pending) {
                            prop_assert!(slots.contains(&slot) && sent.insert(slot), "{} again", slot);
                        }
                    }
                }
            }
            while let Some(slot) = order.next(&pending) {
                prop_assert!(slots.contains(&slot) && sent.insert(slot), "{} again", slot);
            }
            prop_assert!(slots.is_subset(&sent));
            prop_assert_eq!(pending.count(), 0);
        }
    }
}
