//! The memory balloon (virtio 1.2, section 5.5): the guest tells which of its pages it does not use, and the host has them back.
//!
//! | queue | what the driver puts into it |
//! |---|---|
//! | 0, inflate | the numbers of pages that it gives away |
//! | 1, deflate | the numbers of those that it takes back: it need only use them |
//! | 2 and up, reporting | pages that are free at the moment, and stay so until the buffer is used |
//!
//! Which number the reporting queue has is disputed: 4 by the specification's list, while drivers count the queues that are
//! offered, which makes it 2. Since neither statistics nor hints are offered, every queue from 2 on is one for reports.
//!
//! The device never asks for pages by itself: the size that it wants the balloon to have is 0. Pages that are given back read as
//! zeros when the guest touches them again, and count as written by the VMM: a move that has sent them before sends zeros.

mod engine;
#[cfg(test)]
mod tests;

use std::sync::{Arc, Mutex};
use std::time::Instant;

use virtio_bindings::virtio_ids::VIRTIO_ID_BALLOON;
use virtio_queue::QueueState;

use self::engine::Engine;
use super::worker::Worker;
use super::{Activation, VirtioDevice};
use crate::config::BalloonConfig;
use crate::error::VmmError;
use crate::sync::lock;

/// The feature bit of free page reporting.
const VIRTIO_BALLOON_F_PAGE_REPORTING: u64 = 5;

/// Inflate, deflate, and those that may be for reports. Linux reports 32 ranges at a time, and needs a queue of that size.
const QUEUE_SIZES: [u16; 5] = [128; 5];

/// Without reports.
const QUEUES_OF_A_PLAIN_BALLOON: usize = 2;

/// A memory balloon.
pub(crate) struct Balloon {
    config: BalloonConfig,
    /// Both are there while the device is active. The queues are locked while they are processed; the worker's end is waited for
    /// without that lock.
    engine: Mutex<Option<Arc<Engine>>>,
    worker: Mutex<Option<Worker>>,
}

impl Balloon {
    /// A balloon of size 0.
    pub(crate) fn new(config: BalloonConfig) -> Self {
        Self { config, engine: Mutex::new(None), worker: Mutex::new(None) }
    }
}

impl VirtioDevice for Balloon {
    fn kind(&self) -> u32 {
        VIRTIO_ID_BALLOON
    }

    fn features(&self) -> u64 {
        u64::from(self.config.free_page_reporting) << VIRTIO_BALLOON_F_PAGE_REPORTING
    }

    fn queue_max_sizes(&self) -> &[u16] {
        if self.config.free_page_reporting { &QUEUE_SIZES } else { &QUEUE_SIZES[..QUEUES_OF_A_PLAIN_BALLOON] }
    }

    /// The size that the balloon is to have, and the one that it has. The driver's word on the latter is not kept: nobody asks.
    fn read_config(&self, _offset: u64, data: &mut [u8]) {
        data.fill(0);
    }

    fn activate(&self, activation: Activation) -> Result<(), VmmError> {
        let (engine, kicks) = Engine::new(activation)?;
        let engine = Arc::new(engine);
        let served = Arc::clone(&engine);
        *lock(&self.worker) = Some(Worker::spawn("balloon".into(), kicks, move || served.serve())?);
        *lock(&self.engine) = Some(engine);
        Ok(())
    }

    fn resume(&self) {
        if let Some(engine) = &*lock(&self.engine) {
            engine.open();
        }
    }

    fn pause(&self, _until: Instant) -> Result<(), VmmError> {
        // The worker is at no more than one piece of memory.
        if let Some(engine) = &*lock(&self.engine) {
            engine.close();
        }
        Ok(())
    }

    fn queues(&self) -> Vec<QueueState> {
        let state = |engine: &Arc<Engine>| {
            let queues = engine.queues();
            queues.iter().map(|queue| queue.as_ref().map(|queue| queue.state()).unwrap_or_default()).collect()
        };
        lock(&self.engine).as_ref().map(state).unwrap_or_default()
    }

    fn reset(&self) {
        if let Some(engine) = lock(&self.engine).take() {
            engine.close();
        }
        // Waits until it has ended.
        drop(lock(&self.worker).take());
    }

    fn save(&self) -> Result<Vec<u8>, VmmError> {
        Ok(Vec::new())
    }

    fn load(&self, state: &[u8]) -> Result<(), VmmError> {
        if state.is_empty() { Ok(()) } else { Err(VmmError::Status("a memory balloon has no state of its own".into())) }
    }
}
