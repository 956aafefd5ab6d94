//! When to stop the guest: pure arithmetic on what has been measured.
//!
//! [`RoundEnd::decide`] is the stop rule and the limits that nothing overrules. [`Stall`] sees earlier that they are not going to be
//! met. Both lead to what the user has chosen for that ([`OnStall`]).

mod stall;

use std::time::Duration;

pub use self::stall::{Stall, THROTTLED_AFTER};
use crate::memory::PAGE_SIZE;
use crate::source::OnStall;

/// What copying and hashing leave of a fast link: what one core of a small machine does (docs/performance.md).
pub const DATA_PATH_BYTES_PER_S: f64 = 1.5e9;

/// A throttle aims at this much of the downtime limit and of the time budget: guests do not write evenly.
const AIM: f64 = 0.85;
/// A round is made although the limit is met if it leaves at most so much of the pause,
const LEFT: f64 = 0.85;
/// and all of them make the move longer by at most so much of what it would have taken.
const LONGER: f64 = 0.1;
/// If at least so much of the pause would be waiting, that is done before it.
const MOSTLY: f64 = 0.5;

/// What is known when a round has ended.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct RoundEnd {
    /// The round that has ended; 0 is the first pass.
    pub round: u32,
    /// Since the move began.
    pub elapsed: Duration,
    /// Pages dirty now.
    pub dirty_pages: u64,
    /// Wire bytes that a dirty page takes (ρ × 4096).
    pub wire_bytes_per_page: f64,
    /// Bytes sent and not known to be applied.
    pub queued_bytes: u64,
    /// What the destination takes to write those of its pages that are not known to be applied.
    pub applying: Duration,
    /// B_s: what the pause can count on.
    pub switchover_bytes_per_s: f64,
    /// F: what the pause takes with nothing to send.
    pub fixed: Duration,
    /// What another round is expected to come to, if that is known.
    pub next: Option<NextRound>,
    /// When the limit had been met before. `None`: it has not.
    pub met: Option<Met>,
}

/// A limit that was met, and a guest that was not stopped all the same.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Met {
    /// What the move would have taken, had the guest been stopped when that was so for the first time.
    pub after: Duration,
    /// The pause, had it been stopped when that was so for the last time.
    pub pause: Duration,
}

/// A round that has not begun.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct NextRound {
    /// How long it will take.
    pub duration: Duration,
    /// Pages that will be dirty when it ends.
    pub dirty_pages: u64,
}

/// The user's limits.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Limits {
    /// The longest pause to aim for.
    pub downtime: Duration,
    /// Rounds after the first pass.
    pub max_rounds: u32,
    /// Time budget.
    pub timeout: Option<Duration>,
    /// What to do when they are not met.
    pub on_stall: OnStall,
}

impl Limits {
    /// What a throttle aims at, in the order of preference: the limits with something in reserve, and the pause within the time budget; without
    /// the reserve; and the limits as [`RoundEnd::decide`] has them.
    pub fn aims(&self) -> [Self; 3] {
        let over_in_time = |share: f64| Self {
            downtime: self.downtime.mul_f64(share),
            timeout: self.timeout.map(|timeout| timeout.saturating_sub(self.downtime).mul_f64(share)),
            max_rounds: (f64::from(self.max_rounds) * share) as u32,
            ..*self
        };
        [over_in_time(AIM), over_in_time(1.0), *self]
    }

    /// By which a prediction is judged: where there is a throttle, it has the pause end within the time budget.
    pub fn to_judge_by(&self) -> Self {
        match self.on_stall {
            OnStall::Throttle => self.aims()[1],
            OnStall::Abort | OnStall::Force | OnStall::PostCopy => *self,
        }
    }

    /// No time or round is left for another one.
    pub fn are_spent(&self, end: &RoundEnd) -> bool {
        end.round >= self.max_rounds || self.timeout.is_some_and(|timeout| end.elapsed >= timeout)
    }
}

