//! U(t) of each zone from counts of pages by the age of their last clear.
//!
//! In a first pass the parts of memory that are sent early grow old, those that are sent late stay young. What old zones did at ages
//! that a young one has not reached is taken for that one too, as a factor: each zone goes on as all zones together did that have been
//! that old (in actuarial work this is the chain ladder), as long as they are many. A zone that was not reached at all is taken to write
//! nothing.
//!
//! Counts at ages of a few milliseconds are small numbers. Neighbouring ages are counted together until they tell something, and where
//! an older age has a smaller share than a younger one, which is noise (isotonic regression, by pooling adjacent violators).

use std::time::Duration;

use super::front::{self, Became, Pace};
use crate::predict::{Dirtying, Zone};

/// Ages are told apart by half octaves, from this one on.
const YOUNGEST_S: f64 = 1e-3;
/// Up to 2^22 ms: more than an hour.
const BINS: usize = 45;

/// Counts of one zone at ages of a bin.
#[derive(Debug, Clone, Copy, Default)]
struct Bin {
    /// Pages looked at, dirty or not.
    pages: f64,
    dirty: f64,
    /// Ages, weighted by pages.
    seconds: f64,
}

/// An age says how much is dirty if so many dirty pages were to be seen at it: a standard deviation of a sixth.
const TELLING_PAGES: f64 = 32.0;
/// Zones go on as others did if of all that were reached so many did: the few that are oldest may be of another kind.
const MOST: f64 = 0.5;

/// What a fading leaves of the weight of all that was counted before.
const KEPT: f64 = 0.7;

/// What was counted so far.
#[derive(Debug, Clone)]
pub struct Ages {
    zone_pages: Vec<f64>,
    bins: Vec<[Bin; BINS]>,
    pace: Pace,
}

impl Ages {
    /// Nothing yet, of zones with so many pages.
    pub fn new(zone_pages: Vec<f64>) -> Self {
        let bins = vec![[Bin::default(); BINS]; zone_pages.len()];
        Self { zone_pages, bins, pace: Pace::default() }
    }

    /// Of `pages` pages of a zone, whose bits had been cleared so long ago, so many are dirty.
    pub fn count(&mut self, zone: usize, age: Duration, pages: u64, dirty: u64) {
        let seconds = age.as_secs_f64();
        let half_octaves = 2.0 * (seconds / YOUNGEST_S).max(1.0).log2();
        let bin = &mut self.bins[zone][(half_octaves as usize).min(BINS - 1)];
        bin.pages += pages as f64;
        bin.dirty += dirty as f64;
        bin.seconds += seconds * pages as f64;
    }

    /// In all, so many pages are dirty now, by the guest's clock.
    pub fn total(&mut self, at: Duration, dirty_pages: f64) {
        self.pace.seen(at, dirty_pages);
    }

    /// What was counted so far counts for less than what follows.
    pub fn fade(&mut self) {
        for bin in self.bins.iter_mut().flatten() {
            (bin.pages, bin.dirty, bin.seconds) = (bin.pages * KEPT, bin.dirty * KEPT, bin.seconds * KEPT);
        }
    }

    /// The longest age that was seen.
    pub fn oldest(&self) -> Duration {
        let oldest = |bins: &[Bin; BINS]| {
            bins.iter().rev().find(|bin| bin.pages > 0.0).map_or(0.0, |bin| bin.seconds / bin.pages)
        };
        Duration::from_secs_f64(self.bins.iter().map(oldest).fold(0.0, f64::max))
    }

    /// Each zone's curve. All of its pages are taken to be sent in a first pass.
    pub fn zones(&self) -> Vec<Zone> {
        let factors = self.factors();
        let zone = |(bins, &pages): (&[Bin; BINS], &f64)| Zone {
            touched_pages: pages,
            dirtying: Dirtying::measured(&curve(bins, &factors, pages), pages),
        };
        self.bins.iter().zip(&self.zone_pages).map(zone).collect()
    }

