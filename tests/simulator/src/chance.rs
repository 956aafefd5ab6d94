//! Everything that is random in a seed comes from here.

use std::time::Duration;

/// A seeded source of decisions.
pub struct Chance(fastrand::Rng);

impl Chance {
    /// The one of this seed.
    pub fn new(seed: u64) -> Self {
        Self(fastrand::Rng::with_seed(seed))
    }

    /// Another one, for something that must not disturb this one's sequence.
    pub fn fork(&mut self) -> Self {
        Self(self.0.fork())
    }

    /// True with this probability.
    pub fn hit(&mut self, probability: f64) -> bool {
        self.0.f64() < probability
    }

    /// One of `0..bound`.
    pub fn below(&mut self, bound: usize) -> usize {
        self.0.usize(..bound)
    }

    /// Any number.
    pub fn number(&mut self) -> u64 {
        self.0.u64(..)
    }

    /// Random bytes.
    pub fn fill(&mut self, bytes: &mut [u8]) {
        self.0.fill(bytes);
    }

    /// One of several.
    pub fn pick<'t, T>(&mut self, from: &'t [T]) -> &'t T {
        &from[self.below(from.len())]
    }

    /// A time in this range, every order of magnitude as likely as any other: most faults matter only if they come at the right
    /// microsecond, or last longer than somebody's patience.
    pub fn time(&mut self, from: Duration, to: Duration) -> Duration {
        let (from, to) = (from.as_secs_f64().ln(), to.as_secs_f64().ln());
        Duration::from_secs_f64((from + self.0.f64() * (to - from)).exp())
    }

    /// A number in this range, every order of magnitude as likely as any other.
    pub fn amount(&mut self, from: f64, to: f64) -> f64 {
        (from.ln() + self.0.f64() * (to.ln() - from.ln())).exp()
    }
}

/// Milliseconds.
pub const fn ms(milliseconds: u64) -> Duration {
    Duration::from_millis(milliseconds)
}

/// Microseconds.
pub const fn us(microseconds: u64) -> Duration {
    Duration::from_micros(microseconds)
}