/// What to do next.
#[derive(Debug, Clone, PartialEq)]
pub enum Decision {
    /// Another round.
    Continue,
    /// Another round once the destination has caught up: nothing but what is on its way stands against the limit, or it would make up most
    /// of the pause.
    AwaitQueue,
    /// Stop the guest: the limit is met.
    Stop,
    /// Stop the guest although it is not; why.
    ForceStop(String),
    /// Stop the guest, and let the pages that are dirty follow when it runs at the destination; why.
    PostCopy(String),
    /// Give up; why.
    GiveUp(String),
}

impl RoundEnd {
    /// The pause, if it began now: (ρ × dirty + queued) / B_s + F. What is dirty takes at least the time to look at it, and what is
    /// queued the time to write it: pages that shrink a lot are quickly sent and not as quickly applied.
    pub fn predicted_pause(&self) -> Duration {
        // A day stands for "never": a rate of 0 must not divide.
        let sending = |bytes: f64| (bytes / self.switchover_bytes_per_s.max(1.0)).min(86_400.0);
        let looking = self.dirty_pages as f64 * PAGE_SIZE as f64 / DATA_PATH_BYTES_PER_S;
        let dirty = sending(self.dirty_pages as f64 * self.wire_bytes_per_page).max(looking);
        let queued = sending(self.queued_bytes as f64).max(self.applying.as_secs_f64());
        self.fixed + Duration::from_secs_f64(dirty + queued)
    }

    /// The limit is met now, if not for the first time.
    pub fn met_now(&self) -> Met {
        let pause = self.predicted_pause();
        Met { after: self.met.map_or(self.elapsed + pause, |met| met.after), pause }
    }

    /// Whether a move that goes on for so long although its limit is met takes hardly longer, and keeps within its time budget.
    fn may_take(&self, all: Duration, limits: &Limits) -> bool {
        self.round < limits.max_rounds
            && limits.timeout.is_none_or(|timeout| all < timeout)
            && all <= self.met_now().after.mul_f64(1.0 + LONGER)
    }

    /// Whether another round makes the pause shorter and the move hardly longer: what it sends need not be sent in the pause. A limit
    /// says what is bearable, not what is wanted.
    fn another_pays(&self, limits: &Limits) -> bool {
        let Some(next) = self.next else { return false };
        // Of what is queued then, nothing is older than the round.
        let sent = self.dirty_pages as f64 * self.wire_bytes_per_page;
        let then =
            RoundEnd { dirty_pages: next.dirty_pages, queued_bytes: self.queued_bytes.min(sent as u64), ..*self }
                .predicted_pause();
        let now = self.predicted_pause();
        // One that was to make the pause shorter and did not shows that nothing more is to be had.
        let paid = self.met.is_none_or(|met| now <= met.pause.mul_f64(LEFT));
        paid && then <= now.mul_f64(LEFT) && self.may_take(self.elapsed + next.duration + then, limits)
    }

    /// Whether most of the pause would be waiting for what has been sent already. Waiting before it takes as long and keeps nobody from
    /// running; what is dirtied meanwhile is sent by another round, of which something must be known.
    fn waiting_pays(&self, limits: &Limits) -> bool {
        let (now, then) = (self.predicted_pause(), self.caught_up().predicted_pause());
        self.next.is_some() && then <= now.mul_f64(1.0 - MOSTLY) && self.may_take(self.elapsed + now, limits)
    }

    /// The same, once the destination has caught up.
    fn caught_up(&self) -> Self {
        RoundEnd { queued_bytes: 0, applying: Duration::ZERO, ..*self }
    }

