//! A driver's side of a split virtqueue (virtio 1.2, section 2.7), for tests of devices.

use std::cell::Cell;
use std::sync::atomic::{Ordering, fence};

use godwit_core::GuestMemory;
use virtio_queue::{Queue, QueueT};
use vm_memory::{Bytes, GuestAddress};

/// Flags of a descriptor.
pub(crate) const NEXT: u16 = 1;
pub(crate) const WRITABLE: u16 = 2;
pub(crate) const INDIRECT: u16 = 4;

/// How much of guest memory the rings of a queue take up: of at most 256 descriptors, each ring in a page of its own.
pub(crate) const RING_BYTES: u64 = 0x4000;
const AVAILABLE: u64 = 0x2000;
const USED: u64 = 0x3000;

/// The rings of a queue in guest memory, and how far the driver has come in them.
#[derive(Clone)]
pub(crate) struct DriverRing {
    memory: GuestMemory,
    at: u64,
    size: u16,
    /// Chains made available, and chains seen used.
    available: Cell<u16>,
    seen: Cell<u16>,
}

impl DriverRing {
    /// Rings at this address, which nobody has used yet.
    pub(crate) fn new(memory: &GuestMemory, at: u64, size: u16) -> Self {
        Self { memory: memory.clone(), at, size, available: Cell::default(), seen: Cell::default() }
    }

    /// The same for the device, at the beginning.
    pub(crate) fn queue(&self, event_idx: bool) -> Queue {
        let mut queue = Queue::new(self.size).unwrap();
        queue.set_size(self.size);
        queue.set_event_idx(event_idx);
        queue.try_set_desc_table_address(self.descriptor(0)).unwrap();
        queue.try_set_avail_ring_address(GuestAddress(self.at + AVAILABLE)).unwrap();
        queue.try_set_used_ring_address(GuestAddress(self.used())).unwrap();
        queue.set_ready(true);
        queue
    }

    /// Begins anew, with empty rings.
    pub(crate) fn clear(&self) {
        self.memory.write_slice(&[0; RING_BYTES as usize], GuestAddress(self.at)).unwrap();
        self.available.set(0);
        self.seen.set(0);
    }

    /// Where a descriptor lies.
    pub(crate) fn descriptor(&self, index: u16) -> GuestAddress {
        GuestAddress(self.at + 16 * u64::from(index))
    }

    /// Where the used ring lies, which the device writes and the driver does not.
    pub(crate) fn used(&self) -> u64 {
        self.at + USED
    }

    /// Writes descriptors, from this one on.
    pub(crate) fn describe(&self, first: u16, descriptors: &[[u8; 16]]) {
        self.memory.write_slice(descriptors.as_flattened(), self.descriptor(first)).unwrap();
    }

    /// Gives the device the chain that begins with this descriptor. It is not told yet.
    pub(crate) fn make_available(&self, head: u16) {
        let ring = self.at + AVAILABLE;
        let slot = ring + 4 + 2 * u64::from(self.available.get() % self.size);
        self.memory.write_obj(head.to_le(), GuestAddress(slot)).unwrap();
        self.available.set(self.available.get().wrapping_add(1));
        self.memory.store(self.available.get().to_le(), GuestAddress(ring + 2), Ordering::SeqCst).unwrap();
    }

    /// The next chain that the device has used, if there is one: its head, and how much was written. Asks for an interrupt at the
    /// next one before it looks.
    pub(crate) fn take_used(&self) -> Option<(u16, u32)> {
        let seen = self.seen.get();
        let event = self.at + AVAILABLE + 4 + 2 * u64::from(self.size);
        self.memory.store(seen.to_le(), GuestAddress(event), Ordering::SeqCst).unwrap();
        fence(Ordering::SeqCst);
        let index: u16 = self.memory.load(GuestAddress(self.used() + 2), Ordering::SeqCst).unwrap();
        if u16::from_le(index) == seen {
            return None;
        }
        let slot = self.used() + 4 + 8 * u64::from(seen % self.size);
        let [head, length]: [u32; 2] = self.memory.read_obj(GuestAddress(slot)).unwrap();
        self.seen.set(seen.wrapping_add(1));
        Some((u32::from_le(head) as u16, u32::from_le(length)))
    }
}

/// A descriptor as it lies in memory.
pub(crate) fn descriptor(at: u64, length: u32, flags: u16, next: u16) -> [u8; 16] {
    let mut bytes = [0; 16];
    bytes[..8].copy_from_slice(&at.to_le_bytes());
    bytes[8..12].copy_from_slice(&length.to_le_bytes());
    bytes[12..14].copy_from_slice(&flags.to_le_bytes());
    bytes[14..].copy_from_slice(&next.to_le_bytes());
    bytes
}
