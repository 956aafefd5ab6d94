//! Which parts of memory are looked at, and how they are told apart.

use crate::random;

/// More stripes than these (16 GiB) are sampled.
pub(crate) const MOST_STRIPES: usize = 8192;
/// Parts of memory with a curve of their own.
pub(crate) const ZONES: usize = 32;

/// All stripes, or one at random out of each of `most` equal parts.
pub(crate) fn sample(stripes: usize, most: usize) -> Vec<usize> {
    if stripes <= most {
        return (0..stripes).collect();
    }
    let first_of = |part: usize| part * stripes / most;
    let draw = |part: usize| {
        let (first, end) = (first_of(part), first_of(part + 1));
        first + (random::number() % (end - first) as u64) as usize
    };
    (0..most).map(draw).collect()
}

/// The zone in which a stripe lies, of so many.
pub(crate) fn zone_of(stripe: usize, stripes: usize) -> usize {
    stripe * ZONES / stripes.max(1)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn a_sample_is_in_order_and_spread_over_all_of_memory(stripes in 1usize..5000, most in 1usize..500) {
            let sample = sample(stripes, most);
            prop_assert_eq!(sample.len(), stripes.min(most));
            prop_assert!(sample.is_sorted() && sample.windows(2).all(|pair| pair[0] < pair[1]));
            prop_assert!(sample.iter().all(|stripe| *stripe < stripes));
            let part = stripes.div_ceil(most);
            prop_assert!(sample[0] < part && stripes - sample[sample.len() - 1] <= part + 1);
        }
    }
}
