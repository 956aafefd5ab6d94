//! What a balloon does with its queues.

use std::io::{self, Read};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};

use godwit_core::{GuestMemory, PAGE_SIZE};
use virtio_queue::{DescriptorChain, Queue, QueueOwnedT, QueueT};
use vm_memory::{GuestAddress, GuestMemoryBackend};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::devices::virtio::{Activation, ActiveQueue, Interrupt};
use crate::error::{VmmError, chain};
use crate::memory;
use crate::sync::lock;

/// The unit of page numbers: 4096 bytes, whatever the guest's own pages are.
const PAGE_BYTES: u64 = PAGE_SIZE as u64;

/// How much is given back at a time, at most and aligned: a pause waits for no more.
const PIECE_BYTES: u64 = 2 << 20;

/// How much of a list of page numbers is read at a time.
const LIST_BYTES: usize = 1024;

/// The queues of an active balloon, and what they are about.
pub(super) struct Engine {
    queues: Mutex<Vec<Option<Queue>>>,
    open: AtomicBool,
    memory: GuestMemory,
    interrupt: Arc<Interrupt>,
    /// Kicks the device itself, to go on later.
    again: EventFd,
}

/// What a queue is for, by its number.
#[derive(Debug, Clone, Copy)]
enum Role {
    Inflate,
    Deflate,
    Report,
}

impl Role {
    fn of(queue: usize) -> Self {
        match queue {
            0 => Role::Inflate,
            1 => Role::Deflate,
            _ => Role::Report,
        }
    }
}

/// Something in a queue that no driver may put there.
#[derive(Debug, thiserror::Error)]
enum QueueError {
    #[error("its rings cannot be used: {0}")]
    Rings(#[from] virtio_queue::Error),
    #[error("a list of pages cannot be read: {0}")]
    List(#[from] io::Error),
    #[error("{length} bytes from {start:#x} on are not RAM")]
    NotRam { start: u64, length: u64 },
}

/// Whether a chain has been dealt with, or the gate was closed in the middle of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Progress {
    Done,
    Closed,
}

impl Engine {
    /// An engine with its gate closed, and the eventfds upon which it is to be told to [`Engine::serve`].
    pub(super) fn new(activation: Activation) -> Result<(Self, Vec<EventFd>), VmmError> {
        let Activation { memory, queues, interrupt, .. } = activation;
        let failed = || VmmError::os("cannot make an eventfd for the balloon");
        let again = EventFd::new(EFD_NONBLOCK).map_err(failed())?;
        let mut kicks = vec![again.try_clone().map_err(failed())?];
        let mut take = |active: ActiveQueue| {
            kicks.push(active.kick);
            active.queue
        };
        let queues = queues.into_iter().map(|active| active.map(&mut take)).collect();
        Ok((Self { queues: Mutex::new(queues), open: AtomicBool::new(false), memory, interrupt, again }, kicks))
    }

    /// Every queue is processed, as if it had just been kicked.
    pub(super) fn open(&self) {
        self.open.store(true, Ordering::SeqCst);
        self.kick_again();
    }

    /// Afterwards nothing is given back, nor taken from a queue. What is given up half-way is in its queue as before: to give back
    /// a page twice does no harm as long as the driver waits for it.
    pub(super) fn close(&self) {
        // Before the lock: whoever holds it looks at this.
        self.open.store(false, Ordering::SeqCst);
        drop(lock(&self.queues));
    }

    /// The queues, by number.
    pub(super) fn queues(&self) -> MutexGuard<'_, Vec<Option<Queue>>> {
        lock(&self.queues)
    }

    /// Deals with what is in the queues, while the gate is open.
    pub(super) fn serve(&self) {
        let mut queues = lock(&self.queues);
        let mut more = false;
        for (index, queue) in queues.iter_mut().enumerate() {
            let Some(queue) = queue else { continue };
            if !self.is_open() || self.interrupt.is_broken() {
                return;
            }
            match self.answer(Role::of(index), queue) {
                Ok(goes_on) => more |= goes_on,
                Err(error) => {
                    tracing::warn!("memory balloon: the guest's driver has broken it: {}", chain(&error));
                    self.interrupt.device_broken();
                }
            }
        }
        if more {
            self.kick_again();
        }
    }

