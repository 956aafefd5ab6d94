//! Both sides of the data channels against each other, without threads: whatever the guest writes meanwhile and wherever the links
//! break, what arrives is what was there when the guest stopped.

// Helpers outside of #[test] functions may unwrap too: a test is where that belongs.
#![allow(clippy::unwrap_used)]

use std::collections::BTreeSet;
use std::sync::{Arc, Mutex};

use godwit_core::decoder::Wants;
use godwit_core::destination::receiving::Received;
use godwit_core::destination::{DestinationPages, ReceivingChannel};
use godwit_core::layout::{Layout, Stripe, StripeBits};
use godwit_core::machine::RegionDescription;
use godwit_core::pending::{Harvester, Pending};
use godwit_core::progress::PageCounts;
use godwit_core::source::sending::{BrokenOff, Order, Pace, Polled, Report, break_off};
use godwit_core::source::{Compression, Encodings, SendingChannel, SourcePages, Unacknowledged};
use godwit_core::table::{PageHasher, PageTable};
use godwit_core::touched::TouchedPages;
use godwit_core::view::MemoryView;
use godwit_core::{DirtyLog, GuestMemory, MachineError, PAGE_SIZE, audit};
use proptest::prelude::*;
use vm_memory::{Bytes, GuestAddress};

/// Two stripes and a half, and one more beyond a gap.
const REGIONS: [(u64, usize); 2] = [(0, 5 << 20), (1 << 30, 2 << 20)];
const CHANNELS: usize = 2;
const PAGES: usize = (REGIONS[0].1 + REGIONS[1].1) / PAGE_SIZE;
/// The pause, over a link of which nothing is known.
const FINAL: Order = Order::Final { link_bytes_per_s: None };

/// The region of a page, and its number there.
fn place(page: usize) -> (usize, usize) {
    let first = REGIONS[0].1 / PAGE_SIZE;
    if page < first { (0, page) } else { (1, page - first) }
}

/// One bit for every page that the guest has written since it was cleared.
#[derive(Default)]
struct Log(Mutex<BTreeSet<(usize, u64)>>);

impl DirtyLog for Log {
    fn start(&self) -> Result<(), MachineError> {
        Ok(())
    }
    fn stop(&self) -> Result<(), MachineError> {
        Ok(())
    }
    fn harvest(&self, region: usize, words: &mut [u64]) -> Result<(), MachineError> {
        for &(of, page) in self.0.lock().unwrap().iter() {
            if of == region {
                words[page as usize / 64] |= 1 << (page % 64);
            }
        }
        Ok(())
    }
    fn clear(&self, region: usize, first_page: u64, words: &[u64]) -> Result<(), MachineError> {
        let cleared = |page: u64| {
            let bit = page.wrapping_sub(first_page);
            words.get(bit as usize / 64).is_some_and(|word| word >> (bit % 64) & 1 == 1)
        };
        self.0.lock().unwrap().retain(|&(of, page)| of != region || page < first_page || !cleared(page));
        Ok(())
    }
}

/// Pages that the guest has ever written.
#[derive(Clone, Default)]
struct Touched(Arc<Mutex<BTreeSet<u64>>>);

impl TouchedPages for Touched {
    fn of(&self, stripe: &Stripe) -> StripeBits {
        let mut bits = StripeBits::default();
        for frame in self.0.lock().unwrap().range(stripe.first_frame..stripe.first_frame + stripe.pages as u64) {
            let offset = (frame - stripe.first_frame) as usize;
            bits[offset / 64] |= 1 << (offset % 64);
        }
        bits
    }
}

/// Where the links break: after so many bytes of a channel have arrived, and how many of the marks were acknowledged.
#[derive(Debug, Clone)]
struct Cut {
    arrive: [usize; CHANNELS],
    /// Written by the source beyond that.
    in_flight: usize,
    acknowledged: usize,
}

struct Scene {
    source: SourcePages,
    memory: GuestMemory,
    log: Log,
    touched: Touched,
    harvester: Harvester,
    sending: Vec<SendingChannel>,
    unacknowledged: Vec<Unacknowledged>,
    destination: DestinationPages,
    receiving: Vec<ReceivingChannel>,
    /// The first frames of what was announced, per channel.
    coming: [Vec<u64>; CHANNELS],
    /// Where there is memory for bases the link turns out to be slow after so many bytes of an order, and differences are sent.
    slow_after_bytes: Option<usize>,
}

