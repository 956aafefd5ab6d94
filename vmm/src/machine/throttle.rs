//! Taking time away from the vCPUs that write, so that they write less memory.
//!
//! A vCPU that is held back runs and rests by turns, and rests in proportion to what it has run: a duty cycle. By how much depends on how much it writes, as far as that
//! is known: all are held to one and the same rate of writing, so that those that write less than that, or only read, are left alone.
//! Where a rate in pages is given too, each has its part of that.

use std::sync::mpsc::{self, RecvTimeoutError, Sender};
use std::sync::{Arc, Mutex};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use godwit_core::machine::Hold;

use crate::sync::lock;
use crate::vcpu::{Held, Vcpu};

/// How long faults are counted before they are believed.
const COUNT_INTERVAL: Duration = Duration::from_millis(100);

/// Fewer faults than these in that time say nothing of who writes.
const TELLING_FAULTS: u64 = 100;

/// What a newer count leaves of the weight of those before it.
const KEPT: f64 = 0.5;

/// The least share of time that vCPUs keep: a guest at a standstill would look dead.
const MIN_SHARE: f64 = 0.01;

/// A guest whose throttle is lifted goes on for so long at least: should it be stopped next, it has not been at rest already.
const LAST_RUN: Duration = Duration::from_micros(200);

/// Makes vCPUs run and rest by turns.
pub(super) struct Throttle {
    vcpus: Arc<[Vcpu]>,
    worker: Mutex<Option<Worker>>,
}

struct Worker {
    holds: Sender<Hold>,
    thread: JoinHandle<()>,
}

impl Throttle {
    /// No throttle yet.
    pub(super) fn new(vcpus: Arc<[Vcpu]>) -> Self {
        Self { vcpus, worker: Mutex::new(None) }
    }

    /// Holds the guest back, or does not any more.
    pub(super) fn set(&self, hold: Hold) {
        let mut worker = lock(&self.worker);
        if hold.share.is_nan() || hold.share >= 1.0 {
            if let Some(Worker { holds, thread }) = worker.take() {
                drop(holds);
                if thread.join().is_err() {
                    tracing::error!("the throttle's thread panicked");
                }
                thread::sleep(LAST_RUN);
            }
            return;
        }
        let hold = Hold { share: hold.share.max(MIN_SHARE), ..hold };
        if worker.is_none() {
            *worker = self.start();
        }
        if let Some(Worker { holds, .. }) = &*worker {
            // The thread only ends when the sender is dropped.
            let _ = holds.send(hold);
        }
    }

    fn start(&self) -> Option<Worker> {
        let (holds, wanted) = mpsc::channel();
        let vcpus = Arc::clone(&self.vcpus);
        let thread = thread::Builder::new().name("throttle".into()).spawn(move || {
            let Ok(mut hold) = wanted.recv() else { return };
            let mut writers = Writers::new(&vcpus);
            loop {
                writers.leave(&vcpus, &hold);
                match wanted.recv_timeout(COUNT_INTERVAL) {
                    Ok(changed) => hold = changed,
                    Err(RecvTimeoutError::Timeout) => writers.count(&vcpus),
                    Err(RecvTimeoutError::Disconnected) => break,
                }
            }
            vcpus.iter().for_each(|vcpu| vcpu.throttle(Held::NOT));
        });
        match thread {
            Ok(thread) => Some(Worker { holds, thread }),
            Err(error) => {
                tracing::warn!("cannot throttle the guest: {error}");
                None
            }
        }
    }
}

/// How much each vCPU writes.
struct Writers {
    counted: Instant,
    faults: Vec<Option<u64>>,
    /// Faults per second that each would take at its full speed. `None`: not known.
    rates: Option<Vec<f64>>,
    /// What each was left since they were counted.
    left: Vec<Held>,
}

impl Writers {
    fn new(vcpus: &[Vcpu]) -> Self {
        Self { counted: Instant::now(), faults: read(vcpus), rates: None, left: vec![Held::NOT; vcpus.len()] }
    }

