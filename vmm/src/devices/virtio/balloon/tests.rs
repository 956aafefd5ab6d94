//! The balloon with a driver that is played: what is given back, what is not, and drivers that put nonsense into the queues.

#![allow(clippy::single_range_in_vec_init, reason = "lists of ranges of pages")]

use std::time::Duration;

use godwit_core::GuestMemory;
use godwit_core::bitmap::PageBits;
use proptest::prelude::*;
use virtio_queue::Queue;
use vm_memory::bitmap::Bitmap;
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, MmapRegion};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::*;
use crate::config::MemoryBacking;
use crate::devices::virtio::driver_ring::{DriverRing, INDIRECT, NEXT, RING_BYTES, WRITABLE, descriptor};
use crate::devices::virtio::{ActiveQueue, Interrupt};
use crate::memory::guest_memory;

const INFLATE: usize = 0;
const DEFLATE: usize = 1;
/// As Linux counts, and as the specification does.
const REPORTS: [usize; 2] = [2, 4];

const MEMORY_BYTES: u64 = 64 << 20;
const PAGES: u64 = MEMORY_BYTES / 4096;
const RINGS: u64 = 1 << 20;
/// Where lists of pages lie.
const LIST: u64 = 2 << 20;
/// Where the pages begin that nobody needs; each holds its number in its first eight bytes, and is not dirty.
const SPARE: u64 = 4 << 20;
const SPARE_PAGE: u64 = SPARE / 4096;

/// How long anything here may take.
const LIMIT: Duration = Duration::from_secs(5);

/// A balloon with its driver.
struct Rig {
    balloon: Balloon,
    memory: GuestMemory,
    interrupt: Arc<Interrupt>,
    line: EventFd,
    kicks: Vec<EventFd>,
    rings: Vec<DriverRing>,
}

impl Rig {
    /// An open device.
    fn new(backing: MemoryBacking) -> Self {
        let memory = guest_memory(MEMORY_BYTES, backing, false).unwrap();
        for page in SPARE_PAGE..PAGES {
            memory.write_obj(page, GuestAddress(page * 4096)).unwrap();
        }
        let rings = (0..5).map(|queue| DriverRing::new(&memory, RINGS + RING_BYTES * queue, 128)).collect();
        let rig = Self::around(memory, rings);
        rig.activate(None);
        rig.balloon.resume();
        rig.bitmap().clear();
        rig
    }

    fn around(memory: GuestMemory, rings: Vec<DriverRing>) -> Self {
        let line = EventFd::new(EFD_NONBLOCK).unwrap();
        Self {
            balloon: Balloon::new(BalloonConfig::default()),
            memory,
            interrupt: Arc::new(Interrupt::new(line.try_clone().unwrap())),
            line,
            kicks: (0..5).map(|_| EventFd::new(EFD_NONBLOCK).unwrap()).collect(),
            rings,
        }
    }

    /// The same guest on another host, its device closed. This rig's device has been paused.
    fn moved(&self) -> Self {
        let rig = Self::around(self.memory.clone(), self.rings.clone());
        rig.balloon.load(&self.balloon.save().unwrap()).unwrap();
        rig.activate(Some(self.balloon.queues()));
        rig
    }

    fn activate(&self, states: Option<Vec<QueueState>>) {
        let queue = |index: usize| match &states {
            Some(states) => Queue::try_from(states[index]).unwrap(),
            None => self.rings[index].queue(true),
        };
        let active = |index: usize| ActiveQueue { queue: queue(index), kick: self.kicks[index].try_clone().unwrap() };
        let activation = Activation {
            memory: self.memory.clone(),
            features: self.balloon.features(),
            queues: (0..5).map(|index| Some(active(index))).collect(),
            interrupt: Arc::clone(&self.interrupt),
        };
        self.balloon.activate(activation).unwrap();
    }

    fn bitmap(&self) -> &PageBits {
        let mapping: &MmapRegion<PageBits> = self.memory.iter().next().unwrap();
        mapping.bitmap()
    }

    /// Makes a chain available and kicks.
    fn offer(&self, queue: usize, descriptors: &[[u8; 16]]) {
        self.rings[queue].describe(0, descriptors);
        self.rings[queue].make_available(0);
        self.kicks[queue].write(1).unwrap();
    }

