//! U(t): how many different pages a guest dirties in a window of length t.
//!
//! Known at the windows that were measured; between them as a straight line of log U over log t, which is exact for a writer
//! that never returns to a page and for one that has been everywhere, and within 2 % in between if windows at most double. Before the
//! first window as a random writer's W(1 − e^(−rt/W)) that goes through the first two points, which is a straight line if the second
//! has as much more pages as it has time. After the last one as one that goes through that and two before it, bounded by what
//! memory there is.

use std::time::Duration;

use serde::{Deserialize, Serialize};

/// A writer that has been nearly everywhere in the first window known may have been so in much less: it is taken to have needed a third of it
/// for most of that.
const STEEPEST: f64 = 3.0;
/// Windows are well apart if the shorter one is so many times as long as the longer one: nearly an octave.
const APART: f64 = 0.6;

/// Unique pages dirtied in a window of a given length. Never falls.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Dirtying {
    /// Windows in seconds, ascending, and the pages in each.
    points: Vec<(f64, f64)>,
    /// Before the first point: how quickly the pages that would be approached are (per second). 0: a straight line.
    begins_per_s: f64,
    /// After the last point: the pages that are approached, and how quickly (per second).
    most_pages: f64,
    approach_per_s: f64,
}

impl Dirtying {
    /// From counts over windows; no window ever dirties more than `most_pages`. What falls where it should not, being
    /// measured, is levelled.
    pub fn measured(counts: &[(Duration, f64)], most_pages: f64) -> Self {
        Self::from_points(counts.iter().map(|(window, pages)| (window.as_secs_f64(), *pages)).collect(), most_pages)
    }

    /// A guest that writes nothing.
    pub fn none() -> Self {
        Self { points: Vec::new(), begins_per_s: 0.0, most_pages: 0.0, approach_per_s: 0.0 }
    }

    /// A writer of `pages_per_s` pages drawn at random from a working set.
    pub fn random(pages_per_s: f64, set_pages: f64) -> Self {
        Self::of(pages_per_s, set_pages, |t| set_pages * -(-pages_per_s * t / set_pages).exp_m1())
    }

    /// A writer that goes through a working set from front to back, again and again.
    pub fn sequential(pages_per_s: f64, set_pages: f64) -> Self {
        Self::of(pages_per_s, set_pages, |t| (pages_per_s * t).min(set_pages))
    }

    /// The same guest at another speed: what took t takes t / `speed`.
    pub fn at_speed(&self, speed: f64) -> Self {
        let points = self.points.iter().map(|(window, pages)| (window / speed, *pages)).collect();
        let [begins_per_s, approach_per_s] = [self.begins_per_s, self.approach_per_s].map(|per_s| per_s * speed);
        Self { points, begins_per_s, approach_per_s, ..*self }
    }

    /// As if every window had dirtied so many times as many pages, within what there is.
    pub fn scaled(&self, factor: f64, most_pages: f64) -> Self {
        let points: Vec<_> =
            self.points.iter().map(|(window, pages)| (*window, (pages * factor).min(most_pages))).collect();
        let last = points.last().map_or(0.0, |(_, pages)| *pages);
        Self { points, most_pages: (self.most_pages * factor).min(most_pages).max(last), ..*self }
    }

    /// U(t).
    pub fn pages(&self, seconds: f64) -> f64 {
        if seconds <= 0.0 {
            return 0.0;
        }
        let after = self.points.partition_point(|(window, _)| *window < seconds);
        match (after.checked_sub(1).map(|before| self.points[before]), self.points.get(after)) {
            (None, None) => 0.0,
            (None, Some((window, pages))) if self.begins_per_s > 0.0 => {
                pages * (-self.begins_per_s * seconds).exp_m1() / (-self.begins_per_s * window).exp_m1()
            }
            (None, Some((window, pages))) => pages * seconds / window,
            (Some((t0, u0)), Some((t1, u1))) => {
                if u0 <= 0.0 {
                    u1 * (seconds - t0) / (t1 - t0)
                } else {
                    u0 * (seconds / t0).powf((u1 / u0).ln() / (t1 / t0).ln())
                }
            }
            (Some((window, pages)), None) => {
                let room = (self.most_pages - pages).max(0.0);
                pages + room * -(-self.approach_per_s * (seconds - window)).exp_m1()
            }
        }
    }

    /// The window in which so many pages are dirtied; infinite if there is none.
    pub fn window(&self, pages: f64) -> f64 {
        if pages <= 0.0 {
            return 0.0;
        }
        let after = self.points.partition_point(|(_, counted)| *counted < pages);
        match (after.checked_sub(1).map(|before| self.points[before]), self.points.get(after)) {
            (None, None) => f64::INFINITY,
            (None, Some((window, counted))) if self.begins_per_s > 0.0 => {
                let share = pages / counted * (-self.begins_per_s * window).exp_m1();
                -share.ln_1p() / self.begins_per_s
            }
            (None, Some((window, counted))) => window * pages / counted,
            (Some((t0, u0)), Some((t1, u1))) => {
                if u0 <= 0.0 {
                    t0 + (t1 - t0) * pages / u1
                } else {
                    t0 * (pages / u0).powf((t1 / t0).ln() / (u1 / u0).ln())
                }
            }
            (Some((window, counted)), None) => {
                let left = (self.most_pages - pages) / (self.most_pages - counted);
                // Where nothing is left, or nothing is approached.
                match left > 0.0 && self.approach_per_s > 0.0 {
                    true => window - left.ln() / self.approach_per_s,
                    false => f64::INFINITY,
                }
            }
        }
    }

