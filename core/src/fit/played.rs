//! A guest and a sender for tests, played page by page: bits are cleared as pages are sent, and looked at as [`super::Watch`] does.

use std::time::Duration;

use super::{Ages, Seen};
use crate::predict::{Contents, Dirtying, PageCost, Path, Workload, Zone};

/// Pages that are sent in a second, and the bytes of one.
pub(crate) const SENT_PER_S: f64 = 20_000.0;
pub(crate) const PAGE: f64 = 4104.0;
pub(crate) const COST: PageCost = PageCost { wire_bytes: PAGE, pages_per_s: 1e9 };
const ZONES: usize = 32;
/// Parts of memory whose bits count as cleared at once.
const PARTS: usize = 256;

#[derive(Debug, Clone, Copy)]
pub(crate) enum Order {
    Random,
    Sequential,
    HotCold,
}

/// What is played.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Play {
    pub(crate) order: Order,
    pub(crate) memory: usize,
    pub(crate) set: usize,
    /// Where the set begins.
    pub(crate) first: usize,
    /// Pages written for each page sent.
    pub(crate) k: f64,
    /// Of its time, what it needs to write so much.
    pub(crate) busy: f64,
    /// From some round on the guest writes so many times as fast.
    pub(crate) change: (u32, f64),
}

/// It, as far as it was played.
pub(crate) struct Played {
    random: fastrand::Rng,
    pub(crate) play: Play,
    pub(crate) dirty: Vec<bool>,
    at: usize,
    due: f64,
    /// Seconds since the move began,
    pub(crate) now: f64,
    /// and those that the guest has run.
    ran: f64,
    /// What the guest is left of its time,
    pub(crate) share: f64,
    /// and how many clean pages it may write in a second.
    pub(crate) pages_per_s: f64,
    ages: Ages,
    /// When each part was cleared that the first pass has sent.
    cleared: Vec<f64>,
}

impl Play {
    /// One of any kind, of so many pages.
    pub(crate) fn any(random: &mut fastrand::Rng, memory: usize) -> Self {
        let set = (memory as f64 * (0.1 + 0.8 * random.f64())) as usize;
        let order = [Order::Random, Order::Sequential, Order::HotCold][random.usize(..3)];
        let first = random.usize(..memory - set);
        Self { order, memory, set, first, k: 0.2 + 3.0 * random.f64(), busy: 1.0, change: (0, 1.0) }
    }

    /// Whether it meets a sender that it overtakes at a good moment is luck.
    pub(crate) fn is_luck(&self) -> bool {
        matches!(self.order, Order::Sequential) && self.k > 0.95
    }

    /// What there is to know of it before a move.
    pub(crate) fn workload(&self) -> Workload {
        let (set, rate) = (self.set as f64, self.k * SENT_PER_S);
        let written = |pages: f64, dirtying: Dirtying| Zone { touched_pages: pages, dirtying };
        let parts = match self.order {
            Order::Random => vec![written(set, Dirtying::random(rate, set))],
            Order::Sequential => vec![written(set, Dirtying::sequential(rate, set))],
            Order::HotCold => vec![
                written(0.1 * set, Dirtying::random(0.9 * rate, 0.1 * set)),
                written(0.9 * set, Dirtying::random(0.1 * rate, 0.9 * set)),
            ],
        };
        let still = |pages: usize| vec![written(pages as f64, Dirtying::none())];
        let zones = [still(self.first), parts, still(self.memory - self.set - self.first)].concat();
        Workload { zones, contents: Contents::incompressible() }
    }
}

impl Played {
    pub(crate) fn new(play: Play, seed: u64) -> Self {
        let mut random = fastrand::Rng::with_seed(seed);
        let at = random.usize(..play.set);
        let mut zone_pages = vec![0.0; ZONES];
        (0..play.memory).for_each(|page| zone_pages[page * ZONES / play.memory] += 1.0);
        Self {
            random,
            play,
            dirty: vec![true; play.memory],
            at,
            due: 0.0,
            now: 0.0,
            ran: 0.0,
            share: 1.0,
            pages_per_s: f64::INFINITY,
            ages: Ages::new(zone_pages),
            cleared: Vec::new(),
        }
    }

