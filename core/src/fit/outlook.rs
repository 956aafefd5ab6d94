//! How a move that is under way will go on, if nothing changes.

use std::time::Duration;

use super::Fit;
use crate::policy::{Limits, NextRound};
use crate::predict::{
    Contents, Encoded, PageCost, Path, Prediction, Standing, Workload, next_round, predict_from, throttled_share,
};
use crate::source::OnStall;

/// A guest that would have to write this much slower for the limits to be met is clearly too fast.
const CLEARLY: f64 = 0.5;

/// Where a move stands, and what is ahead of it.
#[derive(Debug, Clone, Copy)]
pub struct Ahead {
    /// The round that has ended; 0 also in the middle of the first pass.
    pub round: u32,
    /// Since the move began.
    pub elapsed: Duration,
    /// Of its time, what the guest is left.
    pub share: f64,
    /// What a page costs that is sent for the first time,
    pub first: PageCost,
    /// and one that is sent again.
    pub again: PageCost,
    /// The way that they go.
    pub path: Path,
    /// What is to be met.
    pub limits: Limits,
}

/// What the fit predicts.
#[derive(Debug, Clone, PartialEq)]
pub struct Outlook {
    /// Downtime limit and time budget are going to be met.
    pub converges: bool,
    /// They are not, and would not be if the guest wrote half as fast.
    pub hopeless: bool,
    /// It is the time budget that is not met.
    pub late: bool,
    /// Why not: one sentence.
    pub why: Option<String>,
    /// Until the guest runs at the destination, from the end of the next round on, or of the first pass while that is under way.
    pub after_next_round: Duration,
    /// The shortest pause at the end of any round to come.
    pub shortest_pause: Duration,
}

/// Why the limits are not going to be met. The policy's own words would speak of rounds as if they had been sent.
fn why(prediction: &Prediction, limits: &Limits) -> Option<String> {
    let last = prediction.rounds.last().filter(|_| !prediction.converges())?;
    let pause = Duration::from_secs_f64(last.pause_seconds);
    let when = match limits.timeout.filter(|timeout| prediction.total >= *timeout) {
        Some(timeout) => format!("when the time budget of {timeout:.1?} is used up"),
        None => format!("after {} more rounds", prediction.rounds.len()),
    };
    Some(format!(
        "the guest writes too fast: {when}, {:.0} pages will stay dirty, which would take a pause of {pause:.1?} where {:.1?} are allowed",
        last.dirty_pages, limits.downtime
    ))
}

impl Fit {
    /// What becomes of a move that stands here. `None`: too little is known.
    pub fn outlook(&self, ahead: &Ahead) -> Option<Outlook> {
        let Ahead { elapsed, share, path, .. } = ahead;
        let standing = self.standing(ahead)?;
        let limits = ahead.limits_alone();
        let predict = |share: f64| predict_from(&standing, &self.workload(share, ahead), path, &limits);
        let likely = predict(*share);
        let converges = likely.converges();
        let shortest = likely.rounds.iter().map(|round| round.pause_seconds).fold(f64::MAX, f64::min);
        let next_round = likely.rounds.first().map_or(0.0, |round| round.seconds.min(1e9));
        Some(Outlook {
            converges,
            hopeless: !converges && !predict(share * CLEARLY).converges(),
            late: !converges && limits.timeout.is_some_and(|timeout| likely.total >= timeout),
            why: why(&likely, &limits),
            after_next_round: likely.total.saturating_sub(*elapsed + Duration::from_secs_f64(next_round)),
            shortest_pause: Duration::from_secs_f64(shortest.min(86_400.0)),
        })
    }

    /// What another round would come to. `None`: too little is known.
    pub fn next_round(&self, ahead: &Ahead) -> Option<NextRound> {
        Some(next_round(&self.workload(ahead.share, ahead), self.dirty_pages()?, ahead.again, &ahead.path))
    }

    /// What to leave the guest of its time for the limits to be met from here on: 1 if it needs no throttle, 0 if none is strong
    /// enough. `None`: too little is known.
    pub fn throttled_share(&self, ahead: &Ahead) -> Option<f64> {
        let (standing, limits) = (self.standing(ahead)?, ahead.limits_alone());
        Some(throttled_share(&standing, &self.workload(self.speed_where_clean(), ahead), &ahead.path, &limits))
    }

    fn standing(&self, ahead: &Ahead) -> Option<Standing> {
        Some(Standing {
            round: ahead.round,
            elapsed: ahead.elapsed,
            dirty_pages: self.dirty_pages()?.to_vec(),
            unsent_pages: self.unsent_pages.clone(),
        })
    }

    fn workload(&self, share: f64, ahead: &Ahead) -> Workload {
        let [first, again] = [ahead.first, ahead.again].map(Encoded::always);
        let contents = Contents { first, ..Contents::always(again) };
        Workload { contents, ..self.workload_at(self.speed() * share) }
    }
}

impl Ahead {
    /// A prediction shall say whether the limits are met, not what to do about it.
    fn limits_alone(&self) -> Limits {
        Limits { on_stall: OnStall::Abort, ..self.limits }
    }
}
