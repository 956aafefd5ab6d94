//! How a throttled vCPU spends its time: it runs and rests by turns, and rests in proportion to what it has run, or to the faults that it took, whichever
//! is more. Writing to a page that the dirty log has clean is a fault, where they are counted at all.

use std::io;
use std::sync::Arc;
use std::time::{Duration, Instant};

use nix::time::{ClockId, clock_gettime};

use crate::kvm::{Alarm, FaultCounter};

/// So long a throttled vCPU rests at a time, as a rule at most: to whoever waits for the guest a rest is a pause.
const USUAL_REST: Duration = Duration::from_millis(20);

/// It runs for as short a time between two rests as that takes, but no longer than this,
const LONGEST_RUN: Duration = Duration::from_millis(1);
/// and no shorter: leaving the guest and entering it again takes time too.
const SHORTEST_RUN: Duration = Duration::from_micros(200);

/// A vCPU that has run for nearly long enough is not stopped for less than this.
const SHORTEST_ALARM: Duration = Duration::from_micros(50);

/// However late a vCPU was stopped, it rests no longer than this at a time,
const LONGEST_REST: Duration = Duration::from_millis(40);
/// and owes no more than this of later rests.
const LONGEST_DEBT: Duration = Duration::from_millis(100);

/// A vCPU that was woken late has so much of its later rests spared, if not more than one.
const LONGEST_CREDIT: Duration = Duration::from_millis(20);

/// The least share of its time that a vCPU keeps.
const MIN_SHARE: f64 = 0.001;

/// What a vCPU is left.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Held {
    /// Of its time; from 1 on it is not held at all.
    pub(crate) share: f64,
    /// As far as they are counted.
    pub(crate) faults_per_s: Option<f64>,
}

impl Held {
    /// It runs at its full speed.
    pub(crate) const NOT: Self = Self { share: 1.0, faults_per_s: None };
}

/// Keeps a vCPU to a share of its time. Lives on the vCPU's thread.
pub(super) struct Pace {
    alarm: Alarm,
    account: Account,
    counter: Option<Arc<FaultCounter>>,
    faults: u64,
    /// The thread's CPU time when it went on.
    went_on_at: Duration,
}

impl Pace {
    /// From now on; [`Pace::goes_on`] begins.
    pub(super) fn new(held: Held, counter: Option<Arc<FaultCounter>>) -> io::Result<Self> {
        let (alarm, account) = (Alarm::of_this_thread()?, Account::new(held, Instant::now()));
        let faults = counter.as_ref().and_then(|counter| counter.read()).unwrap_or(0);
        let mut pace = Self { alarm, account, counter, faults, went_on_at: Duration::ZERO };
        pace.goes_on();
        Ok(pace)
    }

    /// Something else, from the next rest on.
    pub(super) fn set(&mut self, held: Held) {
        self.account.set(held);
    }

    /// It enters the guest, after a rest or a pause.
    pub(super) fn goes_on(&mut self) {
        self.account.goes_on(Instant::now());
        self.went_on_at = thread_time();
        self.alarm.set(self.account.run());
    }

    /// Until when to rest, if it has run for long enough. What counts is the time that it has had a CPU: on a busy host it would rest for waiting too.
    pub(super) fn rest(&mut self) -> Option<Instant> {
        let ran = thread_time().saturating_sub(self.went_on_at);
        let faults = self.counter.as_ref().and_then(|counter| counter.read()).unwrap_or(self.faults);
        let taken = faults.saturating_sub(std::mem::replace(&mut self.faults, faults));
        let until = self.account.rest(Instant::now(), ran, taken);
        if until.is_none() {
            self.alarm.set(self.account.run().saturating_sub(ran).max(SHORTEST_ALARM));
        }
        until
    }
}

/// The time that this thread has been on a CPU, in the guest or not.
fn thread_time() -> Duration {
    // The clock is there on every Linux.
    clock_gettime(ClockId::CLOCK_THREAD_CPUTIME_ID).map(Duration::from).unwrap_or_default()
}

/// The arithmetic of it.
struct Account {
    share: f64,
    faults_per_s: Option<f64>,
    /// What its faults alone would have it rest, for each second that it runs.
    faulting: f64,
    /// When faults were counted last.
    counted: Instant,
    /// Seconds for which it must not take a fault. Less than zero: it may take some at once.
    faults_owed_s: f64,
    /// When it began to rest.
    rests_since: Option<Instant>,
    /// Rest that it still owes, in seconds. Less than zero: it has rested for too long.
    owed_s: f64,
}

impl Account {
    fn new(held: Held, now: Instant) -> Self {
        let mut account = Self {
            share: 1.0,
            faults_per_s: None,
            faulting: 0.0,
            counted: now,
            faults_owed_s: 0.0,
            rests_since: None,
            owed_s: 0.0,
        };
        account.set(held);
        account
    }

    fn set(&mut self, held: Held) {
        self.share = clamp(held.share);
        self.faults_per_s = held.faults_per_s.filter(|limit| *limit > 0.0);
        if self.faults_per_s.is_none() {
            (self.faults_owed_s, self.faulting) = (0.0, 0.0);
        }
    }

    /// How long it runs between two rests.
    fn run(&self) -> Duration {
        USUAL_REST.mul_f64(1.0 / self.rest_per_run().max(self.faulting).max(1e-3)).clamp(SHORTEST_RUN, LONGEST_RUN)
    }

