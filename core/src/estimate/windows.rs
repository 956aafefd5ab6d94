//! U(t) from what was dirtied in a row of intervals: pure arithmetic.
//!
//! The log is cleared at the beginning of every interval. What is dirty over several in a row is the union of what each has
//! found, so every interval begins windows of all lengths: a few seconds show many windows of each. That matters most for
//! writers that go through memory from front to back, of which one window shows only where they happened to be.

use std::collections::{BTreeMap, VecDeque};
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::layout::StripeBits;

/// How long an interval is at least,
const INTERVAL_MS: u64 = 250;
/// and how many times as long as one look at the log.
const LOOKS_IN_INTERVAL: u32 = 50;
/// An interval that a person would take for a hang does nobody good.
const MOST_INTERVAL_MS: u64 = 10_000;
/// Windows that are looked at within each.
pub(super) const WITHIN_MS: [u64; 4] = [10, 20, 50, 100];
/// Windows of so many intervals are counted.
const IN_A_ROW: [usize; 6] = [1, 2, 4, 8, 16, 32];
/// Counts over shorter windows say little about the spread: they are small numbers.
const TELLING_WINDOW_MS: u64 = 100;

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

/// Counts over windows of several lengths, zone by zone.
pub(super) struct Windows {
    interval_ms: u64,
    /// Of each stripe that is looked at.
    zone_of: Vec<usize>,
    zones: usize,
    /// The latest last.
    recent: VecDeque<Interval>,
    tallies: BTreeMap<u64, Tally>,
}

/// What one interval has found.
pub(super) struct Interval {
    /// When each zone had been cleared.
    pub(super) cleared: Vec<Duration>,
    /// When it ended.
    pub(super) ended: Duration,
    /// What was dirty then, for each stripe that is looked at.
    pub(super) dirty: Vec<StripeBits>,
}

/// All windows of one length.
struct Tally {
    /// For each zone, seconds and pages, summed up.
    zones: Vec<(f64, f64)>,
    /// Over all zones, one for each window.
    totals: Vec<f64>,
}

impl Windows {
    /// For stripes in these zones, where one look at the log takes so long.
    pub(super) fn new(look: Duration, zone_of: Vec<usize>, zones: usize) -> Self {
        let interval_ms = u64::try_from((look * LOOKS_IN_INTERVAL).as_millis()).unwrap_or(u64::MAX);
        let interval_ms = interval_ms.clamp(INTERVAL_MS, MOST_INTERVAL_MS).next_multiple_of(INTERVAL_MS);
        Self { interval_ms, zone_of, zones, recent: VecDeque::new(), tallies: BTreeMap::new() }
    }

    /// How long an interval is to be.
    pub(super) fn interval_ms(&self) -> u64 {
        self.interval_ms
    }

    /// An interval is under way, and this is dirty so far.
    pub(super) fn look(&mut self, window_ms: u64, so_far: &Interval) {
        let pages = self.count(&so_far.dirty);
        self.note(window_ms, &so_far.cleared, so_far.ended, &pages);
    }

    /// An interval has ended, and with it a window of each length.
    pub(super) fn ended(&mut self, interval: Interval) {
        self.recent.push_back(interval);
        if self.recent.len() > IN_A_ROW[IN_A_ROW.len() - 1] {
            self.recent.pop_front();
        }
        let Some(ended) = self.recent.back().map(|last| last.ended) else { return };
        let mut union = vec![StripeBits::default(); self.zone_of.len()];
        for back in 1..=self.recent.len() {
            let interval = &self.recent[self.recent.len() - back];
            for (union, dirty) in union.iter_mut().zip(&interval.dirty) {
                union.iter_mut().zip(dirty).for_each(|(union, dirty)| *union |= dirty);
            }
            if IN_A_ROW.contains(&back) {
                let (cleared, pages) = (interval.cleared.clone(), self.count(&union));
                self.note(back as u64 * self.interval_ms, &cleared, ended, &pages);
            }
        }
    }

    /// A zone's counts at each window, on average.
    pub(super) fn curve(&self, zone: usize, scale: f64) -> Vec<(Duration, f64)> {
        let mean = |tally: &Tally| {
            let (count, (seconds, pages)) = (tally.totals.len() as f64, tally.zones[zone]);
            (Duration::from_secs_f64(seconds / count), pages / count * scale)
        };
        self.tallies.values().map(mean).collect()
    }

    /// The counts over all memory at each window.
    pub(super) fn counts(&self, scale: f64) -> Vec<WindowCount> {
        let count = |(window_ms, tally): (&u64, &Tally)| {
            let totals = || tally.totals.iter().map(|pages| pages * scale);
            WindowCount {
                window_ms: *window_ms as f64,
                pages: totals().sum::<f64>() / tally.totals.len() as f64,
                low: totals().fold(f64::MAX, f64::min),
                high: totals().fold(0.0, f64::max),
            }
        };
        self.tallies.iter().map(count).collect()
    }

