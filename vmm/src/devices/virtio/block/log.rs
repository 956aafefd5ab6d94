//! What a guest can cause must not fill the log: one line a second.

use std::sync::Mutex;
use std::time::{Duration, Instant};

use crate::sync::lock;

/// The shortest time between two lines.
const INTERVAL: Duration = Duration::from_secs(1);

/// Lets one line through per [`INTERVAL`] and counts the others.
#[derive(Debug, Default)]
pub(super) struct RateLimit(Mutex<(Option<Instant>, u64)>);

impl RateLimit {
    /// Whether a line may be written now; if so, how many have been left out since the last one.
    pub(super) fn admit(&self, now: Instant) -> Option<u64> {
        let mut state = lock(&self.0);
        let (last, left_out) = &mut *state;
        if last.is_some_and(|last| now.saturating_duration_since(last) < INTERVAL) {
            *left_out += 1;
            return None;
        }
        *last = Some(now);
        Some(std::mem::take(left_out))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_line_a_second_and_the_others_are_counted() {
        let (limit, start) = (RateLimit::default(), Instant::now());
        let at = |ms| limit.admit(start + Duration::from_millis(ms));
        assert_eq!(
            [at(0), at(1), at(999), at(1000), at(1500), at(2100)],
            [Some(0), None, None, Some(2), None, Some(1)]
        );
    }
}
