//! Counts dirty pages over windows of several lengths: one clear, then looks at the log that clear nothing.
//!
//! Of large memories only a sample is cleared and counted: one stripe, drawn at random, of each of so many equal parts. A page that is not
//! cleared is not protected either, so the guest is not slowed down for it.

use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use super::EstimateError;
use crate::layout::STRIPE_WORDS;
use crate::machine::{MachineError, SourceMachine};
use crate::pending::{Harvester, Pending, forget_vmm_writes};
use crate::predict::{Dirtying, Zone};
use crate::random;
use crate::touched::TouchedPages;
use crate::view::MemoryView;

/// The windows of a series.
const WINDOWS_MS: [u64; 9] = [10, 20, 50, 100, 200, 500, 1000, 2000, 4000];
/// Counts over shorter windows say little about the spread: they are small numbers.
const TELLING_WINDOW_MS: u64 = 100;
/// More stripes than these (16 GiB) are sampled.
const MOST_STRIPES: usize = 8192;
/// Parts of memory with a curve of their own.
const ZONES: usize = 32;

/// U(t) at one window, over all memory.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct WindowCount {
    /// How long it was.
    pub window_ms: f64,
    /// Different pages dirtied in it, on average,
    pub pages: f64,
    /// at least,
    pub low: f64,
    /// and at most.
    pub high: f64,
}

/// What has been counted.
pub(super) struct Counts {
    pub(super) zones: Vec<Zone>,
    pub(super) windows: Vec<WindowCount>,
    pub(super) spread: f64,
    pub(super) series: u32,
    pub(super) harvest: Duration,
    pub(super) sampled_share: f64,
}

/// Runs series while the dirty log is on; it is off again once this is gone.
pub(super) struct Counter<'m> {
    machine: &'m dyn SourceMachine,
    view: &'m MemoryView,
    /// Stripes that are looked at, in order.
    sample: Vec<usize>,
    pending: Pending,
    harvester: Harvester,
    /// For each window of each series: how long ago each zone had been cleared, and the pages dirty in it.
    taken: Vec<Vec<Vec<(f64, f64)>>>,
    harvest: Duration,
}

impl Drop for Counter<'_> {
    fn drop(&mut self) {
        if let Err(error) = self.machine.dirty_log().stop() {
            tracing::warn!("after an estimate the dirty log cannot be stopped: {error}");
        }
    }
}

impl<'m> Counter<'m> {
    pub(super) fn start(machine: &'m dyn SourceMachine, view: &'m MemoryView) -> Result<Self, MachineError> {
        let layout = view.layout();
        let mut counter = Self {
            machine,
            view,
            sample: sample(layout.stripes(), MOST_STRIPES),
            pending: Pending::new(layout),
            harvester: Harvester::new(layout),
            taken: Vec::new(),
            harvest: Duration::MAX,
        };
        // From here on it is stopped again, whatever happens.
        machine.dirty_log().start()?;
        counter.harvest = counter.look()?;
        Ok(counter)
    }

    /// Stripes that are looked at.
    pub(super) fn sample(&self) -> &[usize] {
        &self.sample
    }

    /// What was dirty when the last series ended.
    pub(super) fn pending(&self) -> &Pending {
        &self.pending
    }

    /// Series so far.
    pub(super) fn series(&self) -> u32 {
        self.taken.len() as u32
    }

    /// One clear, and a look after each window that ends in time (after the first few in any case).
    pub(super) fn run_series(&mut self, until: Instant, wait: &dyn Fn(Duration) -> bool) -> Result<(), EstimateError> {
        let cleared = self.clear()?;
        let began = cleared.last().copied().unwrap_or_else(Instant::now);
        let mut series = Vec::new();
        for (index, window_ms) in WINDOWS_MS.iter().enumerate() {
            let due = began + Duration::from_millis(*window_ms);
            if due > until && index > 2 {
                break;
            }
            if !wait(due.saturating_duration_since(Instant::now())) {
                return Err(EstimateError::CalledOff);
            }
            let looked = Instant::now();
            self.harvest = self.harvest.min(self.look()?);
            let counts = self.count();
            series.push(
                cleared.iter().zip(counts).map(|(cleared, pages)| ((looked - *cleared).as_secs_f64(), pages)).collect(),
            );
        }
        self.taken.push(series);
        Ok(())
    }

    /// Everything that was counted, as curves.
    pub(super) fn finish(self, touched: &dyn TouchedPages) -> Result<Counts, MachineError> {
        let layout = self.view.layout();
        let mut touched_pages = vec![0.0; ZONES];
        let mut pages = vec![0.0; ZONES];
        for &index in &self.sample {
            let stripe = layout.stripe(index);
            let zone = self.zone_of(index);
            touched_pages[zone] += touched.of(&stripe).iter().map(|word| f64::from(word.count_ones())).sum::<f64>();
            pages[zone] += stripe.pages as f64;
        }
        let all: f64 = pages.iter().sum();
        let scale = layout.pages() as f64 / all.max(1.0);
        let zones = (0..ZONES).map(|zone| Zone {
            touched_pages: touched_pages[zone] * scale,
            dirtying: Dirtying::measured(&self.curve(zone, scale), pages[zone] * scale),
        });
        Ok(Counts {
            zones: zones.collect(),
            windows: self.windows(scale),
            spread: self.spread(),
            series: self.series(),
            harvest: self.harvest,
            sampled_share: 1.0 / scale,
        })
    }

