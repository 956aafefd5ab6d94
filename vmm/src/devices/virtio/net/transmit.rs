//! From the guest to the tap.

use std::time::Instant;

use godwit_core::GuestMemory;
use virtio_queue::{Queue, QueueState};
use vmm_sys_util::eventfd::EventFd;

use super::chain::{QueueError, copy_out};
use super::learn::{AddressBook, HEAD_BYTES};
use super::serve::serve;
use super::tap::{HEADER_BYTES, Tap};
use crate::devices::virtio::Interrupt;

/// Frames that are sent in one go, before others get their turn.
const BURST_FRAMES: usize = 64;

/// The queue of frames that the guest sends.
pub(super) struct Transmitter {
    queue: Queue,
    kick: EventFd,
}

impl Transmitter {
    pub(super) fn new(queue: Queue, kick: EventFd) -> Self {
        Self { queue, kick }
    }

    pub(super) fn kick(&self) -> &EventFd {
        &self.kick
    }

    pub(super) fn state(&self) -> QueueState {
        self.queue.state()
    }

    /// Sends what there is. Whether there is more.
    pub(super) fn run(
        &mut self,
        memory: &GuestMemory,
        tap: &Tap,
        book: &mut AddressBook,
        interrupt: &Interrupt,
    ) -> Result<bool, QueueError> {
        let now = Instant::now();
        serve(&mut self.queue, memory, BURST_FRAMES, interrupt, |chain| {
            if !chain.writable.is_empty() {
                return Err(QueueError::Shape("writable buffers in the transmit queue"));
            }
            let mut head = [0; HEAD_BYTES];
            let head_bytes = copy_out(&chain.readable, HEADER_BYTES, &mut head)?;
            book.hear_guest(&head[..head_bytes], now);
            // A frame that the tap does not take is lost, as it would be on a wire: a header that makes no sense, a tap that is
            // down, a host without memory.
            if let Err(error) = tap.write(&chain.readable) {
                tracing::debug!("tap {}: a frame was lost: {error}", tap.name());
            }
            Ok(0)
        })
    }
}
