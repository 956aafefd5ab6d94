//! From the tap to the guest.
//!
//! How long a frame is shows only once it has been read. So the tap is read into as many of the driver's buffers as the longest
//! frame needs; those that a frame did not need are for the next one. A frame that finds too few of them is held until the driver
//! makes more available, while others wait in the tap's queue.

use std::collections::VecDeque;
use std::io;

use godwit_core::GuestMemory;
use virtio_queue::{Queue, QueueOwnedT, QueueState, QueueT};
use vmm_sys_util::eventfd::EventFd;

use super::chain::{Chain, Piece, QueueError, copy_in, copy_out, length};
use super::learn::{AddressBook, HEAD_BYTES};
use super::tap::{HEADER_BYTES, Tap};
use super::used::UsedRing;
use super::vectored::MAX_PIECES;
use crate::devices::virtio::Interrupt;

/// The longest frame that a tap hands out: 64 KiB in one segment, its Ethernet header with a VLAN tag and the virtio-net header.
const MAX_FRAME_BYTES: usize = HEADER_BYTES + 18 + (64 << 10);

/// Where the number of buffers is in the header.
const BUFFERS_OFFSET: usize = 10;

/// Frames that are received in one go, before others get their turn.
const BURST_FRAMES: usize = 64;

/// The queue of buffers for what arrives.
pub(super) struct Receiver {
    queue: Queue,
    kick: EventFd,
    /// Whether a frame may take up several chains (VIRTIO_NET_F_MRG_RXBUF).
    mergeable: bool,
    /// A frame that the driver has too few buffers for.
    held: Option<Vec<u8>>,
    /// For what does not fit into the driver's buffers.
    rest: Box<[u8]>,
}

/// Why receiving has stopped.
#[derive(Debug)]
pub(super) enum Halt {
    /// The tap is empty.
    Empty,
    /// The driver has too few buffers, and kicks when it has more.
    Starved,
    /// It is the others' turn.
    Turn,
    /// The tap cannot be read.
    Tap(io::Error),
}

impl Receiver {
    pub(super) fn new(queue: Queue, kick: EventFd, mergeable: bool) -> Self {
        Self { queue, kick, mergeable, held: None, rest: vec![0; MAX_FRAME_BYTES].into() }
    }

    pub(super) fn kick(&self) -> &EventFd {
        &self.kick
    }

    pub(super) fn state(&self) -> QueueState {
        self.queue.state()
    }

    /// Receives until there is a reason to stop.
    pub(super) fn run(
        &mut self,
        memory: &GuestMemory,
        tap: &Tap,
        book: &mut AddressBook,
        interrupt: &Interrupt,
    ) -> Result<Halt, QueueError> {
        let used_before = self.queue.next_used();
        let mut buffers = Buffers::default();
        let halt = self.fill(memory, tap, book, &mut buffers);
        // What no frame has needed is the driver's again, as if it had never been looked at.
        for _ in 0..buffers.chains.len() {
            self.queue.go_to_previous_position();
        }
        let halt = halt?;
        if UsedRing::of(&mut self.queue, memory).wants_interrupt(used_before)? {
            interrupt.used_buffers();
        }
        Ok(halt)
    }

