//! The entropy source (virtio 1.2, section 5.4): the host's random numbers.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Instant;

use godwit_core::GuestMemory;
use virtio_bindings::virtio_ids::VIRTIO_ID_RNG;
use virtio_queue::{Queue, QueueOwnedT, QueueState, QueueT};
use vm_memory::{Address, Bytes, GuestAddress};
use vmm_sys_util::eventfd::EventFd;

use super::worker::Worker;
use super::{Activation, Interrupt, VirtioDevice};
use crate::error::{VmmError, chain};
use crate::sync::lock;

/// One queue, of as many requests as Linux ever has under way, and more.
const QUEUE_SIZES: [u16; 1] = [64];

/// The most bytes that one request is given: a driver that wants more asks again.
const MAX_REQUEST_BYTES: usize = 64 << 10;

/// Bytes that are made at a time.
const CHUNK_BYTES: usize = 4096;

/// An entropy source.
#[derive(Default)]
pub(crate) struct Rng {
    /// Both are there while the device is active. The queue is locked while it is processed; the worker's end is waited for
    /// without that lock.
    source: Mutex<Option<Arc<Source>>>,
    worker: Mutex<Option<Worker>>,
}

struct Source {
    queue: Mutex<Queue>,
    open: AtomicBool,
    memory: GuestMemory,
    interrupt: Arc<Interrupt>,
    /// Kicks the device itself, to go on later.
    again: EventFd,
}

impl VirtioDevice for Rng {
    fn kind(&self) -> u32 {
        VIRTIO_ID_RNG
    }

    fn features(&self) -> u64 {
        0
    }

    fn queue_max_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn read_config(&self, _offset: u64, data: &mut [u8]) {
        data.fill(0);
    }

    fn activate(&self, activation: Activation) -> Result<(), VmmError> {
        let Activation { memory, mut queues, interrupt, .. } = activation;
        // A driver without a queue gets nothing, and needs no worker for that.
        let Some(active) = queues.pop().flatten() else { return Ok(()) };
        let again = active.kick.try_clone().map_err(VmmError::os("cannot duplicate an eventfd"))?;
        let source = Arc::new(Source {
            queue: Mutex::new(active.queue),
            open: AtomicBool::new(false),
            memory,
            interrupt,
            again,
        });
        let served = Arc::clone(&source);
        let worker = Worker::spawn("rng".into(), vec![active.kick], move || served.serve())?;
        *lock(&self.source) = Some(source);
        *lock(&self.worker) = Some(worker);
        Ok(())
    }

    fn resume(&self) {
        if let Some(source) = &*lock(&self.source) {
            source.open.store(true, Ordering::SeqCst);
            source.kick_again();
        }
    }

    fn pause(&self, _until: Instant) -> Result<(), VmmError> {
        if let Some(source) = &*lock(&self.source) {
            source.open.store(false, Ordering::SeqCst);
            // What the worker is at takes no time worth counting.
            drop(lock(&source.queue));
        }
        Ok(())
    }

    fn queues(&self) -> Vec<QueueState> {
        // Without a queue there is a device in use all the same: its place is kept.
        let state = lock(&self.source).as_ref().map(|source| lock(&source.queue).state());
        vec![state.unwrap_or_default()]
    }

    fn reset(&self) {
        if let Some(source) = lock(&self.source).take() {
            source.open.store(false, Ordering::SeqCst);
        }
        // Waits until it has ended.
        drop(lock(&self.worker).take());
    }

    fn save(&self) -> Result<Vec<u8>, VmmError> {
        Ok(Vec::new())
    }

    fn load(&self, state: &[u8]) -> Result<(), VmmError> {
        if state.is_empty() {
            Ok(())
        } else {
            Err(VmmError::Status("an entropy source has no state of its own".into()))
        }
    }
}

impl Source {
    /// Answers what is in the queue, if the device is open.
    fn serve(&self) {
        let mut queue = lock(&self.queue);
        if !self.open.load(Ordering::SeqCst) || self.interrupt.is_broken() {
            return;
        }
        match self.answer(&mut queue) {
            Ok(true) => self.kick_again(),
            Ok(false) => {}
            Err(error) => {
                tracing::debug!("entropy source: the driver's queue cannot be used: {}", chain(&error));
                self.interrupt.device_broken();
            }
        }
    }

    /// Answers as many requests as the queue can hold, so that no driver can keep it busy for ever. Whether there are more.
    fn answer(&self, queue: &mut Queue) -> Result<bool, virtio_queue::Error> {
        queue.disable_notification(&self.memory)?;
        let mut answered = 0;
        while answered < queue.size() {
            let Some(chain) = queue.iter(&self.memory)?.next() else { break };
            let head = chain.head_index();
            let mut filled = 0;
            for buffer in chain.writable() {
                let length = (buffer.len() as usize).min(MAX_REQUEST_BYTES - filled);
                filled += self.fill(buffer.addr(), length)?;
            }
            queue.add_used(&self.memory, head, filled as u32)?;
            answered += 1;
        }
        if answered > 0 && queue.needs_notification(&self.memory)? {
            self.interrupt.used_buffers();
        }
        queue.enable_notification(&self.memory)
    }

    /// Fills guest memory with random bytes; how many there were.
    fn fill(&self, address: GuestAddress, length: usize) -> Result<usize, virtio_queue::Error> {
        let mut done = 0;
        while done < length {
            let mut chunk = [0; CHUNK_BYTES];
            let count = (length - done).min(CHUNK_BYTES);
            if let Err(error) = getrandom::fill(&mut chunk[..count]) {
                tracing::warn!("entropy source: the host has no random numbers: {error}");
                break;
            }
            let at = address.checked_add(done as u64).ok_or(virtio_queue::Error::AddressOverflow)?;
            self.memory.write_slice(&chunk[..count], at).map_err(virtio_queue::Error::GuestMemory)?;
            done += count;
        }
        Ok(done)
    }

    fn kick_again(&self) {
        // Fails only if the counter is full: then the worker is going to look anyway.
        let _ = self.again.write(1);
    }
}
