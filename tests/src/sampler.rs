//! Watches a guest's heartbeat in two processes at once, from outside.

use std::io::IoSliceMut;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use anyhow::{Result, anyhow};
use nix::sys::uio::{RemoteIoVec, process_vm_readv};
use nix::unistd::Pid;

use crate::clock::monotonic_ns;
use crate::heartbeat::{Gap, Trace, largest_gap, overlaps};
use crate::priority::wake_on_time;

/// Sleep between two samples. With timers exact to the nanosecond a round takes about 20 µs more than this.
const PERIOD: Duration = Duration::from_micros(100);

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

/// Samples heartbeats from a thread of its own until it is dropped or asked for the gap.
pub struct Sampler {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

struct Shared {
    traces: Mutex<Traces>,
    stop: AtomicBool,
}

#[derive(Default)]
struct Traces {
    source: Watched,
    destination: Watched,
}

#[derive(Default)]
struct Watched {
    target: Option<Target>,
    vcpus: Vec<Trace>,
}

impl Sampler {
    /// Starts to watch the process that the guest is to leave.
    pub fn start(source: Target) -> Self {
        let traces = Traces { source: Watched::new(source), destination: Watched::default() };
        let shared = Arc::new(Shared { traces: Mutex::new(traces), stop: AtomicBool::new(false) });
        let thread = thread::spawn({
            let shared = Arc::clone(&shared);
            move || shared.run()
        });
        Self { shared, thread: Some(thread) }
    }

    /// Watches the process that the guest is to arrive in too, from as soon as its memory exists.
    pub fn watch_destination(&self, destination: Target) {
        self.shared.traces().destination = Watched::new(destination);
    }

    /// When the source's heartbeat last changed, as far as it has been seen: the latest over all vCPUs.
    pub fn source_last_change_ns(&self) -> Option<u64> {
        let traces = self.shared.traces();
        traces.source.vcpus.iter().filter_map(Trace::last_change).map(|change| change.at_ns).max()
    }

    /// The gap as far as it can be told by now.
    pub fn gap(&self) -> Result<Gap> {
        let traces = self.shared.traces();
        if traces.destination.target.is_none() {
            return Err(anyhow!("the destination's memory was not found, so its heartbeat could not be watched"));
        }
        Ok(largest_gap(traces.source.vcpus.iter().zip(&traces.destination.vcpus))?)
    }

    /// Whether some vCPU was seen to run at the destination before the last change that was seen at the source.
    pub fn both_ran(&self) -> bool {
        let traces = self.shared.traces();
        overlaps(traces.source.vcpus.iter().zip(&traces.destination.vcpus))
    }
}

impl Drop for Sampler {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            // A panic of the sampler's thread has been shown by the panic hook.
            let _ = thread.join();
        }
    }
}

impl Watched {
    fn new(target: Target) -> Self {
        Self { target: Some(target), vcpus: vec![Trace::default(); target.vcpus] }
    }

    fn sample(&mut self, values: &mut Vec<u64>) {
        let Some(target) = self.target else { return };
        if target.read(values).is_none() {
            return;
        }
        let now_ns = monotonic_ns();
        for (trace, &value) in self.vcpus.iter_mut().zip(values.iter()) {
            trace.sample(now_ns, value);
        }
    }
}

impl Shared {
    fn run(&self) {
        wake_on_time();
        let mut values = Vec::new();
        while !self.stop.load(Ordering::Relaxed) {
            {
                let mut traces = self.traces();
                traces.source.sample(&mut values);
                traces.destination.sample(&mut values);
            }
            thread::sleep(PERIOD);
        }
    }

    fn traces(&self) -> MutexGuard<'_, Traces> {
        self.traces.lock().unwrap_or_else(PoisonError::into_inner)
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
