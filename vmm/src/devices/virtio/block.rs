//! The virtio block device (virtio 1.2, section 5.2) over a raw image.
//!
//! | module | what |
//! |---|---|
//! | `request` | what a driver asks for, checked |
//! | `pool` | threads: taking requests out of queues, carrying them out, pausing |
//! | `image` | the file: reading, writing, flushing, discarding |
//! | `alignment` | what O_DIRECT asks for |
//! | `vectored` | preadv and pwritev on guest memory |

mod alignment;
mod image;
mod log;
mod pool;
mod request;
#[cfg(test)]
mod tests;
mod vectored;

use std::sync::{Arc, Mutex, mpsc};
use std::thread;
use std::time::{Duration, Instant};

use godwit_core::codec;
use serde::{Deserialize, Serialize};
use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_F_BLK_SIZE, VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_F_MQ, VIRTIO_BLK_F_RO,
    VIRTIO_BLK_F_SEG_MAX, VIRTIO_BLK_F_TOPOLOGY, VIRTIO_BLK_F_WRITE_ZEROES,
};
use virtio_bindings::virtio_ids::VIRTIO_ID_BLOCK;
use virtio_bindings::virtio_ring::VIRTIO_RING_F_INDIRECT_DESC;
use virtio_queue::QueueState;

pub(crate) use self::image::{CacheMode, open_file};
use self::image::{Image, SECTOR_BYTES};
use self::pool::Pool;
use self::request::{Geometry, MAX_DISCARD_RANGES, MAX_DISCARD_SECTORS, MAX_ZEROES_RANGES, MAX_ZEROES_SECTORS};
use super::{Activation, VirtioDevice};
use crate::config::DiskConfig;
use crate::disks::{Company, ImageLock};
use crate::error::VmmError;
use crate::sync::lock;

/// Descriptors in each queue.
const QUEUE_SIZE: u16 = 256;
/// Data buffers in a request: what a chain can hold beside header and status.
const MAX_SEGMENTS: u32 = QUEUE_SIZE as u32 - 2;
/// The most queues: more gain nothing, since all share one file.
pub(crate) const MAX_QUEUES: u16 = 4;
/// How long a reset waits for storage that does not answer.
const RESET_LIMIT: Duration = Duration::from_secs(30);
/// Bytes in the configuration space, up to the fields of features that are not offered.
const CONFIG_BYTES: usize = 60;

/// A disk of a machine.
pub(crate) struct Block {
    id: String,
    image: Arc<Image>,
    lock: Arc<ImageLock>,
    /// The smallest unit of requests that the driver is told.
    block_bytes: Mutex<u64>,
    queue_sizes: Vec<u16>,
    pool: Mutex<Use>,
}

/// What becomes of the device.
enum Use {
    Unused,
    Active {
        pool: Pool,
        open: bool,
    },
    /// It was reset while its storage did not answer: a request may still be under way, so that no driver may have it.
    Stuck,
}

/// What a destination has to know of a disk: version 1.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
struct State {
    size_bytes: u64,
    block_bytes: u64,
    queues: u16,
    read_only: bool,
}

/// Opens the disk for a machine with so many queues, and locks its image. Writes nothing.
pub(crate) fn open(
    config: &DiskConfig,
    cache: CacheMode,
    queues: u16,
    company: Company,
) -> Result<Arc<Block>, VmmError> {
    let image = Image::open(config, cache)?;
    let lock = Arc::new(ImageLock::take(config, image.file(), company)?);
    Ok(Arc::new(Block {
        id: config.id.clone(),
        lock,
        block_bytes: Mutex::new(image.block_bytes()),
        image: Arc::new(image),
        queue_sizes: vec![QUEUE_SIZE; queues.clamp(1, MAX_QUEUES).into()],
        pool: Mutex::new(Use::Unused),
    }))
}