impl Scene {
    fn new(compression: Compression, delta_cache_bytes: Option<u64>) -> Self {
        let regions = REGIONS.map(|(guest_address, size)| RegionDescription { guest_address, size_bytes: size as u64 });
        let layout = Arc::new(Layout::new(&regions).unwrap());
        let memory =
            || GuestMemory::from_ranges(&REGIONS.map(|(address, size)| (GuestAddress(address), size))).unwrap();
        let (here, touched, hasher) = (memory(), Touched::default(), PageHasher::new(7, true));
        let source = SourcePages {
            view: MemoryView::new(here.clone(), Arc::clone(&layout)).unwrap(),
            pending: Pending::new(&layout),
            table: PageTable::new(&layout),
            hasher,
            touched: Box::new(touched.clone()),
            channels: CHANNELS,
        };
        source.pending.fill(&layout);
        let encodings =
            Encodings { compression, delta_cache_bytes: delta_cache_bytes.unwrap_or(0), sparse: true, coming: true };
        let destination = DestinationPages {
            view: MemoryView::new(memory(), Arc::clone(&layout)).unwrap(),
            table: PageTable::new(&layout),
            hasher,
        };
        Self {
            harvester: Harvester::new(&layout),
            memory: here,
            log: Log::default(),
            touched,
            sending: (0..CHANNELS).map(|index| SendingChannel::new(index, encodings).unwrap()).collect(),
            unacknowledged: (0..CHANNELS).map(|_| Unacknowledged::default()).collect(),
            receiving: (0..CHANNELS)
                .map(|index| ReceivingChannel::new(&destination, index, CHANNELS).unwrap())
                .collect(),
            coming: Default::default(),
            slow_after_bytes: delta_cache_bytes.map(|_| 50_000),
            source,
            destination,
        }
    }

    /// The guest writes a page: zeros, one byte, noise, or a word of what is there.
    fn write(&self, page: usize, value: u64) {
        let (region, page) = place(page);
        let address = REGIONS[region].0 + (page * PAGE_SIZE) as u64;
        let mut there = vec![0; PAGE_SIZE];
        self.memory.read_slice(&mut there, GuestAddress(address)).unwrap();
        let contents: Vec<u8> = match value % 4 {
            0 => vec![0; PAGE_SIZE],
            1 => vec![value as u8; PAGE_SIZE],
            2 => {
                there[(value >> 8) as usize % 512 * 8..][..8].copy_from_slice(&value.to_le_bytes());
                there
            }
            _ => (0..PAGE_SIZE as u64).map(|at| (value.wrapping_mul(at * at + 1) >> 24) as u8).collect(),
        };
        // The guest's own writes are in its log, not in the VMM's bitmap.
        let slot = self.source.view.layout().slot_of(address / PAGE_SIZE as u64, 1).unwrap();
        self.source.view.write_page(slot, contents.as_slice().try_into().unwrap());
        self.log.0.lock().unwrap().insert((region, page as u64));
        self.touched.0.lock().unwrap().insert(address / PAGE_SIZE as u64);
    }

    /// The guest gives pages back: the VMM discards them, and marks them.
    fn give_back(&self, first: usize, count: usize) {
        for (region, page) in (first..(first + count).min(PAGES)).map(place) {
            let address = REGIONS[region].0 + (page * PAGE_SIZE) as u64;
            self.memory.write_slice(&[0; PAGE_SIZE], GuestAddress(address)).unwrap();
            self.touched.0.lock().unwrap().remove(&(address / PAGE_SIZE as u64));
        }
    }

    fn harvest(&mut self) -> u64 {
        self.harvester.harvest(self.source.view.layout(), &self.log, &self.memory, &self.source.pending).unwrap()
    }

