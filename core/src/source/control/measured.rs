//! What the control plane measures of peer and machine before it has to rely on it.

use std::time::Duration;

/// Messages in sequence between the end of the final pages and *running*: table, ready, commit, running.
pub const HANDOVER_TRIPS: u32 = 2;

/// In the pause, beside all that is measured: workers and coordinators at both ends are told, and the tables are compared. What suited 111
/// short pauses best, on quieter days and on busier ones (docs/convergence.md).
pub const IN_PAUSE: Duration = Duration::from_micros(1500);

/// The peer's clock, by the sample with the shortest round trip.
#[derive(Default)]
pub(super) struct Clock {
    pub(super) asked: u32,
    pub(super) asked_at: Duration,
    pub(super) asked_realtime_ns: i64,
    pub(super) best_round_trip: Option<Duration>,
    pub(super) offset_ns: i64,
}

/// The parts of F that are measured.
#[derive(Default)]
pub(super) struct FixedCost {
    pub(super) pause: Duration,
    pub(super) load: Duration,
    pub(super) round_trip: Duration,
    pub(super) harvest: Duration,
}

impl FixedCost {
    pub(super) fn total(&self) -> Duration {
        self.pause + self.load + self.harvest + IN_PAUSE + self.round_trip * HANDOVER_TRIPS
    }
}