    /// Standard deviation over mean of the counts at a window, on average over the windows.
    pub(super) fn spread(&self) -> f64 {
        let telling = self.tallies.range(TELLING_WINDOW_MS..);
        let shares: Vec<f64> = telling.filter_map(|(_, tally)| deviation(&tally.totals)).collect();
        match shares.is_empty() {
            true => 0.0,
            false => shares.iter().sum::<f64>() / shares.len() as f64,
        }
    }

    fn note(&mut self, window_ms: u64, cleared: &[Duration], ended: Duration, pages: &[f64]) {
        let none = || Tally { zones: vec![(0.0, 0.0); self.zones], totals: Vec::new() };
        let tally = self.tallies.entry(window_ms).or_insert_with(none);
        for (sum, (cleared, pages)) in tally.zones.iter_mut().zip(cleared.iter().zip(pages)) {
            sum.0 += ended.saturating_sub(*cleared).as_secs_f64();
            sum.1 += pages;
        }
        tally.totals.push(pages.iter().sum());
    }

    fn count(&self, dirty: &[StripeBits]) -> Vec<f64> {
        let mut pages = vec![0.0; self.zones];
        for (bits, zone) in dirty.iter().zip(&self.zone_of) {
            pages[*zone] += bits.iter().map(|word| f64::from(word.count_ones())).sum::<f64>();
        }
        pages
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::layout::STRIPE_PAGES;

    /// A writer that goes from front to back through so many stripes, each a zone, `pages` in an interval.
    fn sequential(stripes: usize, pages: usize, intervals: usize) -> Windows {
        let mut windows = Windows::new(Duration::ZERO, (0..stripes).collect(), stripes);
        let at = |interval: usize| Duration::from_millis(INTERVAL_MS * interval as u64);
        for interval in 0..intervals {
            let mut dirty = vec![StripeBits::default(); stripes];
            for page in interval * pages..(interval + 1) * pages {
                let page = page % (stripes * STRIPE_PAGES);
                dirty[page / STRIPE_PAGES][page % STRIPE_PAGES / 64] |= 1 << (page % 64);
            }
            windows.ended(Interval { cleared: vec![at(interval); stripes], ended: at(interval + 1), dirty });
        }
        windows
    }

    #[test]
    fn windows_begin_with_every_interval() {
        let windows = sequential(4, 100, 40);
        let counts: Vec<_> = windows.counts(1.0).iter().map(|count| (count.window_ms, count.pages)).collect();
        let expected = [1, 2, 4, 8, 16, 32].map(|row| (f64::from(row) * 250.0, f64::from(row * 100).min(2048.0)));
        assert_eq!(counts, expected);
        assert!(windows.spread() < 1e-9, "{}", windows.spread());
    }

    #[test]
    fn where_a_sequential_writer_happens_to_be_hardly_matters_to_a_zone() {
        // Around the set once in 20 intervals, so in 4 of them a fifth of every zone on average, wherever it began.
        let windows = sequential(4, 102, 60);
        for zone in 0..4 {
            let (window, pages) = windows.curve(zone, 2.0)[2];
            assert_eq!(window, Duration::from_secs(1));
            assert!((pages / 2.0 / STRIPE_PAGES as f64 - 0.2).abs() < 0.03, "zone {zone}: {pages}");
        }
    }

    #[test]
    fn an_interval_is_longer_where_looking_takes_long() {
        let interval = |look_ms: u64| Windows::new(Duration::from_millis(look_ms), Vec::new(), 0).interval_ms();
        assert_eq!([0, 5, 6, 20, 100_000].map(interval), [250, 250, 500, 1000, 10_000]);
    }

    #[test]
    fn a_look_within_an_interval_counts_for_its_own_window() {
        let mut windows = Windows::new(Duration::ZERO, vec![0, 1], 2);
        let ms = Duration::from_millis;
        for pages in [0b1u64, 0b111] {
            let dirty = vec![[pages, 0, 0, 0, 0, 0, 0, 0], [0b11, 0, 0, 0, 0, 0, 0, 0]];
            windows.look(10, &Interval { cleared: vec![ms(100), ms(102)], ended: ms(112), dirty });
        }
        assert_eq!(windows.curve(0, 1.0), [(ms(12), 2.0)]);
        assert_eq!(windows.curve(1, 10.0), [(ms(10), 20.0)]);
        assert_eq!(windows.counts(1.0)[0].low, 3.0);
    }

    #[test]
    fn deviation_is_a_share_of_the_mean() {
        assert_eq!(deviation(&[100.0]), None);
        assert_eq!(deviation(&[0.0, 0.0]), None);
        assert!((deviation(&[90.0, 110.0]).unwrap() - 0.1414).abs() < 1e-3);
    }
}
