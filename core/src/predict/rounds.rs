//! A move played in virtual time: rounds after rounds, by the engine's own stop rule.
//!
//! Memory is cut into slices that a round visits one after the other. A page's bit is cleared when its slice is visited, so at the end of
//! a round every slice has an age of its own, and what is dirty in it is what was dirtied in that time. Pages that were clean when
//! the round began are not visited: those dirtied before their slice's turn stay dirty too, unless they were dirtied again after it.
//! With h the begin and h' the end of a round, a slice visited at v, m = v − h and b = h' − v:
//!
//! ```text
//! dirty' = U(b) + U(a + m + b) − U(a + b)    where U(a) = dirty
//! ```
//!
//! a is the age that explains what was dirty at h. For a random writer this is exact, and the same as
//! x' = x(1 − (1 − e^(−kx))/(kx)) + (1 − x)(1 − e^(−kx)), which settles at x* = max(0, 1 − 1/k).

use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::contents::Contents;
use super::curve::Dirtying;
use crate::policy::{Decision, Limits, RoundEnd};
use crate::source::control::TELLING_ROUND_BYTES;

/// Slices of memory: enough that the age within one hardly differs.
const SLICES: usize = 128;
/// Nothing new happens in rounds after so many.
const MOST_ROUNDS: usize = 1000;

/// A part of guest memory, in the order in which it is sent.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Zone {
    /// Pages that the first pass sends.
    pub touched_pages: f64,
    /// What the guest dirties in it.
    pub dirtying: Dirtying,
}

/// A guest as a move sees it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Workload {
    /// Its memory, in order.
    pub zones: Vec<Zone>,
    /// What its pages cost.
    pub contents: Contents,
}

/// The way from host to host.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Path {
    /// B_c: in the rounds.
    pub bandwidth_bytes_per_s: f64,
    /// B_s: in the pause.
    pub switchover_bytes_per_s: f64,
    /// Until the first page is sent.
    pub setup: Duration,
    /// Sent meanwhile, to find out what the link takes.
    pub probe_bytes: f64,
    /// What a round takes beside sending.
    pub round_overhead: Duration,
    /// F: what the pause takes with nothing to send.
    pub fixed: Duration,
    /// Sent and not acknowledged when a round ends.
    pub queued_bytes: f64,
}

/// How a move is predicted to go.
#[derive(Debug, Clone, PartialEq)]
pub struct Prediction {
    /// What ends the rounds: [`Decision::Stop`], [`Decision::ForceStop`] or [`Decision::GiveUp`].
    pub end: Decision,
    /// Every round, the first pass included.
    pub rounds: Vec<PredictedRound>,
    /// Until the guest runs at the destination, or the move is given up.
    pub total: Duration,
    /// The pause, or what it would be when the move is given up.
    pub pause: Duration,
    /// Over the link.
    pub wire_bytes: f64,
}

/// One of its rounds.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct PredictedRound {
    /// Pages sent.
    pub pages: f64,
    /// Bytes over the link.
    pub wire_bytes: f64,
    /// How long.
    pub seconds: f64,
    /// Pages dirty when it ends.
    pub dirty_pages: f64,
    /// The pause, if it began then.
    pub pause_seconds: f64,
}

struct Slice<'w> {
    dirtying: &'w Dirtying,
    touched_pages: f64,
    dirty_pages: f64,
}

impl Workload {
    /// The same guest, writing so many times as fast.
    pub fn at_speed(&self, speed: f64) -> Self {
        self.with_dirtying(|zone| zone.dirtying.at_speed(speed))
    }

    /// The same guest, dirtying so many times as many pages in every window.
    pub fn scaled(&self, factor: f64) -> Self {
        self.with_dirtying(|zone| zone.dirtying.scaled(factor, zone.touched_pages.max(zone.dirtying.most_pages())))
    }

    /// Pages per second that find a clean page, in the shortest window known.
    pub fn pages_per_s(&self) -> f64 {
        self.zones.iter().map(|zone| zone.dirtying.pages_per_s()).sum()
    }

    /// U(t) of all memory.
    pub fn dirty_pages(&self, window: Duration) -> f64 {
        self.zones.iter().map(|zone| zone.dirtying.pages(window.as_secs_f64())).sum()
    }

    fn with_dirtying(&self, dirtying: impl Fn(&Zone) -> Dirtying) -> Self {
        let zones = self.zones.iter().map(|zone| Zone { dirtying: dirtying(zone), ..zone.clone() }).collect();
        Self { zones, ..*self }
    }
}

/// How a move over `path` within `limits` goes.
pub fn predict(workload: &Workload, path: &Path, limits: &Limits) -> Prediction {
    play(workload, path, |end| end.decide(limits))
}