    /// Each zone's curve once the whole first pass has been seen, if the guest goes through its memory from front to back.
    pub fn fronts(&self) -> Option<Vec<Zone>> {
        let became = |(bins, pages): (&[Bin; BINS], &f64)| {
            let seen = bins.iter().filter(|bin| bin.pages > 0.0);
            Became::of(seen.map(|bin| (bin.seconds / bin.pages, pages * bin.dirty / bin.pages)))
        };
        let became: Vec<Became> = self.bins.iter().zip(&self.zone_pages).map(became).collect();
        front::zones(&became, &self.zone_pages, &self.pace)
    }

    /// For each bin that many zones have reached: the mean age, and how many times as many pages are dirty there as in the bin before.
    fn factors(&self) -> Vec<(usize, f64, f64)> {
        let mut factors = Vec::new();
        let mut before: Option<usize> = None;
        let reached = self.bins.iter().filter(|bins| bins.iter().any(|bin| bin.pages > 0.0)).count() as f64;
        let mut known = 0;
        for index in 0..BINS {
            let (mut pages, mut seconds, mut then, mut now, mut zones) = (0.0, 0.0, 0.0, 0.0, 0.0);
            for (bins, zone_pages) in self.bins.iter().zip(&self.zone_pages) {
                let bin = bins[index];
                pages += bin.pages;
                seconds += bin.seconds;
                // Only zones that have been seen at both ages say how they grow.
                if let Some(earlier) = before.map(|before| bins[before])
                    && bin.pages > 0.0
                    && earlier.pages > 0.0
                {
                    zones += 1.0;
                    then += zone_pages * earlier.dirty / earlier.pages;
                    now += zone_pages * bin.dirty / bin.pages;
                }
            }
            if pages > 0.0 {
                let factor = if then > 0.0 { (now / then).max(1.0) } else { 1.0 };
                factors.push((index, seconds / pages, factor));
                before = Some(index);
                if zones >= MOST * reached {
                    known = factors.len();
                }
            }
        }
        factors.truncate(known);
        factors
    }
}

impl Bin {
    fn age(&self) -> f64 {
        self.seconds / self.pages
    }

    fn share(&self) -> f64 {
        self.dirty / self.pages
    }

    fn with(&self, other: &Self) -> Self {
        Self { pages: self.pages + other.pages, dirty: self.dirty + other.dirty, seconds: self.seconds + other.seconds }
    }

    /// Whether it says how much is dirty at its age, beside one that is older: pages enough were looked at, and it has no larger share.
    fn tells_beside(&self, older: &Self) -> bool {
        let expected = self.pages * older.share() * self.age() / older.age();
        expected >= TELLING_PAGES && self.share() <= older.share()
    }
}

/// Neighbours that are counted together.
fn pooled(bins: &[Bin]) -> Vec<Bin> {
    let mut pools: Vec<Bin> = Vec::new();
    for bin in bins.iter().filter(|bin| bin.pages > 0.0) {
        let mut pool = *bin;
        while let Some(younger) = pools.pop_if(|younger| !younger.tells_beside(&pool)) {
            pool = pool.with(&younger);
        }
        pools.push(pool);
    }
    pools
}