    fn write(&mut self, round: u32) {
        let Play { order, set, first, k, busy, change: (from, factor), .. } = self.play;
        // From front to back, nearly every page is clean.
        let most = if matches!(order, Order::Sequential) { self.pages_per_s / SENT_PER_S } else { f64::INFINITY };
        let wanted = (self.share / busy).min(1.0) * if round >= from { k * factor } else { k };
        self.due += wanted.min(most);
        while self.due >= 1.0 {
            self.due -= 1.0;
            let page = match order {
                Order::Random => self.random.usize(..set),
                Order::HotCold if self.random.usize(..10) > 0 => self.random.usize(..set / 10),
                Order::HotCold => set / 10 + self.random.usize(..set - set / 10),
                Order::Sequential => {
                    self.at = (self.at + 1) % set;
                    self.at
                }
            };
            self.dirty[first + page] = true;
        }
        self.now += 1.0 / SENT_PER_S;
        self.ran += self.share / SENT_PER_S;
    }

    fn by_zone(&self, counts: impl Fn(usize) -> bool) -> Vec<f64> {
        let mut pages = vec![0.0; ZONES];
        let memory = self.play.memory;
        (0..memory).filter(|page| counts(*page)).for_each(|page| pages[page * ZONES / memory] += 1.0);
        pages
    }

    /// Pages that the first pass has sent.
    pub(crate) fn sent(&self) -> usize {
        match self.cleared.len() {
            PARTS => self.play.memory,
            parts => parts * (self.play.memory / PARTS),
        }
    }

    /// The first pass goes on for so many parts of memory, 256 in all, and a look.
    pub(crate) fn look(&mut self, parts: usize) -> Seen {
        let part = self.play.memory / PARTS;
        for _ in 0..parts.min(PARTS - self.cleared.len()) {
            let first = self.sent();
            self.cleared.push(self.ran + self.share * part as f64 / 2.0 / SENT_PER_S);
            for page in first..first + part {
                self.dirty[page] = false;
                self.write(0);
            }
        }
        for (index, cleared) in self.cleared.iter().enumerate() {
            let pages = index * part..(index + 1) * part;
            let zone = pages.start * ZONES / self.play.memory;
            let dirty = self.dirty[pages].iter().filter(|dirty| **dirty).count() as u64;
            self.ages.count(zone, Duration::from_secs_f64((self.ran - cleared).max(0.0)), part as u64, dirty);
        }
        let sent = self.sent();
        if sent == self.play.memory {
            self.dirty[part * PARTS..].fill(false);
        }
        let dirty_pages = self.by_zone(|page| page < sent && self.dirty[page]);
        self.ages.total(Duration::from_secs_f64(self.ran), dirty_pages.iter().sum());
        let fronts = (sent == self.play.memory).then(|| self.ages.fronts()).flatten();
        Seen {
            is_front: fronts.is_some(),
            zones: Some(fronts.unwrap_or_else(|| self.ages.zones())),
            dirty_pages,
            unsent_pages: if sent < self.play.memory { self.by_zone(|page| page >= sent) } else { Vec::new() },
            ran: Duration::from_secs_f64(self.ran),
            again_wire_bytes: None,
        }
    }

    /// What a look shows when the first pass is over.
    pub(crate) fn first_pass(&mut self) -> Seen {
        (0..15).for_each(|_| drop(self.look(PARTS / 16)));
        self.look(PARTS)
    }

    /// A round.
    pub(crate) fn round(&mut self, round: u32) -> Seen {
        let (pending, began) = (self.dirty.clone(), self.ran);
        for (page, _) in pending.iter().enumerate().filter(|(_, pending)| **pending) {
            self.dirty[page] = false;
            self.write(round);
        }
        Seen {
            dirty_pages: self.by_zone(|page| self.dirty[page]),
            ran: Duration::from_secs_f64(self.ran - began),
            ..Seen::default()
        }
    }

    pub(crate) fn dirty_pages(&self) -> u64 {
        self.dirty.iter().filter(|dirty| **dirty).count() as u64
    }
}

/// The way that its pages go.
pub(crate) fn path() -> Path {
    Path {
        bandwidth_bytes_per_s: SENT_PER_S * PAGE,
        switchover_bytes_per_s: SENT_PER_S * PAGE,
        setup: Duration::ZERO,
        probe_bytes: 0.0,
        round_overhead: Duration::ZERO,
        fixed: Duration::ZERO,
        queued_bytes: 0.0,
    }
}