    fn fill<'m>(
        &mut self,
        memory: &'m GuestMemory,
        tap: &Tap,
        book: &mut AddressBook,
        buffers: &mut Buffers<'m>,
    ) -> Result<Halt, QueueError> {
        for _ in 0..BURST_FRAMES {
            self.gather(memory, buffers)?;
            let pieces = buffers.pieces();
            let room = length(&pieces);
            if self.held.is_none() && room > 0 {
                match tap.read(&pieces, &mut self.rest) {
                    Ok(size) if size <= room => {
                        self.hand_over(memory, buffers, &pieces, size, book)?;
                        continue;
                    }
                    Ok(size) => self.hold(&pieces, size)?,
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(Halt::Empty),
                    Err(error) => return Ok(Halt::Tap(error)),
                }
            }
            if !self.hand_over_held(memory, buffers, &pieces, book)? && !self.more_available(memory, buffers)? {
                return Ok(Halt::Starved);
            }
        }
        Ok(Halt::Turn)
    }

    /// Takes what the longest frame may need out of the queue.
    fn gather<'m>(&mut self, memory: &'m GuestMemory, buffers: &mut Buffers<'m>) -> Result<(), QueueError> {
        let most_chains = if self.mergeable { usize::from(self.queue.size()) } else { 1 };
        while buffers.room < MAX_FRAME_BYTES && buffers.chains.len() < most_chains {
            let Some(descriptors) = self.queue.iter(memory)?.next() else { return Ok(()) };
            let chain = Chain::read(memory, descriptors, self.queue.size())?;
            let room = length(&chain.writable);
            if !chain.readable.is_empty() || room < HEADER_BYTES {
                return Err(QueueError::Shape(
                    "no room for a frame's header, or readable buffers, in the receive queue",
                ));
            }
            if buffers.piece_count + chain.writable.len() > MAX_PIECES {
                self.queue.go_to_previous_position();
                return Ok(());
            }
            buffers.room += room;
            buffers.piece_count += chain.writable.len();
            buffers.chains.push_back(chain);
        }
        Ok(())
    }

    /// Gives the driver a frame that lies in its first buffers.
    fn hand_over(
        &mut self,
        memory: &GuestMemory,
        buffers: &mut Buffers,
        pieces: &[Piece],
        size: usize,
        book: &mut AddressBook,
    ) -> Result<(), QueueError> {
        if size < HEADER_BYTES {
            return Ok(());
        }
        // Before the guest can change it.
        let mut head = [0; HEAD_BYTES];
        let head_bytes = copy_out(pieces, HEADER_BYTES, &mut head[..HEAD_BYTES.min(size - HEADER_BYTES)])?;
        book.hear_others(&head[..head_bytes]);
        let used = buffers.take(size);
        // The kernel leaves this field as it is.
        copy_in(pieces, BUFFERS_OFFSET, &(used.len() as u16).to_le_bytes())?;
        UsedRing::of(&mut self.queue, memory).add_together(&used)
    }

    /// Keeps a frame that has been read and does not fit.
    fn hold(&mut self, pieces: &[Piece], size: usize) -> Result<(), QueueError> {
        let room = length(pieces);
        let mut frame = vec![0; room];
        copy_out(pieces, 0, &mut frame)?;
        frame.extend_from_slice(self.rest.get(..size - room).unwrap_or(&self.rest));
        self.held = Some(frame);
        Ok(())
    }

    /// Gives the driver the frame that is being held, if there is one and room for it.
    fn hand_over_held(
        &mut self,
        memory: &GuestMemory,
        buffers: &mut Buffers,
        pieces: &[Piece],
        book: &mut AddressBook,
    ) -> Result<bool, QueueError> {
        let Some(frame) = self.held.take() else { return Ok(false) };
        if frame.len() <= length(pieces) {
            copy_in(pieces, 0, &frame)?;
            self.hand_over(memory, buffers, pieces, frame.len(), book)?;
            return Ok(true);
        }
        if !self.mergeable && !buffers.chains.is_empty() {
            tracing::debug!("a frame of {} bytes is longer than the guest's buffers: dropped", frame.len());
            return Ok(true);
        }
        self.held = Some(frame);
        Ok(false)
    }

    /// Asks the driver for a kick when it has more buffers. Whether it has already.
    fn more_available(&mut self, memory: &GuestMemory, buffers: &Buffers) -> Result<bool, QueueError> {
        // All that there can be is here: there will not be more until some of it has been used.
        let all_taken = buffers.chains.len() >= usize::from(self.queue.size());
        Ok(self.queue.enable_notification(memory)? && !all_taken)
    }
}

/// Chains that have been taken out of the queue and not been used yet, in order.
#[derive(Default)]
struct Buffers<'m> {
    chains: VecDeque<Chain<'m>>,
    room: usize,
    piece_count: usize,
}

impl<'m> Buffers<'m> {
    fn pieces(&self) -> Vec<Piece<'m>> {
        self.chains.iter().flat_map(|chain| chain.writable.iter().copied()).collect()
    }

    /// The chains that a frame of this size lies in, each with how much of it.
    fn take(&mut self, size: usize) -> Vec<(u16, u32)> {
        let mut used = Vec::new();
        let mut left = size;
        while left > 0 {
            let Some(chain) = self.chains.pop_front() else { break };
            let room = length(&chain.writable);
            self.room -= room;
            self.piece_count -= chain.writable.len();
            used.push((chain.head, room.min(left) as u32));
            left = left.saturating_sub(room);
        }
        used
    }
}
