//! Whether a move has stalled: what to make of predictions that change from round to round.
//!
//! | what the fit says | stalled |
//! |---|---|
//! | the limits are going to be met | no |
//! | they are not, and would not be if the guest wrote half as fast | once a round bears it out; or once that has stood for eight seconds, however long the round |
//! | they are not | once two rounds in a row bear it out |
//!
//! A round bears out that the downtime limit cannot be met if it leaves about as much dirty as the one before. It is shrinking
//! that is seen, not predicted: a writer that goes through memory from front to back is hard to predict, and shrinks all the same. That the
//! time budget is too short every round bears out.
//!
//! What cannot be taken back is not done before the limits have been out of reach for a second in which no round left less than all before
//! ([`Stall::has_stood`]): a host that was busy with something else for a moment makes one round slow, and the next ones show it.

use std::time::Duration;

use crate::fit::Outlook;

/// A round that leaves no more than this of what was dirty before has got somewhere.
const SHRUNK: f64 = 0.95;
/// A throttle begins as soon as this in the first pass, if a clear prediction has stood for half of it.
pub const THROTTLED_AFTER: Duration = Duration::from_secs(1);
/// Before a move is given up, or its guest stopped, the limits have been out of reach for this long: several times what a busy host holds a round up.
const STOOD: Duration = Duration::from_secs(1);
/// A clear prediction is not to be let stand for longer than this without something being done.
const LATEST: Duration = Duration::from_secs(8);

/// A move that may stall.
#[derive(Debug, Clone, Default)]
pub struct Stall {
    doubt: Option<Doubt>,
    dirty_pages: Option<u64>,
    /// What the best round so far has left.
    least_dirty_pages: Option<u64>,
}

#[derive(Debug, Clone)]
struct Doubt {
    /// Since when the limits have not been going to be met, and no round has got further than all before.
    since: Duration,
    /// Since when the prediction has been clear.
    clear_since: Option<Duration>,
    /// Rounds in a row that have borne it out.
    rounds: u32,
    why: String,
}

impl Stall {
    /// A round has ended with so many dirty pages. Some: the move has stalled, why.
    pub fn judge_round(&mut self, now: Duration, dirty_pages: u64, outlook: &Outlook) -> Option<String> {
        let before = self.dirty_pages.replace(dirty_pages);
        let least = self.least_dirty_pages.filter(|least| !shrunk(*least, dirty_pages));
        self.least_dirty_pages = least.or(Some(dirty_pages));
        self.note(now, outlook);
        let doubt = self.doubt.as_mut()?;
        if least.is_none() && !outlook.late {
            doubt.since = now;
        }
        let stands_still = before.is_some_and(|before| !shrunk(before, dirty_pages));
        let borne_out = stands_still || (outlook.late && before.is_some());
        doubt.rounds = if borne_out { doubt.rounds + 1 } else { 0 };
        let enough = if doubt.clear_since.is_some() { 1 } else { 2 };
        match doubt.rounds >= enough {
            true => Some(doubt.why.clone()),
            false => self.check(now),
        }
    }

    /// The limits have been out of reach, without getting closer, for long enough to do what cannot be taken back.
    pub fn has_stood(&self, now: Duration) -> bool {
        self.doubt.as_ref().is_some_and(|doubt| now >= doubt.since + STOOD)
    }

    /// Something has been seen in the first pass. Some: the move has stalled, why.
    pub fn judge_look(&mut self, now: Duration, outlook: &Outlook) -> Option<String> {
        self.note(now, outlook);
        self.check(now)
    }

    /// A prediction has been clear for so long. Some: why the limits are not met.
    pub fn clear_for(&self, now: Duration, time: Duration) -> Option<&str> {
        let doubt = self.doubt.as_ref()?;
        (now >= doubt.clear_since? + time).then_some(&doubt.why)
    }

    /// Time has passed. Some: the move has stalled, why.
    pub fn check(&self, now: Duration) -> Option<String> {
        self.clear_for(now, LATEST).map(str::to_owned)
    }

