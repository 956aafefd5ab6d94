//! Watches a guest's heartbeat in two processes at once, from outside.

use std::io::IoSliceMut;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, MutexGuard, OnceLock, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use anyhow::{Context, Result};
use nix::sys::uio::{RemoteIoVec, process_vm_readv};
use nix::unistd::Pid;

use crate::clock::monotonic_ns;
use crate::heartbeat::{Gap, Trace, largest_gap, overlaps};
use crate::priority::wake_on_time;

/// Sleep between two samples where it matters: at the source while the guest runs there, at the destination once it does not. With timers
/// exact to the nanosecond a round takes about 20 µs more than this.
const DENSE: Duration = Duration::from_micros(130);

/// Sleep between two samples elsewhere. Each sample has a processor turn from a move to the sampler and back: two threads that both did so
/// every 100 µs took as much as a sixth of two cores from what they measured.
const SPARSE: Duration = Duration::from_micros(500);

/// A guest whose heartbeat has not changed for so many samples has stopped, as far as can be told.
const STILL_SAMPLES: u32 = 8;

/// Where one process keeps the guest's heartbeats.
#[derive(Debug, Clone, Copy)]
pub struct Target {
    /// The process.
    pub pid: Pid,
    /// Address of vCPU 0's heartbeat in the process; each further vCPU's is `stride_bytes` behind.
    pub address: u64,
    /// Bytes from one vCPU's heartbeat to the next.
    pub stride_bytes: usize,
    /// Number of vCPUs.
    pub vcpus: usize,
}

impl Target {
    /// Reads the heartbeats, or `None` if the process or its memory is gone.
    pub fn read(&self, values: &mut Vec<u64>) -> Option<()> {
        let mut buffer = vec![0u8; self.stride_bytes * (self.vcpus - 1) + size_of::<u64>()];
        let remote = RemoteIoVec { base: self.address as usize, len: buffer.len() };
        let read = process_vm_readv(self.pid, &mut [IoSliceMut::new(&mut buffer)], &[remote]).ok()?;
        if read != buffer.len() {
            return None;
        }
        values.clear();
        for vcpu in 0..self.vcpus {
            let bytes = buffer[vcpu * self.stride_bytes..].first_chunk()?;
            values.push(u64::from_le_bytes(*bytes));
        }
        Some(())
    }
}

/// Samples heartbeats until it is dropped, each process on a thread of its own: to read in one may take milliseconds, while it unmaps
/// memory, and is not to keep what happens in the other from being seen.
pub struct Sampler {
    source: Watching,
    destination: OnceLock<Watching>,
}

/// One process, and the thread that watches it.
struct Watching {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

struct Shared {
    target: Target,
    vcpus: Mutex<Vec<Trace>>,
    /// The guest stands still at the source.
    still: Arc<AtomicBool>,
    is_source: bool,
    stop: AtomicBool,
}

impl Sampler {
    /// Starts to watch the process that the guest is to leave.
    pub fn start(source: Target) -> Self {
        Self { source: Watching::start(source, Arc::default(), true), destination: OnceLock::new() }
    }

    /// Watches the process that the guest is to arrive in too, from as soon as its memory exists.
    pub fn watch_destination(&self, destination: Target) {
        let still = Arc::clone(&self.source.shared.still);
        self.destination.get_or_init(|| Watching::start(destination, still, false));
    }

    /// When the source's heartbeat last changed, as far as it has been seen: the latest over all vCPUs.
    pub fn source_last_change_ns(&self) -> Option<u64> {
        self.source.shared.vcpus().iter().filter_map(Trace::last_change).map(|change| change.at_ns).max()
    }

    /// The gap as far as it can be told by now.
    pub fn gap(&self) -> Result<Gap> {
        let destination = self.destination.get();
        let destination =
            destination.context("the destination's memory was not found, so its heartbeat could not be watched")?;
        Ok(largest_gap(self.source.shared.vcpus().iter().zip(destination.shared.vcpus().iter()))?)
    }

    /// Whether some vCPU was seen to run at the destination before the last change that was seen at the source.
    pub fn both_ran(&self) -> bool {
        let Some(destination) = self.destination.get() else { return false };
        overlaps(self.source.shared.vcpus().iter().zip(destination.shared.vcpus().iter()))
    }
}

impl Watching {
    fn start(target: Target, still: Arc<AtomicBool>, is_source: bool) -> Self {
        let vcpus = Mutex::new(vec![Trace::default(); target.vcpus]);
        let shared = Arc::new(Shared { target, vcpus, still, is_source, stop: AtomicBool::new(false) });
        let watching = Arc::clone(&shared);
        Self { shared, thread: Some(thread::spawn(move || watching.run())) }
    }
}

impl Drop for Watching {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            // A panic of the sampler's thread has been shown by the panic hook.
            let _ = thread.join();
        }
    }
}

impl Shared {
    fn run(&self) {
        wake_on_time();
        let (mut values, mut before, mut unchanged) = (Vec::new(), Vec::new(), 0_u32);
        while !self.stop.load(Ordering::Relaxed) {
            self.sample(&mut values);
            if self.is_source {
                unchanged = if values == before { unchanged.saturating_add(1) } else { 0 };
                self.still.store(unchanged >= STILL_SAMPLES, Ordering::Relaxed);
                before.clone_from(&values);
            }
            let matters = self.is_source != self.still.load(Ordering::Relaxed);
            thread::sleep(if matters { DENSE } else { SPARSE });
        }
    }

    fn sample(&self, values: &mut Vec<u64>) {
        if self.target.read(values).is_none() {
            return;
        }
        let now_ns = monotonic_ns();
        for (trace, &value) in self.vcpus().iter_mut().zip(values.iter()) {
            trace.sample(now_ns, value);
        }
    }

    fn vcpus(&self) -> MutexGuard<'_, Vec<Trace>> {
        self.vcpus.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicU64;

    use super::*;
    use crate::wait;

    /// Two counters of this very process stand for the two guests.
    #[test]
    fn sees_counters_change_from_outside() {
        let (source, destination) = (AtomicU64::new(1), AtomicU64::new(0));
        let target = |counter: &AtomicU64| Target {
            pid: Pid::this(),
            address: counter.as_ptr() as u64,
            stride_bytes: 64,
            vcpus: 1,
        };
        let sampler = Sampler::start(target(&source));
        let limit = Duration::from_secs(5);
        wait::until_true("first sample", limit, || Ok(sampler.source_last_change_ns().is_some())).unwrap();
        let first_ns = sampler.source_last_change_ns();
        assert!(sampler.gap().is_err(), "no destination yet");

        source.store(7, Ordering::Relaxed);
        wait::until_true("second change", limit, || Ok(sampler.source_last_change_ns() > first_ns)).unwrap();
        sampler.watch_destination(target(&destination));
        assert!(sampler.gap().is_err(), "the destination does not run yet");
        destination.store(8, Ordering::Relaxed);
        let gap = wait::until("gap", limit, || Ok(sampler.gap().ok())).unwrap();
        assert!(gap.gap_ms > 0.0 && gap.gap_ms < 5000.0, "{gap:?}");
    }

    #[test]
    fn memory_that_is_not_there_is_not_read() {
        let nowhere = Target { pid: Pid::this(), address: 4096, stride_bytes: 64, vcpus: 1 };
        assert!(nowhere.read(&mut Vec::new()).is_none());
    }
}