    /// Carries an order out, or breaks off. What the channels report, unless they broke off.
    fn run(&mut self, order: Order, cut: Option<&Cut>) -> Result<Vec<Report>, BrokenOff> {
        let slow_after_bytes = self.slow_after_bytes.unwrap_or(usize::MAX);
        let mut reports = Vec::new();
        for index in 0..CHANNELS {
            let limit = cut.map_or(usize::MAX, |cut| cut.arrive[index] + cut.in_flight);
            let mut wire = Vec::new();
            let channel = &mut self.sending[index];
            channel.begin(order);
            while wire.len() < limit {
                let bytes_per_s = (wire.len() >= slow_after_bytes).then_some(1_000_000);
                let pace = Pace { quantum_bytes: 20_000, bytes_per_s, cut: false };
                match channel.poll(&self.source, &self.log, pace).unwrap() {
                    Polled::Bytes { bytes, .. } => {
                        wire.extend_from_slice(bytes);
                        channel.written();
                    }
                    Polled::Marked(batch) => self.unacknowledged[index].sent(batch).unwrap(),
                    Polled::Done(report) => {
                        reports.push(report);
                        break;
                    }
                    Polled::Idle => unreachable!("an order was given"),
                }
            }
            let arrived = cut.map_or(wire.len(), |cut| cut.arrive[index].min(wire.len()));
            let marks = self.receive(index, &wire[..arrived]);
            for mark in marks.into_iter().take(cut.map_or(usize::MAX, |cut| cut.acknowledged)) {
                self.unacknowledged[index].applied(mark).unwrap();
            }
        }
        if cut.is_none() {
            return Ok(reports);
        }
        self.receiving.iter_mut().for_each(|channel| channel.reattach(&self.destination));
        Err(break_off(&self.source, &mut self.sending, &mut self.unacknowledged))
    }

    /// Brings the destination what has arrived, also if that is half a page, and gives the marks in it.
    fn receive(&mut self, index: usize, mut wire: &[u8]) -> Vec<u64> {
        let (channel, pages) = (&mut self.receiving[index], &self.destination);
        let mut marks = Vec::new();
        loop {
            let received = match channel.wants() {
                Wants::Bytes(count) => {
                    let Some((now, later)) = wire.split_at_checked(count) else { return marks };
                    wire = later;
                    channel.handle_bytes(pages, now).unwrap()
                }
                Wants::Pages { slot, pages: count } => {
                    let place = pages.view.pages(slot, count);
                    let now = wire.len().min(place.len());
                    place.copy_from(&wire[..now]);
                    if now < place.len() {
                        return marks;
                    }
                    wire = &wire[now..];
                    channel.handle_pages(pages).unwrap()
                }
                Wants::Nothing => return marks,
            };
            match received {
                Received::Mark(mark) => marks.push(mark),
                Received::Coming(pages) => {
                    let stands = pages.slot..pages.slot + pages.pages;
                    assert!(stands.into_iter().all(|slot| self.destination.table.entry(slot).is_none()), "too late");
                    self.coming[index].push(pages.frame);
                }
                Received::Nothing | Received::Ended(_) => {}
            }
        }
    }

    fn counts(&self) -> PageCounts {
        let add = |sum: PageCounts, channel: &SendingChannel| {
            let more = channel.counts();
            PageCounts {
                raw: sum.raw + more.raw,
                zero: sum.zero + more.zero,
                zstd: sum.zstd + more.zstd,
                untouched: sum.untouched + more.untouched,
                ..sum
            }
        };
        self.sending.iter().fold(PageCounts::default(), add)
    }

    fn ended(&mut self) -> (u64, u64) {
        let sent = self.run(FINAL, None).unwrap().into_iter().fold(0u64, |sum, report| match report {
            Report::Ended(share) => sum.wrapping_add(share),
            other => panic!("{other:?}"),
        });
        (sent, self.receiving.iter().fold(0, |sum, channel| sum.wrapping_add(channel.sum())))
    }

    fn differing(&self) -> Vec<u64> {
        let layout = self.source.view.layout();
        let (mut here, mut there) = ([0; PAGE_SIZE], [0; PAGE_SIZE]);
        let mut differing = Vec::new();
        for stripe in (0..layout.stripes()).map(|index| layout.stripe(index)) {
            for offset in 0..stripe.pages {
                self.source.view.copy_page(&stripe, offset, &mut here);
                self.destination.view.copy_page(&stripe, offset, &mut there);
                if here != there {
                    differing.push(stripe.first_frame + offset as u64);
                }
            }
        }
        differing
    }
}

/// Pages that are given back, after which some are written again.
fn given_back() -> impl Strategy<Value = Vec<(usize, usize)>> {
    prop::collection::vec((0..PAGES, prop_oneof![1usize..70, Just(512)]), 0..4)
}

fn writes() -> impl Strategy<Value = Vec<(usize, u64)>> {
    prop::collection::vec((0usize..7 * 256, any::<u64>()), 0..300)
}

fn cut() -> impl Strategy<Value = Cut> {
    let arrive = prop::array::uniform2(prop_oneof![0usize..200, 0usize..600_000]);
    (arrive, 0usize..100_000, 0usize..3).prop_map(|(arrive, in_flight, acknowledged)| Cut {
        arrive,
        in_flight,
        acknowledged,
    })
}

