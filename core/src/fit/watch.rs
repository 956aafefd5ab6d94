//! Looks at the dirty log while the first pass goes over memory, and counts what is dirty by zone.
//!
//! A look clears nothing: it costs the guest nothing, and the move hardly anything. When the bits of 64 pages were cleared, the least that
//! is cleared at once, is not told by anybody; it is known to lie between the two looks of which the later one finds nothing pending there.
//! All ages are in the guest's own time ([`GuestClock`]): a throttle changes nothing of what is counted.

use std::time::Duration;

use super::ages::Ages;
use super::clock::GuestClock;
use super::resent::Resent;
use crate::estimate::EstimateError;
use crate::estimate::sampling::{self, MOST_STRIPES, ZONES};
use crate::layout::{Layout, STRIPE_WORDS, StripeBits};
use crate::machine::{DirtyLog, MachineError};
use crate::predict::Zone;
use crate::source::{Encodings, SourcePages};

/// The shortest time between two looks,
const INTERVAL: Duration = Duration::from_millis(50);
/// and how many times as long as a look took they are at least apart: large memories take long to look at.
const APART: u32 = 50;

/// What a look has shown.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Seen {
    /// U(t) of each zone. `None`: as before.
    pub zones: Option<Vec<Zone>>,
    /// The guest goes through its memory from front to back.
    pub is_front: bool,
    /// Pages dirty in each zone, of those that have been visited.
    pub dirty_pages: Vec<f64>,
    /// Pages of each zone that the first pass has still to send. Empty: it is over.
    pub unsent_pages: Vec<f64>,
    /// For how long the guest has run in this round, in its own time.
    pub ran: Duration,
    /// Bytes on the wire of a page that is sent again, where differences may be sent instead; as far as known.
    pub again_wire_bytes: Option<f64>,
}

/// The watch over one first pass, and what is dirty by zone after each round.
pub struct Watch {
    sample: Vec<usize>,
    /// How many times as many pages there are as are looked at.
    scale: f64,
    /// Touched pages of each stripe of the sample. Empty: not counted yet.
    touched: Vec<f64>,
    /// When each word of each was visited, by the guest's clock.
    visited: Vec<[Option<Duration>; STRIPE_WORDS]>,
    clock: GuestClock,
    /// When the round under way began, by that clock.
    round_began: Duration,
    ages: Ages,
    resent: Option<Resent>,
    /// Zeros between looks.
    words: Vec<Vec<u64>>,
    looked: Duration,
    due: Duration,
    over: bool,
}

impl Watch {
    /// A watch over a first pass that begins now.
    /// `encodings`: the move's.
    pub fn new(layout: &Layout, now: Duration, encodings: Encodings) -> Result<Self, EstimateError> {
        let sample = sampling::sample(layout.stripes(), MOST_STRIPES);
        let mut pages = vec![0.0; ZONES];
        for &index in &sample {
            pages[sampling::zone_of(index, layout.stripes())] += layout.stripe(index).pages as f64;
        }
        let scale = layout.pages() as f64 / pages.iter().sum::<f64>().max(1.0);
        Ok(Self {
            resent: Resent::new(encodings)?,
            touched: Vec::new(),
            visited: vec![[None; STRIPE_WORDS]; sample.len()],
            clock: GuestClock::default(),
            round_began: now,
            sample,
            scale,
            ages: Ages::new(pages.iter().map(|pages| pages * scale).collect()),
            words: (0..layout.regions())
                .map(|region| vec![0; layout.region_pages(region).div_ceil(64) as usize])
                .collect(),
            looked: now,
            due: now + INTERVAL,
            over: false,
        })
    }

    /// When to look next. `None`: not any more.
    pub fn due(&self) -> Option<Duration> {
        (!self.over).then_some(self.due)
    }

