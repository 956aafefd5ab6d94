//! What a move under way learns of the guest that it moves, and how it will go on by that.
//!
//! The first pass gives a curve U(t) of each part of memory ([`Watch`], [`Ages`]). Every round after it tells how fast the guest writes
//! compared with that: the speed at which the model would have left as much dirty as was found. So a guest shows that works harder or
//! less than it did; one whose habits are others altogether is known by its last round alone. All of this is in the guest's own time
//! ([`GuestClock`]), of which a throttle leaves it a share.
//!
//! ```text
//! first pass:  look, look, look …  →  U(t) by zone
//! each round:  dirty before, time, dirty after  →  speed
//! both, the share, and where the move stands  →  Outlook
//! ```

mod ages;
mod clock;
mod front;
mod outlook;
mod resent;
mod watch;

use std::time::Duration;

pub use self::ages::Ages;
pub use self::clock::GuestClock;
pub use self::outlook::{Ahead, Outlook};
pub use self::watch::{Seen, Watch};
use crate::predict::{Dirtying, Workload, Zone, dirty_after_round};

/// How far a guest is expected to change its speed from round to round: one standard deviation, as a logarithm.
const SPEED_CHANGE: f64 = 0.5;
/// How far the model is expected to be off: one standard deviation of the pages dirty after a round, as a share,
const MODEL_ERROR: f64 = 0.04;
/// more where it is luck how often a writer meets the sender,
const FRONT_ERROR: f64 = 0.4;
/// and in pages (stacks, the kernel's own).
const STRAY_PAGES: f64 = 20.0;
/// However little a round says of it, a guest does not write so many times as fast as it did, or as slowly.
const FASTEST: f64 = 100.0;
/// Speeds that are tried, in eighths of a doubling: from a sixteenth to sixteen times the last one.
const TRIES: std::ops::RangeInclusive<i32> = -32..=32;
/// Further off than this, the curves of the first pass say nothing of the guest any more.
const OTHER_HABITS: f64 = 0.5;
const OTHER_THAN_FRONTS: f64 = 2.0;

/// What the first write to a clean page costs a guest, beside the write: a fault that KVM handles. Measured (docs/convergence.md).
const FAULT_SECONDS: f64 = 3e-6;
/// Guests that would spend less of their time on faults do other things beside writing, or nothing: faults do not hold them up.
const FEW_FAULTS: f64 = 0.2;

/// What is known of the guest.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Fit {
    /// As counted in the first pass, at the speed that the guest had then.
    zones: Vec<Zone>,
    /// How many times as fast it writes now, in its own time.
    speed: f64,
    /// Pages dirty in each zone when the last round ended, or as far as the first pass has come.
    dirty_pages: Vec<f64>,
    /// Pages of each zone that the first pass has still to send. Empty: it is over.
    unsent_pages: Vec<f64>,
    /// It goes through its memory from front to back.
    is_front: bool,
    /// Some round after the first pass has told its speed.
    compared: bool,
}

impl Fit {
    /// Something has been seen in the first pass, or at its end.
    pub fn first_pass(&mut self, seen: Seen) {
        if let Some(zones) = seen.zones {
            (self.zones, self.speed, self.is_front, self.compared) = (zones, 1.0, seen.is_front, false);
        }
        (self.dirty_pages, self.unsent_pages) = (seen.dirty_pages, seen.unsent_pages);
    }

    /// A round after the first pass has left this dirty.
    pub fn round(&mut self, seen: Seen) {
        self.unsent_pages.clear();
        let before = std::mem::replace(&mut self.dirty_pages, seen.dirty_pages);
        if before.len() != self.zones.len() || self.dirty_pages.len() != before.len() {
            // Nothing was seen of the first pass, or of this round.
            return;
        }
        let found: f64 = self.dirty_pages.iter().sum();
        let seconds = seen.ran.as_secs_f64();
        let expected =
            |speed: f64| -> f64 { dirty_after_round(&self.workload_at(speed), &before, seconds).iter().sum() };
        let (model_error, other_habits) = match self.is_front {
            true => (FRONT_ERROR, OTHER_THAN_FRONTS),
            false => (MODEL_ERROR, OTHER_HABITS),
        };
        // As far off as what was found or what was expected lets it be: a front that happens to leave little is not slow.
        let variance = |expected: f64| found + (model_error * found.max(expected)).powi(2) + STRAY_PAGES.powi(2);
        let unlikely = |&(steps, expected): &(f64, f64)| {
            (steps * std::f64::consts::LN_2 / SPEED_CHANGE).powi(2) + (found - expected).powi(2) / variance(expected)
        };
        let tries = TRIES.map(|eighths| f64::from(eighths) / 8.0);
        let likeliest = tries
            .map(|doublings| (doublings, expected(self.speed * doublings.exp2())))
            .min_by(|one, other| unlikely(one).total_cmp(&unlikely(other)));
        let Some((doublings, expected)) = likeliest else { return };
        self.compared = true;
        self.speed = (self.speed * doublings.exp2()).clamp(1.0 / FASTEST, FASTEST);
        if (found - expected).abs() > other_habits * found + 10.0 * STRAY_PAGES {
            self.learn_anew(seconds);
        }
    }

    /// What happens until the next round ends cannot be told from what was dirty when the last one did.
    pub fn interrupted(&mut self) {
        self.dirty_pages.clear();
    }

    /// How many times as fast it writes as it did in the first pass, in its own time.
    pub fn speed(&self) -> f64 {
        self.speed
    }

    /// How many times as fast as its speed says it will write in rounds to come. In the first pass it found most pages dirty already; in those it
    /// finds nearly all of them clean, and each takes it a fault. What rounds have shown includes that.
    fn speed_where_clean(&self) -> f64 {
        let writes_per_s: f64 = self.zones.iter().map(|zone| zone.dirtying.writes_per_s()).sum();
        let faults = writes_per_s * FAULT_SECONDS;
        match self.compared || self.is_front || faults < FEW_FAULTS {
            true => 1.0,
            false => 1.0 / (1.0 + faults),
        }
    }

    /// If it goes through its memory from front to back: how many pages a second it wrote in the first pass, in its own time.
    pub fn front_pages_per_s(&self) -> Option<f64> {
        self.is_front.then(|| self.zones.iter().map(|zone| zone.dirtying.pages_per_s()).sum())
    }

    /// Pages dirty in each zone. `None`: too little has been seen.
    pub fn dirty_pages(&self) -> Option<&[f64]> {
        let known = !self.zones.is_empty() && self.zones.len() == self.dirty_pages.len();
        known.then_some(&self.dirty_pages[..])
    }

    /// The guest at so many times the speed of the first pass. Without contents: those are known elsewhere.
    fn workload_at(&self, speed: f64) -> Workload {
        let zones = self.zones.iter().map(|zone| Zone { dirtying: zone.dirtying.at_speed(speed), ..zone.clone() });
        Workload { zones: zones.collect(), contents: crate::predict::Contents::incompressible() }
    }

    /// On average, a part of memory was visited in the middle of the round.
    fn learn_anew(&mut self, seconds: f64) {
        let window = Duration::from_secs_f64((seconds / 2.0).max(1e-3));
        for (zone, dirty_pages) in self.zones.iter_mut().zip(&self.dirty_pages) {
            zone.dirtying = Dirtying::measured(&[(window, *dirty_pages)], zone.touched_pages);
        }
        (self.speed, self.is_front) = (1.0, false);
    }
}

#[cfg(test)]
pub(crate) mod played;
#[cfg(test)]
mod tests;
