//! A small driver: lays requests out in guest memory, kicks, waits for interrupts.

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::path::PathBuf;
use std::rc::Rc;

use godwit_core::GuestMemory;
use godwit_core::bitmap::PageBits;
use virtio_queue::Queue;
use vm_memory::{Bytes, GuestAddress, MmapRegion};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::*;
use crate::devices::virtio::driver_ring::{DriverRing, INDIRECT, NEXT, RING_BYTES, WRITABLE, descriptor};
use crate::devices::virtio::{ActiveQueue, Interrupt};

const QUEUES: usize = 2;
const MEMORY_BYTES: usize = 16 << 20;
/// Each queue's rings lie here, and one after the other.
const RINGS: u64 = 0x1000;
/// Requests lie from here on.
const HEAP: u64 = 1 << 20;

/// A request to be laid out.
#[derive(Debug, Clone)]
pub(super) struct Op {
    pub(super) kind: u32,
    pub(super) sector: u64,
    /// What follows the header.
    pub(super) out: Vec<u8>,
    /// Room for data from the device.
    pub(super) data_bytes: usize,
    /// By how many bytes the data's address is crooked.
    pub(super) misaligned: usize,
    /// How long the pieces of the data are; the rest is one piece.
    pub(super) cuts: Vec<usize>,
    pub(super) queue: usize,
    pub(super) indirect: bool,
    pub(super) header_bytes: usize,
    /// The data lies there instead.
    pub(super) data_at: Option<u64>,
}

impl Default for Op {
    fn default() -> Self {
        Self {
            kind: 0,
            sector: 0,
            out: Vec::new(),
            data_bytes: 0,
            misaligned: 0,
            cuts: Vec::new(),
            queue: 0,
            indirect: false,
            header_bytes: 16,
            data_at: None,
        }
    }
}

impl Op {
    pub(super) fn read(sector: u64, data_bytes: usize) -> Self {
        Self { sector, data_bytes, ..Self::default() }
    }

    pub(super) fn write(sector: u64, data: &[u8]) -> Self {
        Self { kind: 1, sector, out: data.into(), ..Self::default() }
    }

    pub(super) fn flush() -> Self {
        Self { kind: 4, ..Self::default() }
    }
}

/// What the device has answered.
#[derive(Debug)]
pub(super) struct Answer {
    pub(super) status: u8,
    pub(super) used_bytes: u32,
    pub(super) data: Vec<u8>,
}

/// A request under way.
pub(super) struct Pending {
    queue: usize,
    head: u16,
    status_at: u64,
    data_at: u64,
    data_bytes: usize,
}

/// Ways to get a chain wrong.
#[derive(Clone, Copy)]
pub(super) enum Malformed {
    NoStatus,
    LeadsNowhere,
    WritableFirst,
}

/// A device with its driver.
pub(super) struct Rig {
    folder: Rc<tempfile::TempDir>,
    pub(super) read_only: bool,
    pub(super) flush: bool,
    pub(super) event_idx: bool,
    pub(super) page_cache: bool,
    pub(super) block: Arc<Block>,
    pub(super) interrupt: Arc<Interrupt>,
    pub(super) memory: GuestMemory,
    line: EventFd,
    kicks: Vec<EventFd>,
    rings: [DriverRing; QUEUES],
    /// By queue: the next descriptor that is free.
    descriptors: [Cell<u16>; QUEUES],
    used: RefCell<BTreeMap<(usize, u16), u32>>,
    heap: Cell<u64>,
}

impl Rig {
    pub(super) fn new(size: usize) -> Self {
        Self::with(size, |_| {})
    }

    pub(super) fn with(size: usize, set: impl FnOnce(&mut Self)) -> Self {
        Self::in_folder(tempfile::tempdir().unwrap(), size, set)
    }

    pub(super) fn in_folder(folder: tempfile::TempDir, size: usize, set: impl FnOnce(&mut Self)) -> Self {
        let folder = Rc::new(folder);
        fs::write(folder.path().join("disk"), vec![0; size]).unwrap();
        let memory = GuestMemory::from_ranges(&[(GuestAddress(0), MEMORY_BYTES)]).unwrap();
        let (interrupt, line) = interrupt();
        let block = open(&folder, false, true, Company::Nobody);
        let ring = |queue| DriverRing::new(&memory, RINGS + RING_BYTES * queue, QUEUE_SIZE);
        let mut rig = Self {
            folder,
            read_only: false,
            flush: true,
            event_idx: false,
            page_cache: false,
            block,
            interrupt,
            rings: [ring(0), ring(1)],
            memory,
            line,
            kicks: Vec::new(),
            descriptors: Default::default(),
            used: RefCell::default(),
            heap: Cell::new(HEAP),
        };
        set(&mut rig);
        rig.block.let_go();
        rig.block = open(&rig.folder, rig.read_only, rig.page_cache, Company::Nobody);
        rig.activate(None);
        rig.block.resume();
        rig
    }