    /// How long it rests if nothing is late.
    fn usual_rest(&self) -> Duration {
        self.run().mul_f64(self.rest_per_run())
    }

    fn rest_per_run(&self) -> f64 {
        1.0 / self.share - 1.0
    }

    fn goes_on(&mut self, now: Instant) {
        if let Some(since) = self.rests_since.take() {
            // On a busy host it is woken late. It has that back, within limits.
            let most = self.usual_rest().max(LONGEST_CREDIT);
            self.owed_s = (self.owed_s - (now - since).as_secs_f64()).max(-most.as_secs_f64());
        }
    }

    /// `taken`: faults since this was last asked.
    fn rest(&mut self, now: Instant, ran: Duration, taken: u64) -> Option<Instant> {
        if let Some(limit) = self.faults_per_s {
            let passed = now.saturating_duration_since(self.counted).as_secs_f64();
            let owed = self.faults_owed_s + taken as f64 / limit - passed;
            self.faults_owed_s = owed.clamp(-USUAL_REST.as_secs_f64(), LONGEST_DEBT.as_secs_f64());
            self.faulting = taken as f64 / limit / ran.max(SHORTEST_ALARM).as_secs_f64();
        }
        self.counted = now;
        let has_run = ran + SHORTEST_ALARM / 2 >= self.run();
        if !has_run && self.faults_owed_s < SHORTEST_ALARM.as_secs_f64() {
            return None;
        }
        self.owed_s = (self.owed_s + ran.as_secs_f64() * self.rest_per_run()).min(LONGEST_DEBT.as_secs_f64());
        self.rests_since = Some(now);
        let rest = self.owed_s.max(self.faults_owed_s);
        Some(now + Duration::from_secs_f64(rest.clamp(0.0, LONGEST_REST.as_secs_f64())))
    }
}

fn clamp(share: f64) -> f64 {
    share.clamp(MIN_SHARE, 1.0)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const MS: Duration = Duration::from_millis(1);

    fn to(share: f64) -> Held {
        Held { share, faults_per_s: None }
    }

    #[test]
    fn one_that_does_its_work_in_little_time_is_held_by_its_faults() {
        // Up to 50 faults in each millisecond that it runs, 6000 a second allowed.
        let (start, mut now, mut faults) = (Instant::now(), Instant::now(), 0u64);
        let mut account = Account::new(Held { share: 0.6, faults_per_s: Some(6000.0) }, start);
        for _ in 0..1000 {
            now += MS;
            faults += 50;
            now = account.rest(now, MS, 50).unwrap();
            account.goes_on(now);
        }
        let rate = faults as f64 / (now - start).as_secs_f64();
        assert!((5800.0..6200.0).contains(&rate), "{rate}");
        // One that takes none is held by its time.
        let until = account.rest(now + 200 * MS, MS, 0).unwrap();
        assert!(until < now + 201 * MS, "{:?}", until - now);
    }

    #[test]
    fn the_more_faults_it_takes_the_shorter_it_runs_and_no_rest_is_long() {
        // 100 faults in each millisecond that it runs, 2500 a second allowed.
        let mut now = Instant::now();
        let mut account = Account::new(Held { share: 0.6, faults_per_s: Some(2500.0) }, now);
        for number in 0..100 {
            let run = account.run();
            now += run;
            let until = account.rest(now, run, (run.as_secs_f64() * 100_000.0).round() as u64).unwrap();
            assert!(number == 0 || until - now <= USUAL_REST, "{:?}", until - now);
            now = until;
            account.goes_on(now);
        }
    }

    #[test]
    fn the_rest_is_what_the_share_leaves_of_what_was_run() {
        let now = Instant::now();
        let rest = |share, ran| Account::new(to(share), now).rest(now, ran, 0).map(|until| until - now);
        assert_eq!(rest(0.5, MS * 2), Some(MS * 2));
        assert_eq!(rest(0.25, MS * 3), Some(MS * 9));
        assert_eq!(rest(0.5, MS / 2), None, "it was interrupted for another reason");
        assert_eq!(
            rest(0.01, MS / 5),
            Some(MS * 99 / 5),
            "the less it is left, the shorter it runs, and no rest is long"
        );
        assert_eq!(rest(0.0, MS * 1000), Some(LONGEST_REST));
    }

    proptest! {
        #[test]
        fn it_has_its_share_however_late_it_is_woken(
            share in 0.02f64..0.8, late in prop::collection::vec((0u64..500, 0u64..4000), 500),
        ) {
            let (start, mut ran) = (Instant::now(), Duration::ZERO);
            let mut account = Account::new(to(share), start);
            let mut now = start;
            for (kicked_late_us, woken_late_us) in late {
                let run = account.run() + Duration::from_micros(kicked_late_us);
                (now, ran) = (now + run, ran + run);
                now = account.rest(now, run, 0).unwrap() + Duration::from_micros(if share < 0.3 { woken_late_us } else { woken_late_us / 10 });
                account.goes_on(now);
            }
            let reached = ran.as_secs_f64() / (now - start).as_secs_f64();
            prop_assert!((0.97 * share..1.03 * share).contains(&reached), "{reached} of {share}");
        }
    }
}
