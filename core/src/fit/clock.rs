//! The time that a guest has had to run in.
//!
//! A throttle by duty cycle takes time away from a guest and leaves it as it is otherwise: in its own time it writes as it always did.
//! So U(t) is counted in that time, and stays the same whatever the throttle does meanwhile.

use std::time::Duration;

/// A clock that goes slower while the guest is held.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct GuestClock {
    /// When the share last changed,
    since: Duration,
    /// what the guest had run by then,
    ran: Duration,
    /// and what it is left of its time from there on.
    share: f64,
}

/// Of a guest that has all of its time.
impl Default for GuestClock {
    fn default() -> Self {
        Self { since: Duration::ZERO, ran: Duration::ZERO, share: 1.0 }
    }
}

impl GuestClock {
    /// From now on the guest is left this share of its time.
    pub fn hold(&mut self, now: Duration, share: f64) {
        *self = Self { since: now, ran: self.at(now), share: share.clamp(0.0, 1.0) };
    }

    /// Whether the guest is left less than all of its time.
    pub fn is_held(&self) -> bool {
        self.share < 1.0
    }

    /// What this clock shows at a time since the last change.
    pub fn at(&self, now: Duration) -> Duration {
        self.ran + now.saturating_sub(self.since).mul_f64(self.share)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const MS: Duration = Duration::from_millis(1);

    #[test]
    fn counts_what_the_guest_was_left() {
        let mut clock = GuestClock::default();
        assert_eq!(clock.at(700 * MS), 700 * MS);
        clock.hold(1000 * MS, 0.1);
        assert_eq!(clock.at(3000 * MS), 1200 * MS);
        clock.hold(3000 * MS, 1.0);
        assert_eq!(clock.at(3500 * MS), 1700 * MS);
    }

    proptest! {
        #[test]
        fn never_goes_back_nor_faster_than_time(steps in prop::collection::vec((0u64..10_000, 0.0f64..1.5), 1..20)) {
            let (mut clock, mut now) = (GuestClock::default(), Duration::ZERO);
            for (ms, share) in steps {
                let before = clock.at(now);
                now += MS * ms as u32;
                let ran = clock.at(now).checked_sub(before);
                prop_assert!(ran.is_some_and(|ran| ran <= MS * ms as u32), "{ran:?}");
                clock.hold(now, share);
            }
        }
    }
}
