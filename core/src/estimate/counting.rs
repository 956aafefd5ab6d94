//! Watches the dirty log: intervals, one after the other, in each of which the log is looked at several times.
//!
//! At the end of an interval just those bits are cleared that it has found: nothing that is written meanwhile is lost. Of large memories
//! only a sample is cleared and counted: one stripe, drawn at random, of each of so many equal parts. A page that is not cleared is not
//! protected either, so the guest is not slowed down for it.

use std::time::{Duration, Instant};

use super::EstimateError;
use super::sampling::{MOST_STRIPES, ZONES, sample, zone_of};
use super::windows::{Interval, WITHIN_MS, WindowCount, Windows};
use crate::layout::{STRIPE_WORDS, StripeBits};
use crate::machine::{MachineError, SourceMachine};
use crate::pending::{Harvester, Pending, forget_vmm_writes};
use crate::predict::{Dirtying, Zone};
use crate::touched::TouchedPages;
use crate::view::MemoryView;

/// What has been counted.
pub(super) struct Counts {
    pub(super) zones: Vec<Zone>,
    pub(super) windows: Vec<WindowCount>,
    pub(super) spread: f64,
    pub(super) intervals: u32,
    pub(super) harvest: Duration,
    pub(super) sampled_share: f64,
}

/// Runs intervals while the dirty log is on; it is off again once this is gone.
pub(super) struct Counter<'m> {
    machine: &'m dyn SourceMachine,
    view: &'m MemoryView,
    began: Instant,
    /// Stripes that are looked at, in order.
    sample: Vec<usize>,
    /// Dirtied in the interval that is under way, or was last.
    dirty: Pending,
    /// Dirtied since [`Counter::forget`].
    since: Pending,
    harvester: Harvester,
    /// When each zone was last cleared.
    cleared: Vec<Duration>,
    windows: Windows,
    intervals: u32,
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
        let sample = sample(layout.stripes(), MOST_STRIPES);
        let zone_of = sample.iter().map(|stripe| zone_of(*stripe, layout.stripes())).collect();
        let mut counter = Self {
            machine,
            view,
            began: Instant::now(),
            sample,
            dirty: Pending::new(layout),
            since: Pending::new(layout),
            harvester: Harvester::new(layout),
            cleared: vec![Duration::ZERO; ZONES],
            windows: Windows::new(Duration::ZERO, Vec::new(), ZONES),
            intervals: 0,
            harvest: Duration::MAX,
        };
        // From here on it is stopped again, whatever happens.
        machine.dirty_log().start()?;
        counter.harvest = counter.look()?;
        counter.windows = Windows::new(counter.harvest, zone_of, ZONES);
        forget_vmm_writes(view.memory());
        let all = counter.sample.iter().map(|index| layout.stripe(*index).all()).collect::<Vec<_>>();
        counter.clear(&all)?;
        Ok(counter)
    }

    /// Stripes that are looked at.
    pub(super) fn sample(&self) -> &[usize] {
        &self.sample
    }

    /// Dirtied in the last interval.
    pub(super) fn dirty(&self) -> &Pending {
        &self.dirty
    }

    /// Dirtied since [`Counter::forget`].
    pub(super) fn dirty_since(&self) -> &Pending {
        &self.since
    }

    /// Begins [`Counter::dirty_since`] anew.
    pub(super) fn forget(&self) {
        for &index in &self.sample {
            self.since.take(index);
        }
    }

    /// Intervals so far.
    pub(super) fn intervals(&self) -> u32 {
        self.intervals
    }

    /// An interval: looks at the log that clear nothing, and at the end one that does.
    pub(super) fn run_interval(&mut self, wait: &dyn Fn(Duration) -> bool) -> Result<(), EstimateError> {
        // What was dirty in the interval before was kept until now.
        self.take_dirty();
        let began = self.cleared.last().copied().unwrap_or_default();
        let interval_ms = self.windows.interval_ms();
        for window_ms in WITHIN_MS.into_iter().chain([interval_ms]) {
            let due = began + Duration::from_millis(window_ms);
            if !wait(due.saturating_sub(self.began.elapsed())) {
                return Err(EstimateError::CalledOff);
            }
            let ended = self.began.elapsed();
            self.harvest = self.harvest.min(self.look()?);
            let dirty = self.sample.iter().map(|index| self.dirty.get(*index)).collect();
            let interval = Interval { cleared: self.cleared.clone(), ended, dirty };
            if window_ms < interval_ms {
                self.windows.look(window_ms, &interval);
                continue;
            }
            self.clear(&interval.dirty)?;
            for (index, bits) in self.sample.iter().zip(&interval.dirty) {
                self.since.merge(*index, bits);
            }
            self.windows.ended(interval);
        }
        self.intervals += 1;
        Ok(())
    }

    /// Everything that was counted, as curves.
    pub(super) fn finish(self, touched: &dyn TouchedPages) -> Counts {
        let layout = self.view.layout();
        let mut touched_pages = vec![0.0; ZONES];
        let mut pages = vec![0.0; ZONES];
        for &index in &self.sample {
            let stripe = layout.stripe(index);
            let zone = zone_of(index, layout.stripes());
            touched_pages[zone] += touched.of(&stripe).iter().map(|word| f64::from(word.count_ones())).sum::<f64>();
            pages[zone] += stripe.pages as f64;
        }
        let all: f64 = pages.iter().sum();
        let scale = layout.pages() as f64 / all.max(1.0);
        let zones = (0..ZONES).map(|zone| Zone {
            touched_pages: touched_pages[zone] * scale,
            dirtying: Dirtying::measured(&self.windows.curve(zone, scale), pages[zone] * scale),
        });
        Counts {
            zones: zones.collect(),
            windows: self.windows.counts(scale),
            spread: self.windows.spread(),
            intervals: self.intervals,
            harvest: self.harvest,
            sampled_share: 1.0 / scale,
        }
    }

    /// Clears these bits of the sample in the log.
    fn clear(&mut self, dirty: &[StripeBits]) -> Result<(), MachineError> {
        let layout = self.view.layout();
        for (&index, bits) in self.sample.iter().zip(dirty) {
            if *bits != StripeBits::default() {
                let stripe = layout.stripe(index);
                let words = stripe.pages.div_ceil(64).min(STRIPE_WORDS);
                self.machine.dirty_log().clear(stripe.region, stripe.first_page, &bits[..words])?;
            }
            self.cleared[zone_of(index, layout.stripes())] = self.began.elapsed();
        }
        Ok(())
    }

    /// Takes in what has become dirty; how long that took.
    fn look(&mut self) -> Result<Duration, MachineError> {
        let began = Instant::now();
        let (log, memory) = (self.machine.dirty_log(), self.view.memory());
        self.harvester.harvest(self.view.layout(), log, memory, &self.dirty)?;
        Ok(began.elapsed())
    }

    fn take_dirty(&self) {
        for index in 0..self.view.layout().stripes() {
            self.dirty.take(index);
        }
    }
}
