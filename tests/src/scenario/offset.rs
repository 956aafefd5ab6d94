//! Clocks compared over the network: of many exchanges the one with the shortest round trip tells best, as in NTP.

use std::time::{Duration, Instant};

use anyhow::{Context, Result};

use crate::clock::monotonic_ns;
use crate::scenario::guest::GuestClient;

/// Exchanges in one measurement, and more for as long as none has been quick, within a limit: a machine that is busy answers at once now and then.
const EXCHANGES: usize = 40;
const QUICK: Duration = Duration::from_millis(20);
const LIMIT: Duration = Duration::from_secs(20);

/// How far a remote real-time clock is ahead of this machine's monotonic clock.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Offset {
    /// The best estimate.
    pub offset_ms: f64,
    /// By how much it can be wrong: half the round trip.
    pub uncertainty_ms: f64,
}

/// One exchange: asked and answered by the local clock, and what the remote clock showed in between.
#[derive(Debug, Clone, Copy)]
pub struct Sample {
    /// When the request was sent.
    pub asked_ns: u64,
    /// When the answer was there.
    pub answered_ns: u64,
    /// The remote clock.
    pub remote_ns: u64,
}

impl Sample {
    fn round_trip(&self) -> Duration {
        Duration::from_nanos(self.answered_ns.saturating_sub(self.asked_ns))
    }
}

impl Offset {
    /// What the sample with the shortest round trip tells.
    pub fn from_samples(samples: &[Sample]) -> Option<Self> {
        let best = samples.iter().min_by_key(|sample| sample.round_trip())?;
        let half_ns = best.round_trip().as_nanos() / 2;
        let offset_ns = i128::from(best.remote_ns) - i128::from(best.asked_ns) - half_ns as i128;
        Some(Self { offset_ms: offset_ns as f64 / 1e6, uncertainty_ms: half_ns as f64 / 1e6 })
    }

    /// Measures a remote machine's clock.
    pub fn measure(remote: &mut GuestClient) -> Result<Self> {
        let (mut samples, began) = (Vec::<Sample>::new(), Instant::now());
        let is_slow = |samples: &[Sample]| samples.iter().all(|sample| sample.round_trip() > QUICK);
        while samples.len() < EXCHANGES || (is_slow(&samples) && began.elapsed() < LIMIT) {
            let asked_ns = monotonic_ns();
            let remote_ns = remote.clocks()?.realtime_ns;
            samples.push(Sample { asked_ns, answered_ns: monotonic_ns(), remote_ns });
        }
        Self::from_samples(&samples).context("no exchange")
    }
}

/// All clocks that matter to a move, measured at about the same time.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Offsets {
    /// The guest's.
    pub guest: Offset,
    /// Of the host that the guest leaves.
    pub source: Offset,
    /// Of the host that it goes to.
    pub destination: Offset,
}

/// By how much the guest's offset to its host's real-time clock changed over a move, the hosts' own offset subtracted.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct ClockChange {
    /// Positive if the guest is further ahead than before.
    pub change_ms: f64,
    /// By how much that can be wrong.
    pub uncertainty_ms: f64,
}

impl ClockChange {
    /// Over a move with these offsets before and after it.
    pub fn over(before: &Offsets, after: &Offsets) -> Self {
        let guest_to_source = before.guest.offset_ms - before.source.offset_ms;
        let guest_to_destination = after.guest.offset_ms - after.destination.offset_ms;
        // What the hosts' clocks differ by may drift a little during the move: its middle counts.
        let apart = |offsets: &Offsets| offsets.destination.offset_ms - offsets.source.offset_ms;
        let hosts_apart = (apart(before) + apart(after)) / 2.0;
        let all = [before.guest, before.source, before.destination, after.guest, after.source, after.destination];
        Self {
            change_ms: guest_to_destination + hosts_apart - guest_to_source,
            uncertainty_ms: all.iter().map(|offset| offset.uncertainty_ms).sum(),
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn offsets(guest_ms: f64, source_ms: f64, destination_ms: f64) -> Offsets {
        let offset = |offset_ms| Offset { offset_ms, uncertainty_ms: 1.0 };
        Offsets { guest: offset(guest_ms), source: offset(source_ms), destination: offset(destination_ms) }
    }

    #[test]
    fn hosts_that_differ_are_not_the_guests_fault() {
        // The destination's clock is 500 ms ahead; the guest keeps the time that it had.
        let change = ClockChange::over(&offsets(103.0, 100.0, 600.0), &offsets(103.0, 100.0, 600.0));
        assert_eq!(change, ClockChange { change_ms: 0.0, uncertainty_ms: 6.0 });
    }

    #[test]
    fn a_clock_that_jumps_is_noticed() {
        let change = ClockChange::over(&offsets(103.0, 100.0, 600.0), &offsets(183.0, 100.0, 600.0));
        assert_eq!(change.change_ms, 80.0);
        // A guest that takes over the destination's time jumps by what the hosts differ.
        let change = ClockChange::over(&offsets(100.0, 100.0, 600.0), &offsets(600.0, 100.0, 600.0));
        assert_eq!(change.change_ms, 500.0);
    }

    #[test]
    fn a_pause_that_the_clock_slept_through_is_noticed() {
        let change = ClockChange::over(&offsets(100.0, 100.0, 100.0), &offsets(-200.0, 100.0, 100.0));
        assert_eq!(change.change_ms, -300.0);
    }

    #[test]
    fn no_sample_gives_no_offset() {
        assert_eq!(Offset::from_samples(&[]), None);
    }

    proptest! {
        #[test]
        fn the_true_offset_lies_within_the_uncertainty(
            offset_ns in 0u64..1 << 60,
            delays in prop::collection::vec((0u64..50_000_000, 0u64..50_000_000), 1..20),
        ) {
            let samples: Vec<Sample> = (1..).zip(&delays).map(|(n, &(there, back))| {
                let asked_ns = n * 1_000_000_000;
                Sample { asked_ns, answered_ns: asked_ns + there + back, remote_ns: asked_ns + there + offset_ns }
            }).collect();
            let measured = Offset::from_samples(&samples).unwrap();
            let shortest = delays.iter().map(|(there, back)| there + back).min().unwrap() as f64 / 2e6;
            prop_assert!((measured.uncertainty_ms - shortest).abs() < 1e-6);
            prop_assert!((measured.offset_ms - offset_ns as f64 / 1e6).abs() <= measured.uncertainty_ms + 0.001);
        }
    }
}