    /// When a doubt becomes a certainty, if nothing else happens.
    pub fn deadline(&self) -> Option<Duration> {
        Some(self.doubt.as_ref()?.clear_since? + LATEST)
    }

    /// What has been predicted so far does not count any more.
    pub fn forget(&mut self) {
        *self = Self::default();
    }

    fn note(&mut self, now: Duration, outlook: &Outlook) {
        if outlook.converges {
            self.doubt = None;
            return;
        }
        let doubt = self.doubt.get_or_insert(Doubt { since: now, clear_since: None, rounds: 0, why: String::new() });
        doubt.why = outlook.why.clone().unwrap_or_else(|| "the limits are not met".into());
        doubt.clear_since = outlook.hopeless.then(|| doubt.clear_since.unwrap_or(now));
    }
}

fn shrunk(before: u64, now: u64) -> bool {
    now as f64 <= SHRUNK * before as f64
}

#[cfg(test)]
mod tests {
    use super::*;

    const S: Duration = Duration::from_secs(1);

    fn outlook(converges: bool, hopeless: bool) -> Outlook {
        Outlook {
            converges,
            hopeless,
            late: false,
            why: (!converges).then(|| "too fast".into()),
            after_next_round: S,
            shortest_pause: S,
        }
    }

    #[test]
    fn a_clear_case_takes_one_round_that_leaves_as_much_as_there_was() {
        let (mut stall, clear) = (Stall::default(), outlook(false, true));
        assert_eq!(stall.judge_round(S, 1000, &clear), None, "nothing bears it out yet");
        assert_eq!(stall.judge_round(2 * S, 900, &clear), None, "it shrinks");
        assert_eq!(stall.judge_round(3 * S, 890, &clear).as_deref(), Some("too fast"));
        assert_eq!(stall.judge_round(4 * S, 890, &outlook(true, false)), None, "refuted");
    }

    #[test]
    fn a_narrow_case_takes_two() {
        let (mut stall, narrow) = (Stall::default(), outlook(false, false));
        for (dirty_pages, stalled) in [(1000, false), (990, false), (800, false), (810, false), (800, true)] {
            assert_eq!(stall.judge_round(S, dirty_pages, &narrow).is_some(), stalled, "{dirty_pages}");
        }
    }

    #[test]
    fn a_moment_of_slowness_is_nothing_to_end_a_move_for() {
        let (mut stall, clear) = (Stall::default(), outlook(false, true));
        assert!(!stall.has_stood(S));
        stall.judge_round(S, 1000, &clear);
        stall.judge_round(3 * S / 2, 1000, &outlook(false, false));
        assert!(!stall.has_stood(19 * S / 10) && stall.has_stood(2 * S));
        stall.judge_round(2 * S, 1000, &outlook(true, false));
        stall.judge_round(3 * S, 1000, &clear);
        assert!(!stall.has_stood(3 * S), "it begins anew");
        assert_eq!(stall.judge_round(5 * S, 400, &clear), None);
        assert!(!stall.has_stood(5 * S) && stall.has_stood(6 * S), "the last round has got further than any before");
    }

    #[test]
    fn a_time_budget_is_too_short_however_well_it_shrinks() {
        let (mut stall, late) = (Stall::default(), Outlook { late: true, ..outlook(false, true) });
        assert_eq!(stall.judge_round(S, 1000, &late), None);
        assert!(stall.judge_round(2 * S, 500, &late).is_some());
    }

    #[test]
    fn a_long_round_does_not_keep_a_clear_case_waiting() {
        let mut stall = Stall::default();
        stall.judge_look(S, &outlook(false, false));
        assert_eq!(stall.deadline(), None, "not clear");
        stall.judge_look(2 * S, &outlook(false, true));
        assert_eq!((stall.judge_look(9 * S, &outlook(false, true)), stall.deadline()), (None, Some(10 * S)));
        assert!(stall.check(10 * S).is_some());
        stall.judge_look(10 * S, &outlook(true, false));
        assert_eq!(stall.check(20 * S), None);
    }
}