    /// Writes per second that found a clean page, in the shortest window known.
    pub fn pages_per_s(&self) -> f64 {
        self.points.first().map_or(0.0, |(window, pages)| pages / window)
    }

    /// Writes per second to pages that are all clean: how U begins.
    pub fn writes_per_s(&self) -> f64 {
        match self.points.first() {
            Some((window, pages)) if self.begins_per_s > 0.0 => {
                pages * self.begins_per_s / -(-self.begins_per_s * window).exp_m1()
            }
            _ => self.pages_per_s(),
        }
    }

    /// What U approaches.
    pub fn most_pages(&self) -> f64 {
        self.most_pages
    }

    fn from_points(mut points: Vec<(f64, f64)>, most_pages: f64) -> Self {
        points.retain(|(window, pages)| *window > 0.0 && pages.is_finite());
        points.sort_by(|a, b| a.0.total_cmp(&b.0));
        points.dedup_by(|later, earlier| later.0 == earlier.0);
        let mut before = 0.0f64;
        for (_, pages) in &mut points {
            *pages = pages.clamp(before, most_pages.max(before));
            before = *pages;
        }
        let (most_pages, approach_per_s) = tail(&points, most_pages);
        Self { begins_per_s: head(&points), points, most_pages, approach_per_s }
    }

    /// From a formula, at windows around the time that the set takes to be written once.
    fn of(pages_per_s: f64, set_pages: f64, pages: impl Fn(f64) -> f64) -> Self {
        if !(pages_per_s > 0.0 && set_pages > 0.0) {
            return Self::none();
        }
        // Four points to a doubling, from a millionth of that time to 32 times it.
        let once = set_pages / pages_per_s;
        let points = (-80..=20).map(|step| once * 2f64.powf(f64::from(step) / 4.0)).map(|t| (t, pages(t))).collect();
        Self::from_points(points, set_pages)
    }
}

/// How quickly the first two points approach something: λ of U = A(1 − e^(−λt)) through both of them. 0 if they lie on a straight line.
fn head(points: &[(f64, f64)]) -> f64 {
    let [(t1, u1), (t2, u2), ..] = *points else { return 0.0 };
    // How many times as many pages in the second window; falls from t2 / t1 towards 1 as λ grows.
    let times = |lambda: f64| (-lambda * t2).exp_m1() / (-lambda * t1).exp_m1();
    if u1 <= 0.0 || u2 >= u1 * t2 / t1 {
        return 0.0;
    }
    let steepest = STEEPEST / t1;
    if u2 <= u1 * times(steepest) {
        return steepest;
    }
    let (mut low, mut high) = (0.0, steepest);
    for _ in 0..60 {
        let middle = (low + high) / 2.0;
        match times(middle) > u2 / u1 {
            true => low = middle,
            false => high = middle,
        }
    }
    high
}

/// What the last points approach, and how quickly: U = A − (A − u3)e^(−λ(t − t3)) through three of them.
fn tail(points: &[(f64, f64)], bound: f64) -> (f64, f64) {
    let Some([(t1, u1), (t2, u2), (t3, u3)]) = last_apart(points) else {
        // Too little is known: it may go on as it was.
        let Some((window, pages)) = points.last() else { return (0.0, 0.0) };
        return bounded(*pages, pages / window, bound);
    };
    let (grown, then) = (u2 - u1, u3 - u2);
    if then <= 0.0 {
        return (u3, 0.0);
    }
    let (first, second) = (t2 - t1, t3 - t2);
    // How much of a growth in the first window is seen in the second; falls from second / first towards 0 as λ grows.
    let seen = |lambda: f64| (-lambda * first).exp() * (-lambda * second).exp_m1() / (-lambda * first).exp_m1();
    if then >= grown * second / first {
        return bounded(u3, then / second, bound);
    }
    let (mut low, mut high) = (0.0, 1.0 / first);
    while seen(high) > then / grown && high < 1e9 {
        high *= 2.0;
    }
    for _ in 0..60 {
        let middle = (low + high) / 2.0;
        match middle > 0.0 && seen(middle) > then / grown {
            true => low = middle,
            false => high = middle,
        }
    }
    let lambda = high;
    let most = u3 + then * (-lambda * second).exp() / -(-lambda * second).exp_m1();
    match most <= bound {
        true => (most, lambda),
        false => bounded(u3, (most - u3) * lambda, bound),
    }
}