    /// Leaves each of them so much that all together write this share of what they would.
    fn leave(&mut self, vcpus: &[Vcpu], Hold { share, pages_per_s }: &Hold) {
        let even = vec![1.0; vcpus.len()];
        let shares = self.rates.as_ref().map_or_else(|| vec![*share; vcpus.len()], |rates| hold(rates, *share));
        let writes: Vec<f64> =
            shares.iter().zip(self.rates.as_ref().unwrap_or(&even)).map(|(share, rate)| share * rate).collect();
        let all: f64 = writes.iter().sum();
        let of = |(share, writes): (&f64, &f64)| Held {
            share: *share,
            faults_per_s: pages_per_s
                .filter(|_| *share < 1.0 && all > 0.0)
                .map(|pages_per_s| pages_per_s * writes / all),
        };
        let left: Vec<Held> = shares.iter().zip(&writes).map(of).collect();
        if left == self.left {
            return;
        }
        for (vcpu, (left, before)) in vcpus.iter().zip(left.iter().zip(&self.left)) {
            if left != before {
                vcpu.throttle(*left);
            }
        }
        self.left = left;
        // What was counted when they were left something else is not compared with this.
        (self.counted, self.faults) = (Instant::now(), read(vcpus));
    }

    fn count(&mut self, vcpus: &[Vcpu]) {
        let (now, faults) = (Instant::now(), read(vcpus));
        let seconds = (now - self.counted).as_secs_f64();
        let before = std::mem::replace(&mut self.faults, faults);
        self.counted = now;
        let taken: Option<Vec<u64>> = before
            .iter()
            .zip(&self.faults)
            .map(|(before, now)| Some(now.as_ref()?.saturating_sub((*before)?)))
            .collect();
        let Some(taken) = taken.filter(|taken| taken.iter().sum::<u64>() >= TELLING_FAULTS) else { return };
        let rates =
            taken.iter().zip(&self.left).map(|(faults, left)| *faults as f64 / seconds / left.share.max(MIN_SHARE));
        self.rates = Some(match &self.rates {
            Some(before) => rates.zip(before).map(|(now, before)| KEPT * before + (1.0 - KEPT) * now).collect(),
            None => rates.collect(),
        });
    }
}

fn read(vcpus: &[Vcpu]) -> Vec<Option<u64>> {
    vcpus.iter().map(Vcpu::faults).collect()
}

/// Holds all to one rate, such that they have this share of what they have together; each gets its own share of its rate.
fn hold(rates: &[f64], share: f64) -> Vec<f64> {
    let mut sorted = rates.to_vec();
    sorted.sort_by(f64::total_cmp);
    let mut left = share.clamp(0.0, 1.0) * sorted.iter().sum::<f64>();
    let mut cap = f64::INFINITY;
    for (index, rate) in sorted.iter().enumerate() {
        let even = left / (sorted.len() - index) as f64;
        if *rate > even {
            cap = even;
            break;
        }
        left -= rate;
    }
    rates.iter().map(|rate| if *rate > cap { (cap / rate).max(MIN_SHARE) } else { 1.0 }).collect()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn those_that_hardly_write_are_left_alone() {
        assert_eq!(hold(&[1000.0, 0.0], 0.5), [0.5, 1.0]);
        assert_eq!(hold(&[1000.0, 100.0, 1000.0], 0.5), [0.475, 1.0, 0.475]);
        assert_eq!(hold(&[500.0, 500.0], 0.2), [0.2, 0.2]);
    }

    proptest! {
        #[test]
        fn all_together_have_their_share(rates in prop::collection::vec(0.0f64..1e6, 1..64), share in 0.05f64..1.0) {
            let held = hold(&rates, share);
            let (all, left): (f64, f64) = (rates.iter().sum(), rates.iter().zip(&held).map(|(rate, held)| rate * held).sum());
            // The least that everybody keeps may be more than the share.
            prop_assert!(left >= share * all * 0.999 && left <= share * all * 1.001 + MIN_SHARE * all, "{left} of {all}");
            prop_assert!(held.iter().all(|held| (MIN_SHARE..=1.0).contains(held)));
        }
    }
}
