//! How long faults take: a histogram whose bins are within 6 % of what they stand for.

use std::time::Duration;

/// Bins for each power of two.
const BINS: u64 = 16;
const BITS: u32 = BINS.trailing_zeros();

/// Durations, counted by size.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Latencies {
    bins: Vec<u64>,
    count: u64,
    max_us: u64,
}

impl Latencies {
    /// Counts one.
    pub fn note(&mut self, latency: Duration) {
        let us = u64::try_from(latency.as_micros()).unwrap_or(u64::MAX);
        let bin = bin_of(us);
        if self.bins.len() <= bin {
            self.bins.resize(bin + 1, 0);
        }
        self.bins[bin] += 1;
        self.count += 1;
        self.max_us = self.max_us.max(us);
    }

    /// How many there are.
    pub fn count(&self) -> u64 {
        self.count
    }

    /// The longest.
    pub fn max_us(&self) -> u64 {
        self.max_us
    }

    /// So long that this share of them is no longer; 0 if there are none.
    pub fn percentile_us(&self, share: f64) -> u64 {
        let rank = ((self.count as f64 * share).ceil() as u64).max(1);
        let mut seen = 0;
        for (bin, count) in self.bins.iter().enumerate() {
            seen += count;
            if seen >= rank {
                return largest_in(bin as u64).min(self.max_us);
            }
        }
        self.max_us
    }
}

/// Up to [`BINS`] each number has a bin of its own; from there on each power of two has so many.
fn bin_of(us: u64) -> usize {
    let shift = us.checked_ilog2().map_or(0, |log| log.saturating_sub(BITS));
    (u64::from(shift) * BINS + (us >> shift)) as usize
}

fn largest_in(bin: u64) -> u64 {
    let shift = (bin / BINS).saturating_sub(1);
    let first = u128::from(bin - shift * BINS);
    u64::try_from(((first + 1) << shift) - 1).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn nothing_is_zero() {
        assert_eq!(Latencies::default().percentile_us(0.99), 0);
    }

    proptest! {
        #[test]
        fn percentiles_are_near_the_true_ones(mut all in prop::collection::vec(0u64..10_000_000, 1..300), share in 0.0..1.0f64) {
            let mut latencies = Latencies::default();
            all.iter().for_each(|us| latencies.note(Duration::from_micros(*us)));
            all.sort_unstable();
            let rank = ((all.len() as f64 * share).ceil() as usize).max(1);
            let (right, told) = (all[rank - 1], latencies.percentile_us(share));
            prop_assert!(told >= right && told as f64 <= right as f64 * 1.07 + 1.0, "{} for {}", told, right);
            prop_assert_eq!(latencies.max_us(), *all.last().unwrap());
            prop_assert_eq!(latencies.count(), all.len() as u64);
        }

        #[test]
        fn every_number_lies_in_its_bin(us in any::<u64>()) {
            let bin = bin_of(us);
            prop_assert!(us <= largest_in(bin as u64));
            prop_assert!(bin == 0 || us > largest_in(bin as u64 - 1));
        }
    }
}
