//! What a person wants to know of a move beforehand: does it converge and how surely, how long, how many bytes, which pause.

use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::rounds::{
    Path, PredictedRound, Prediction, Standing, Workload, predict, predict_from, shortest_pause, standing_after,
};
use crate::memory::PAGE_SIZE;
use crate::policy::{Decision, Limits, THROTTLED_AFTER};

/// A guest that may write a tenth faster, or must write a tenth slower, is called a border case.
const BORDER: f64 = 0.1;
/// Speeds that are looked at, as powers of 2: from a thousandth to a thousand times the measured one.
const MOST_DOUBLINGS: f64 = 10.0;
/// To a thousandth.
const HALVINGS: u32 = 14;

/// A value and what it may be instead.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
pub struct Band {
    /// If the guest writes less than on average.
    pub low: f64,
    /// What is predicted.
    pub likely: f64,
    /// If it writes more.
    pub high: f64,
}

/// How a move will go.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Forecast {
    /// The downtime limit is met in time.
    pub converges: bool,
    /// The border is near: within a tenth of the guest's write rate.
    pub border: bool,
    /// How many times as fast the guest could write and the move still converge. Absent: however fast. 0: it cannot, however slowly.
    pub margin: Option<f64>,
    /// What a throttle would leave the guest for it to converge. Absent: it needs none, or none is strong enough.
    pub throttle: Option<Throttle>,
    /// Why it does not converge, if it does not: the policy's own words.
    pub why: Option<String>,
    /// Until the guest runs at the destination, or the move is given up.
    pub total_s: Band,
    /// The pause; if it does not converge, what it would be in the end.
    pub pause_ms: Band,
    /// Over the link.
    pub wire_bytes: Band,
    /// Each round, the first pass included.
    pub rounds: Vec<PredictedRound>,
    /// The shortest pause within reach.
    pub shortest_pause_ms: f64,
}

/// The highest write rate at which downtime limit and time budget are met, with the reserve that a throttle keeps. It holds from when the throttle
/// begins in the first pass; until then the guest writes as fast as it likes.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Throttle {
    /// Of what it writes by itself.
    pub share: f64,
    /// Page writes, those to pages that are dirty already included.
    pub pages_per_s: f64,
    /// The same in bytes of whole pages.
    pub bytes_per_s: f64,
}

/// Forecasts for one bandwidth.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Row {
    /// B_c.
    pub bandwidth_bytes_per_s: f64,
    /// The shortest pause within reach.
    pub shortest_pause_ms: f64,
    /// One for each downtime limit.
    pub cells: Vec<Cell>,
}

/// One combination of bandwidth and downtime limit.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Cell {
    /// The longest pause to aim for.
    pub downtime_limit_ms: f64,
    /// It is met in time.
    pub converges: bool,
    /// Until the guest runs at the destination, or the move is given up.
    pub total_s: f64,
    /// The pause.
    pub pause_ms: f64,
    /// Over the link.
    pub wire_bytes: f64,
}

impl Forecast {
    /// Of `workload`, whose counts differ from window to window by a share of `spread` (one standard deviation).
    pub fn new(workload: &Workload, spread: f64, path: &Path, limits: &Limits) -> Self {
        let likely = predict(workload, path, limits);
        let others = match spread > 0.0 {
            true => vec![
                predict(&workload.scaled((1.0 - spread).max(0.0)), path, limits),
                predict(&workload.scaled(1.0 + spread), path, limits),
            ],
            false => Vec::new(),
        };
        let band = |value: &dyn Fn(&Prediction) -> f64| {
            let likely = value(&likely);
            let all = || others.iter().map(value).chain([likely]);
            Band { low: all().fold(f64::MAX, f64::min), likely, high: all().fold(f64::MIN, f64::max) }
        };
        let margin = highest_speed(workload, path, limits);
        Self {
            converges: likely.converges(),
            border: margin.is_some_and(|speed| (speed - 1.0).abs() <= BORDER),
            margin,
            throttle: Throttle::new(workload, path, limits).filter(|_| !likely.converges()),
            why: likely.why().map(str::to_owned),
            total_s: band(&|prediction| prediction.total.as_secs_f64()),
            pause_ms: band(&|prediction| prediction.pause.as_secs_f64() * 1e3),
            wire_bytes: band(&|prediction| prediction.wire_bytes),
            shortest_pause_ms: shortest_pause(workload, path, limits.max_rounds).as_secs_f64() * 1e3,
            rounds: likely.rounds,
        }
    }
}

