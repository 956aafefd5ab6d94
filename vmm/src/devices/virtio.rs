//! virtio devices: what a device is, apart from the transport that a guest finds it by.
//!
//! ```text
//!               activate                     resume
//!   (reset) ───────────────► active, closed ◄────────► active, open
//!      ▲                          │          pause          │
//!      └──────────────────────────┴────────────────────────┘  reset (by the guest, or when it reboots)
//! ```
//!
//! A device takes buffers from its queues only while it is open. That is how nothing is written to a disk, taken from a
//! network or put into guest memory while the machine is paused, and before a machine that comes in is owned.

pub(crate) mod balloon;
pub(crate) mod block;
#[cfg(test)]
pub(crate) mod driver_ring;
pub(crate) mod mmio;
pub(crate) mod net;
pub(crate) mod rng;
mod worker;

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Instant;

use godwit_core::GuestMemory;
use virtio_queue::{Queue, QueueState};
use vmm_sys_util::eventfd::EventFd;

use crate::error::VmmError;

/// The interrupt status bit for used buffers (virtio 1.2, section 4.2.2).
const USED_BUFFERS: u32 = 1;
/// The interrupt status bit for a configuration change.
const CONFIG_CHANGED: u32 = 2;

/// A virtio device, as its transport sees it. Calls come one at a time, from any thread, but for the configuration space,
/// which is read at any time.
pub(crate) trait VirtioDevice: Send + Sync {
    /// What kind of device it is (VIRTIO_ID_…).
    fn kind(&self) -> u32;

    /// The feature bits that this kind of device offers here. The transport adds those that every device has
    /// (VIRTIO_F_VERSION_1, VIRTIO_RING_F_EVENT_IDX).
    fn features(&self) -> u64;

    /// The largest size of each of its queues.
    fn queue_max_sizes(&self) -> &[u16];

    /// Fills `data` with the configuration space from `offset` on; zeros where there is nothing.
    fn read_config(&self, offset: u64, data: &mut [u8]);

    /// The driver is ready (DRIVER_OK), or was when the state was saved that is being loaded. The device stays closed until
    /// [`VirtioDevice::resume`] if the machine is paused; otherwise the transport calls that at once.
    fn activate(&self, activation: Activation) -> Result<(), VmmError>;

    /// Opens the device: every queue is processed as if it had just been kicked. Does nothing if it is not active, or open.
    fn resume(&self);

    /// Closes the device: what is in flight is completed (and flushed, for a disk), nothing new is begun. On an error, after
    /// `until` at the latest, the device is open as before.
    fn pause(&self, until: Instant) -> Result<(), VmmError>;

    /// The queues of a device that is active and closed, as they stand, by number; what is there for a queue that the driver
    /// does not use means nothing. Empty if the device is not active.
    fn queues(&self) -> Vec<QueueState>;

    /// Ends what the device does and forgets the queues: afterwards it does not touch guest memory.
    fn reset(&self);

    /// What else a destination has to know, encoded by the device.
    fn save(&self) -> Result<Vec<u8>, VmmError>;

    /// Takes that in, before [`VirtioDevice::activate`].
    fn load(&self, state: &[u8]) -> Result<(), VmmError>;
}

/// What a device gets when its driver is ready.
pub(crate) struct Activation {
    /// Guest memory. Whoever writes it otherwise than through vm-memory marks its bitmap after the data has landed.
    pub(crate) memory: GuestMemory,
    /// The feature bits that the driver accepted.
    pub(crate) features: u64,
    /// The queues, each with the eventfd that the guest's kick signals. None for a queue that the driver does not use.
    pub(crate) queues: Vec<Option<ActiveQueue>>,
    /// How the device tells the driver that something has happened.
    pub(crate) interrupt: Arc<Interrupt>,
}

/// A queue in use.
pub(crate) struct ActiveQueue {
    pub(crate) queue: Queue,
    /// Signalled when the driver has made buffers available. Non-blocking.
    pub(crate) kick: EventFd,
}

/// The interrupt of a virtio device: a status register and a line.
#[derive(Debug)]
pub(crate) struct Interrupt {
    status: AtomicU32,
    broken: AtomicU32,
    /// How often the configuration has changed.
    generation: AtomicU32,
    line: EventFd,
}

impl Interrupt {
    /// An interrupt that signals `line`, which KVM turns into an edge.
    pub(crate) fn new(line: EventFd) -> Self {
        Self { status: AtomicU32::new(0), broken: AtomicU32::new(0), generation: AtomicU32::new(0), line }
    }

    /// Buffers have been used. Call it only if the queue says that the driver wants to know.
    pub(crate) fn used_buffers(&self) {
        self.raise(USED_BUFFERS);
    }

    /// The configuration has changed.
    pub(crate) fn config_changed(&self) {
        self.generation.fetch_add(1, Ordering::SeqCst);
        self.raise(CONFIG_CHANGED);
    }

    /// The driver has put something into a queue that cannot be used: the device wants to be reset.
    pub(crate) fn device_broken(&self) {
        self.broken.store(1, Ordering::SeqCst);
        self.config_changed();
    }

    /// Whether the device wants to be reset.
    pub(crate) fn is_broken(&self) -> bool {
        self.broken.load(Ordering::SeqCst) != 0
    }

    /// Differs before and after a change of the configuration, for a driver that reads it in several pieces.
    pub(crate) fn config_generation(&self) -> u32 {
        self.generation.load(Ordering::SeqCst)
    }

    /// The status register.
    pub(crate) fn status(&self) -> u32 {
        self.status.load(Ordering::SeqCst)
    }

    /// The driver has seen these bits.
    pub(crate) fn acknowledge(&self, bits: u32) {
        self.status.fetch_and(!bits, Ordering::SeqCst);
    }

    /// Forgets everything: the device has been reset.
    pub(crate) fn reset(&self) {
        self.status.store(0, Ordering::SeqCst);
        self.broken.store(0, Ordering::SeqCst);
    }

    /// Takes over the status of a machine that comes in. [`Interrupt::raise_again`] makes the driver look.
    pub(crate) fn load(&self, status: u32, broken: bool, config_generation: u32) {
        self.generation.store(config_generation, Ordering::SeqCst);
        self.status.store(status & (USED_BUFFERS | CONFIG_CHANGED), Ordering::SeqCst);
        self.broken.store(u32::from(broken), Ordering::SeqCst);
    }

    /// Signals the line again if something is unacknowledged: a signal that was on its way is in nobody's state.
    pub(crate) fn raise_again(&self) {
        if self.status() != 0 {
            self.signal();
        }
    }

    fn raise(&self, bit: u32) {
        // The status before the edge: the driver reads it as soon as the interrupt arrives.
        self.status.fetch_or(bit, Ordering::SeqCst);
        self.signal();
    }

    fn signal(&self) {
        // Fails only if the counter is full: then KVM is going to see a signal anyway.
        let _ = self.line.write(1);
    }
}
