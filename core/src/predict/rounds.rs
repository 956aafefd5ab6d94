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

use super::contents::{Contents, PageCost};
use super::curve::Dirtying;
use crate::policy::{Decision, Limits, NextRound, RoundEnd};
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

/// A move that is under way, between two rounds or in the middle of the first pass.
#[derive(Debug, Clone, PartialEq)]
pub struct Standing {
    /// The round that has ended; 0 is the first pass, also while it is under way.
    pub round: u32,
    /// Since the move began.
    pub elapsed: Duration,
    /// Pages dirty now, in each zone of the workload: of those that have been sent.
    pub dirty_pages: Vec<f64>,
    /// Pages of each zone that the first pass has still to send. Empty: it is over.
    pub unsent_pages: Vec<f64>,
}

/// Memory in slices, each of which is visited at once.
#[derive(Clone)]
struct Slices<'w> {
    slices: Vec<Slice<'w>>,
    /// Of a zone.
    share: f64,
    zones: usize,
}

#[derive(Clone)]
struct Slice<'w> {
    zone: usize,
    dirtying: &'w Dirtying,
    touched_pages: f64,
    /// The share of them that the first pass has still to send.
    unsent: f64,
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

/// Where a move stands when its first pass has gone on for so long, or when that is over.
pub fn standing_after(first_pass: Duration, workload: &Workload, path: &Path) -> Standing {
    let mut slices = Slices::new(workload, None, None);
    let pages = slices.to_send(true);
    let seconds = path.round_seconds(workload.contents.first.at(path.bandwidth_bytes_per_s), pages);
    let head = seconds.min(first_pass.as_secs_f64());
    slices.send(if head < seconds { pages * head / seconds } else { pages }, head);
    Standing {
        round: 0,
        elapsed: path.setup + Duration::from_secs_f64(head),
        dirty_pages: slices.by_zone(|slice| slice.dirty_pages),
        unsent_pages: if head < seconds { slices.by_zone(|slice| slice.to_send(true)) } else { Vec::new() },
    }
}

/// Pages dirty in each zone at the end of a round of so many seconds that began with `dirty_pages`.
pub fn dirty_after_round(workload: &Workload, dirty_pages: &[f64], seconds: f64) -> Vec<f64> {
    let mut slices = Slices::new(workload, Some(dirty_pages), Some(&[]));
    slices.visit(seconds, 0.0);
    slices.by_zone(|slice| slice.dirty_pages)
}

/// What a round after this one comes to, over pages that cost so much.
pub fn next_round(workload: &Workload, dirty_pages: &[f64], cost: PageCost, path: &Path) -> NextRound {
    Slices::new(workload, Some(dirty_pages), Some(&[])).next_round(cost, path)
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
    /// With so many dirty pages in each zone, and so many that the first pass has still to send: `None`: none are dirty, all are to be sent.
    fn new(workload: &'w Workload, dirty_pages: Option<&[f64]>, unsent_pages: Option<&[f64]>) -> Self {
        let zones = workload.zones.len();
        let per_zone = (SLICES / zones.max(1)).max(1);
        let share = 1.0 / per_zone as f64;
        let in_zone = |pages: Option<&[f64]>, zone: usize| pages.and_then(|all| all.get(zone)).copied();
        let slices = workload.zones.iter().enumerate().flat_map(|(index, zone)| {
            let dirty = in_zone(dirty_pages, index).unwrap_or(0.0);
            let unsent = match unsent_pages {
                None => 1.0,
                Some(_) if zone.touched_pages <= 0.0 => 0.0,
                Some(all) => (in_zone(Some(all), index).unwrap_or(0.0) / zone.touched_pages).clamp(0.0, 1.0),
            };
            (0..per_zone).map(move |slice| {
                // A zone is sent from front to back.
                let unsent_here = (unsent * per_zone as f64 - (per_zone - 1 - slice) as f64).clamp(0.0, 1.0);
                let sent = if unsent < 1.0 { (1.0 - unsent_here) / (1.0 - unsent) } else { 0.0 };
                Slice {
                    zone: index,
                    dirtying: &zone.dirtying,
                    touched_pages: zone.touched_pages * share,
                    unsent: unsent_here,
                    dirty_pages: dirty * share * sent,
                }
            })
        });
        Self { slices: slices.collect(), share, zones }
    }

    /// What a round has to send.
    fn to_send(&self, first_pass: bool) -> f64 {
        self.slices.iter().map(|slice| slice.to_send(first_pass)).sum()
    }

    /// So much of the first pass, in so many seconds. Before it every page is dirty, so what counts is what becomes of those that it has sent.
    fn send(&mut self, pages: f64, seconds: f64) {
        let Self { slices, share, .. } = self;
        let (mut left, mut visited) = (pages, 0.0);
        for slice in slices {
            let to_send = slice.to_send(true);
            let sent = to_send.min(left);
            let taking = if pages > 0.0 { seconds * sent / pages } else { 0.0 };
            let since_clear = seconds - (visited + taking / 2.0);
            (left, visited) = (left - sent, visited + taking);
            let newly = if to_send > 0.0 { slice.unsent * sent / to_send } else { slice.unsent };
            let before = *share * (1.0 - slice.unsent);
            let grown = match before > 0.0 {
                true => {
                    let age = slice.dirtying.window(slice.dirty_pages / before);
                    // Where no age explains it, nothing is left to become dirty.
                    if age.is_finite() { before * slice.dirtying.pages(age + seconds) } else { slice.dirty_pages }
                }
                false => 0.0,
            };
            slice.dirty_pages = grown + *share * newly * slice.dirtying.pages(since_clear);
            slice.unsent -= newly;
        }
    }

    /// A round of so many seconds, which began `waited` seconds after the last harvest.
    fn visit(&mut self, seconds: f64, waited: f64) {
        let pages = self.to_send(false);
        let Self { slices, share, zones } = self;
        let mut visited = waited;
        for slice in slices {
            let part = if pages > 0.0 { slice.dirty_pages / pages } else { *share / *zones as f64 };
            let taking = seconds * part;
            let since_harvest = visited + taking / 2.0;
            let since_clear = waited + seconds - since_harvest;
            visited += taking;
            let age = slice.dirtying.window(slice.dirty_pages / *share);
            let grown = match age.is_finite() {
                true => {
                    slice.dirtying.pages(age + since_harvest + since_clear) - slice.dirtying.pages(age + since_clear)
                }
                false => 0.0,
            };
            slice.dirty_pages = *share * (slice.dirtying.pages(since_clear) + grown);
        }
    }

    /// A round that is not made.
    fn next_round(&self, cost: PageCost, path: &Path) -> NextRound {
        let mut then = self.clone();
        let seconds = path.round_seconds(cost, self.dirty_pages());
        then.visit(seconds, 0.0);
        NextRound {
            duration: Duration::from_secs_f64(seconds.min(1e9)),
            dirty_pages: then.dirty_pages().round() as u64,
        }
    }

    fn dirty_pages(&self) -> f64 {
        self.slices.iter().map(|slice| slice.dirty_pages).sum()
    }

    fn by_zone(&self, pages: impl Fn(&Slice) -> f64) -> Vec<f64> {
        let mut sums = vec![0.0; self.zones];
        self.slices.iter().for_each(|slice| sums[slice.zone] += pages(slice));
        sums
    }
}

