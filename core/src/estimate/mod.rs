//! What has to be known of a running guest to predict its move, measured without moving it: how many pages it dirties in windows
//! of several lengths, what is in its pages, what a pause takes.
//!
//! The dirty log runs meanwhile, as it does in a move, and is off again afterwards whatever happens.

mod contents;
mod counting;
pub(crate) mod sampling;
mod windows;

use std::sync::Arc;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use self::contents::FirstContents;
pub(crate) use self::contents::RewrittenContents;
use self::counting::{Counter, Counts};
pub use self::windows::WindowCount;
use crate::layout::{Layout, StripeBits};
use crate::machine::{MachineError, SourceMachine};
use crate::predict::{Path, Workload};
use crate::source::control::{Done, HANDOVER_TRIPS, IN_PAUSE, probe_bytes};
use crate::source::{Compression, jobs};
use crate::touched::{MappedPages, TouchedPages};
use crate::view::MemoryView;

/// Below this, there are no two intervals.
pub const SHORTEST: Duration = Duration::from_millis(500);
/// Fewer say nothing of how they differ.
const LEAST_INTERVALS: u32 = 2;
/// Pages that were rewritten are looked at after so many intervals: about as long as a later round.
const COMPARE_EVERY: u32 = 4;
/// From connecting to the first page, on a link without delay, beside probing the link: above all the destination's machine is built.
const SETUP: Duration = Duration::from_millis(55);
/// Between two rounds, beside the harvest: workers are told, and tell.
pub(crate) const BETWEEN_ROUNDS: Duration = Duration::from_micros(200);
/// A round trip to the destination, as long as nobody has measured it.
const ROUND_TRIP: Duration = Duration::from_micros(300);
/// What is on its way at the end of a round: half of what the cap hands to a socket in one call (`pacer.rs`), and no more than sockets hold.
const QUEUED: Duration = Duration::from_micros(500);
const MOST_QUEUED_BYTES: f64 = 128e3;

/// How to measure, and with which of a move's options pages would be encoded.
#[derive(Debug, Clone, Copy)]
pub struct Options {
    /// How long to measure.
    pub time: Duration,
    /// How pages may be compressed.
    pub compression: Compression,
    /// Memory for what was last sent of pages.
    pub delta_cache_bytes: u64,
}

