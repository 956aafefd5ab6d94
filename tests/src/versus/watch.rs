//! What a move costs besides time: processor time of both ends, bytes on the link, and how far the guest is slowed.

use std::fs;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use anyhow::{Context, Result, anyhow};
use nix::unistd::{Pid, SysconfVar, sysconf};

use crate::clock::monotonic_ns;
use crate::counters::Interface;
use crate::sampler::Target;
use crate::workload;

/// Between two looks at the guest's own count of its writes.
const PERIOD: Duration = Duration::from_millis(5);

/// How long the guest is watched before the move, for comparison.
const BASELINE: Duration = Duration::from_millis(500);

/// Watches a move from before it begins.
pub(super) struct Watch {
    link: Interface,
    bytes_before: u64,
    pids: [Pid; 2],
    cpu_before_s: f64,
    baseline_pages_per_s: f64,
    writes: Writes,
}

/// What it cost.
pub(super) struct Cost {
    /// Both directions, as the source's interface counts them.
    pub(super) wire_bytes: u64,
    /// Of both ends, without what the guest itself used.
    pub(super) cpu_s: f64,
    /// The guest's rate of writes until the pause over that before the move; none for a guest that does not write.
    pub(super) guest_rate_share: Option<f64>,
}

impl Watch {
    /// `heartbeats`: the guest's at the source, `pids`: the source and the destination.
    pub(super) fn start(link: Interface, heartbeats: Target, pids: [Pid; 2]) -> Result<Self> {
        let baseline = Writes::start(workload::writes(heartbeats));
        thread::sleep(BASELINE);
        let baseline_pages_per_s = baseline.finish()?;
        let bytes_before = bytes(&link)?;
        let writes = Writes::start(workload::writes(heartbeats));
        Ok(Self { link, bytes_before, pids, cpu_before_s: cpu_s(pids)?, baseline_pages_per_s, writes })
    }

    /// To be called as soon as the move is over, before either process is waited for.
    pub(super) fn finish(self) -> Result<Cost> {
        let cpu_s = cpu_s(self.pids)? - self.cpu_before_s;
        let wire_bytes = bytes(&self.link)? - self.bytes_before;
        let rate = self.writes.finish()?;
        let guest_rate_share = (self.baseline_pages_per_s > 0.0).then(|| rate / self.baseline_pages_per_s);
        Ok(Cost { wire_bytes, cpu_s, guest_rate_share })
    }
}

fn bytes(link: &Interface) -> Result<u64> {
    let traffic = link.traffic()?;
    Ok(traffic.received_bytes + traffic.sent_bytes)
}

/// Processor time of processes, also of one that has ended and was not waited for; guests' own time left out.
fn cpu_s(pids: [Pid; 2]) -> Result<f64> {
    let ticks_per_s = sysconf(SysconfVar::CLK_TCK)?.context("the length of a tick is not known")? as f64;
    pids.into_iter()
        .map(|pid| {
            let stat = fs::read_to_string(format!("/proc/{pid}/stat")).with_context(|| format!("process {pid}"))?;
            let ticks = cpu_ticks(&stat).with_context(|| format!("/proc/{pid}/stat cannot be read: {stat}"))?;
            Ok(ticks as f64 / ticks_per_s)
        })
        .sum()
}

/// User and system time less guest time (proc(5): fields 14, 15 and 43).
fn cpu_ticks(stat: &str) -> Option<u64> {
    // The second field is a name in parentheses, which may hold anything.
    let fields: Vec<&str> = stat.rsplit_once(')')?.1.split_whitespace().collect();
    let field = |number: usize| fields.get(number - 3)?.parse::<u64>().ok();
    // The kernel scales user and system time to what was scheduled, guest time not: it can be a little more.
    Some((field(14)? + field(15)?).saturating_sub(field(43)?))
}

/// A guest's rate of writes, from its own counters.
struct Writes {
    stop: Arc<AtomicBool>,
    thread: JoinHandle<Option<f64>>,
}

impl Writes {
    fn start(counters: Target) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = Arc::clone(&stop);
        Self { stop, thread: thread::spawn(move || pages_per_s(counters, &stopped)) }
    }

    fn finish(self) -> Result<f64> {
        self.stop.store(true, Ordering::Relaxed);
        let rate = self.thread.join().map_err(|_| anyhow!("the thread that watches the guest's writes panicked"))?;
        rate.context("the guest's count of its writes cannot be read")
    }
}

/// From the first look until the last that showed something new.
fn pages_per_s(counters: Target, stop: &AtomicBool) -> Option<f64> {
    let mut values = Vec::new();
    counters.read(&mut values)?;
    let first = (monotonic_ns(), values.iter().sum::<u64>());
    let mut last = first;
    while !stop.load(Ordering::Relaxed) {
        thread::sleep(PERIOD);
        // A source that has moved its guest takes the memory with it.
        if counters.read(&mut values).is_none() {
            break;
        }
        let sum = values.iter().sum::<u64>();
        if sum != last.1 {
            last = (monotonic_ns(), sum);
        }
    }
    let seconds = (last.0 - first.0) as f64 / 1e9;
    Some(if seconds > 0.0 { (last.1 - first.1) as f64 / seconds } else { 0.0 })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn guest_time_is_left_out_and_names_may_hold_anything() {
        let stat = "7 (a) b (c) S 1 7 7 0 -1 4194560 1 0 0 0 100 50 0 0 20 0 1 0 1 1 1 1 1 1 1 1 1 0 0 0 0 0 0 0 17 1 0 0 0 30 0 0";
        assert_eq!(cpu_ticks(stat), Some(120));
        assert_eq!(cpu_ticks("nonsense"), None);
    }

    #[test]
    fn this_very_process_has_used_some() {
        let before = cpu_s([Pid::this(), Pid::this()]).unwrap();
        let until = std::time::Instant::now() + Duration::from_millis(60);
        while std::time::Instant::now() < until {}
        assert!(cpu_s([Pid::this(), Pid::this()]).unwrap() > before);
    }
}
