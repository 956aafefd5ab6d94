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

/// A move that is under way, between two rounds.
#[derive(Debug, Clone, PartialEq)]
pub struct Standing {
    /// The round that has ended; 0 is the first pass.
    pub round: u32,
    /// Since the move began.
    pub elapsed: Duration,
    /// Pages dirty now, in each zone of the workload.
    pub dirty_pages: Vec<f64>,
}

/// Memory in slices, each of which is visited at once.
struct Slices<'w> {
    slices: Vec<Slice<'w>>,
    /// Of a zone.
    share: f64,
    zones: usize,
}

struct Slice<'w> {
    zone: usize,
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
    play(workload, path, None, |end| decide_in_time(end, limits))
}

/// The engine's own rule; but a round that outlasts the time budget is cut, and leaves unsent what the limit would need sent.
fn decide_in_time(end: &RoundEnd, limits: &Limits) -> Decision {
    match (end.decide(limits), limits.timeout) {
        (Decision::Stop, Some(timeout)) if end.elapsed > timeout => Decision::GiveUp(format!(
            "the time budget of {timeout:.1?} is used up in the middle of round {}",
            end.round
        )),
        (decision, _) => decision,
    }
}

/// How a move that is under way goes on. It has stalled as soon as a round leaves as much dirty as the one before.
pub fn predict_from(standing: &Standing, workload: &Workload, path: &Path, limits: &Limits) -> Prediction {
    let mut settling = Settling::default();
    play(workload, path, Some(standing), |end| match decide_in_time(end, limits) {
        Decision::Continue if settling.has_settled(end.dirty_pages) => Decision::GiveUp(format!(
            "as much is written as is sent: {} pages will stay dirty, which would take a pause of {:.1?} where {:.1?} are allowed",
            end.dirty_pages,
            end.predicted_pause(),
            limits.downtime
        )),
        decision => decision,
    })
}

/// Pages dirty in each zone at the end of a round of so many seconds that began with `dirty_pages`.
pub fn dirty_after_round(workload: &Workload, dirty_pages: &[f64], seconds: f64) -> Vec<f64> {
    let mut slices = Slices::new(workload, Some(dirty_pages));
    slices.visit(false, seconds, 0.0);
    slices.by_zone()
}

/// Sees rounds that change nothing any more.
#[derive(Default)]
struct Settling {
    before: u64,
    rounds: u32,
}

impl Settling {
    /// So much of what was dirty makes no difference.
    const SAME: f64 = 0.002;
    /// So many rounds in a row must change nothing.
    const ROUNDS: u32 = 4;

    fn has_settled(&mut self, dirty_pages: u64) -> bool {
        let same = dirty_pages.abs_diff(self.before) as f64 <= Self::SAME * self.before as f64;
        self.before = dirty_pages;
        self.rounds = if same { self.rounds + 1 } else { 0 };
        self.rounds >= Self::ROUNDS
    }
}

/// The shortest pause that so many rounds after the first pass reach.
pub fn shortest_pause(workload: &Workload, path: &Path, max_rounds: u32) -> Duration {
    let mut shortest = Duration::MAX;
    play(workload, path, None, |end| {
        shortest = shortest.min(end.predicted_pause());
        match end.round < max_rounds {
            true => Decision::Continue,
            false => Decision::Stop,
        }
    });
    shortest
}

impl<'w> Slices<'w> {
    /// Clean, or with so many dirty pages in each zone.
    fn new(workload: &'w Workload, dirty_pages: Option<&[f64]>) -> Self {
        let zones = workload.zones.len();
        let per_zone = (SLICES / zones.max(1)).max(1);
        let share = 1.0 / per_zone as f64;
        let dirty_in = |zone: usize| dirty_pages.and_then(|all| all.get(zone)).map_or(0.0, |pages| pages * share);
        let slices = workload.zones.iter().enumerate().flat_map(|(index, zone)| {
            (0..per_zone).map(move |_| Slice {
                zone: index,
                dirtying: &zone.dirtying,
                touched_pages: zone.touched_pages * share,
                dirty_pages: dirty_in(index),
            })
        });
        Self { slices: slices.collect(), share, zones }
    }