/// What a zone has shown, and beyond that what the factors say.
fn curve(bins: &[Bin; BINS], factors: &[(usize, f64, f64)], zone_pages: f64) -> Vec<(Duration, f64)> {
    let Some(last) = bins.iter().rposition(|bin| bin.pages > 0.0) else { return Vec::new() };
    let mut points: Vec<_> = pooled(&bins[..=last]).iter().map(|bin| (bin.age(), zone_pages * bin.share())).collect();
    let (oldest, mut dirty) = points.last().copied().unwrap_or_default();
    for &(_, mean_seconds, factor) in factors.iter().filter(|(index, ..)| *index > last) {
        dirty *= factor;
        points.push((mean_seconds.max(oldest), dirty));
    }
    points.into_iter().map(|(seconds, dirty)| (Duration::from_secs_f64(seconds), f64::min(dirty, zone_pages))).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Zones of 1000 pages that are cleared one after the other, 0.1 s apart, and counted every 50 ms until the last is 0.1 s old.
    fn passed_over(writers: &[Dirtying]) -> Ages {
        let mut ages = Ages::new(vec![1000.0; writers.len()]);
        for look in 1..=writers.len() * 2 {
            let now = look as f64 * 0.05;
            for (zone, dirtying) in writers.iter().enumerate() {
                let age = now - 0.1 * zone as f64;
                if age > 0.0 {
                    ages.count(zone, Duration::from_secs_f64(age), 1000, dirtying.pages(age).round() as u64);
                }
            }
        }
        ages
    }

    #[test]
    fn a_zone_that_is_still_young_goes_on_as_the_others_did() {
        let writer = Dirtying::random(800.0, 900.0);
        let zones = passed_over(&vec![writer.clone(); 16]).zones();
        for (index, zone) in zones.iter().enumerate() {
            for age in [0.05, 0.2, 0.5, 1.0] {
                let (found, truth) = (zone.dirtying.pages(age), writer.pages(age));
                // What is not known is rather taken to be less.
                assert!((found - truth).abs() < 0.2 * truth + 3.0, "zone {index} at {age} s: {found}, not {truth}");
            }
        }
    }

    /// Zones of 1024 pages, each page of which is dirty after an age with the writer's probability. Sent in words of 64 pages, one every
    /// 5 ms, and counted every 50 ms.
    fn passed_over_by_words(writers: &[Dirtying]) -> Ages {
        let mut random = fastrand::Rng::with_seed(1);
        let mut ages = Ages::new(vec![1024.0; writers.len()]);
        let words = writers.len() * 16;
        for look in (10..=words).step_by(10).chain([words]) {
            for word in 0..look {
                let age = (look - word) as f64 * 0.005;
                let share = writers[word / 16].pages(age) / 1024.0;
                let dirty = (0..64).filter(|_| random.f64() < share).count() as u64;
                ages.count(word / 16, Duration::from_secs_f64(age), 64, dirty);
            }
        }
        ages
    }

    #[test]
    fn noise_in_small_counts_does_not_make_a_guest_quicker() {
        let writer = Dirtying::random(100.0, 900.0);
        let zones = passed_over_by_words(&vec![writer.clone(); 32]).zones();
        for age in [0.002, 0.01, 0.02, 0.05, 0.1, 0.5] {
            let found: f64 = zones.iter().map(|zone| zone.dirtying.pages(age)).sum();
            let truth = 32.0 * writer.pages(age);
            assert!((0.9..1.1).contains(&(found / truth)), "at {age} s: {found}, not {truth}");
        }
    }

    #[test]
    fn few_old_zones_of_another_kind_do_not_tell_how_the_others_go_on() {
        let (hot, cold) = (Dirtying::random(20_000.0, 1000.0), Dirtying::random(60.0, 900.0));
        let writers: Vec<_> = (0..32).map(|zone| if zone < 2 { hot.clone() } else { cold.clone() }).collect();
        let zones = passed_over_by_words(&writers).zones();
        // The first of them is 2.4 s old.
        let all = |age: f64| zones[2..12].iter().map(|zone| zone.dirtying.pages(age)).sum::<f64>();
        let (grown, truth) = (all(3.0) - all(2.3), 10.0 * (cold.pages(3.0) - cold.pages(2.3)));
        assert!((0.7..1.3).contains(&(grown / truth)), "{grown}, not {truth}");
    }

    #[test]
    fn what_has_faded_hardly_counts_beside_what_is_new() {
        let mut ages = Ages::new(vec![1000.0]);
        ages.count(0, Duration::from_millis(100), 1000, 800);
        ages.count(0, Duration::from_millis(800), 1000, 900);
        for _ in 0..10 {
            ages.fade();
            ages.count(0, Duration::from_millis(100), 1000, 300);
        }
        let zone = &ages.zones()[0].dirtying;
        assert!((290.0..320.0).contains(&zone.pages(0.1)), "{}", zone.pages(0.1));
        assert!((890.0..910.0).contains(&zone.pages(0.8)), "what nothing new is known of stays: {}", zone.pages(0.8));
    }

    #[test]
    fn a_zone_that_was_not_reached_writes_nothing() {
        let mut ages = Ages::new(vec![100.0, 100.0]);
        ages.count(0, Duration::from_secs(1), 100, 40);
        let zones = ages.zones();
        assert_eq!((zones[0].dirtying.pages(1.0), zones[1].dirtying.pages(1.0)), (40.0, 0.0));
        assert_eq!(ages.oldest(), Duration::from_secs(1));
    }
}
