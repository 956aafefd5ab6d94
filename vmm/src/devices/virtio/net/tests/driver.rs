//! A small driver: lays frames out in guest memory, kicks, looks at what has been used.

use std::cell::Cell;

use godwit_core::GuestMemory;
use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_queue::Queue;
use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::network::open_soon;
use super::*;
use crate::devices::virtio::driver_ring::{DriverRing, NEXT, RING_BYTES, WRITABLE, descriptor};
use crate::devices::virtio::net::tap::HEADER_BYTES;

pub(super) const MAC: MacAddress = MacAddress([0x52, 0x54, 0, 0, 0, 0x11]);
pub(super) const RECEIVE: usize = 0;
pub(super) const TRANSMIT: usize = 1;
pub(super) const CONTROL: usize = 2;

const MEMORY_BYTES: usize = 96 << 20;
const RINGS: u64 = 0x1000;
/// Each queue's buffers lie here, 64 KiB and a bit for each descriptor.
const BUFFERS: u64 = 1 << 20;
const BUFFER_BYTES: u64 = 0x1_1000;

/// All that the device can do.
pub(super) fn every_feature(net: &Net) -> u64 {
    net.features() | 1 << VIRTIO_F_VERSION_1
}

/// A device with its driver.
pub(super) struct Rig {
    pub(super) net: Arc<Net>,
    pub(super) memory: GuestMemory,
    pub(super) interrupt: Arc<Interrupt>,
    line: EventFd,
    kicks: Vec<EventFd>,
    features: u64,
    event_idx: bool,
    pub(super) rings: [DriverRing; 3],
    /// By queue: descriptors that have been laid out.
    laid_out: [Cell<u16>; 3],
}

pub(super) fn config(tap: &str) -> NetConfig {
    NetConfig { id: "net0".into(), tap: tap.into(), mac: MAC.to_string() }
}

impl Rig {
    /// An open device on this tap, whose driver accepts everything.
    pub(super) fn new(tap: &str) -> Self {
        Self::with(tap, |features| features, true)
    }

    pub(super) fn with(tap: &str, choose: impl Fn(u64) -> u64, event_idx: bool) -> Self {
        let net = open_soon(tap, 0);
        let memory = GuestMemory::from_ranges(&[(GuestAddress(0), MEMORY_BYTES)]).unwrap();
        let features = choose(every_feature(&net));
        let rig = Self::around(net, memory, features, event_idx);
        rig.activate(None);
        rig.net.resume();
        rig
    }

    fn around(net: Arc<Net>, memory: GuestMemory, features: u64, event_idx: bool) -> Self {
        let line = EventFd::new(EFD_NONBLOCK).unwrap();
        let ring = |queue: usize| DriverRing::new(&memory, RINGS + RING_BYTES * queue as u64, QUEUE_SIZES[queue]);
        Self {
            net,
            rings: [ring(RECEIVE), ring(TRANSMIT), ring(CONTROL)],
            memory,
            interrupt: Arc::new(Interrupt::new(line.try_clone().unwrap())),
            line,
            kicks: (0..3).map(|_| EventFd::new(EFD_NONBLOCK).unwrap()).collect(),
            features,
            event_idx,
            laid_out: Default::default(),
        }
    }

    /// The same guest on another host, its device closed. This rig's device has been paused.
    pub(super) fn moved(&self, tap: &str) -> Self {
        self.moved_to(open_soon(tap, self.features))
    }

    /// The same behind an interface that has been opened before.
    pub(super) fn moved_to(&self, net: Arc<Net>) -> Self {
        let rig = Self {
            rings: self.rings.clone(),
            laid_out: self.laid_out.clone(),
            ..Self::around(net, self.memory.clone(), self.features, self.event_idx)
        };
        rig.net.load(&self.net.save().unwrap()).unwrap();
        rig.activate(Some(self.net.queues()));
        rig
    }

    fn activate(&self, states: Option<Vec<QueueState>>) {
        let queue = |index: usize| match &states {
            Some(states) => Queue::try_from(states[index]).unwrap(),
            None => self.rings[index].queue(self.event_idx),
        };
        let active = |index: usize| ActiveQueue { queue: queue(index), kick: self.kicks[index].try_clone().unwrap() };
        let activation = Activation {
            memory: self.memory.clone(),
            features: self.features,
            queues: (0..3).map(|index| Some(active(index))).collect(),
            interrupt: Arc::clone(&self.interrupt),
        };
        self.net.activate(activation).unwrap();
    }

    /// Makes buffers of this length available for what arrives.
    pub(super) fn post(&self, count: usize, length: u32) {
        for _ in 0..count {
            let (index, at) = self.next(RECEIVE);
            self.describe(RECEIVE, index, at, length, WRITABLE, 0);
            self.make_available(RECEIVE, index);
        }
        self.kick(RECEIVE);
    }