#[test]
fn what_the_pause_sends_over_a_slow_link_is_compressed() {
    for (link_bytes_per_s, compressed) in [(Some(10_000_000), 300), (Some(2_000_000_000), 0), (None, 0)] {
        let mut scene = Scene::new(Compression::Auto, None);
        (0..300).for_each(|page| scene.write(page, 1));
        scene.run(Order::Final { link_bytes_per_s }, None).unwrap();
        assert_eq!(scene.counts().zstd, compressed, "{link_bytes_per_s:?}");
    }
}

#[test]
fn over_a_slow_link_what_is_written_before_its_turn_is_sent_once() {
    for (bytes_per_s, again) in [(Some(10_000_000), 0), (None, 1)] {
        let mut scene = Scene::new(Compression::None, None);
        (0..512).for_each(|page| scene.write(page, (1 << 28) + 4 * page as u64 + 3));
        let pace = Pace { quantum_bytes: 20_000, bytes_per_s, cut: false };
        scene.sending[0].begin(Order::Round { first: true });
        let mut wire = Vec::new();
        loop {
            match scene.sending[0].poll(&scene.source, &scene.log, pace).unwrap() {
                Polled::Bytes { bytes, .. } => {
                    // The first pages of the stripe are under way, and the guest writes its last one.
                    let first = wire.is_empty();
                    wire.extend_from_slice(bytes);
                    scene.sending[0].written();
                    if first {
                        scene.write(511, 7);
                    }
                }
                Polled::Done(_) => break,
                _ => {}
            }
        }
        scene.receive(0, &wire);
        assert_eq!(scene.differing(), Vec::<u64>::new());
        scene.source.pending.take(1);
        scene.source.pending.take(3);
        assert_eq!(scene.harvest(), again, "{bytes_per_s:?}");
    }
}

#[test]
fn what_is_left_of_a_stripe_goes_as_it_does_over_a_slow_link_once_that_is_known() {
    let mut scene = Scene::new(Compression::Auto, Some(4 << 20));
    (0..512).for_each(|page| scene.write(page, 1 + 4 * page as u64));
    scene.sending[0].begin(Order::Round { first: true });
    let mut wire = Vec::new();
    loop {
        let slow = !wire.is_empty();
        let pace = Pace { quantum_bytes: 20_000, bytes_per_s: slow.then_some(10_000_000), cut: false };
        match scene.sending[0].poll(&scene.source, &scene.log, pace).unwrap() {
            Polled::Bytes { bytes, .. } => {
                wire.extend_from_slice(bytes);
                scene.sending[0].written();
                if !slow {
                    // Before its turn.
                    scene.write(511, 5);
                }
            }
            Polled::Done(_) => break,
            _ => {}
        }
    }
    assert_eq!(scene.counts().raw, 5, "of 512");
    assert!(wire.len() < 60_000, "{}", wire.len());
    scene.receive(0, &wire);
    assert_eq!(scene.differing(), Vec::<u64>::new());
    scene.source.pending.take(1);
    scene.source.pending.take(3);
    assert_eq!(scene.harvest(), 0, "the last page was sent once");
}

#[test]
fn bytes_that_may_wait_for_others_are_followed_by_some() {
    let rounds = [(Order::Round { first: true }, None), (Order::Round { first: true }, Some(3))];
    for (order, cut_after) in rounds.into_iter().chain([(Order::Final { link_bytes_per_s: None }, None)]) {
        let mut scene = Scene::new(Compression::None, None);
        // Too few for a mark before the end.
        (0..500).for_each(|page| scene.write(page, (1 << 28) + 4 * page as u64 + 3));
        scene.sending[0].begin(order);
        let mut waiting = Vec::new();
        loop {
            let cut = cut_after == Some(waiting.len());
            let pace = Pace { quantum_bytes: 128 << 10, bytes_per_s: None, cut };
            match scene.sending[0].poll(&scene.source, &scene.log, pace).unwrap() {
                Polled::Bytes { more, .. } => {
                    waiting.push(more);
                    scene.sending[0].written();
                }
                Polled::Done(_) => break,
                _ => {}
            }
        }
        assert!(waiting.len() > 3, "{order:?}");
        assert_eq!(waiting.pop(), Some(false), "{order:?}");
        assert!(waiting.into_iter().all(|more| more), "{order:?}");
    }
}