    pub(super) fn path(&self) -> PathBuf {
        self.folder.path().join("disk")
    }

    fn activate(&mut self, states: Option<Vec<QueueState>>) {
        self.kicks = (0..QUEUES).map(|_| EventFd::new(EFD_NONBLOCK).unwrap()).collect();
        let queue = |index: usize| match &states {
            Some(states) => Queue::try_from(states[index]).unwrap(),
            None => self.rings[index].queue(self.event_idx),
        };
        let active = |index| Some(ActiveQueue { queue: queue(index), kick: self.kicks[index].try_clone().unwrap() });
        let features = self.block.features() & !(u64::from(!self.flush) << VIRTIO_BLK_F_FLUSH);
        let activation = Activation {
            memory: self.memory.clone(),
            features,
            queues: (0..QUEUES).map(active).collect(),
            interrupt: Arc::clone(&self.interrupt),
        };
        self.block.activate(activation).unwrap();
    }

    /// As a driver that begins anew.
    pub(super) fn reset_and_activate(&mut self) {
        self.block.reset();
        self.interrupt.reset();
        self.rings.iter().for_each(DriverRing::clear);
        self.descriptors = Default::default();
        self.activate(None);
        self.block.resume();
    }

    /// The same guest on another host: this rig's device is paused.
    pub(super) fn moved(&self) -> Rig {
        let (interrupt, line) = interrupt();
        let mut rig = Rig {
            folder: Rc::clone(&self.folder),
            block: open(&self.folder, self.read_only, self.page_cache, Company::Source),
            interrupt,
            memory: self.memory.clone(),
            line,
            kicks: Vec::new(),
            rings: self.rings.clone(),
            descriptors: self.descriptors.clone(),
            used: self.used.clone(),
            heap: self.heap.clone(),
            ..*self
        };
        rig.block.load(&self.block.save().unwrap()).unwrap();
        rig.activate(Some(self.block.queues()));
        rig
    }

    /// Carries a request out, which must succeed.
    pub(super) fn run(&self, op: Op) -> Answer {
        let shown = format!("{op:?}");
        let answer = self.answer(op);
        assert_eq!(answer.status, 0, "{shown:.200}");
        answer
    }

    /// Carries a request out.
    pub(super) fn answer(&self, op: Op) -> Answer {
        self.finish(self.submit(op))
    }

    /// The pages that the request's data will lie in, if it is the next one.
    pub(super) fn data_pages(&self, op: &Op) -> Vec<u64> {
        let first = (self.heap.get() + 4096 + op.misaligned as u64) / 4096;
        (first..=first + (op.data_bytes as u64 - 1) / 4096).collect()
    }

    pub(super) fn submit(&self, op: Op) -> Pending {
        let base = self.heap.get();
        let mut header = Vec::from(op.kind.to_le_bytes());
        header.extend([0; 4]);
        header.extend(op.sector.to_le_bytes());
        let status_at = base + 1024;
        let data_at = op.data_at.unwrap_or(base + 4096 + op.misaligned as u64);
        let data_bytes = op.out.len().max(op.data_bytes);
        let pages = (8192 + op.misaligned + data_bytes) as u64 / 4096 + 1;
        let next = base + pages * 4096;
        self.heap.set(if next + (2 << 20) > MEMORY_BYTES as u64 { HEAP } else { next });
        let write = |at: u64, bytes: &[u8]| self.memory.write_slice(bytes, GuestAddress(at)).unwrap();
        write(base, &header[..op.header_bytes]);
        write(status_at, &[0xee]);
        if op.data_at.is_none() {
            write(data_at, &op.out);
        }
        let mut chain = vec![(base, op.header_bytes as u32, 0)];
        let flags = if op.out.is_empty() { WRITABLE } else { 0 };
        let (mut at, mut left) = (data_at, data_bytes);
        for cut in op.cuts.iter().copied().chain([usize::MAX]) {
            let length = cut.min(left);
            if length > 0 {
                chain.push((at, length as u32, flags));
            }
            (at, left) = (at + length as u64, left - length);
        }
        chain.push((status_at, 1, WRITABLE));
        let head = match op.indirect {
            false => self.put(op.queue, &chain),
            true => {
                let table = base + 2048;
                write(table, descriptors(&chain, 0).as_flattened());
                self.put(op.queue, &[(table, 16 * chain.len() as u32, INDIRECT)])
            }
        };
        Pending { queue: op.queue, head, status_at, data_at, data_bytes: op.data_bytes }
    }

