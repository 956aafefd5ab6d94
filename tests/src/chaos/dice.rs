//! Random choices that a seed decides, the same on every machine.

use std::time::Duration;

/// A sequence of random choices.
#[derive(Debug, Clone)]
pub struct Dice(fastrand::Rng);

impl Dice {
    /// The sequence of `seed` for episode `episode`: that of one episode does not depend on what others drew.
    pub fn new(seed: u64, episode: u64) -> Self {
        Self(fastrand::Rng::with_seed(fastrand::Rng::with_seed(seed).u64(..) ^ episode))
    }

    /// Any number.
    pub fn number(&mut self) -> u64 {
        self.0.u64(..)
    }

    /// A number below `limit`, which is not 0.
    pub fn below(&mut self, limit: u64) -> u64 {
        self.0.u64(..limit)
    }

    /// True in `percent` of 100 cases.
    pub fn chance(&mut self, percent: u64) -> bool {
        self.below(100) < percent
    }

    /// A time between the two.
    pub fn between(&mut self, shortest: Duration, longest: Duration) -> Duration {
        Duration::from_micros(self.0.u64(shortest.as_micros() as u64..=longest.as_micros() as u64))
    }

    /// One of `choices`, which are not none.
    pub fn one_of<T: Copy>(&mut self, choices: &[T]) -> T {
        choices[self.below(choices.len() as u64) as usize]
    }

    /// One of `choices`, each as often as its weight says.
    pub fn weighted<T: Copy>(&mut self, choices: &[(T, u64)]) -> T {
        let mut left = self.below(choices.iter().map(|(_, weight)| weight).sum());
        for &(choice, weight) in choices {
            match left.checked_sub(weight) {
                Some(rest) => left = rest,
                None => return choice,
            }
        }
        choices[choices.len() - 1].0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_seed_decides_everything_and_another_seed_something_else() {
        let draw = |seed, episode| {
            let mut dice = Dice::new(seed, episode);
            [dice.number(), dice.number(), dice.number()]
        };
        assert_eq!(draw(1, 5), draw(1, 5));
        assert_ne!(draw(1, 5), draw(2, 5));
        assert_ne!(draw(1, 5), draw(1, 6));
    }

    #[test]
    fn weights_are_kept() {
        let mut dice = Dice::new(7, 0);
        let mut drawn = [0u32; 3];
        for _ in 0..4000 {
            drawn[dice.weighted(&[(0usize, 1), (1, 0), (2, 3)])] += 1;
        }
        assert_eq!(drawn[1], 0);
        assert!((900..1100).contains(&drawn[0]), "{drawn:?}");
    }

    #[test]
    fn times_lie_between_their_bounds() {
        let mut dice = Dice::new(7, 1);
        let (low, high) = (Duration::from_millis(3), Duration::from_millis(5));
        assert!((0..1000).all(|_| (low..=high).contains(&dice.between(low, high))));
    }
}