#[test]
fn the_first_pass_says_which_stripes_come_if_they_hold_something_all_over() {
    let far = REGIONS[1].0 / PAGE_SIZE as u64;
    for (written, zeros, announced) in [(512, 0, vec![far]), (512, 300, vec![]), (190, 0, vec![]), (0, 0, vec![])] {
        let mut scene = Scene::new(Compression::None, None);
        // The first stripe of each channel follows at once; a stripe that was never touched, or holds zeros, is not announced.
        (0..1024).for_each(|page| scene.write(page, 1));
        (1280..1280 + written).for_each(|page| scene.write(page, 1));
        (1280..1280 + zeros).for_each(|page| scene.write(page, 0));
        scene.run(Order::Round { first: true }, None).unwrap();
        assert_eq!(scene.coming, [vec![], announced.clone()], "{written} written, {zeros} with zeros");
        (0..PAGES).for_each(|page| scene.write(page, 3));
        scene.harvest();
        scene.run(Order::Round { first: false }, None).unwrap();
        assert_eq!(scene.coming, [vec![], announced], "memory is there by then");
    }
}

#[test]
fn what_was_given_back_is_not_read_and_sent_only_as_zeros_where_something_was_sent_before() {
    for in_the_pause in [false, true] {
        let mut scene = Scene::new(Compression::None, None);
        (0..300).for_each(|page| scene.write(page, 1));
        scene.run(Order::Round { first: true }, None).unwrap();
        scene.harvest();
        let before = scene.counts();
        scene.give_back(100, 400);
        // If one of them were read, this would arrive.
        for page in 100..500 {
            scene.source.view.write_page(page, &[7; PAGE_SIZE]);
        }
        scene.harvest();
        let order = if in_the_pause { FINAL } else { Order::Round { first: false } };
        scene.run(order, None).unwrap();
        let after = scene.counts();
        let left = (after.raw - before.raw, after.zero - before.zero, after.untouched - before.untouched);
        assert_eq!(left, (0, 200, 200), "in the pause: {in_the_pause}");
        let mut page = [1; PAGE_SIZE];
        for offset in 100..500 {
            scene.destination.view.copy_page(&scene.destination.view.layout().stripe(0), offset, &mut page);
            assert_eq!(page, [0; PAGE_SIZE]);
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(150))]

    #[test]
    fn invariant_4_whatever_breaks_what_arrives_is_what_was_last_sent(
        rounds in prop::collection::vec((writes(), given_back(), writes(), prop::option::of(cut())), 1..6),
        in_the_pause in prop::option::of(cut()), last_given_back in given_back(), last in writes(), zstd: bool,
        bases in prop::option::of(prop_oneof![Just(0u64), 0u64..200]),
    ) {
        let compression = if zstd { Compression::Zstd(1) } else { Compression::None };
        let mut scene = Scene::new(compression, bases.map(|pages| pages * PAGE_SIZE as u64));
        for (index, (writes, given_back, again, cut)) in rounds.iter().enumerate() {
            writes.iter().for_each(|&(page, value)| scene.write(page, value));
            given_back.iter().for_each(|&(page, count)| scene.give_back(page, count));
            again.iter().for_each(|&(page, value)| scene.write(page, value));
            let _ = scene.run(Order::Round { first: index == 0 }, cut.as_ref());
            scene.harvest();
        }
        if let Some(cut) = &in_the_pause {
            let _ = scene.run(FINAL, Some(cut));
        }
        last_given_back.iter().for_each(|&(page, count)| scene.give_back(page, count));
        last.iter().for_each(|&(page, value)| scene.write(page, value));
        scene.harvest();
        let (sent, applied) = scene.ended();
        prop_assert_eq!(scene.differing(), Vec::<u64>::new());
        prop_assert_eq!(sent, applied);
        let audit = audit::memory_against_table(&scene.source);
        prop_assert!(audit.starts_with("ok: "), "{}", audit);
    }

    #[test]
    fn no_more_is_sent_again_than_was_unacknowledged_or_written_since(first in writes(), since in writes(), cut in cut()) {
        let mut scene = Scene::new(Compression::None, None);
        first.iter().for_each(|&(page, value)| scene.write(page, value));
        scene.harvest();
        let broken = scene.run(Order::Round { first: true }, Some(&cut)).unwrap_err();
        since.iter().for_each(|&(page, value)| scene.write(page, value));
        let dirtied = scene.harvest();
        let again: u64 = scene.run(Order::Round { first: true }, None).unwrap().iter().map(|report| match report {
            Report::RoundSent { again, .. } => *again,
            other => panic!("{other:?}"),
        }).sum();
        prop_assert!(again - broken.anyway_pages <= broken.unacknowledged_pages + dirtied);
    }
}