/// The shortest pause that so many rounds after the first pass reach.
pub fn shortest_pause(workload: &Workload, path: &Path, max_rounds: u32) -> Duration {
    let mut shortest = Duration::MAX;
    play(workload, path, |end| {
        shortest = shortest.min(end.predicted_pause());
        match end.round < max_rounds {
            true => Decision::Continue,
            false => Decision::Stop,
        }
    });
    shortest
}

fn play(workload: &Workload, path: &Path, mut decide: impl FnMut(&RoundEnd) -> Decision) -> Prediction {
    let contents = &workload.contents;
    let [first, again] = [contents.first, contents.again].map(|cost| cost.at(path.bandwidth_bytes_per_s));
    let in_pause = contents.in_pause_at(path.bandwidth_bytes_per_s, path.switchover_bytes_per_s);
    let per_zone = (SLICES / workload.zones.len().max(1)).max(1);
    let share = 1.0 / per_zone as f64;
    let mut slices: Vec<Slice<'_>> = workload
        .zones
        .iter()
        .flat_map(|zone| (0..per_zone).map(move |_| zone))
        .map(|zone| Slice { dirtying: &zone.dirtying, touched_pages: zone.touched_pages * share, dirty_pages: 0.0 })
        .collect();

    let mut rounds: Vec<PredictedRound> = Vec::new();
    let mut elapsed = path.setup.as_secs_f64();
    let mut wire_bytes_per_page = again.wire_bytes;
    // Waited for the destination to catch up, since the last round ended.
    let mut waited = 0.0;
    loop {
        let first_pass = rounds.is_empty();
        let cost = if first_pass { first } else { again };
        let to_send = |slice: &Slice<'_>| if first_pass { slice.touched_pages } else { slice.dirty_pages };
        let pages: f64 = slices.iter().map(to_send).sum();
        let seconds = cost.seconds(pages, path.bandwidth_bytes_per_s) + path.round_overhead.as_secs_f64();
        let wire_bytes = pages * cost.wire_bytes;
        elapsed += seconds;

        let mut visited = waited;
        for slice in &mut slices {
            let taking =
                seconds * if pages > 0.0 { to_send(slice) / pages } else { share / workload.zones.len() as f64 };
            let since_harvest = visited + taking / 2.0;
            let since_clear = waited + seconds - since_harvest;
            visited += taking;
            // Before the first pass every page is dirty.
            let age = if first_pass { f64::INFINITY } else { slice.dirtying.window(slice.dirty_pages / share) };
            let grown = match age.is_finite() {
                true => {
                    slice.dirtying.pages(age + since_harvest + since_clear) - slice.dirtying.pages(age + since_clear)
                }
                false => 0.0,
            };
            slice.dirty_pages = share * (slice.dirtying.pages(since_clear) + grown);
        }
        waited = 0.0;

        if wire_bytes >= TELLING_ROUND_BYTES as f64 {
            wire_bytes_per_page = cost.wire_bytes;
        }
        let dirty_pages: f64 = slices.iter().map(|slice| slice.dirty_pages).sum();
        let queued_bytes = path.queued_bytes.min(wire_bytes);
        let end = RoundEnd {
            round: rounds.len() as u32,
            elapsed: Duration::from_secs_f64(elapsed.min(1e9)),
            dirty_pages: dirty_pages.round() as u64,
            wire_bytes_per_page,
            queued_bytes: queued_bytes as u64,
            switchover_bytes_per_s: path.switchover_bytes_per_s,
            // A destination is taken to keep pace with the link.
            applying: Duration::ZERO,
            fixed: path.fixed,
        };
        let pause_seconds = (path.fixed.as_secs_f64()
            + in_pause.seconds(dirty_pages, path.switchover_bytes_per_s)
            + queued_bytes / path.switchover_bytes_per_s.max(1.0))
        .min(1e9);
        rounds.push(PredictedRound { pages, wire_bytes, seconds, dirty_pages, pause_seconds });
        let decision = match decide(&end) {
            Decision::AwaitQueue => {
                waited = queued_bytes / path.bandwidth_bytes_per_s.max(1.0);
                elapsed += waited;
                Decision::Continue
            }
            decision => decision,
        };
        if decision == Decision::Continue && rounds.len() < MOST_ROUNDS {
            continue;
        }
        let given_up = matches!(decision, Decision::GiveUp(_) | Decision::Continue);
        let sent = path.probe_bytes + rounds.iter().map(|round| round.wire_bytes).sum::<f64>();
        return Prediction {
            end: match decision {
                Decision::Continue => Decision::GiveUp(format!("{MOST_ROUNDS} rounds were not enough")),
                decision => decision,
            },
            total: Duration::from_secs_f64((elapsed + if given_up { 0.0 } else { pause_seconds }).min(1e9)),
            pause: Duration::from_secs_f64(pause_seconds),
            wire_bytes: sent + if given_up { 0.0 } else { dirty_pages * in_pause.wire_bytes },
            rounds,
        };
    }
}