/// Why nothing was measured.
#[derive(Debug, thiserror::Error)]
pub enum EstimateError {
    /// Somebody wanted it to end.
    #[error("the estimate was called off")]
    CalledOff,
    /// The machine could not do what it was asked for.
    #[error(transparent)]
    Machine(#[from] MachineError),
    /// This process's memory cannot be looked at.
    #[error("{0}: {1}")]
    Io(&'static str, #[source] std::io::Error),
}

/// What was measured.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Measured {
    /// All of guest RAM.
    pub memory_bytes: u64,
    /// Of that, ever touched.
    pub touched_bytes: u64,
    /// Of guest RAM, the share that was looked at; the rest is taken to be like it.
    pub sampled_share: f64,
    /// Intervals, each from one clear of the log to the next.
    pub intervals: u32,
    /// U(t) at each window.
    pub windows: Vec<WindowCount>,
    /// By how much counts over the same window differ: one standard deviation, as a share.
    pub spread: f64,
    /// Of touched pages, those that are all zeros.
    pub zero_share: f64,
    /// Of the others, those that compress.
    pub compressible_share: f64,
    /// Of dirtied pages, those whose differences are short enough to be sent instead.
    pub delta_share: f64,
    /// Of dirtied pages, those that hold what they held before.
    pub same_share: f64,
    /// Pausing and saving: the rehearsal of a move.
    pub pause_ms: f64,
    /// One look at all dirty bits.
    pub harvest_ms: f64,
    /// For the predictor.
    pub workload: Workload,
}

/// What pausing and saving take: the rehearsal of a move.
pub fn rehearse(machine: &dyn SourceMachine) -> Result<Duration, MachineError> {
    let began = Instant::now();
    match jobs::rehearse(machine, &|| began.elapsed())? {
        Done::Rehearsed { pause, .. } => Ok(pause),
        _ => Err(MachineError::new("the rehearsal of the pause has ended as something else")),
    }
}

/// Measures `machine`, whose pause takes what [`rehearse`] has shown. `wait` waits for so long, and says whether to go on.
pub fn measure(
    machine: &dyn SourceMachine,
    pause: Duration,
    options: &Options,
    wait: &dyn Fn(Duration) -> bool,
) -> Result<Measured, EstimateError> {
    let description = machine.describe()?;
    let layout = Layout::new(&description.memory)
        .map_err(|error| MachineError::with_source("the machine's description", error))?;
    let view = MemoryView::new(machine.memory(), Arc::new(layout))?;
    let touched = MappedPages::new(view.memory())
        .map_err(|error| EstimateError::Io("cannot read this process's page map", error))?;
    let began = Instant::now();
    let mut counter = Counter::start(machine, &view)?;
    let first = FirstContents::sample(&view, &touched, counter.sample(), options)?;
    let mut rewritten = RewrittenContents::new(options, contents::RUNS)?;
    while counter.intervals() < LEAST_INTERVALS || began.elapsed() < options.time {
        if counter.intervals().is_multiple_of(COMPARE_EVERY) {
            // Pages that were dirty and are dirty again are those that a later round would send.
            rewritten.compare(&view, |index| counter.dirty_since().get(index));
            let touched_and_dirty = |index: usize| match counter.dirty().get(index) {
                bits if bits == StripeBits::default() => bits,
                bits => {
                    let touched = touched.of(&view.layout().stripe(index));
                    std::array::from_fn(|word| bits[word] & touched[word])
                }
            };
            rewritten.remember(&view, touched_and_dirty, counter.sample());
            counter.forget();
        }
        counter.run_interval(wait)?;
    }
    rewritten.compare(&view, |index| counter.dirty_since().get(index));
    let Counts { zones, windows, spread, intervals, harvest, sampled_share } = counter.finish(&touched);
    let dirty_pages = windows.last().map_or(0.0, |window| window.pages);
    let contents = rewritten.costs(&first, dirty_pages);
    let touched_pages: f64 = zones.iter().map(|zone| zone.touched_pages).sum();
    Ok(Measured {
        memory_bytes: description.memory_bytes(),
        touched_bytes: touched_pages as u64 * crate::memory::PAGE_SIZE as u64,
        sampled_share,
        intervals,
        windows,
        spread,
        zero_share: first.zero_share,
        compressible_share: first.compressible_share,
        delta_share: rewritten.delta_share(),
        same_share: rewritten.same_share(),
        pause_ms: pause.as_secs_f64() * 1e3,
        harvest_ms: harvest.as_secs_f64() * 1e3,
        workload: Workload { zones, contents },
    })
}

impl Measured {
    /// A link to the destination that is capped, and therefore probed. What only a destination can tell is taken to be as on this host.
    pub fn path(&self, bandwidth_bytes_per_s: f64, switchover_bytes_per_s: f64) -> Path {
        let ms = |ms: f64| Duration::from_secs_f64(ms.max(0.0) / 1e3);
        let probe_bytes = probe_bytes(switchover_bytes_per_s);
        let (pause, harvest) = (ms(self.pause_ms), ms(self.harvest_ms));
        Path {
            bandwidth_bytes_per_s,
            switchover_bytes_per_s,
            setup: SETUP + Duration::from_secs_f64((probe_bytes / switchover_bytes_per_s.max(1e3)).min(3600.0)),
            probe_bytes,
            round_overhead: BETWEEN_ROUNDS + harvest,
            // State is loaded in about the time in which it is saved (docs/performance.md).
            fixed: 2 * pause + harvest + IN_PAUSE + HANDOVER_TRIPS * ROUND_TRIP,
            queued_bytes: (bandwidth_bytes_per_s * QUEUED.as_secs_f64()).min(MOST_QUEUED_BYTES),
        }
    }

    /// Bytes that the guest dirties in a second, first writes to clean pages alone.
    pub fn dirty_bytes_per_s(&self) -> f64 {
        self.workload.dirty_pages(Duration::from_secs(1)) * crate::memory::PAGE_SIZE as f64
    }
}