    /// The next frame with its header that has arrived, if one does soon.
    pub(super) fn receive_with_header(&self, limit: Duration) -> Option<Vec<u8>> {
        let (index, length) = self.wait_used(RECEIVE, limit)?;
        let read = |index: u16, length: u32| {
            let mut part = vec![0; length as usize];
            self.memory.read_slice(&mut part, GuestAddress(buffer(RECEIVE, index))).unwrap();
            part
        };
        let mut frame = read(index, length);
        let buffers = u16::from_le_bytes([frame[10], frame[11]]);
        for _ in 1..buffers {
            // All of a frame appears at once.
            let (index, length) = self.wait_used(RECEIVE, Duration::ZERO).expect("the rest of a frame");
            frame.extend(read(index, length));
        }
        Some(frame)
    }

    /// The next frame, if there is one soon.
    pub(super) fn receive(&self, limit: Duration) -> Option<Vec<u8>> {
        Some(self.receive_with_header(limit)?.split_off(HEADER_BYTES))
    }

    /// Sends a frame and waits until the device is done with it.
    pub(super) fn send(&self, frame: &[u8]) {
        self.send_with_header(&[&[0; HEADER_BYTES][..], frame].concat(), &[]);
    }

    /// The same with a header of its own, cut up at these places.
    pub(super) fn send_with_header(&self, frame: &[u8], cuts: &[usize]) {
        self.offer(frame, cuts);
        assert!(self.wait_used(TRANSMIT, LIMIT).is_some(), "the device takes a frame");
    }

    /// Makes a frame available and kicks.
    pub(super) fn offer(&self, frame: &[u8], cuts: &[usize]) {
        let mut pieces = Vec::new();
        let mut rest = frame;
        for cut in cuts {
            let (first, last) = rest.split_at((*cut).min(rest.len()));
            pieces.push(first);
            rest = last;
        }
        pieces.push(rest);
        let mut head = None;
        for (number, piece) in pieces.iter().enumerate() {
            let (index, at) = self.next(TRANSMIT);
            self.memory.write_slice(piece, GuestAddress(at)).unwrap();
            let more = number + 1 < pieces.len();
            let next = (index + 1) % QUEUE_SIZES[TRANSMIT];
            self.describe(TRANSMIT, index, at, piece.len() as u32, if more { NEXT } else { 0 }, next);
            head.get_or_insert(index);
        }
        self.make_available(TRANSMIT, head.unwrap());
        self.kick(TRANSMIT);
    }

    /// Gives a command and waits for its answer.
    pub(super) fn command(&self, bytes: &[u8]) -> u8 {
        let (index, at) = self.next(CONTROL);
        let (answer, answer_at) = self.next(CONTROL);
        self.memory.write_slice(bytes, GuestAddress(at)).unwrap();
        self.memory.write_obj(0xffu8, GuestAddress(answer_at)).unwrap();
        self.describe(CONTROL, index, at, bytes.len() as u32, NEXT, answer);
        self.describe(CONTROL, answer, answer_at, 1, WRITABLE, 0);
        self.make_available(CONTROL, index);
        self.kick(CONTROL);
        assert!(self.wait_used(CONTROL, LIMIT).is_some(), "the device answers");
        self.memory.read_obj(GuestAddress(answer_at)).unwrap()
    }

    pub(super) fn status(&self) -> u16 {
        let mut status = [0; 2];
        self.net.read_config(6, &mut status);
        u16::from_le_bytes(status)
    }

    /// Whether the device has interrupted since the last call, if it does soon.
    pub(super) fn interrupted(&self, limit: Duration) -> bool {
        let until = Instant::now() + limit;
        while Instant::now() <= until {
            if self.line.read().is_ok() {
                return true;
            }
            std::thread::sleep(Duration::from_micros(200));
        }
        false
    }

    /// A free descriptor and its buffer.
    pub(super) fn next(&self, queue: usize) -> (u16, u64) {
        let index = self.laid_out[queue].get() % QUEUE_SIZES[queue];
        self.laid_out[queue].set(self.laid_out[queue].get().wrapping_add(1));
        (index, buffer(queue, index))
    }

    pub(super) fn describe(&self, queue: usize, index: u16, at: u64, length: u32, flags: u16, next: u16) {
        self.rings[queue].describe(index, &[descriptor(at, length, flags, next)]);
    }

    pub(super) fn make_available(&self, queue: usize, head: u16) {
        self.rings[queue].make_available(head);
    }

    pub(super) fn kick(&self, queue: usize) {
        self.kicks[queue].write(1).unwrap();
    }

    /// The next chain that has been used: its head, and how much was written.
    pub(super) fn wait_used(&self, queue: usize, limit: Duration) -> Option<(u16, u32)> {
        let until = Instant::now() + limit;
        loop {
            let used = self.rings[queue].take_used();
            if used.is_some() || Instant::now() > until {
                return used;
            }
            std::thread::sleep(Duration::from_micros(200));
        }
    }
}

/// Where a descriptor's buffer lies.
pub(super) fn buffer(queue: usize, index: u16) -> u64 {
    BUFFERS + (queue as u64 * 256 + u64::from(index)) * BUFFER_BYTES
}