impl Block {
    /// Makes what the guest has written last, by `until` at the latest. On a thread of its own: storage that does not answer must not
    /// hang the caller.
    pub(crate) fn sync(&self, until: Instant) -> Result<(), VmmError> {
        let (told, result) = mpsc::channel();
        let image = Arc::clone(&self.image);
        let flush = move || {
            // Nobody listens if it has taken too long.
            let _ = told.send(image.sync());
        };
        thread::Builder::new()
            .name(format!("{}-sync", self.id))
            .spawn(flush)
            .map_err(VmmError::os(format!("cannot start a thread to flush disk {}", self.id)))?;
        match result.recv_timeout(until.saturating_duration_since(Instant::now())) {
            Ok(result) => result.map_err(VmmError::os(format!("cannot flush disk {}", self.id))),
            Err(_) => Err(VmmError::Status(format!("disk {} was not flushed in time", self.id))),
        }
    }

    /// The locks on its image.
    pub(crate) fn image_lock(&self) -> Arc<ImageLock> {
        Arc::clone(&self.lock)
    }

    /// Lets others have the image, once the machine has ended; not if a request may still be under way.
    pub(crate) fn let_go(&self) {
        if !matches!(*lock(&self.pool), Use::Stuck) {
            self.lock.release();
        }
    }

    /// Drops what this host's page cache holds of the image.
    pub(crate) fn forget_cached(&self) {
        if let Err(error) = self.image.forget_cached() {
            tracing::warn!("disk {}: the page cache may hold stale data of its image: {error}", self.id);
        }
    }

    /// How many requests of the first queue have been taken out and put back.
    #[cfg(test)]
    fn queue_positions(&self) -> Option<(u16, u16)> {
        self.queues().first().map(|state| (state.next_avail, state.next_used))
    }

    fn geometry(&self) -> Geometry {
        Geometry {
            size_bytes: self.image.size_bytes(),
            block_bytes: *lock(&self.block_bytes),
            read_only: self.image.read_only(),
        }
    }

    fn state(&self) -> State {
        let Geometry { size_bytes, block_bytes, read_only } = self.geometry();
        State { size_bytes, block_bytes, queues: self.queue_sizes.len() as u16, read_only }
    }

    fn config_space(&self) -> [u8; CONFIG_BYTES] {
        let Geometry { size_bytes, block_bytes, .. } = self.geometry();
        let discard_alignment = (block_bytes.max(4096) / SECTOR_BYTES) as u32;
        let mut space = [0; CONFIG_BYTES];
        let mut put = |at: usize, bytes: &[u8]| space[at..at + bytes.len()].copy_from_slice(bytes);
        put(0, &(size_bytes / SECTOR_BYTES).to_le_bytes());
        put(12, &MAX_SEGMENTS.to_le_bytes());
        put(20, &(block_bytes as u32).to_le_bytes());
        // Physical blocks of 4 KiB: what file systems and their storage are made of.
        put(24, &[(4096 / block_bytes).max(1).ilog2() as u8]);
        put(34, &(self.queue_sizes.len() as u16).to_le_bytes());
        put(36, &MAX_DISCARD_SECTORS.to_le_bytes());
        put(40, &(MAX_DISCARD_RANGES as u32).to_le_bytes());
        put(44, &discard_alignment.to_le_bytes());
        put(48, &MAX_ZEROES_SECTORS.to_le_bytes());
        put(52, &(MAX_ZEROES_RANGES as u32).to_le_bytes());
        // Writing zeroes may free what they are written to.
        put(56, &[1]);
        space
    }
}

impl VirtioDevice for Block {
    fn kind(&self) -> u32 {
        VIRTIO_ID_BLOCK
    }

    fn features(&self) -> u64 {
        let always = [
            VIRTIO_BLK_F_SEG_MAX,
            VIRTIO_BLK_F_BLK_SIZE,
            VIRTIO_BLK_F_FLUSH,
            VIRTIO_BLK_F_TOPOLOGY,
            VIRTIO_BLK_F_MQ,
            VIRTIO_RING_F_INDIRECT_DESC,
        ];
        let more: &[u32] = match self.image.read_only() {
            true => &[VIRTIO_BLK_F_RO],
            false => &[VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_WRITE_ZEROES],
        };
        always.iter().chain(more).fold(0, |bits, bit| bits | 1 << bit)
    }