    pub(super) fn submit_malformed(&self, how: Malformed) {
        match how {
            Malformed::NoStatus => self.put(0, &[(HEAP, 16, 0)]),
            Malformed::LeadsNowhere => self.put(0, &[(HEAP, 16, 0), (HEAP, 16, WRITABLE), (0, 15, INDIRECT)]),
            Malformed::WritableFirst => self.put(0, &[(HEAP, 16, WRITABLE), (HEAP, 16, 0), (HEAP, 1, WRITABLE)]),
        };
    }

    /// Makes these descriptors available as they are; `low`: where memory is.
    pub(super) fn submit_raw(&self, raw: &[(u64, u32, u16, u16)], low: bool) {
        let raw = raw.iter().map(|&(address, length, flags, next)| {
            let (address, next) = if low { (HEAP + address % (8 << 20), next % 20) } else { (address, next) };
            descriptor(address, if low { length % (1 << 16) } else { length }, flags, next)
        });
        self.rings[0].describe(0, &raw.collect::<Vec<_>>());
        self.make_available(0, 0);
    }

    /// Waits for an answer.
    pub(super) fn finish(&self, pending: Pending) -> Answer {
        let key = (pending.queue, pending.head);
        let until = soon();
        let used_bytes = loop {
            self.collect();
            if let Some(used_bytes) = self.used.borrow_mut().remove(&key) {
                break used_bytes;
            }
            // Only an interrupt makes a driver look.
            while self.line.read().is_err() {
                assert!(Instant::now() < until, "no answer");
                std::thread::sleep(Duration::from_micros(50));
            }
        };
        let mut data = vec![0; pending.data_bytes];
        let _ = self.memory.read_slice(&mut data, GuestAddress(pending.data_at));
        Answer { status: self.memory.read_obj(GuestAddress(pending.status_at)).unwrap(), used_bytes, data }
    }

    pub(super) fn wait_until(&self, condition: impl Fn(&Self) -> bool) {
        let until = soon();
        while !condition(self) {
            assert!(Instant::now() < until, "it does not come");
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    pub(super) fn forget_marks(&self) {
        self.region(|bitmap, _| bitmap.clear());
    }

    pub(super) fn is_marked(&self, page: u64) -> bool {
        self.region(|bitmap, _| bitmap.dirty_at(page as usize * 4096))
    }

    /// How many pages of used rings are marked: the driver never writes those.
    pub(super) fn device_marks(&self) -> usize {
        self.rings.iter().filter(|ring| self.is_marked(ring.used() / 4096)).count()
    }

    fn region<T>(&self, look: impl FnOnce(&PageBits, usize) -> T) -> T {
        let region = self.memory.iter().next().unwrap();
        let mapping: &MmapRegion<PageBits> = region;
        look(mapping.bitmap(), region.len() as usize)
    }

    fn put(&self, queue: usize, chain: &[(u64, u32, u16)]) -> u16 {
        let first = &self.descriptors[queue];
        if usize::from(first.get()) + chain.len() > QUEUE_SIZE.into() {
            first.set(0);
        }
        let head = first.get();
        self.rings[queue].describe(head, &descriptors(chain, head));
        first.set(head + chain.len() as u16);
        self.make_available(queue, head);
        head
    }

    fn make_available(&self, queue: usize, head: u16) {
        self.rings[queue].make_available(head);
        self.kicks[queue].write(1).unwrap();
    }

    fn collect(&self) {
        for (queue, ring) in self.rings.iter().enumerate() {
            while let Some((head, length)) = ring.take_used() {
                self.used.borrow_mut().insert((queue, head), length);
            }
        }
    }
}

/// A chain of descriptors that lie one after the other.
fn descriptors(chain: &[(u64, u32, u16)], first: u16) -> Vec<[u8; 16]> {
    let linked = (first + 1..).zip(chain).map(|(next, &(address, length, flags))| {
        let last = usize::from(next - first) == chain.len();
        descriptor(address, length, if last { flags } else { flags | NEXT }, next)
    });
    linked.collect()
}

fn interrupt() -> (Arc<Interrupt>, EventFd) {
    let line = EventFd::new(EFD_NONBLOCK).unwrap();
    (Arc::new(Interrupt::new(line.try_clone().unwrap())), line)
}

fn open(folder: &tempfile::TempDir, readonly: bool, page_cache: bool, company: Company) -> Arc<Block> {
    let config = DiskConfig { id: "root".into(), path: folder.path().join("disk"), readonly };
    super::open(&config, CacheMode::of(page_cache), QUEUES as u16, company).unwrap()
}
