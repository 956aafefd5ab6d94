//! How a move that is under way will go on, if nothing changes.

use std::time::Duration;

use super::Fit;
use crate::policy::Limits;
use crate::predict::{
    Contents, Encoded, PageCost, Path, Prediction, Standing, Workload, highest_speed_from, predict_from,
};
use crate::source::OnStall;

/// A guest that would have to write this much slower for the limits to be met is clearly too fast.
const CLEARLY: f64 = 0.5;

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
    /// Until the guest runs at the destination, since the move began. Says nothing of a move that does not converge.
    pub total: Duration,
    /// Of that, what follows the next round.
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
    pub fn outlook(
        &self,
        round: u32,
        elapsed: Duration,
        cost: PageCost,
        path: &Path,
        limits: &Limits,
    ) -> Option<Outlook> {
        let standing = self.standing(round, elapsed)?;
        // A prediction shall say whether the limits are met, not what to do about it.
        let limits = Limits { on_stall: OnStall::Abort, ..*limits };
        let predict = |speed: f64| predict_from(&standing, &self.workload(speed, cost), path, &limits);
        let likely = predict(self.speed());
        let converges = likely.converges();
        let shortest = likely.rounds.iter().map(|round| round.pause_seconds).fold(f64::MAX, f64::min);
        let next_round = likely.rounds.first().map_or(0.0, |round| round.seconds.min(1e9));
        Some(Outlook {
            converges,
            hopeless: !converges && !predict(self.speed() * CLEARLY).converges(),
            late: !converges && limits.timeout.is_some_and(|timeout| likely.total >= timeout),
            why: why(&likely, &limits),
            total: likely.total,
            after_next_round: likely.total.saturating_sub(elapsed + Duration::from_secs_f64(next_round)),
            shortest_pause: Duration::from_secs_f64(shortest.min(86_400.0)),
        })
    }

    /// The highest speed, as [`Fit::speed`], at which the limits are met from here on. `None`: too little is known, or any speed will do.
    pub fn highest_speed(
        &self,
        round: u32,
        elapsed: Duration,
        cost: PageCost,
        path: &Path,
        limits: &Limits,
    ) -> Option<f64> {
        let standing = self.standing(round, elapsed)?;
        let limits = Limits { on_stall: OnStall::Abort, ..*limits };
        highest_speed_from(&standing, &self.workload(1.0, cost), path, &limits)
    }

    fn standing(&self, round: u32, elapsed: Duration) -> Option<Standing> {
        Some(Standing { round, elapsed, dirty_pages: self.dirty_pages()?.to_vec() })
    }

    fn workload(&self, speed: f64, cost: PageCost) -> Workload {
        Workload { contents: Contents::always(Encoded::always(cost)), ..self.workload_at(speed) }
    }
}
