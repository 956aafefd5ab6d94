//! The bandwidth cap: a token bucket over virtual time.
//!
//! Written as the generic cell rate algorithm (ITU-T I.371): one number, the time at which everything sent so far
//! would have been due at the cap. It has no clock and never sleeps, so it is exact and testable; the driver asks how
//! long to wait.

use std::time::Duration;

/// How much may leave at once after an idle spell, as time at the cap. With [`Pacer::quantum_bytes`] it keeps the
/// stream smooth below 10 ms, and lets a thread that woke late by this much lose nothing.
const BURST: Duration = Duration::from_millis(2);
/// What is handed to the socket in one call, as time at the cap.
const QUANTUM: Duration = Duration::from_millis(1);
/// One page with its header fits in the smallest quantum.
const MIN_QUANTUM_BYTES: usize = 4096 + 64;
/// Keeps what is in flight between encoder and socket within a core's cache.
const MAX_QUANTUM_BYTES: usize = 128 << 10;

/// The cap of one move, shared by its channels.
#[derive(Debug, Clone, PartialEq)]
pub struct Pacer {
    bytes_per_s: Option<u64>,
    /// Bytes charged up to now are worth the time until here.
    due: Duration,
}

impl Pacer {
    /// A pacer with this cap (`None`: no cap). A cap of 0 counts as 1 byte/s.
    pub fn new(bytes_per_s: Option<u64>) -> Self {
        Self { bytes_per_s: bytes_per_s.map(|rate| rate.max(1)), due: Duration::ZERO }
    }

    /// The cap in force.
    pub fn bytes_per_s(&self) -> Option<u64> {
        self.bytes_per_s
    }

    /// Changes the cap from `now` on. What was sent beyond the old cap is still owed, at the new one.
    pub fn set_bytes_per_s(&mut self, now: Duration, bytes_per_s: Option<u64>) {
        let owed = match self.bytes_per_s {
            Some(rate) => self.due.saturating_sub(now).as_secs_f64() * rate as f64,
            None => 0.0,
        };
        *self = Self::new(bytes_per_s);
        self.due = now;
        self.charge_exactly(owed);
    }

    /// How long to wait before more may be sent; zero: send now.
    pub fn delay(&self, now: Duration) -> Duration {
        match self.bytes_per_s {
            Some(_) => self.due.saturating_sub(now),
            None => Duration::ZERO,
        }
    }

    /// Takes note of bytes sent.
    pub fn charge(&mut self, now: Duration, bytes: u64) {
        self.due = self.due.max(now.saturating_sub(BURST));
        self.charge_exactly(bytes as f64);
    }

    /// The most to hand to a socket in one call.
    pub fn quantum_bytes(&self) -> usize {
        match self.bytes_per_s {
            Some(rate) => ((rate as f64 * QUANTUM.as_secs_f64()) as usize).clamp(MIN_QUANTUM_BYTES, MAX_QUANTUM_BYTES),
            None => MAX_QUANTUM_BYTES,
        }
    }

    fn charge_exactly(&mut self, bytes: f64) {
        if let Some(rate) = self.bytes_per_s {
            // A century: far enough, and never out of a Duration's range.
            let seconds = (bytes / rate as f64).min(3.2e9);
            self.due = self.due.saturating_add(Duration::from_secs_f64(seconds));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// Sends as fast as the pacer lets it, each call late by `lateness`; returns (time, bytes) of each call.
    fn run(pacer: &mut Pacer, from: Duration, until: Duration, lateness: Duration) -> Vec<(Duration, u64)> {
        let mut now = from;
        let mut sent = Vec::new();
        while now < until {
            match pacer.delay(now) {
                Duration::ZERO => {
                    let bytes = pacer.quantum_bytes() as u64;
                    pacer.charge(now, bytes);
                    sent.push((now, bytes));
                    now += Duration::from_nanos(1);
                }
                wait => now += wait + lateness,
            }
        }
        sent
    }

    fn total(sent: &[(Duration, u64)]) -> f64 {
        sent.iter().map(|(_, bytes)| *bytes as f64).sum()
    }

    #[test]
    fn no_cap_never_waits() {
        let mut pacer = Pacer::new(None);
        pacer.charge(Duration::ZERO, u64::MAX);
        assert_eq!(pacer.delay(Duration::ZERO), Duration::ZERO);
    }

    #[test]
    fn a_new_cap_holds_from_now_on() {
        let mut pacer = Pacer::new(Some(1_000_000));
        let second = Duration::from_secs(1);
        let slow = run(&mut pacer, second, 2 * second, Duration::ZERO);
        pacer.set_bytes_per_s(2 * second, Some(100_000_000));
        let fast = run(&mut pacer, 2 * second, 3 * second, Duration::ZERO);
        assert!((total(&slow) / 1e6 - 1.0).abs() < 0.02, "{}", total(&slow));
        assert!((total(&fast) / 1e8 - 1.0).abs() < 0.02, "{}", total(&fast));
    }

    proptest! {
        #[test]
        fn any_window_keeps_to_the_cap(rate in 20_000u64..10_000_000_000, late_us in 0u64..1500, idle_ms in 0u64..500) {
            let mut pacer = Pacer::new(Some(rate));
            pacer.charge(Duration::ZERO, 1);
            let start = Duration::from_millis(idle_ms);
            let length = Duration::from_secs(1).min(Duration::from_secs_f64(2e9 / rate as f64)).max(Duration::from_millis(300));
            let sent = run(&mut pacer, start, start + length, Duration::from_micros(late_us));
            let window = Duration::from_millis(100);
            let allowed = rate as f64 * (window + BURST).as_secs_f64() + 2.0 * pacer.quantum_bytes() as f64;
            let mut first = 0;
            let mut bytes = 0;
            for &(at, size) in &sent {
                bytes += size;
                while sent[first].0 + window < at {
                    bytes -= sent[first].1;
                    first += 1;
                }
                prop_assert!(bytes as f64 <= allowed, "{bytes} in 100 ms at {rate}");
            }
            let expected = rate as f64 * length.as_secs_f64();
            prop_assert!(total(&sent) <= expected + allowed);
            prop_assert!(total(&sent) >= expected * 0.95 - 2.0 * pacer.quantum_bytes() as f64, "late wake-ups up to the burst lose nothing");
        }
    }
}