impl Throttle {
    /// Of a move that has not begun. `None`: no throttle is strong enough.
    fn new(workload: &Workload, path: &Path, limits: &Limits) -> Option<Self> {
        let standing = standing_after(THROTTLED_AFTER, workload, path);
        let share = throttled_share(&standing, workload, path, limits);
        let pages_per_s = share * workload.pages_per_s();
        (share > 0.0).then_some(Self { share, pages_per_s, bytes_per_s: pages_per_s * PAGE_SIZE as f64 })
    }
}

/// The highest share of its speed at which a guest meets the limits from where a move stands, with something in reserve if there is any such share. 0: there is
/// none at all.
pub fn throttled_share(standing: &Standing, workload: &Workload, path: &Path, limits: &Limits) -> f64 {
    let highest = |limits: &Limits| {
        highest_that(|speed| predict_from(standing, &workload.at_speed(speed), path, limits).converges())
    };
    // However fast it writes: that needs no throttle.
    let share = |limits: Limits| highest(&limits).unwrap_or(1.0).min(1.0);
    limits.aims().into_iter().map(share).find(|share| *share > 0.0).unwrap_or(0.0)
}

impl Prediction {
    /// Whether the downtime limit is met in time.
    pub fn converges(&self) -> bool {
        self.end == Decision::Stop
    }

    /// Why it is not: the policy's own words.
    pub fn why(&self) -> Option<&str> {
        match &self.end {
            Decision::GiveUp(why) | Decision::ForceStop(why) | Decision::PostCopy(why) => Some(why),
            Decision::Continue | Decision::AwaitQueue | Decision::Stop => None,
        }
    }
}

/// How many times as fast as it does the guest may write for downtime limit and time budget to be met. `None`: however fast. 0: they
/// cannot be met even by a guest that hardly writes.
pub fn highest_speed(workload: &Workload, path: &Path, limits: &Limits) -> Option<f64> {
    highest_that(|speed| predict(&workload.at_speed(speed), path, limits).converges())
}

fn highest_that(is_met: impl Fn(f64) -> bool) -> Option<f64> {
    let converges = |doublings: f64| is_met(doublings.exp2());
    let (mut met, mut missed) = (-MOST_DOUBLINGS, MOST_DOUBLINGS);
    if converges(missed) {
        return None;
    }
    if !converges(met) {
        return Some(0.0);
    }
    for _ in 0..HALVINGS {
        let middle = (met + missed) / 2.0;
        match converges(middle) {
            true => met = middle,
            false => missed = middle,
        }
    }
    Some(met.exp2())
}

/// A forecast in short for each bandwidth and downtime limit; `path` knows the way at a bandwidth.
pub fn table(
    workload: &Workload,
    path: &dyn Fn(f64) -> Path,
    limits: &Limits,
    bandwidths: &[f64],
    downtimes: &[Duration],
) -> Vec<Row> {
    let row = |&bandwidth_bytes_per_s: &f64| {
        let path = path(bandwidth_bytes_per_s);
        let cell = |&downtime: &Duration| {
            let prediction = predict(workload, &path, &Limits { downtime, ..*limits });
            Cell {
                downtime_limit_ms: downtime.as_secs_f64() * 1e3,
                converges: prediction.converges(),
                total_s: prediction.total.as_secs_f64(),
                pause_ms: prediction.pause.as_secs_f64() * 1e3,
                wire_bytes: prediction.wire_bytes,
            }
        };
        Row {
            bandwidth_bytes_per_s,
            shortest_pause_ms: shortest_pause(workload, &path, limits.max_rounds).as_secs_f64() * 1e3,
            cells: downtimes.iter().map(cell).collect(),
        }
    };
    bandwidths.iter().map(row).collect()
}
