//! Descriptor chains, checked, as pieces of guest memory.

use godwit_core::GuestMemory;
use virtio_queue::DescriptorChain;
use vm_memory::bitmap::MS;
use vm_memory::{GuestMemoryBackend, VolatileSlice};

use super::vectored::MAX_PIECES;

/// A piece of guest memory, contiguous in this process.
pub(super) type Piece<'m> = VolatileSlice<'m, MS<'m, GuestMemory>>;

/// A chain of buffers that the driver has made available.
pub(super) struct Chain<'m> {
    /// By what the driver knows it.
    pub(super) head: u16,
    /// What the device may read.
    pub(super) readable: Vec<Piece<'m>>,
    /// What the device may write.
    pub(super) writable: Vec<Piece<'m>>,
}

/// Something in a queue that no driver may put there.
#[derive(Debug, thiserror::Error)]
pub(super) enum QueueError {
    #[error("its rings cannot be used: {0}")]
    Rings(#[from] virtio_queue::Error),
    #[error("a chain of descriptors does not end as it should")]
    Endless,
    #[error("a chain has more than {0} descriptors")]
    TooLong(u16),
    #[error("a descriptor points to where there is no memory")]
    OutsideMemory(#[from] vm_memory::GuestMemoryError),
    #[error("a piece of guest memory cannot be reached: {0}")]
    Volatile(#[from] vm_memory::VolatileMemoryError),
    #[error("a chain has {0}")]
    Shape(&'static str),
}

impl<'m> Chain<'m> {
    /// Reads a chain of at most `max_descriptors`, the size of its queue.
    pub(super) fn read(
        memory: &'m GuestMemory,
        descriptors: DescriptorChain<&'m GuestMemory>,
        max_descriptors: u16,
    ) -> Result<Self, QueueError> {
        let mut chain = Self { head: descriptors.head_index(), readable: Vec::new(), writable: Vec::new() };
        let mut goes_on = true;
        for (count, descriptor) in (1u32..).zip(descriptors) {
            if count > u32::from(max_descriptors) {
                return Err(QueueError::TooLong(max_descriptors));
            }
            let pieces = if descriptor.is_write_only() { &mut chain.writable } else { &mut chain.readable };
            for piece in GuestMemoryBackend::get_slices(memory, descriptor.addr(), descriptor.len() as usize) {
                pieces.push(piece?);
            }
            if !descriptor.is_write_only() && !chain.writable.is_empty() {
                return Err(QueueError::Shape("readable buffers after writable ones"));
            }
            goes_on = descriptor.has_next();
        }
        // The iterator stops in silence at what it cannot follow.
        if goes_on {
            return Err(QueueError::Endless);
        }
        if chain.readable.len().max(chain.writable.len()) > MAX_PIECES {
            return Err(QueueError::TooLong(max_descriptors));
        }
        Ok(chain)
    }
}

/// How many bytes these pieces hold.
pub(super) fn length(pieces: &[Piece]) -> usize {
    pieces.iter().map(VolatileSlice::len).sum()
}

/// Copies the bytes from `offset` on out of pieces; returns how many there were.
pub(super) fn copy_out(pieces: &[Piece], mut offset: usize, to: &mut [u8]) -> Result<usize, QueueError> {
    let mut done = 0;
    for piece in pieces {
        if offset < piece.len() {
            let part = piece.offset(offset)?;
            done += part.copy_to(&mut to[done..]);
        }
        offset = offset.saturating_sub(piece.len());
        if done == to.len() {
            break;
        }
    }
    Ok(done)
}

/// Copies bytes into pieces from `offset` on; returns for how many there was room.
pub(super) fn copy_in(pieces: &[Piece], mut offset: usize, from: &[u8]) -> Result<usize, QueueError> {
    let mut done = 0;
    for piece in pieces {
        if offset < piece.len() && done < from.len() {
            let part = piece.offset(offset)?;
            let length = part.len().min(from.len() - done);
            part.copy_from(&from[done..done + length]);
            done += length;
        }
        offset = offset.saturating_sub(piece.len());
    }
    Ok(done)
}
