//! What was last sent of some pages, so that only their differences need be sent: a cache of bounded size.
//!
//! Pages that are sent again and again are what a cache is for, and a working set is often visited in order: with the oldest
//! thrown out first, a set that is slightly too large would never be met. So a full cache throws out a page at random.

use std::collections::HashMap;

use crate::memory::PAGE_SIZE;
use crate::table::Page;

/// Pages allocated at a time.
const SLAB_PAGES: usize = 512;

/// Bases of one channel's pages.
pub struct Bases {
    /// Where a page's base is, by the page's slot.
    places: HashMap<usize, usize>,
    /// Whose base is at a place.
    owners: Vec<usize>,
    slabs: Vec<Box<[Page]>>,
    most_pages: usize,
    random: u64,
}

impl Bases {
    /// None yet, and never more than fit into `most_bytes`.
    pub fn new(most_bytes: u64) -> Self {
        let most_pages = usize::try_from(most_bytes / PAGE_SIZE as u64).unwrap_or(usize::MAX);
        Self { places: HashMap::new(), owners: Vec::new(), slabs: Vec::new(), most_pages, random: 1 }
    }

    /// Whether anything can be kept at all.
    pub fn has_room(&self) -> bool {
        self.most_pages > 0
    }

    /// What was last sent of the page at `slot`, if it is known.
    pub fn get(&self, slot: usize) -> Option<&Page> {
        if self.places.is_empty() {
            return None;
        }
        let place = *self.places.get(&slot)?;
        Some(&self.slabs[place / SLAB_PAGES][place % SLAB_PAGES])
    }

    /// Keeps what was sent.
    pub fn keep(&mut self, slot: usize, page: &Page) {
        let place = match self.places.get(&slot) {
            Some(&place) => place,
            None if self.owners.len() < self.most_pages => {
                let place = self.owners.len();
                if place == self.slabs.len() * SLAB_PAGES {
                    self.slabs.push(vec![[0; PAGE_SIZE]; SLAB_PAGES].into_boxed_slice());
                }
                self.owners.push(slot);
                self.places.insert(slot, place);
                place
            }
            None if self.most_pages == 0 => return,
            None => {
                let place = self.any_place();
                self.places.remove(&self.owners[place]);
                self.owners[place] = slot;
                self.places.insert(slot, place);
                place
            }
        };
        self.slabs[place / SLAB_PAGES][place % SLAB_PAGES] = *page;
    }

    /// Forgets what was sent of a page that is not to be built upon.
    pub fn forget(&mut self, slot: usize) {
        if self.places.is_empty() {
            return;
        }
        let Some(place) = self.places.remove(&slot) else { return };
        // The last one moves into the gap.
        let last = self.owners.len() - 1;
        if place != last {
            let page = self.slabs[last / SLAB_PAGES][last % SLAB_PAGES];
            self.slabs[place / SLAB_PAGES][place % SLAB_PAGES] = page;
            self.owners[place] = self.owners[last];
            self.places.insert(self.owners[place], place);
        }
        self.owners.pop();
    }

    /// Forgets all.
    pub fn clear(&mut self) {
        *self = Self { most_pages: self.most_pages, ..Self::new(0) };
    }

    /// Xorshift (Marsaglia 2003): which one does not matter, only that it is not always the same.
    fn any_place(&mut self) -> usize {
        self.random ^= self.random << 13;
        self.random ^= self.random >> 7;
        self.random ^= self.random << 17;
        (self.random % self.owners.len() as u64) as usize
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[derive(Debug, Clone, Copy)]
    enum Do {
        Keep(usize, u8),
        Forget(usize),
    }

    proptest! {
        /// Whatever a cache still knows is what was kept last; and it never grows beyond its bound.
        #[test]
        fn what_is_known_is_true(
            most in 0u64..6,
            steps in prop::collection::vec(
                prop_oneof![(0usize..10, any::<u8>()).prop_map(|(s, v)| Do::Keep(s, v)), (0usize..10).prop_map(Do::Forget)],
                0..80,
            ),
        ) {
            let mut bases = Bases::new(most * 4096);
            let mut truth = HashMap::new();
            for step in steps {
                match step {
                    Do::Keep(slot, value) => {
                        bases.keep(slot, &[value; PAGE_SIZE]);
                        truth.insert(slot, value);
                        prop_assert_eq!(bases.get(slot).is_some(), most > 0);
                    }
                    Do::Forget(slot) => {
                        bases.forget(slot);
                        prop_assert!(bases.get(slot).is_none());
                    }
                }
                let known: Vec<_> = (0..10).filter(|slot| bases.get(*slot).is_some()).collect();
                prop_assert!(known.len() as u64 <= most);
                for slot in known {
                    prop_assert_eq!(bases.get(slot), Some(&[truth[&slot]; PAGE_SIZE]));
                }
            }
        }
    }

    #[test]
    fn a_working_set_that_is_slightly_too_large_is_met_in_part() {
        let mut bases = Bases::new(100 * 4096);
        let mut met = 0;
        for slot in (0..4).flat_map(|_| 0..110) {
            met += usize::from(bases.get(slot).is_some());
            bases.keep(slot, &[0; PAGE_SIZE]);
        }
        assert!(met > 200, "{met} of 330");
        bases.clear();
        assert!((0..110).all(|slot| bases.get(slot).is_none()));
    }
}