    /// Looks; `now` is a clock.
    pub fn look(
        &mut self,
        pages: &SourcePages,
        log: &dyn DirtyLog,
        now: &dyn Fn() -> Duration,
    ) -> Result<Seen, MachineError> {
        let layout = pages.view.layout();
        let began = now();
        if self.touched.is_empty() {
            let touched = |index: &usize| f64::from(count(&pages.touched.of(&layout.stripe(*index))));
            self.touched = self.sample.iter().map(touched).collect();
        }
        self.note_visited(pages, now());
        for (region, words) in self.words.iter_mut().enumerate() {
            log.harvest(region, words)?;
        }
        let looked = now();
        let words = std::mem::take(&mut self.words);
        let bits = |index: usize| {
            let stripe = layout.stripe(index);
            let first = (index - layout.region_first_stripe(stripe.region)) * STRIPE_WORDS;
            let of_region = &words[stripe.region];
            let mut bits = StripeBits::default();
            let logged = &of_region[first..of_region.len().min(first + STRIPE_WORDS)];
            bits.iter_mut().zip(logged).zip(stripe.all()).for_each(|((word, logged), all)| *word = logged & all);
            bits
        };
        if self.clock.is_held() {
            // A guest that is held finds nearly every page clean, and each first write to one takes a fault: it is slower, in its own
            // time too, than it was while it wrote to pages that were dirty already.
            self.ages.fade();
        }
        let dirty_pages = self.count(layout, looked, self.clock.at(self.looked), bits);
        if let Some(resent) = &mut self.resent {
            let visited: Vec<usize> = self
                .sample
                .iter()
                .zip(&self.visited)
                .filter(|(_, visited)| visited.iter().all(Option::is_some))
                .map(|(index, _)| *index)
                .collect();
            resent.look(&pages.view, self.clock.at(looked), &visited, &bits);
        }
        self.words = words;
        self.words.iter_mut().for_each(|words| words.fill(0));
        self.looked = looked;
        self.due = looked + INTERVAL.max((looked - began) * APART);
        Ok(Seen {
            zones: Some(self.ages.zones()),
            is_front: false,
            dirty_pages,
            unsent_pages: self.unsent_pages(layout),
            ran: self.ran(looked),
            again_wire_bytes: self.again_wire_bytes(),
        })
    }

    /// A round begins. Another one than the first ends what is learned of U(t): pages are pending that had been visited.
    pub fn round_begins(&mut self, now: Duration) {
        self.over = true;
        self.round_began = self.clock.at(now);
    }

    /// From now on the guest is left this share of its time.
    pub fn held(&mut self, now: Duration, share: f64) {
        self.clock.hold(now, share);
    }

    /// A round has ended and what is dirty has been collected. The first time this is the last look.
    pub fn round_ended(&mut self, pages: &SourcePages, now: Duration) -> Seen {
        let layout = pages.view.layout();
        let zones = (!self.over).then(|| {
            // All that is pending now was not visited again: this was the last moment to tell.
            self.interpolate(now, |_| StripeBits::default());
            self.count(layout, now, Duration::MAX, |index| pages.pending.get(index));
            self.ages.fronts().map_or_else(|| (self.ages.zones(), false), |zones| (zones, true))
        });
        self.over = true;
        let mut dirty_pages = vec![0.0; ZONES];
        for index in pages.pending.stripes() {
            dirty_pages[sampling::zone_of(index, layout.stripes())] += f64::from(count(&pages.pending.get(index)));
        }
        let (zones, is_front) = zones.unzip();
        Seen {
            zones,
            is_front: is_front.unwrap_or(false),
            dirty_pages,
            unsent_pages: Vec::new(),
            ran: self.ran(now),
            again_wire_bytes: self.again_wire_bytes(),
        }
    }

    fn ran(&self, now: Duration) -> Duration {
        self.clock.at(now).saturating_sub(self.round_began)
    }

    /// What the first pass has still to send of each zone.
    fn unsent_pages(&self, layout: &Layout) -> Vec<f64> {
        let mut pages = vec![0.0; ZONES];
        for ((&index, visited), touched) in self.sample.iter().zip(&self.visited).zip(&self.touched) {
            let unvisited = visited.iter().filter(|visited| visited.is_none()).count() as f64 / STRIPE_WORDS as f64;
            pages[sampling::zone_of(index, layout.stripes())] += touched * unvisited * self.scale;
        }
        pages
    }

    fn again_wire_bytes(&self) -> Option<f64> {
        self.resent.as_ref()?.wire_bytes()
    }

    fn note_visited(&mut self, pages: &SourcePages, now: Duration) {
        self.interpolate(now, |index| pages.pending.get(index));
    }

    /// Words that have been visited since the last look were visited one after the other.
    fn interpolate(&mut self, now: Duration, pending: impl Fn(usize) -> StripeBits) {
        let mut new = Vec::new();
        for (place, (visited, &index)) in self.visited.iter().zip(&self.sample).enumerate() {
            if visited.iter().any(Option::is_none) {
                for (word, (visited, pending)) in visited.iter().zip(pending(index)).enumerate() {
                    if visited.is_none() && pending == 0 {
                        new.push((place, word));
                    }
                }
            }
        }
        // A share changes after a look, if at all.
        let (looked, now) = (self.clock.at(self.looked), self.clock.at(now));
        let since = now.saturating_sub(looked).as_secs_f64();
        for (rank, &(place, word)) in new.iter().enumerate() {
            let share = (rank as f64 + 0.5) / new.len() as f64;
            self.visited[place][word] = Some(looked + Duration::from_secs_f64(since * share));
        }
    }