    /// Reports ranges of bytes as free.
    fn report(&self, queue: usize, ranges: &[(u64, u32)]) {
        let last = ranges.len() - 1;
        let describe = |(index, &(start, length)): (usize, &(u64, u32))| {
            let flags = if index < last { WRITABLE | NEXT } else { WRITABLE };
            descriptor(start, length, flags, index as u16 + 1)
        };
        self.offer(queue, &ranges.iter().enumerate().map(describe).collect::<Vec<_>>());
    }

    /// Puts a list of pages into a queue, in pieces of that many bytes.
    fn list(&self, queue: usize, pages: &[u32], piece: usize) {
        let bytes: Vec<u8> = pages.iter().flat_map(|page| page.to_le_bytes()).collect();
        self.memory.write_slice(&bytes, GuestAddress(LIST)).unwrap();
        let pieces = bytes.len().div_ceil(piece);
        let describe = |index: usize| {
            let at = index * piece;
            let flags = if index + 1 < pieces { NEXT } else { 0 };
            descriptor(LIST + at as u64, piece.min(bytes.len() - at) as u32, flags, index as u16 + 1)
        };
        self.offer(queue, &(0..pieces).map(describe).collect::<Vec<_>>());
    }

    /// Waits until the device has used the chain, of which it says that nothing was written.
    fn wait_used(&self, queue: usize) {
        let until = Instant::now() + LIMIT;
        loop {
            if let Some(used) = self.rings[queue].take_used() {
                return assert_eq!(used, (0, 0));
            }
            assert!(Instant::now() < until, "not used in time");
            let _ = self.line.read();
            std::thread::sleep(Duration::from_micros(100));
        }
    }

    /// Whether the device breaks.
    fn breaks(&self) -> bool {
        let until = Instant::now() + LIMIT;
        while !self.interrupt.is_broken() && Instant::now() < until {
            std::thread::sleep(Duration::from_micros(100));
        }
        self.interrupt.is_broken()
    }

    /// The spare pages that are gone, all of which are dirty.
    fn gone(&self) -> Vec<u64> {
        let holds = |page: &u64| self.memory.read_obj::<u64>(GuestAddress(page * 4096)).unwrap();
        let (gone, there): (Vec<_>, Vec<_>) = (SPARE_PAGE..PAGES).partition(|page| holds(page) == 0);
        assert!(there.iter().all(|page| holds(page) == *page), "no page is changed otherwise");
        let dirty = |page: &u64| self.bitmap().dirty_at((page * 4096) as usize);
        assert!(gone.iter().all(dirty), "what is gone counts as written");
        assert!(!there.iter().any(dirty), "and nothing else");
        gone
    }
}

fn pages(ranges: &[std::ops::Range<u64>]) -> Vec<u64> {
    ranges.iter().cloned().flatten().map(|page| SPARE_PAGE + page).collect()
}

#[test]
fn reported_pages_are_gone_before_the_buffer_is_used() {
    for backing in [MemoryBacking::Private, MemoryBacking::Memfd] {
        for queue in REPORTS {
            let rig = Rig::new(backing);
            rig.report(queue, &[(SPARE, 4 << 20), (SPARE + (8 << 20), 4096)]);
            rig.wait_used(queue);
            assert_eq!(rig.gone(), pages(&[0..1024, 2048..2049]), "{backing:?}");
            assert!(!rig.interrupt.is_broken());
        }
    }
}

#[test]
fn only_whole_pages_go() {
    let rig = Rig::new(MemoryBacking::Private);
    let ranges = [(SPARE + 1, 8192), (SPARE + 0x5000, 4095), (SPARE + 0x8fff, 2), (SPARE + 0xa000 - 8, 4096 + 16)];
    rig.report(2, &ranges);
    rig.wait_used(2);
    assert_eq!(rig.gone(), pages(&[1..2, 10..11]));
}

#[test]
fn what_only_the_device_may_read_is_no_report() {
    let rig = Rig::new(MemoryBacking::Private);
    rig.offer(2, &[descriptor(SPARE, 4096, 0, 0)]);
    rig.wait_used(2);
    assert_eq!(rig.gone(), pages(&[]));
}

