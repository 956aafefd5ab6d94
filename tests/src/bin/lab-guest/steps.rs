//! Watches the monotonic clock from every CPU: it must never show less than it showed before, on any of them.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::Duration;

use nix::sched::{CpuSet, sched_getaffinity, sched_setaffinity};
use nix::time::{ClockId, clock_gettime};
use nix::unistd::Pid;

/// Bursts begin at multiples of this, on all CPUs at once. Each is an interrupt, which costs an emulated processor a good part of a millisecond:
/// a guest that is woken more often has no time left to answer.
const PERIOD: Duration = Duration::from_millis(10);

/// Readings in a burst: enough for the bursts of several CPUs to overlap.
const BURST: u64 = 16;

/// What all threads have seen.
#[derive(Default)]
pub(crate) struct Watch {
    latest_ns: AtomicU64,
    samples: AtomicU64,
    backward: AtomicU64,
    worst_ns: AtomicU64,
}

impl Watch {
    /// Starts one thread on each CPU.
    pub(crate) fn start() -> io::Result<Arc<Self>> {
        let watch = Arc::new(Self::default());
        let this_process = Pid::from_raw(0);
        let allowed = sched_getaffinity(this_process)?;
        for cpu in (0..CpuSet::count()).filter(|&cpu| allowed.is_set(cpu).unwrap_or(false)) {
            let mut only = CpuSet::new();
            only.set(cpu)?;
            let watching = watch.clone();
            thread::spawn(move || {
                if let Err(error) = sched_setaffinity(this_process, &only) {
                    eprintln!("lab-guest: cannot stay on CPU {cpu}: {error}");
                }
                watching.run();
            });
        }
        Ok(watch)
    }

    /// How many readings, how many of them backward, and by how much at most.
    pub(crate) fn answer(&self) -> String {
        let read = |number: &AtomicU64| number.load(Ordering::Relaxed);
        format!("{} {} {}", read(&self.samples), read(&self.backward), read(&self.worst_ns))
    }

    fn run(&self) {
        loop {
            for _ in 0..BURST {
                self.sample();
            }
            self.samples.fetch_add(BURST, Ordering::Relaxed);
            thread::sleep(until_next_burst());
        }
    }

    fn sample(&self) {
        // What any CPU had read before this load must not be later than what the clock shows after it.
        let latest_ns = self.latest_ns.load(Ordering::SeqCst);
        let Ok(now) = clock_gettime(ClockId::CLOCK_MONOTONIC) else { return };
        let now_ns = Duration::from(now).as_nanos() as u64;
        if now_ns < latest_ns {
            self.backward.fetch_add(1, Ordering::Relaxed);
            self.worst_ns.fetch_max(latest_ns - now_ns, Ordering::Relaxed);
        }
        self.latest_ns.fetch_max(now_ns, Ordering::SeqCst);
    }
}

fn until_next_burst() -> Duration {
    let now = clock_gettime(ClockId::CLOCK_MONOTONIC).map(Duration::from).unwrap_or_default();
    let since_last_ns = now.as_nanos() % PERIOD.as_nanos();
    PERIOD - Duration::from_nanos(since_last_ns as u64)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_step_back_is_noticed_and_a_good_clock_is_not() {
        let watch = Watch::default();
        (0..1000).for_each(|_| watch.sample());
        assert_eq!(watch.answer(), "0 0 0");
        watch.latest_ns.fetch_add(3_600_000_000_000, Ordering::SeqCst);
        watch.sample();
        assert_eq!(watch.backward.load(Ordering::Relaxed), 1);
        assert!(watch.worst_ns.load(Ordering::Relaxed) > 3_500_000_000_000);
    }
}