    /// Takes in what is dirty in all that has been visited; how much that is by zone. What was visited after `known` is too young for
    /// its age to be told well enough, and says nothing of U: guests that are held live in just those short windows.
    fn count(
        &mut self,
        layout: &Layout,
        now: Duration,
        known: Duration,
        dirty: impl Fn(usize) -> StripeBits,
    ) -> Vec<f64> {
        let now = self.clock.at(now);
        let mut pages = vec![0.0; ZONES];
        for (&index, visited) in self.sample.iter().zip(&self.visited) {
            let (zone, all) = (sampling::zone_of(index, layout.stripes()), layout.stripe(index).all());
            for ((visited, dirty), all) in visited.iter().zip(dirty(index)).zip(all) {
                let Some(visited) = visited else { continue };
                if *visited <= known {
                    let age = now.saturating_sub(*visited);
                    self.ages.count(zone, age, all.count_ones().into(), dirty.count_ones().into());
                }
                pages[zone] += f64::from(dirty.count_ones()) * self.scale;
            }
        }
        self.ages.total(now, pages.iter().sum());
        pages
    }
}

fn count(bits: &StripeBits) -> u32 {
    bits.iter().map(|word| word.count_ones()).sum()
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::layout::Stripe;
    use crate::machine::RegionDescription;
    use crate::memory::GuestMemory;
    use crate::pending::Pending;
    use crate::source::Compression;
    use crate::table::{PageHasher, PageTable};
    use crate::touched::TouchedPages;
    use crate::view::MemoryView;
    use vm_memory::GuestAddress;

    const MS: Duration = Duration::from_millis(1);

    struct All;

    impl TouchedPages for All {
        fn of(&self, stripe: &Stripe) -> StripeBits {
            stripe.all()
        }
    }

    /// All of its first 64 pages are dirty.
    struct FirstWord;

    impl DirtyLog for FirstWord {
        fn start(&self) -> Result<(), MachineError> {
            Ok(())
        }
        fn stop(&self) -> Result<(), MachineError> {
            Ok(())
        }
        fn harvest(&self, _: usize, words: &mut [u64]) -> Result<(), MachineError> {
            words[0] = u64::MAX;
            Ok(())
        }
        fn clear(&self, _: usize, _: u64, _: &[u64]) -> Result<(), MachineError> {
            Ok(())
        }
    }

    /// Memory of one stripe, all of it pending.
    fn pages() -> SourcePages {
        let layout = Arc::new(Layout::new(&[RegionDescription { guest_address: 0, size_bytes: 2 << 20 }]).unwrap());
        let memory = GuestMemory::from_ranges(&[(GuestAddress(0), 2 << 20)]).unwrap();
        let pending = Pending::new(&layout);
        pending.fill(&layout);
        SourcePages {
            pending,
            table: PageTable::new(&layout),
            view: MemoryView::new(memory, layout).unwrap(),
            hasher: PageHasher::new(1, true),
            touched: Box::new(All),
            channels: 1,
        }
    }

    #[test]
    fn ages_are_told_by_what_is_cleared_at_once() {
        let pages = pages();
        let encodings = Encodings { compression: Compression::None, delta_cache_bytes: 0, sparse: true, coming: false };
        let mut watch = Watch::new(pages.view.layout(), Duration::ZERO, encodings).unwrap();
        let mut look = |at: Duration| {
            let seen = watch.look(&pages, &FirstWord, &|| at).unwrap();
            (seen, watch.visited[0])
        };
        let (nothing, _) = look(MS);
        assert_eq!(nothing.dirty_pages.iter().sum::<f64>(), 0.0, "what is dirty there has not been visited");
        pages.pending.take_words(0, 0..1);
        look(11 * MS);
        look(1000 * MS);
        pages.pending.take_words(0, 1..3);
        let (seen, visited) = look(1010 * MS);
        assert_eq!(visited[..4], [Some(6 * MS), Some(1002 * MS + MS / 2), Some(1007 * MS + MS / 2), None]);
        assert_eq!(seen.dirty_pages.iter().sum::<f64>(), 64.0);
        assert_eq!(seen.unsent_pages.iter().sum::<f64>(), 5.0 * 64.0);
    }
}