#[test]
fn pages_given_away_are_gone_and_can_be_taken_back() {
    let list: Vec<u32> = pages(&[7..300, 5..6, 900..901]).into_iter().map(|page| page as u32).collect();
    // The pieces of a list end anywhere.
    for piece in [4096, 4 * 295, 97, 10] {
        let rig = Rig::new(MemoryBacking::Memfd);
        rig.list(INFLATE, &list, piece.max(list.len() * 4 / 120));
        rig.wait_used(INFLATE);
        assert_eq!(rig.gone(), pages(&[5..6, 7..300, 900..901]));
        rig.list(DEFLATE, &list, 4096);
        rig.wait_used(DEFLATE);
        let taken_back = GuestAddress(SPARE + 7 * 4096);
        rig.memory.write_obj(SPARE_PAGE + 7, taken_back).unwrap();
        assert_eq!(rig.memory.read_obj::<u64>(taken_back).unwrap(), SPARE_PAGE + 7);
    }
}

#[test]
fn a_closed_device_does_nothing_and_the_next_one_goes_on() {
    let rig = Rig::new(MemoryBacking::Private);
    rig.report(2, &[(SPARE, 4096)]);
    rig.wait_used(2);
    rig.balloon.pause(Instant::now()).unwrap();
    rig.report(2, &[(SPARE + 4096, 4096)]);
    rig.list(INFLATE, &[SPARE_PAGE as u32 + 2], 4);
    std::thread::sleep(Duration::from_millis(20));
    assert_eq!(rig.gone(), pages(&[0..1]));
    // The move fails: the source goes on.
    let moved = rig.moved();
    rig.balloon.resume();
    rig.wait_used(2);
    rig.wait_used(INFLATE);
    assert_eq!(rig.gone(), pages(&[0..3]));
    // What the destination has loaded it does again.
    rig.balloon.pause(Instant::now()).unwrap();
    moved.memory.write_obj(SPARE_PAGE + 1, GuestAddress(SPARE + 4096)).unwrap();
    moved.balloon.resume();
    moved.kicks[2].write(1).unwrap();
    // Both devices have one memory here, in which the source has already said that the chain is used: only the page tells.
    let until = Instant::now() + LIMIT;
    while moved.memory.read_obj::<u64>(GuestAddress(SPARE + 4096)).unwrap() != 0 {
        assert!(Instant::now() < until, "the destination gives the page back");
        std::thread::sleep(Duration::from_micros(100));
    }
}

#[test]
fn a_pause_waits_for_no_more_than_a_piece() {
    let rig = Rig::new(MemoryBacking::Private);
    // As much as a chain can hold: all spare memory, over and over.
    let all = (SPARE, (MEMORY_BYTES - SPARE) as u32);
    rig.report(2, &[all; 68]);
    let until = Instant::now() + LIMIT;
    while rig.memory.read_obj::<u64>(GuestAddress(SPARE)).unwrap() != 0 {
        assert!(Instant::now() < until, "it begins");
    }
    rig.balloon.pause(Instant::now()).unwrap();
    let states = rig.balloon.queues();
    let used: u16 = rig.memory.read_obj(GuestAddress(rig.rings[2].used() + 2)).unwrap();
    // Either all of it was quicker, or none of it is used.
    assert_eq!((states[2].next_avail, states[2].next_used), (used, used));
    rig.balloon.resume();
    rig.wait_used(2);
    assert_eq!(rig.gone(), pages(&[0..PAGES - SPARE_PAGE]));
}

#[test]
fn a_reset_takes_the_queues_away() {
    let rig = Rig::new(MemoryBacking::Private);
    rig.report(2, &[(SPARE, 4096)]);
    rig.wait_used(2);
    rig.balloon.reset();
    assert!(rig.balloon.queues().is_empty());
    rig.report(2, &[(SPARE + 4096, 4096)]);
    std::thread::sleep(Duration::from_millis(20));
    assert_eq!(rig.gone(), pages(&[0..1]));
}

#[test]
fn without_reporting_there_is_no_queue_for_it() {
    let plain = Balloon::new(BalloonConfig { free_page_reporting: false });
    assert_eq!((plain.features(), plain.queue_max_sizes().len()), (0, 2));
    let reporting = Balloon::new(BalloonConfig::default());
    assert_eq!((reporting.features(), reporting.queue_max_sizes().len()), (1 << 5, 5));
}