    /// Deals with as many chains as the queue can hold, so that no queue has to wait for ever. Whether there are more.
    fn answer(&self, role: Role, queue: &mut Queue) -> Result<bool, QueueError> {
        queue.disable_notification(&self.memory)?;
        let mut answered = 0;
        while answered < queue.size() {
            let Some(chain) = queue.iter(&self.memory)?.next() else { break };
            let head = chain.head_index();
            let progress = match role {
                Role::Inflate => self.inflate(chain)?,
                Role::Deflate => Progress::Done,
                Role::Report => self.report(chain)?,
            };
            if progress == Progress::Closed {
                queue.go_to_previous_position();
                break;
            }
            // Nothing was written into the buffers.
            queue.add_used(&self.memory, head, 0)?;
            answered += 1;
        }
        if answered > 0 && queue.needs_notification(&self.memory)? {
            self.interrupt.used_buffers();
        }
        Ok(queue.enable_notification(&self.memory)?)
    }

    /// Free pages: the buffers themselves.
    fn report(&self, chain: DescriptorChain<&GuestMemory>) -> Result<Progress, QueueError> {
        for buffer in chain.writable() {
            if self.give_back(buffer.addr().0, u64::from(buffer.len()))? == Progress::Closed {
                return Ok(Progress::Closed);
            }
        }
        Ok(Progress::Done)
    }

    /// Pages that the guest gives away: their numbers are in the buffers.
    fn inflate(&self, chain: DescriptorChain<&GuestMemory>) -> Result<Progress, QueueError> {
        let mut list = chain.reader(&self.memory)?;
        let mut bytes = [0; LIST_BYTES];
        loop {
            // Less than asked for only at the end.
            let length = list.read(&mut bytes)?;
            let (numbers, _) = bytes[..length].as_chunks();
            if numbers.is_empty() {
                return Ok(Progress::Done);
            }
            for (first, pages) in runs(numbers.iter().map(|number| u32::from_le_bytes(*number))) {
                let (start, length) = (u64::from(first) * PAGE_BYTES, u64::from(pages) * PAGE_BYTES);
                if self.give_back(start, length)? == Progress::Closed {
                    return Ok(Progress::Closed);
                }
            }
        }
    }

    /// Gives the whole pages of a range back to the host, piece by piece.
    fn give_back(&self, start: u64, length: u64) -> Result<Progress, QueueError> {
        if length == 0 {
            return Ok(Progress::Done);
        }
        if !GuestMemoryBackend::check_range(&self.memory, GuestAddress(start), length as usize) {
            return Err(QueueError::NotRam { start, length });
        }
        // It lies in RAM: no sum overflows.
        let end = (start + length) / PAGE_BYTES * PAGE_BYTES;
        let mut at = start.next_multiple_of(PAGE_BYTES);
        while at < end {
            if !self.is_open() {
                return Ok(Progress::Closed);
            }
            let next = (at + 1).next_multiple_of(PIECE_BYTES).min(end);
            if let Err(error) = memory::discard(&self.memory, GuestAddress(at), (next - at) as usize) {
                // The page stays what it is, which the driver allows.
                tracing::debug!("memory balloon: {}", chain(&error));
            }
            at = next;
        }
        Ok(Progress::Done)
    }

    fn is_open(&self) -> bool {
        self.open.load(Ordering::SeqCst)
    }

    fn kick_again(&self) {
        // Fails only if the counter is full: then the worker is going to look anyway.
        let _ = self.again.write(1);
    }
}

/// Numbers that follow each other, taken together: the first of them, and how many.
fn runs(numbers: impl Iterator<Item = u32>) -> impl Iterator<Item = (u32, u32)> {
    let mut numbers = numbers.peekable();
    std::iter::from_fn(move || {
        let first = numbers.next()?;
        let mut count = 1;
        while numbers.next_if(|next| u64::from(*next) == u64::from(first) + u64::from(count)).is_some() {
            count += 1;
        }
        Some((first, count))
    })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn runs_hold_the_same_numbers_in_order(numbers in prop::collection::vec(prop_oneof![0u32..20, u32::MAX - 3..=u32::MAX], 0..64)) {
            let found: Vec<_> = runs(numbers.iter().copied()).collect();
            let all: Vec<u32> = found.iter().flat_map(|&(first, count)| (0..count).map(move |n| first + n)).collect();
            prop_assert_eq!(all, numbers);
            prop_assert!(found.windows(2).all(|pair| u64::from(pair[0].0) + u64::from(pair[0].1) != u64::from(pair[1].0)));
        }
    }
}
