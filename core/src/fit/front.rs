//! Writers that go through memory from front to back.
//!
//! A zone that such a writer comes by stays clean for a while and is dirty all at once. When that is, is a matter of where in its lap the writer
//! was when the zone was sent, and says nothing of the next round: there the writer is somewhere else. What stays is how many pages a lap has, and
//! how fast it goes: U(t) of each zone is, on average over all places where it can be, a straight line to a whole lap.

use std::time::Duration;

use crate::predict::{Dirtying, Zone};

/// From the first to the last tenth of what is written in it, a zone's age grows by no more than this where a front comes by. A random writer's
/// grows ninefold where it is slow and 22-fold where it has been everywhere.
const SHARP: f64 = 3.0;
/// A front is a writer's habit if so much of what is written is written by fronts.
const MOSTLY: f64 = 0.5;
/// Over windows of this length and more the pace is told.
const WINDOW: Duration = Duration::from_millis(200);
/// A zone with fewer dirty pages says nothing.
const TELLING_PAGES: f64 = 32.0;

/// How fast pages become dirty, in the first pass: there each is counted once.
#[derive(Debug, Clone, Default)]
pub(super) struct Pace {
    looks: Vec<(Duration, f64)>,
}

impl Pace {
    /// So many pages were dirty at a time of the guest's own.
    pub(super) fn seen(&mut self, at: Duration, dirty_pages: f64) {
        self.looks.push((at, dirty_pages));
    }

    /// While it does not write where it has written already, or where nothing has been sent. `None`: too little was seen.
    pub(super) fn pages_per_s(&self) -> Option<f64> {
        let mut fastest: Option<f64> = None;
        let mut first = 0;
        for &(at, dirty_pages) in &self.looks {
            // The latest look that is a window ago.
            while self.looks.get(first + 1).is_some_and(|(then, _)| *then + WINDOW <= at) {
                first += 1;
            }
            let (then, before) = self.looks[first];
            if then + WINDOW <= at {
                let pace = (dirty_pages - before) / (at - then).as_secs_f64();
                fastest = Some(fastest.unwrap_or(0.0).max(pace));
            }
        }
        fastest.filter(|pace| *pace > 0.0)
    }
}

/// How a zone became dirty.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) enum Became {
    /// Hardly at all.
    Nothing,
    /// So many pages at once, after a while.
    AtOnce(f64),
    /// So many, by and by, or before anybody looked.
    ByAndBy(f64),
}

impl Became {
    /// From what was counted: ages in seconds, ascending, and the pages dirty then.
    pub(super) fn of(counted: impl Iterator<Item = (f64, f64)> + Clone) -> Self {
        let most = counted.clone().map(|(_, dirty)| dirty).fold(0.0, f64::max);
        if most < TELLING_PAGES {
            return Self::Nothing;
        }
        let clean_until = counted.clone().take_while(|(_, dirty)| *dirty <= 0.1 * most).last();
        let dirty_from = counted.clone().find(|(_, dirty)| *dirty >= 0.9 * most);
        match (clean_until, dirty_from) {
            (Some((clean, _)), Some((dirty, _))) if dirty <= SHARP * clean => Self::AtOnce(most),
            _ => Self::ByAndBy(most),
        }
    }
}

/// Zones of a guest whose writers are fronts, by what was seen in a whole first pass. `None`: they are not, or too little was seen.
pub(super) fn zones(became: &[Became], zone_pages: &[f64], pace: &Pace) -> Option<Vec<Zone>> {
    let pages = |became: &Became| match became {
        Became::Nothing => 0.0,
        Became::AtOnce(pages) | Became::ByAndBy(pages) => *pages,
    };
    let lap: f64 = became.iter().map(pages).sum();
    let at_once: f64 = became.iter().filter(|became| matches!(became, Became::AtOnce(_))).map(pages).sum();
    let pages_per_s = pace.pages_per_s()?;
    if lap <= 0.0 || at_once < MOSTLY * lap {
        return None;
    }
    let zone = |(became, &zone_pages): (&Became, &f64)| {
        let pages = pages(became).min(zone_pages);
        Zone { touched_pages: zone_pages, dirtying: Dirtying::sequential(pages_per_s * pages / lap, pages) }
    };
    Some(became.iter().zip(zone_pages).map(zone).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn became(of: impl Fn(f64) -> f64) -> Became {
        let ages: Vec<f64> = (0..24).map(|half_octaves| 0.05 * 2f64.powf(f64::from(half_octaves) / 2.0)).collect();
        Became::of(ages.iter().map(|age| (*age, of(*age))))
    }

    #[test]
    fn only_a_front_makes_a_zone_dirty_all_at_once() {
        let front = |at: f64| became(move |age| ((age - at) * 10_000.0).clamp(0.0, 1000.0));
        assert!(matches!(front(0.5), Became::AtOnce(_)), "{:?}", front(0.5));
        assert!(matches!(front(5.0), Became::AtOnce(_)), "{:?}", front(5.0));
        for pages_per_s in [20.0, 200.0, 2_000.0, 20_000.0, 200_000.0] {
            let writer = Dirtying::random(pages_per_s, 1000.0);
            let random = became(|age| writer.pages(age));
            assert!(matches!(random, Became::ByAndBy(_)), "{pages_per_s}: {random:?}");
        }
        assert_eq!(became(|_| 3.0), Became::Nothing);
    }

    #[test]
    fn its_pace_is_the_highest_that_is_seen_for_a_while() {
        let mut pace = Pace::default();
        assert_eq!(pace.pages_per_s(), None);
        // Nothing while it is where nothing has been sent; 10,000 a second; nothing new after a lap.
        for look in 0..60u64 {
            let at = look as f64 * 0.05;
            pace.seen(Duration::from_millis(50 * look), (10_000.0 * (at - 1.0)).clamp(0.0, 8_000.0));
        }
        let found = pace.pages_per_s().unwrap();
        assert!((9_990.0..10_010.0).contains(&found), "{found}");
    }
}
