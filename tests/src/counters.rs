//! What crosses a network interface, and how well a cap is kept.
//!
//! A virtual link hands on what the stack gives it: with segmentation offload one buffer of up to 64 KiB, counted as
//! *one* packet and as its payload plus *one* set of headers, not as the many packets it would be on a real wire. So
//! `bytes − headers × packets` is exactly the payload, whatever the sizes; a queue that cuts buffers up (tbf) adds to
//! packets and bytes alike. What a cap counts is that payload: bytes given to a TCP socket, or UDP payload for QUIC.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use anyhow::{Context, Result, bail};

use crate::clock::monotonic_ns;
use crate::priority::wake_on_time;

/// Ethernet, IPv4 and TCP headers with the timestamp option, which Linux always negotiates.
pub const TCP_HEADER_BYTES: u64 = 14 + 20 + 20 + 12;

/// Ethernet, IPv4 and UDP headers.
pub const UDP_HEADER_BYTES: u64 = 14 + 20 + 8;

/// The window over which a cap must hold.
pub const WINDOW_NS: u64 = 100_000_000;

/// Between two samples.
const PERIOD: Duration = Duration::from_millis(2);

/// A sample whose reading took longer than this was interrupted: its time is not known well enough.
const MAX_READING_NS: u64 = 500_000;

/// More than any table of interfaces here.
const MAX_TABLE_BYTES: usize = 64 << 10;

/// An interface's counters.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Traffic {
    /// Bytes received, link headers included.
    pub received_bytes: u64,
    /// Packets (or offloaded buffers) received.
    pub received_packets: u64,
    /// Bytes sent, link headers included.
    pub sent_bytes: u64,
    /// Packets (or offloaded buffers) sent.
    pub sent_packets: u64,
}

/// An interface whose counters can be read.
pub struct Interface {
    /// `/proc/net/dev`, opened inside the interface's namespace: it keeps showing that namespace.
    table: File,
    name: String,
}

impl Interface {
    /// Interface `name` in the table `table`.
    pub fn new(table: File, name: impl Into<String>) -> Self {
        Self { table, name: name.into() }
    }

    /// The counters as they stand.
    pub fn traffic(&self) -> Result<Traffic> {
        let mut text = vec![0; MAX_TABLE_BYTES];
        let length = self.table.read_at(&mut text, 0).context("cannot read the interfaces' counters")?;
        parse(&String::from_utf8_lossy(&text[..length]), &self.name)
            .with_context(|| format!("no counters of interface {}", self.name))
    }
}

fn parse(table: &str, name: &str) -> Option<Traffic> {
    let line = table.lines().find_map(|line| line.trim_start().strip_prefix(name)?.strip_prefix(':'))?;
    let fields: Vec<u64> = line.split_whitespace().map_while(|field| field.parse().ok()).collect();
    Some(Traffic {
        received_bytes: *fields.first()?,
        received_packets: *fields.get(1)?,
        sent_bytes: *fields.get(8)?,
        sent_packets: *fields.get(9)?,
    })
}

/// Payload sent until some moment.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Sample {
    /// When.
    pub at_ns: u64,
    /// Bytes sent less headers.
    pub payload_bytes: f64,
}

/// Samples an interface's transmit counter from a thread of its own.
pub struct CounterSampler {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<Result<()>>>,
}

struct Shared {
    samples: Mutex<Vec<Sample>>,
    stop: AtomicBool,
}

impl CounterSampler {
    /// Starts to sample; `header_bytes` are subtracted for each packet.
    pub fn start(interface: Interface, header_bytes: u64) -> Self {
        let shared = Arc::new(Shared { samples: Mutex::default(), stop: AtomicBool::new(false) });
        let thread = thread::spawn({
            let shared = Arc::clone(&shared);
            move || shared.run(&interface, header_bytes)
        });
        Self { shared, thread: Some(thread) }
    }

    /// Stops and gives all samples.
    pub fn finish(mut self) -> Result<Vec<Sample>> {
        self.shared.stop.store(true, Ordering::Relaxed);
        match self.thread.take().map(JoinHandle::join) {
            Some(Ok(result)) => result?,
            _ => bail!("the thread that samples counters panicked"),
        }
        Ok(std::mem::take(&mut *self.shared.samples()))
    }

    /// The samples so far.
    pub fn samples(&self) -> Vec<Sample> {
        self.shared.samples().clone()
    }
}

impl Drop for CounterSampler {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::Relaxed);
    }
}

impl Shared {
    fn run(&self, interface: &Interface, header_bytes: u64) -> Result<()> {
        wake_on_time();
        while !self.stop.load(Ordering::Relaxed) {
            let before_ns = monotonic_ns();
            let traffic = interface.traffic()?;
            let after_ns = monotonic_ns();
            if after_ns - before_ns <= MAX_READING_NS {
                let headers = header_bytes * traffic.sent_packets;
                let payload_bytes = traffic.sent_bytes as f64 - headers as f64;
                self.samples().push(Sample { at_ns: before_ns.midpoint(after_ns), payload_bytes });
            }
            thread::sleep(PERIOD);
        }
        Ok(())
    }