    /// What a round has to send.
    fn to_send(&self, first_pass: bool) -> f64 {
        self.slices.iter().map(|slice| slice.to_send(first_pass)).sum()
    }

    /// A round of so many seconds, which began `waited` seconds after the last harvest.
    fn visit(&mut self, first_pass: bool, seconds: f64, waited: f64) {
        let pages = self.to_send(first_pass);
        let Self { slices, share, zones } = self;
        let mut visited = waited;
        for slice in slices {
            let part = if pages > 0.0 { slice.to_send(first_pass) / pages } else { *share / *zones as f64 };
            let taking = seconds * part;
            let since_harvest = visited + taking / 2.0;
            let since_clear = waited + seconds - since_harvest;
            visited += taking;
            // Before the first pass every page is dirty.
            let age = if first_pass { f64::INFINITY } else { slice.dirtying.window(slice.dirty_pages / *share) };
            let grown = match age.is_finite() {
                true => {
                    slice.dirtying.pages(age + since_harvest + since_clear) - slice.dirtying.pages(age + since_clear)
                }
                false => 0.0,
            };
            slice.dirty_pages = *share * (slice.dirtying.pages(since_clear) + grown);
        }
    }

    fn dirty_pages(&self) -> f64 {
        self.slices.iter().map(|slice| slice.dirty_pages).sum()
    }

    fn by_zone(&self) -> Vec<f64> {
        let mut pages = vec![0.0; self.zones];
        self.slices.iter().for_each(|slice| pages[slice.zone] += slice.dirty_pages);
        pages
    }
}

impl Slice<'_> {
    fn to_send(&self, first_pass: bool) -> f64 {
        if first_pass { self.touched_pages } else { self.dirty_pages }
    }
}

/// Plays rounds until `decide` ends them: all of them, or those that follow where a move stands.
fn play(
    workload: &Workload,
    path: &Path,
    standing: Option<&Standing>,
    mut decide: impl FnMut(&RoundEnd) -> Decision,
) -> Prediction {
    let contents = &workload.contents;
    let [first, again] = [contents.first, contents.again].map(|cost| cost.at(path.bandwidth_bytes_per_s));
    let in_pause = contents.in_pause_at(path.bandwidth_bytes_per_s, path.switchover_bytes_per_s);
    let mut slices = Slices::new(workload, standing.map(|standing| &standing.dirty_pages[..]));
    let mut rounds: Vec<PredictedRound> = Vec::new();
    let before = standing.map_or(0, |standing| standing.round + 1);
    let mut elapsed = standing.map_or(path.setup, |standing| standing.elapsed).as_secs_f64();
    let mut wire_bytes_per_page = again.wire_bytes;
    // Waited for the destination to catch up, since the last round ended.
    let mut waited = 0.0;
    loop {
        let first_pass = standing.is_none() && rounds.is_empty();
        let cost = if first_pass { first } else { again };
        let pages = slices.to_send(first_pass);
        let seconds = cost.seconds(pages, path.bandwidth_bytes_per_s) + path.round_overhead.as_secs_f64();
        let wire_bytes = pages * cost.wire_bytes;
        elapsed += seconds;
        slices.visit(first_pass, seconds, waited);
        waited = 0.0;

        if wire_bytes >= TELLING_ROUND_BYTES as f64 {
            wire_bytes_per_page = cost.wire_bytes;
        }
        let dirty_pages = slices.dirty_pages();
        let queued_bytes = path.queued_bytes.min(wire_bytes);
        let end = RoundEnd {
            round: before + rounds.len() as u32,
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
        let probed = if standing.is_none() { path.probe_bytes } else { 0.0 };
        let sent = probed + rounds.iter().map(|round| round.wire_bytes).sum::<f64>();
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