    /// The stop rule, and what happens when it is not met in time.
    pub fn decide(&self, limits: &Limits) -> Decision {
        let pause = self.predicted_pause();
        if pause <= limits.downtime {
            return match (self.waiting_pays(limits), self.another_pays(limits)) {
                (true, _) => Decision::AwaitQueue,
                (false, true) => Decision::Continue,
                (false, false) => Decision::Stop,
            };
        }
        if self.fixed > limits.downtime && limits.on_stall != OnStall::Force {
            // No number of rounds makes the pause shorter than what it takes with nothing to send.
            return Decision::GiveUp(format!(
                "the pause takes {:.1?} even with nothing left to send, where {:.1?} are allowed",
                self.fixed, limits.downtime
            ));
        }
        let late = limits.timeout.filter(|timeout| self.elapsed >= *timeout);
        let spent = match late {
            Some(timeout) => format!("the time budget of {timeout:.1?} is used up"),
            None if self.round >= limits.max_rounds => {
                format!("{} rounds after the first pass were not enough", self.round)
            }
            None => {
                return match self.caught_up().predicted_pause() <= limits.downtime {
                    true => Decision::AwaitQueue,
                    false => Decision::Continue,
                };
            }
        };
        let short = format!(
            "{spent}: {} pages are still dirty, which would take a pause of {pause:.1?} ({:.1?} of it fixed) where {:.1?} are allowed",
            self.dirty_pages, self.fixed, limits.downtime
        );
        limits.on_stall.when_spent(short)
    }
}

