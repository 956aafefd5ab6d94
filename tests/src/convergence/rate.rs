//! How fast the guest writes through a move, by its own counter, wherever it runs.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use anyhow::{Result, anyhow};
use nix::unistd::Pid;

use crate::clock::monotonic_ns;
use crate::sampler::Target;
use crate::workload;

/// Between two looks.
const PERIOD: Duration = Duration::from_millis(20);
/// Between two looks for the destination's memory, in periods.
const SEARCH_EVERY: u32 = 5;

/// Pages written until some moment.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Sample {
    /// When.
    pub at_ns: u64,
    /// Since the guest began.
    pub pages: u64,
}

/// Looks at the guest's count of its writes from a thread of its own.
pub struct RateSampler {
    stop: Arc<AtomicBool>,
    thread: JoinHandle<Vec<Sample>>,
}

impl RateSampler {
    /// `heartbeats`: the guest's where it is, `destination`: the process that it may arrive in.
    pub fn start(heartbeats: Target, destination: Pid) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = Arc::clone(&stop);
        let thread = thread::spawn(move || sample(heartbeats, destination, &stopped));
        Self { stop, thread }
    }

    /// What was seen.
    pub fn finish(self) -> Result<Vec<Sample>> {
        self.stop.store(true, Ordering::Relaxed);
        self.thread.join().map_err(|_| anyhow!("the thread that watches the guest's writes panicked"))
    }
}

fn sample(heartbeats: Target, destination: Pid, stop: &AtomicBool) -> Vec<Sample> {
    let source = workload::writes(heartbeats);
    let mut arrived: Option<Target> = None;
    let (mut samples, mut values, mut looks) = (Vec::<Sample>::new(), Vec::new(), 0u32);
    while !stop.load(Ordering::Relaxed) {
        if arrived.is_none() && looks.is_multiple_of(SEARCH_EVERY) {
            let header = workload::find_header(destination);
            arrived =
                header.map(|header| workload::writes(workload::heartbeats(destination, header, heartbeats.vcpus)));
        }
        looks += 1;
        // A copy of the counter that has arrived early shows less than the counter where the guest runs.
        let mut pages = samples.last().map_or(0, |last| last.pages);
        for target in [Some(source), arrived].into_iter().flatten() {
            if target.read(&mut values).is_some() {
                pages = pages.max(values.iter().sum());
            }
        }
        samples.push(Sample { at_ns: monotonic_ns(), pages });
        thread::sleep(PERIOD);
    }
    samples
}
