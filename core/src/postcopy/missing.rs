//! Which pages are missing, as it is told over the wire.

use serde::{Deserialize, Serialize};

use crate::layout::{Layout, StripeBits};

/// So many stripes are told of in one message.
const STRIPES_PER_PART: usize = 16 << 10;

/// Pages that are missing at the destination, by stripes of 512 pages ([`crate::layout`]); a part of them, if they are many.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Missing {
    /// Stripes all of whose pages are missing: the first, and how many.
    pub whole: Vec<(u64, u64)>,
    /// Other stripes, with one bit for each page that is missing.
    pub partly: Vec<(u64, StripeBits)>,
    /// No other part follows.
    pub last: bool,
}

/// Why what is said to be missing cannot be.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("pages are said to be missing that there are not, in stripe {0}")]
pub struct BadMissing(u64);

/// The pages that `bits` says are missing, in as many parts as it takes.
pub fn missing_parts(layout: &Layout, bits: impl Fn(usize) -> StripeBits) -> Vec<Missing> {
    let mut parts = Vec::new();
    let mut part = Missing::default();
    for index in 0..layout.stripes() {
        let missing = bits(index);
        if missing == StripeBits::default() {
            continue;
        }
        let stripe = index as u64;
        match part.whole.last_mut() {
            _ if missing != layout.stripe(index).all() => part.partly.push((stripe, missing)),
            Some((first, count)) if *first + *count == stripe => *count += 1,
            _ => part.whole.push((stripe, 1)),
        }
        if part.whole.len() + part.partly.len() == STRIPES_PER_PART {
            parts.push(std::mem::take(&mut part));
        }
    }
    part.last = true;
    parts.push(part);
    parts
}

impl Missing {
    /// Every stripe that lacks pages, and which, after all of it has been found possible.
    pub fn stripes(&self, layout: &Layout) -> Result<impl Iterator<Item = (usize, StripeBits)>, BadMissing> {
        let stripes = layout.stripes() as u64;
        for (first, count) in &self.whole {
            if first.checked_add(*count).is_none_or(|end| end > stripes) {
                return Err(BadMissing(*first));
            }
        }
        for (stripe, bits) in &self.partly {
            let exists = *stripe < stripes
                && bits.iter().zip(layout.stripe(*stripe as usize).all()).all(|(bits, all)| bits & !all == 0);
            if !exists {
                return Err(BadMissing(*stripe));
            }
        }
        let whole = self.whole.iter().flat_map(|(first, count)| *first..first + count);
        let whole = whole.map(|stripe| (stripe as usize, layout.stripe(stripe as usize).all()));
        let partly = self.partly.iter().map(|(stripe, bits)| (*stripe as usize, *bits));
        Ok(whole.chain(partly).collect::<Vec<_>>().into_iter())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bitmap::PageBits;
    use crate::machine::RegionDescription;
    use proptest::prelude::*;

    fn layout() -> Layout {
        Layout::new(&[
            RegionDescription { guest_address: 0, size_bytes: 11 * (2 << 20) + 4096 },
            RegionDescription { guest_address: 4 << 30, size_bytes: 3 << 20 },
        ])
        .unwrap()
    }

    proptest! {
        #[test]
        fn what_is_told_is_what_is_missing(stripes in prop::collection::vec((0usize..14, prop::array::uniform8(prop_oneof![Just(0u64), Just(!0), any::<u64>()])), 0..20)) {
            let layout = layout();
            let missing = PageBits::new(layout.stripes());
            for (stripe, bits) in stripes {
                let mut bits = bits;
                bits.iter_mut().zip(layout.stripe(stripe).all()).for_each(|(bits, all)| *bits &= all);
                missing.set(stripe, &bits);
            }
            let parts = missing_parts(&layout, |stripe| missing.get(stripe));
            let told = PageBits::new(layout.stripes());
            for part in &parts {
                for (stripe, bits) in part.stripes(&layout).unwrap() {
                    told.set(stripe, &bits);
                }
            }
            prop_assert!((0..layout.stripes()).all(|stripe| told.get(stripe) == missing.get(stripe)));
            prop_assert!(parts.iter().rev().skip(1).all(|part| !part.last) && parts.last().unwrap().last);
        }

        #[test]
        fn invariant_5_pages_that_there_are_not_are_refused(stripe in any::<u64>(), count in any::<u64>()) {
            let layout = layout();
            let whole = Missing { whole: vec![(stripe, count)], ..Missing::default() };
            prop_assert_eq!(whole.stripes(&layout).is_ok(), u128::from(stripe) + u128::from(count) <= layout.stripes() as u128);
            let partly = Missing { partly: vec![(stripe, [!0; 8])], ..Missing::default() };
            prop_assert_eq!(partly.stripes(&layout).is_ok(), stripe < 11 || stripe == 12);
        }
    }
}
