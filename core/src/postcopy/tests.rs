//! Both ends of post-copy over links that break, with memory of one number a page: whatever comes first, comes twice or gets lost.

use std::collections::{BTreeMap, VecDeque};
use std::time::Duration;

use proptest::prelude::*;

use super::*;
use crate::layout::{Layout, STRIPE_PAGES, StripeBits};
use crate::machine::RegionDescription;
use crate::pending::Pending;

const PAGES: usize = 3 * STRIPE_PAGES;

/// What happens next.
#[derive(Debug, Clone, Copy)]
enum Step {
    /// The guest touches a page, and writes it if it is there.
    Touch(usize),
    /// The source reads a request and answers it.
    Answer,
    /// The source sends a page that nobody has asked for.
    Push,
    /// The destination takes a page from a channel.
    Take(PageChannel),
    /// The guest gives a page back that is there: it is gone.
    GiveBack(usize),
    /// The links break, and are made anew.
    Cut,
}

fn steps() -> impl Strategy<Value = Step> {
    prop_oneof![
        6 => (0..PAGES).prop_map(Step::Touch),
        6 => Just(Step::Answer),
        6 => Just(Step::Push),
        6 => Just(Step::Take(PageChannel::Fault)),
        6 => Just(Step::Take(PageChannel::Push)),
        1 => (0..PAGES).prop_map(Step::GiveBack),
        1 => Just(Step::Cut),
    ]
}

struct World {
    layout: Layout,
    /// The guest's memory as it was when it was stopped.
    source: Vec<u64>,
    pending: Pending,
    order: PushOrder,
    /// What is there at the destination; none: nothing.
    destination: Vec<Option<u64>>,
    /// What the guest would find if it had all of its memory.
    truth: Vec<u64>,
    wanted: Wanted,
    requests: VecDeque<usize>,
    fault: VecDeque<(usize, u64)>,
    push: VecDeque<(usize, u64)>,
    /// Who waits for which page, with the number that is to be written there.
    waiting: BTreeMap<usize, u64>,
    writes: u64,
}

impl World {
    fn new(missing: &[usize], untouched: &[usize]) -> Self {
        let layout = Layout::new(&[RegionDescription { guest_address: 0, size_bytes: PAGES as u64 * 4096 }]).unwrap();
        let mut world = Self {
            source: (0..PAGES as u64).map(|slot| slot + 1).collect(),
            pending: Pending::new(&layout),
            order: PushOrder::default(),
            destination: (0..PAGES as u64).map(|slot| Some(slot + 1)).collect(),
            truth: (0..PAGES as u64).map(|slot| slot + 1).collect(),
            wanted: Wanted::new(&layout),
            layout,
            requests: VecDeque::new(),
            fault: VecDeque::new(),
            push: VecDeque::new(),
            waiting: BTreeMap::new(),
            writes: 1_000_000,
        };
        for slot in missing {
            let mut bits = StripeBits::default();
            bits[slot % STRIPE_PAGES / 64] = 1 << (slot % 64);
            world.pending.merge(slot / STRIPE_PAGES, &bits);
        }
        // Zeros, and nowhere said to be missing.
        for slot in untouched.iter().filter(|slot| !missing.contains(slot)) {
            (world.source[*slot], world.truth[*slot], world.destination[*slot]) = (0, 0, None);
        }
        for part in missing_parts(&world.layout, |stripe| world.pending.get(stripe)) {
            part.stripes(&world.layout).unwrap().for_each(|(stripe, bits)| world.wanted.add(stripe, &bits));
        }
        for slot in (0..PAGES).filter(|slot| world.wanted.is_missing(*slot)) {
            world.destination[slot] = None;
        }
        world
    }

    fn place(&mut self, slot: usize, number: u64) {
        if self.destination[slot].is_none() {
            self.destination[slot] = Some(number);
        }
        self.goes_on(slot);
    }

    fn goes_on(&mut self, slot: usize) {
        if let Some(number) = self.waiting.remove(&slot) {
            assert_eq!(self.destination[slot], Some(self.truth[slot]), "page {slot} as the guest finds it");
            (self.destination[slot], self.truth[slot]) = (Some(number), number);
        }
    }

    fn step(&mut self, step: Step) {
        match step {
            Step::Touch(slot) => {
                self.writes += 1;
                self.waiting.entry(slot).or_insert(self.writes);
                match self.destination[slot] {
                    Some(_) => self.goes_on(slot),
                    None => match self.wanted.needed(slot, Duration::ZERO) {
                        Answer::Ask => self.requests.push_back(slot),
                        Answer::Wait => {}
                        Answer::Zeros => self.place(slot, 0),
                    },
                }
            }
            Step::Answer => {
                if let Some(slot) = self.requests.pop_front() {
                    self.order.needed(&self.pending, slot);
                    self.fault.push_back((slot, self.source[slot]));
                }
            }
            Step::Push => {
                if let Some(slot) = self.order.next(&self.pending) {
                    self.push.push_back((slot, self.source[slot]));
                }
            }
            Step::Take(channel) => {
                let queue = if channel == PageChannel::Fault { &mut self.fault } else { &mut self.push };
                if let Some((slot, number)) = queue.pop_front() {
                    if self.wanted.is_missing(slot) {
                        self.place(slot, number);
                    }
                    self.wanted.placed(slot, Duration::ZERO);
                }
            }
            Step::GiveBack(slot) => {
                if self.destination[slot].is_some() {
                    (self.destination[slot], self.truth[slot]) = (None, 0);
                }
            }
            Step::Cut => {
                self.requests.clear();
                self.fault.clear();
                self.push.clear();
                self.order.put_back(&self.pending);
                self.order = PushOrder::default();
                self.pending.clear();
                for part in self.wanted.parts(&self.layout) {
                    for (stripe, bits) in part.stripes(&self.layout).unwrap() {
                        self.pending.merge(stripe, &bits);
                    }
                }
                self.requests.extend(self.wanted.unanswered());
            }
        }
    }
}

proptest! {
    #[test]
    fn the_guest_finds_every_page_as_it_left_it(
        missing in prop::collection::vec(0..PAGES, 0..300),
        untouched in prop::collection::vec(0..PAGES, 0..30),
        steps in prop::collection::vec(steps(), 0..600),
    ) {
        let mut world = World::new(&missing, &untouched);
        steps.into_iter().for_each(|step| world.step(step));
        // Whatever has happened: the links hold now.
        let mut turns = 0;
        while world.wanted.left() > 0 || !world.waiting.is_empty() {
            for step in [Step::Answer, Step::Push, Step::Take(PageChannel::Fault), Step::Take(PageChannel::Push)] {
                world.step(step);
            }
            turns += 1;
            prop_assert!(turns < 10 * PAGES, "{} pages never come", world.wanted.left());
        }
        for slot in 0..PAGES {
            prop_assert_eq!(world.destination[slot].unwrap_or(0), world.truth[slot], "page {}", slot);
        }
        prop_assert!(world.wanted.unanswered().is_empty());
    }
}