    fn samples(&self) -> MutexGuard<'_, Vec<Sample>> {
        self.samples.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The largest excess over `cap_bytes_per_s`, in percent of it, in any window of [`WINDOW_NS`] that lies within the
/// samples; 0 if the cap was kept in all of them. `None` if the samples do not span a window.
pub fn cap_error_max_pct(samples: &[Sample], cap_bytes_per_s: f64) -> Option<f64> {
    let (first, last) = (samples.first()?, samples.last()?);
    let allowance = cap_bytes_per_s * WINDOW_NS as f64 / 1e9;
    // Payload is interpolated between samples. The excess of a window is then piecewise linear in the time at which it
    // begins, so its maximum is where the window begins or ends at a sample.
    let begins = samples.iter().map(|sample| sample.at_ns);
    let ends = samples.iter().filter_map(|sample| sample.at_ns.checked_sub(WINDOW_NS));
    begins
        .chain(ends)
        .filter(|&begin_ns| begin_ns >= first.at_ns && begin_ns + WINDOW_NS <= last.at_ns)
        .map(|begin_ns| payload_at(samples, begin_ns + WINDOW_NS) - payload_at(samples, begin_ns))
        .map(|bytes| ((bytes - allowance) / allowance * 100.0).max(0.0))
        .max_by(f64::total_cmp)
}

/// Payload at a moment within the samples.
fn payload_at(samples: &[Sample], at_ns: u64) -> f64 {
    let next = samples.partition_point(|sample| sample.at_ns < at_ns).min(samples.len() - 1);
    let (before, after) = (samples[next.saturating_sub(1)], samples[next]);
    if after.at_ns <= at_ns || after.at_ns == before.at_ns {
        return after.payload_bytes;
    }
    let share = (at_ns - before.at_ns) as f64 / (after.at_ns - before.at_ns) as f64;
    before.payload_bytes + share * (after.payload_bytes - before.payload_bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    const CAP: f64 = 125e6;

    /// Samples every 2 ms of a sender whose rate at millisecond `t` is `rate(t)` bytes per second.
    fn samples(duration_ms: u64, rate: impl Fn(u64) -> f64) -> Vec<Sample> {
        let mut payload_bytes = 0.0;
        let mut samples = Vec::new();
        for ms in 0..=duration_ms {
            if ms % 2 == 0 {
                samples.push(Sample { at_ns: 5_000_000_000 + ms * 1_000_000, payload_bytes });
            }
            payload_bytes += rate(ms) / 1000.0;
        }
        samples
    }

    fn error_pct(samples: &[Sample]) -> f64 {
        cap_error_max_pct(samples, CAP).unwrap()
    }

    #[test]
    fn a_kept_cap_has_no_error() {
        assert!(error_pct(&samples(1000, |_| CAP)) < 1e-6);
        assert_eq!(error_pct(&samples(1000, |_| CAP / 2.0)), 0.0);
    }

    #[test]
    fn a_lasting_excess_is_found_at_its_size() {
        assert!((error_pct(&samples(1000, |_| CAP * 1.03)) - 3.0).abs() < 1e-6);
    }

    #[test]
    fn a_burst_counts_by_its_share_of_the_window() {
        // Twice the cap for 10 of 100 ms, wherever it lies.
        for start_ms in [0, 333, 801, 990] {
            let burst = samples(1000, |ms| if (start_ms..start_ms + 10).contains(&ms) { 2.0 * CAP } else { CAP });
            assert!((error_pct(&burst) - 10.0).abs() < 1e-6, "burst at {start_ms} ms");
        }
    }

    #[test]
    fn idle_time_does_not_excuse_a_burst() {
        let bursty = samples(1000, |ms| match ms {
            400..420 => CAP / 2.0,
            420..430 => 2.0 * CAP,
            _ => CAP,
        });
        assert!((error_pct(&bursty) - 10.0).abs() < 1e-6);
    }

    #[test]
    fn too_few_samples_give_no_figure() {
        assert_eq!(cap_error_max_pct(&[], CAP), None);
        assert_eq!(cap_error_max_pct(&samples(98, |_| CAP), CAP), None);
        assert!(cap_error_max_pct(&samples(100, |_| CAP), CAP).is_some());
    }

    #[test]
    fn missing_samples_are_bridged() {
        let mut samples = samples(1000, |_| CAP * 1.05);
        samples.retain(|sample| sample.at_ns % 7 < 3 || sample.at_ns % 10_000_000 == 0);
        assert!((error_pct(&samples) - 5.0).abs() < 1e-6);
    }

    #[test]
    fn reads_the_kernels_table() {
        let table = "Inter-|   Receive                                                |  Transmit\n face |bytes\n    \
                     lo: 1 2 0 0 0 0 0 0 3 4 0 0 0 0 0 0\n  to-b: 4040 3 0 0 0 0 0 0 9999999999 17 0 0 0 0 0 0\n";
        let expected =
            Traffic { received_bytes: 4040, received_packets: 3, sent_bytes: 9_999_999_999, sent_packets: 17 };
        assert_eq!(parse(table, "to-b"), Some(expected));
        assert_eq!(parse(table, "to"), None);
        assert_eq!(parse(table, "to-c"), None);
    }
}