impl OnStall {
    /// What to do when there is no time or round left.
    fn when_spent(self, why: String) -> Decision {
        match self {
            // The throttle was what could be done.
            OnStall::Abort | OnStall::Throttle => Decision::GiveUp(why),
            OnStall::Force => Decision::ForceStop(why),
            OnStall::PostCopy => Decision::PostCopy(why),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: Duration = Duration::from_millis(1);

    fn end(round: u32, dirty_pages: u64) -> RoundEnd {
        RoundEnd {
            round,
            elapsed: 100 * MS,
            dirty_pages,
            wire_bytes_per_page: 5000.0,
            queued_bytes: 1_000_000,
            applying: Duration::ZERO,
            switchover_bytes_per_s: 1e9,
            fixed: 2 * MS,
            next: None,
            met: None,
        }
    }

    fn limits(on_stall: OnStall) -> Limits {
        Limits { downtime: 8 * MS, max_rounds: 3, timeout: None, on_stall }
    }

    #[test]
    fn stops_exactly_when_the_predicted_pause_fits() {
        assert_eq!(end(0, 1000).predicted_pause(), 8 * MS);
        assert_eq!(end(0, 1000).decide(&limits(OnStall::Abort)), Decision::Stop);
        assert_eq!(end(0, 1201).decide(&limits(OnStall::Abort)), Decision::Continue);
        assert_eq!(end(3, 1000).decide(&limits(OnStall::Abort)), Decision::Stop, "also in the last round");
    }

    #[test]
    fn goes_on_although_the_limit_is_met_where_that_pays() {
        let next = |duration, dirty_pages| RoundEnd { next: Some(NextRound { duration, dirty_pages }), ..end(0, 1000) };
        let decided = |end: RoundEnd| end.decide(&limits(OnStall::Abort));
        // 8 ms now, 2 ms of them fixed; then 2 ms, 1 ms for what is queued, and what is dirty.
        assert_eq!(decided(next(5 * MS, 100)), Decision::Continue);
        assert_eq!(decided(next(5 * MS, 750)), Decision::Continue, "6.75 ms instead of 8");
        assert_eq!(decided(next(5 * MS, 770)), Decision::Stop, "6.85 ms instead of 8");
        let fixed = RoundEnd { fixed: 7 * MS, queued_bytes: 0, ..next(2 * MS, 0) };
        assert_eq!(decided(RoundEnd { dirty_pages: 200, ..fixed }), Decision::Stop, "hardly anything to gain");
        assert_eq!(decided(next(15 * MS, 100)), Decision::Continue, "118.5 ms in all, 108 without");
        assert_eq!(decided(next(16 * MS, 100)), Decision::Stop, "makes the move more than a tenth longer");
        let met = |after, pause| RoundEnd { met: Some(Met { after, pause }), ..next(5 * MS, 100) };
        assert_eq!(decided(met(98 * MS, 10 * MS)), Decision::Stop, "all of them make it more than a tenth longer");
        assert_eq!(decided(met(99 * MS, 10 * MS)), Decision::Continue);
        assert_eq!(decided(met(99 * MS, 9 * MS)), Decision::Stop, "the last one has hardly made the pause shorter");
        assert_eq!(decided(RoundEnd { round: 3, ..next(5 * MS, 100) }), Decision::Stop, "no round is left");
        let timed = Limits { timeout: Some(108 * MS), ..limits(OnStall::Abort) };
        assert_eq!(next(5 * MS, 100).decide(&timed), Decision::Stop, "no time is left");
    }

    #[test]
    fn waits_before_the_pause_rather_than_in_it() {
        let next = Some(NextRound { duration: MS, dirty_pages: 400 });
        // F takes 2 ms, what is dirty 0.5 ms.
        let queued = |queued_bytes| RoundEnd { queued_bytes, next, ..end(0, 100) };
        let decided = |end: RoundEnd| end.decide(&limits(OnStall::Abort));
        assert_eq!(decided(queued(5_000_000)), Decision::AwaitQueue);
        assert_eq!(decided(queued(2_000_000)), Decision::Stop, "less than half of it");
        assert_eq!(decided(RoundEnd { next: None, ..queued(5_000_000) }), Decision::Stop, "nothing is known");
        assert_eq!(decided(RoundEnd { round: 3, ..queued(5_000_000) }), Decision::Stop, "no round is left");
        let timed = Limits { timeout: Some(101 * MS), ..limits(OnStall::Abort) };
        assert_eq!(queued(5_000_000).decide(&timed), Decision::Stop, "no time is left");
        let met = Some(Met { after: 95 * MS, pause: 20 * MS });
        let long = RoundEnd { met, ..queued(5_000_000) };
        assert_eq!(decided(long), Decision::Stop, "it has gone on for too long already");
    }

    #[test]
    fn waits_for_the_destination_to_catch_up_when_that_is_all_it_takes() {
        assert_eq!(
            RoundEnd { queued_bytes: 1_000_001, ..end(0, 1000) }.decide(&limits(OnStall::Abort)),
            Decision::AwaitQueue
        );
        assert_eq!(
            RoundEnd { queued_bytes: 1_000_001, ..end(0, 1201) }.decide(&limits(OnStall::Abort)),
            Decision::Continue
        );
    }

    #[test]
    fn what_is_quickly_sent_and_not_as_quickly_applied_counts() {
        let shrunk = RoundEnd { applying: 3 * MS, ..end(0, 1000) };
        assert_eq!(shrunk.predicted_pause(), 10 * MS);
        assert_eq!(shrunk.decide(&limits(OnStall::Abort)), Decision::AwaitQueue);
    }

    #[test]
    fn never_goes_on_for_ever() {
        assert_eq!(end(2, 5000).decide(&limits(OnStall::Abort)), Decision::Continue);
        assert!(matches!(end(3, 5000).decide(&limits(OnStall::Abort)), Decision::GiveUp(_)));
        assert!(matches!(end(3, 5000).decide(&limits(OnStall::Force)), Decision::ForceStop(_)));
        assert!(matches!(end(3, 5000).decide(&limits(OnStall::PostCopy)), Decision::PostCopy(_)));
        let timed = Limits { timeout: Some(100 * MS), ..limits(OnStall::Abort) };
        assert!(matches!(end(0, 5000).decide(&timed), Decision::GiveUp(why) if why.contains("time budget")));
    }

    #[test]
    fn gives_up_at_once_where_no_round_can_help() {
        let hopeless = Limits { downtime: MS, ..limits(OnStall::Abort) };
        assert!(
            matches!(end(0, 0).decide(&hopeless), Decision::GiveUp(why) if why.contains("2.0ms even with nothing"))
        );
        assert_eq!(end(0, 0).decide(&Limits { on_stall: OnStall::Force, ..hopeless }), Decision::Continue);
    }

    #[test]
    fn a_rate_of_nothing_predicts_a_very_long_pause() {
        let stuck = RoundEnd { switchover_bytes_per_s: 0.0, ..end(0, u64::MAX) };
        assert!(stuck.predicted_pause() >= Duration::from_secs(86_400));
    }
}