    /// Clears the log of the sample and forgets what was counted. Returns when each zone had been cleared.
    fn clear(&mut self) -> Result<Vec<Instant>, MachineError> {
        let layout = self.view.layout();
        let mut cleared = vec![Instant::now(); ZONES];
        forget_vmm_writes(self.view.memory());
        for &index in &self.sample {
            let stripe = layout.stripe(index);
            let words = stripe.pages.div_ceil(64).min(STRIPE_WORDS);
            self.machine.dirty_log().clear(stripe.region, stripe.first_page, &stripe.all()[..words])?;
            cleared[self.zone_of(index)] = Instant::now();
        }
        for index in 0..layout.stripes() {
            self.pending.take(index);
        }
        Ok(cleared)
    }

    /// Takes in what has become dirty; how long that took.
    fn look(&mut self) -> Result<Duration, MachineError> {
        let began = Instant::now();
        let (log, memory) = (self.machine.dirty_log(), self.view.memory());
        self.harvester.harvest(self.view.layout(), log, memory, &self.pending)?;
        Ok(began.elapsed())
    }

    fn count(&self) -> Vec<f64> {
        let mut pages = vec![0.0; ZONES];
        for &index in &self.sample {
            pages[self.zone_of(index)] +=
                self.pending.get(index).iter().map(|word| f64::from(word.count_ones())).sum::<f64>();
        }
        pages
    }

    fn zone_of(&self, stripe: usize) -> usize {
        stripe * ZONES / self.view.layout().stripes().max(1)
    }

    /// A zone's counts at each window, averaged over the series that have it.
    fn curve(&self, zone: usize, scale: f64) -> Vec<(Duration, f64)> {
        let at = |index: usize| {
            let all: Vec<(f64, f64)> =
                self.taken.iter().filter_map(|series| series.get(index)).map(|zones| zones[zone]).collect();
            let mean = |value: fn(&(f64, f64)) -> f64| all.iter().map(value).sum::<f64>() / all.len() as f64;
            (!all.is_empty()).then(|| (Duration::from_secs_f64(mean(|taken| taken.0)), mean(|taken| taken.1) * scale))
        };
        (0..WINDOWS_MS.len()).filter_map(at).collect()
    }

    /// The counts over all memory at a window, one for each series that has it.
    fn totals(&self, index: usize) -> Vec<f64> {
        let total = |zones: &Vec<(f64, f64)>| zones.iter().map(|taken| taken.1).sum();
        self.taken.iter().filter_map(|series| series.get(index)).map(total).collect()
    }

    fn windows(&self, scale: f64) -> Vec<WindowCount> {
        let at = |(index, window_ms): (usize, &u64)| {
            let totals: Vec<f64> = self.totals(index).iter().map(|pages| pages * scale).collect();
            (!totals.is_empty()).then(|| WindowCount {
                window_ms: *window_ms as f64,
                pages: totals.iter().sum::<f64>() / totals.len() as f64,
                low: totals.iter().copied().fold(f64::MAX, f64::min),
                high: totals.iter().copied().fold(0.0, f64::max),
            })
        };
        WINDOWS_MS.iter().enumerate().filter_map(at).collect()
    }

    /// Standard deviation over mean of the counts at a window, on average over the windows.
    fn spread(&self) -> f64 {
        let telling = WINDOWS_MS.iter().enumerate().filter(|(_, window_ms)| **window_ms >= TELLING_WINDOW_MS);
        let shares: Vec<f64> = telling.filter_map(|(index, _)| deviation(&self.totals(index))).collect();
        match shares.is_empty() {
            true => 0.0,
            false => shares.iter().sum::<f64>() / shares.len() as f64,
        }
    }
}

/// `None` of fewer than two, or where nothing was counted.
fn deviation(counts: &[f64]) -> Option<f64> {
    let mean = counts.iter().sum::<f64>() / counts.len() as f64;
    if counts.len() < 2 || mean <= 0.0 {
        return None;
    }
    let squares: f64 = counts.iter().map(|count| (count - mean).powi(2)).sum();
    Some((squares / (counts.len() - 1) as f64).sqrt() / mean)
}

/// All stripes, or one at random out of each of `most` equal parts.
fn sample(stripes: usize, most: usize) -> Vec<usize> {
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

    #[test]
    fn deviation_is_a_share_of_the_mean() {
        assert_eq!(deviation(&[100.0]), None);
        assert_eq!(deviation(&[0.0, 0.0]), None);
        assert!((deviation(&[90.0, 110.0]).unwrap() - 0.1414).abs() < 1e-3);
    }
}