impl Slice<'_> {
    fn to_send(&self, first_pass: bool) -> f64 {
        if first_pass { self.touched_pages * self.unsent } else { self.dirty_pages }
    }
}

impl Path {
    fn round_seconds(&self, cost: PageCost, pages: f64) -> f64 {
        cost.seconds(pages, self.bandwidth_bytes_per_s) + self.round_overhead.as_secs_f64()
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
    let mut slices = Slices::new(
        workload,
        standing.map(|standing| &standing.dirty_pages[..]),
        standing.map(|standing| &standing.unsent_pages[..]),
    );
    let mut rounds: Vec<PredictedRound> = Vec::new();
    let mut first_pass = standing.is_none_or(|standing| !standing.unsent_pages.is_empty());
    let before = standing.filter(|_| !first_pass).map_or(0, |standing| standing.round + 1);
    let mut elapsed = standing.map_or(path.setup, |standing| standing.elapsed).as_secs_f64();
    let mut wire_bytes_per_page = again.wire_bytes;
    // Waited for the destination to catch up, since the last round ended.
    let mut waited = 0.0;
    let mut met = None;
    loop {
        let cost = if first_pass { first } else { again };
        let pages = slices.to_send(first_pass);
        let seconds = path.round_seconds(cost, pages);
        let wire_bytes = pages * cost.wire_bytes;
        elapsed += seconds;
        match first_pass {
            true => slices.send(pages, seconds),
            false => slices.visit(seconds, waited),
        }
        (first_pass, waited) = (false, 0.0);

        if wire_bytes >= TELLING_ROUND_BYTES as f64 {
            wire_bytes_per_page = cost.wire_bytes;
        }
        let dirty_pages = slices.dirty_pages();
        let queued_bytes = path.queued_bytes.min(wire_bytes);
        let mut end = RoundEnd {
            round: before + rounds.len() as u32,
            elapsed: Duration::from_secs_f64(elapsed.min(1e9)),
            dirty_pages: dirty_pages.round() as u64,
            wire_bytes_per_page,
            queued_bytes: queued_bytes as u64,
            switchover_bytes_per_s: path.switchover_bytes_per_s,
            // A destination is taken to keep pace with the link.
            applying: Duration::ZERO,
            fixed: path.fixed,
            next: None,
            met,
        };
        let pause_seconds = (path.fixed.as_secs_f64()
            + in_pause.seconds(dirty_pages, path.switchover_bytes_per_s)
            + queued_bytes / path.switchover_bytes_per_s.max(1.0))
        .min(1e9);
        rounds.push(PredictedRound { pages, wire_bytes, seconds, dirty_pages, pause_seconds });
        let mut decided = decide(&end);
        if decided == Decision::Stop {
            met = Some(end.met_now());
            end.next = Some(slices.next_round(again, path));
            decided = decide(&end);
        }
        let decision = match decided {
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
