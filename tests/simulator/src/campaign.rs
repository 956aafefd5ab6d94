//! Many seeds, over all cores.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::thread;

use crate::verdict::{Outcome, Verdict, play};

/// What many seeds came to.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Totals {
    /// How many were played.
    pub seeds: u64,
    /// What happened in all of them.
    pub steps: u64,
    /// Seeds by their outcome.
    pub moved: u64,
    /// See [`Totals::moved`].
    pub stayed: u64,
    /// See [`Totals::moved`].
    pub person: u64,
    /// Seeds in which something happened that must never happen, and what.
    pub violations: Vec<(u64, String)>,
}

impl Totals {
    fn add(&mut self, seed: u64, verdict: Verdict) {
        self.seeds += 1;
        self.steps += verdict.steps;
        match verdict.outcome {
            Outcome::Moved => self.moved += 1,
            Outcome::Stayed => self.stayed += 1,
            Outcome::Person => self.person += 1,
        }
        self.violations.extend(verdict.violation.map(|what| (seed, what)));
    }
}

/// Plays these seeds. `begin` is called once by each thread; `stop_at_first`: the first violation ends it.
pub fn run(seeds: std::ops::Range<u64>, stop_at_first: bool, begin: impl Fn() + Sync) -> Totals {
    let (next, stop) = (AtomicU64::new(seeds.start), AtomicBool::new(false));
    let totals = Mutex::new(Totals::default());
    let threads = thread::available_parallelism().map_or(1, |count| count.get());
    thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(|| {
                begin();
                while !stop.load(Ordering::Relaxed) {
                    let seed = next.fetch_add(1, Ordering::Relaxed);
                    if seed >= seeds.end {
                        return;
                    }
                    let verdict = play(seed, false);
                    if stop_at_first && verdict.violation.is_some() {
                        stop.store(true, Ordering::Relaxed);
                    }
                    totals.lock().unwrap_or_else(PoisonError::into_inner).add(seed, verdict);
                }
            });
        }
    });
    let mut totals = totals.into_inner().unwrap_or_else(PoisonError::into_inner);
    totals.violations.sort();
    totals
}
