//! How large QUIC's windows must be: as large as the path needs, and no larger.
//!
//! A window that is too small starves the link. One that is too large fills with bytes that wait somewhere between
//! the two ends, and when the guest is paused every one of them lengthens its pause. Loss-free paths make that
//! worse than it sounds: the congestion window, which only losses shrink, says nothing there.
//!
//! So both ends measure how fast bytes move and allow twice what a round trip takes at that rate, so that the rate
//! can double every round trip until something else limits it, plus a constant that covers hiccups of the threads.
//! (The kernel tunes TCP's buffers by the same rule.)

use std::time::{Duration, Instant};

/// A connection never holds more than this for its peer: 10 Gbit/s over 50 ms.
pub(super) const LARGEST_BYTES: u64 = 64 << 20;

/// The least that a sender may have written and its peer not yet acknowledged.
pub(super) const LEAST_UNACKNOWLEDGED_BYTES: u64 = 512 << 10;

/// The least that a receiver lets its peer send ahead on a data channel.
pub(super) const LEAST_AHEAD_BYTES: u64 = 4 << 20;

/// The rate is taken over at least this time.
const INTERVAL: Duration = Duration::from_millis(5);

/// Measures one direction of a connection.
pub(super) struct Flow {
    since: Instant,
    bytes: u64,
}

impl Flow {
    pub(super) fn new(now: Instant) -> Self {
        Self { since: now, bytes: 0 }
    }

    /// Notes that `bytes` moved. At the end of each interval it says how many bytes now move in twice the time
    /// `round_trip`.
    pub(super) fn moved(&mut self, bytes: usize, now: Instant, round_trip: impl FnOnce() -> Duration) -> Option<u64> {
        self.bytes += bytes as u64;
        let took = now.saturating_duration_since(self.since);
        if took < INTERVAL {
            return None;
        }
        let bytes_per_second = self.bytes as f64 / took.as_secs_f64();
        *self = Self::new(now);
        // Saturates, as the cast of a float does.
        Some((bytes_per_second * 2.0 * round_trip().as_secs_f64()) as u64)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn allows_twice_the_bytes_of_a_round_trip() {
        let start = Instant::now();
        let mut flow = Flow::new(start);
        let at = |ms| start + Duration::from_millis(ms);
        let round_trip = || Duration::from_millis(30);
        assert_eq!(flow.moved(4_000_000, at(4), round_trip), None, "too early to tell");
        assert_eq!(flow.moved(6_000_000, at(10), round_trip), Some(60_000_000), "1 GB/s");
        assert_eq!(flow.moved(0, at(20), round_trip), Some(0), "the next interval starts anew");
        assert_eq!(flow.moved(usize::MAX, at(25), || Duration::MAX), Some(u64::MAX));
    }
}
