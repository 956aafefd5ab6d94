//! How fast the destination writes pages, seen from the source: by what it acknowledges while there is something to write.

use std::time::{Duration, Instant};

/// What one more acknowledgement leaves of the weight of those before it: some ten of them count.
const KEPT: f64 = 0.9;

/// The destination's pace.
#[derive(Debug, Default)]
pub struct Applying {
    /// Since when it has been at what it acknowledges next.
    since: Option<Instant>,
    /// What counts of the pages written and of the time that took.
    pages: f64,
    seconds: f64,
}

impl Applying {
    /// Something is sent to a destination that had nothing left to write.
    pub fn begin(&mut self, now: Instant) {
        self.since = Some(now);
    }

    /// So many pages more have been written.
    pub fn applied(&mut self, now: Instant, pages: u64) {
        if let Some(since) = self.since.replace(now)
            && pages > 0
        {
            self.pages = self.pages * KEPT + pages as f64;
            self.seconds = self.seconds * KEPT + now.saturating_duration_since(since).as_secs_f64();
        }
    }

    /// What it takes to write so many.
    pub fn time_for(&self, pages: u64) -> Duration {
        if self.pages == 0.0 {
            return Duration::ZERO;
        }
        Duration::from_secs_f64((self.seconds / self.pages * pages as f64).min(86_400.0))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn time_without_anything_to_write_does_not_count() {
        let start = Instant::now();
        let at = |ms: u64| start + Duration::from_millis(ms);
        let mut applying = Applying::default();
        assert_eq!(applying.time_for(5), Duration::ZERO, "nothing is known yet");
        applying.begin(at(0));
        applying.applied(at(10), 1000);
        applying.applied(at(20), 1000);
        applying.begin(at(5000));
        applying.applied(at(5010), 1000);
        let ms = applying.time_for(2000).as_secs_f64() * 1e3;
        assert!((19.9..20.1).contains(&ms), "{ms}");
    }
}