#[test]
fn what_is_not_ram_breaks_the_device() {
    let cases: [(&str, usize, Vec<[u8; 16]>); 6] = [
        ("reported from outside", 2, vec![descriptor(1 << 40, 4096, WRITABLE, 0)]),
        ("reported beyond the end", 2, vec![descriptor(MEMORY_BYTES - 4096, 8192, WRITABLE, 0)]),
        ("reported around the end", 4, vec![descriptor(u64::MAX - 4095, 4096, WRITABLE, 0)]),
        ("a list outside", INFLATE, vec![descriptor(1 << 40, 4, 0, 0)]),
        ("the first page after the end", INFLATE, vec![descriptor(LIST, 4, 0, 0)]),
        ("the last page of all", INFLATE, vec![descriptor(LIST + 4, 4, 0, 0)]),
    ];
    for (what, queue, descriptors) in cases {
        let rig = Rig::new(MemoryBacking::Private);
        rig.memory.write_obj([PAGES as u32, u32::MAX], GuestAddress(LIST)).unwrap();
        rig.bitmap().clear();
        rig.offer(queue, &descriptors);
        assert!(rig.breaks(), "{what}");
        // It does nothing more, and can be paused and reset all the same.
        rig.report(3, &[(SPARE, 4096)]);
        rig.balloon.pause(Instant::now()).unwrap();
        rig.balloon.resume();
        std::thread::sleep(Duration::from_millis(5));
        assert_eq!(rig.gone(), pages(&[]), "{what}");
        rig.balloon.reset();
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn any_descriptors_are_survived(
        descriptors in prop::collection::vec((
            prop_oneof![SPARE..MEMORY_BYTES, any::<u64>(), Just(LIST)],
            prop_oneof![0..0x5000u32, any::<u32>()],
            prop_oneof![Just(WRITABLE | NEXT), Just(NEXT), Just(INDIRECT), 0..8u16],
            0..10u16,
        ), 1..8),
        numbers in prop::collection::vec(prop_oneof![SPARE_PAGE as u32..PAGES as u32, any::<u32>()], 64),
        queue in 0..5usize, head in 0..8u16,
    ) {
        let rig = Rig::new(MemoryBacking::Private);
        let bytes: Vec<u8> = numbers.iter().flat_map(|number| number.to_le_bytes()).collect();
        rig.memory.write_slice(&bytes, GuestAddress(LIST)).unwrap();
        rig.bitmap().clear();
        let chain: Vec<_> = descriptors.iter().map(|&(at, length, flags, next)| descriptor(at, length, flags, next)).collect();
        rig.rings[queue].describe(0, &chain);
        rig.rings[queue].make_available(head);
        rig.kicks[queue].write(1).unwrap();
        std::thread::sleep(Duration::from_millis(1));
        rig.balloon.pause(Instant::now()).unwrap();
        prop_assert_eq!(rig.balloon.queues().len(), 5);
        rig.gone();
    }

    #[test]
    fn exactly_what_is_named_goes(
        ranges in prop::collection::vec((0..PAGES - SPARE_PAGE, 1..700u64), 1..20), inflate: bool,
    ) {
        let rig = Rig::new(MemoryBacking::Memfd);
        let ranges: Vec<_> = ranges
            .into_iter()
            .map(|(first, count)| first..(first + count).min(PAGES - SPARE_PAGE))
            .collect();
        let mut expected = pages(&ranges);
        let queue = if inflate {
            let list: Vec<_> = expected.iter().map(|page| *page as u32).collect();
            rig.list(INFLATE, &list, 2000);
            INFLATE
        } else {
            let bytes = |range: &std::ops::Range<u64>| {
                (SPARE + range.start * 4096, (range.end - range.start) as u32 * 4096)
            };
            rig.report(2, &ranges.iter().map(bytes).collect::<Vec<_>>());
            2
        };
        rig.wait_used(queue);
        expected.sort_unstable();
        expected.dedup();
        prop_assert_eq!(rig.gone(), expected);
    }
}
