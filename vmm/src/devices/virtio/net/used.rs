//! Giving several chains back to the driver at once.
//!
//! A frame in several chains must appear as a whole: a driver that finds the first of them and not the others takes the frame for
//! damaged. virtio-queue shows every chain by itself.

use std::sync::atomic::{Ordering, fence};

use godwit_core::GuestMemory;
use virtio_queue::{Error, Queue, QueueT};
use vm_memory::{Address, Bytes, GuestAddress};

use super::chain::QueueError;

/// Bytes before the first element of a ring, and of an element of each ring (virtio 1.2, sections 2.7.6 and 2.7.8).
const HEADER_BYTES: u64 = 4;
const USED_ELEMENT_BYTES: u64 = 8;
const AVAILABLE_ELEMENT_BYTES: u64 = 2;

/// The used ring of a queue.
pub(super) struct UsedRing<'a> {
    queue: &'a mut Queue,
    memory: &'a GuestMemory,
}

impl<'a> UsedRing<'a> {
    pub(super) fn of(queue: &'a mut Queue, memory: &'a GuestMemory) -> Self {
        Self { queue, memory }
    }

    /// Adds chains, each with the number of bytes in it. The driver sees all of them or none.
    pub(super) fn add_together(&mut self, chains: &[(u16, u32)]) -> Result<(), QueueError> {
        let Some((&(last_head, last_length), others)) = chains.split_last() else { return Ok(()) };
        for &(head, length) in others {
            let position = u64::from(self.queue.next_used() % self.queue.size());
            let element = address(self.queue.used_ring(), HEADER_BYTES + position * USED_ELEMENT_BYTES)?;
            let parts = [u32::from(head).to_le_bytes(), length.to_le_bytes()];
            self.memory.write_slice(parts.as_flattened(), element)?;
            self.queue.set_next_used(self.queue.next_used().wrapping_add(1));
        }
        // This one makes all of them visible.
        Ok(self.queue.add_used(self.memory, last_head, last_length)?)
    }

    /// Whether the driver wants to be told of what has been added since the ring's index was `used_before`.
    pub(super) fn wants_interrupt(&mut self, used_before: u16) -> Result<bool, QueueError> {
        let used = self.queue.next_used();
        if used == used_before || !self.queue.event_idx_enabled() {
            return Ok(used != used_before);
        }
        // What has been added is visible before the driver's wish is read.
        fence(Ordering::SeqCst);
        let offset = HEADER_BYTES + u64::from(self.queue.size()) * AVAILABLE_ELEMENT_BYTES;
        let event: u16 = self.memory.load(address(self.queue.avail_ring(), offset)?, Ordering::Relaxed)?;
        let since_event = used.wrapping_sub(u16::from_le(event)).wrapping_sub(1);
        Ok(since_event < used.wrapping_sub(used_before))
    }
}

fn address(ring: u64, offset: u64) -> Result<GuestAddress, QueueError> {
    GuestAddress(ring).checked_add(offset).ok_or(QueueError::Rings(Error::AddressOverflow))
}