    fn queue_max_sizes(&self) -> &[u16] {
        &self.queue_sizes
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let space = self.config_space();
        let there = usize::try_from(offset).ok().and_then(|offset| space.get(offset..)).unwrap_or_default();
        let length = there.len().min(data.len());
        data[..length].copy_from_slice(&there[..length]);
        data[length..].fill(0);
    }

    fn activate(&self, activation: Activation) -> Result<(), VmmError> {
        let mut current = lock(&self.pool);
        match *current {
            Use::Unused => {}
            Use::Active { .. } => return Err(VmmError::Status(format!("disk {} is already in use", self.id))),
            Use::Stuck => {
                return Err(VmmError::Status(format!(
                    "disk {} cannot be used any more: its storage has not answered a request from before a reset",
                    self.id
                )));
            }
        }
        let write_through = activation.features & 1 << VIRTIO_BLK_F_FLUSH == 0;
        let pool = Pool::start(&self.id, Arc::clone(&self.image), self.geometry(), write_through, activation)?;
        *current = Use::Active { pool, open: false };
        Ok(())
    }

    fn resume(&self) {
        if let Use::Active { pool, open } = &mut *lock(&self.pool)
            && !*open
        {
            *open = true;
            pool.open();
        }
    }

    fn pause(&self, until: Instant) -> Result<(), VmmError> {
        let mut current = lock(&self.pool);
        let reopen = match &mut *current {
            Use::Active { pool, open: open @ true } => {
                if let Err(in_flight) = pool.close(until) {
                    pool.open();
                    return Err(VmmError::Status(format!(
                        "disk {}: {in_flight} requests were not completed in time (does its storage answer?)",
                        self.id
                    )));
                }
                *open = false;
                true
            }
            _ => false,
        };
        let synced = self.sync(until);
        if synced.is_err()
            && reopen
            && let Use::Active { pool, open } = &mut *current
        {
            *open = true;
            pool.open();
        }
        synced
    }

    fn queues(&self) -> Vec<QueueState> {
        match &*lock(&self.pool) {
            Use::Active { pool, .. } => pool.queues(),
            _ => Vec::new(),
        }
    }

    fn reset(&self) {
        let mut current = lock(&self.pool);
        if !matches!(*current, Use::Active { .. }) {
            return;
        }
        let Use::Active { pool, .. } = std::mem::replace(&mut *current, Use::Stuck) else { return };
        match pool.end(RESET_LIMIT) {
            true => *current = Use::Unused,
            false => tracing::error!(
                "disk {}: its storage did not answer within {} s of a reset; the guest cannot use it any more",
                self.id,
                RESET_LIMIT.as_secs()
            ),
        }
    }

    fn save(&self) -> Result<Vec<u8>, VmmError> {
        codec::encode(&self.state()).map_err(|source| VmmError::Codec { what: "cannot encode a disk's state", source })
    }

    fn load(&self, state: &[u8]) -> Result<(), VmmError> {
        let wrong = |reason: String| VmmError::state(format!("disk {}", self.id), reason);
        let state: State = codec::decode(state).map_err(|error| wrong(error.to_string()))?;
        let here = self.state();
        let needed = self.image.block_bytes();
        if (state.size_bytes, state.read_only) != (here.size_bytes, here.read_only) {
            return Err(wrong(format!("the guest knows another disk: {state:?}, here it is {here:?}")));
        }
        if state.queues != here.queues {
            return Err(wrong(format!("the guest has {} queues, here there are {}", state.queues, here.queues)));
        }
        if !(SECTOR_BYTES..=1 << 16).contains(&state.block_bytes) || !state.block_bytes.is_multiple_of(needed) {
            return Err(wrong(format!(
                "the guest uses blocks of {} bytes, here the image can be accessed in blocks of {needed} only",
                state.block_bytes
            )));
        }
        *lock(&self.block_bytes) = state.block_bytes;
        Ok(())
    }
}