/// The last point and two before it that are well apart, if there are such: between neighbours noise may be all there is. Or else the last three.
fn last_apart(points: &[(f64, f64)]) -> Option<[(f64, f64); 3]> {
    let before = |(t, _): (f64, f64)| points.iter().copied().rev().find(|(window, _)| *window <= APART * t);
    let last = *points.last()?;
    let apart = before(last).and_then(|middle| Some([before(middle)?, middle, last]));
    apart.or_else(|| points.last_chunk().copied())
}

/// Goes on from `pages` with this slope, and never beyond the bound.
fn bounded(pages: f64, per_s: f64, bound: f64) -> (f64, f64) {
    let room = bound - pages;
    match room > 0.0 {
        true => (bound, per_s / room),
        false => (pages, 0.0),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn near(value: f64, expected: f64, share: f64) -> bool {
        (value - expected).abs() <= expected.abs() * share
    }

    /// What `estimate` measures of a random writer.
    fn sampled(rate: f64, set: f64, windows: &[f64]) -> Dirtying {
        let count = |t: &f64| (Duration::from_secs_f64(*t), set * -(-rate * t / set).exp_m1());
        Dirtying::measured(&windows.iter().map(count).collect::<Vec<_>>(), 1e9)
    }

    #[test]
    fn a_random_writer_is_known_from_a_few_windows() {
        let (rate, set) = (20_000.0, 60_000.0);
        let curve = sampled(rate, set, &[0.1, 0.2, 0.5, 1.0, 2.0, 4.0]);
        for t in [0.01, 0.05, 0.15, 0.3, 0.7, 1.5, 3.0, 6.0, 20.0, 500.0] {
            let truth = set * -(-rate * t / set).exp_m1();
            assert!(near(curve.pages(t), truth, 0.02), "{t}: {} {truth}", curve.pages(t));
        }
        assert!(near(curve.most_pages(), set, 0.001));
    }

    #[test]
    fn a_random_writer_is_known_in_windows_shorter_than_all_that_were_measured() {
        let (rate, set) = (14_400.0, 435.0);
        let curve = sampled(rate, set, &[0.05, 0.07, 0.1, 0.2]);
        for t in [0.0001, 0.005, 0.02, 0.04] {
            let truth = set * -(-rate * t / set).exp_m1();
            assert!(near(curve.pages(t), truth, 0.01), "{t}: {} {truth}", curve.pages(t));
        }
        assert!(near(curve.writes_per_s(), rate, 0.01), "{}", curve.writes_per_s());
    }

    #[test]
    fn what_grows_evenly_goes_on_until_memory_ends() {
        let counts = [1, 2, 3].map(|s| (Duration::from_secs(s), 100.0 * s as f64));
        let curve = Dirtying::measured(&counts, 1000.0);
        assert!(near(curve.pages(3.5), 350.0, 0.02), "{}", curve.pages(3.5));
        assert!(curve.pages(1e6) <= 1000.0 && near(curve.pages(1e6), 1000.0, 0.001));
        assert_eq!(Dirtying::none().pages(5.0), 0.0);
        assert_eq!(Dirtying::none().window(1.0), f64::INFINITY);
    }

    #[test]
    fn a_sequential_writer_ends_where_its_set_does() {
        let curve = Dirtying::sequential(1000.0, 4000.0);
        for (t, pages) in [(0.5, 500.0), (2.0, 2000.0), (3.99, 3990.0), (4.2, 4000.0), (1e5, 4000.0)] {
            assert!(near(curve.pages(t), pages, 0.01), "{t}: {}", curve.pages(t));
        }
    }

    proptest! {
        #[test]
        fn never_falls_and_is_its_own_inverse(
            counts in prop::collection::vec((1u64..5000, 0.0f64..1e6), 0..8),
            most in 1.0f64..1e6,
            times in prop::collection::vec(0.0f64..1e3, 2..20),
        ) {
            let counts: Vec<_> = counts.iter().map(|(ms, pages)| (Duration::from_millis(*ms), *pages)).collect();
            let curve = Dirtying::measured(&counts, most);
            let mut times = times;
            times.sort_by(f64::total_cmp);
            let mut before = 0.0;
            for t in times {
                let pages = curve.pages(t);
                prop_assert!(pages.is_finite() && pages + 1e-6 >= before && pages <= most * (1.0 + 1e-9), "{t} {pages} {before}");
                before = pages;
                let window = curve.window(pages);
                prop_assert!(window.is_infinite() || (curve.pages(window) - pages).abs() <= 1e-6 * most.max(1.0), "{t} {pages} {window}");
            }
        }

        #[test]
        fn twice_the_speed_is_half_the_time(rate in 1.0f64..1e6, set in 1.0f64..1e6, t in 0.001f64..100.0) {
            let curve = Dirtying::random(rate, set);
            prop_assert!(near(curve.at_speed(2.0).pages(t), curve.pages(2.0 * t), 1e-9));
        }
    }
}
