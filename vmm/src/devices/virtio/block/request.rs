//! Requests as a driver puts them into a queue (virtio 1.2, section 5.2.6): read from descriptors, checked against the disk.
//!
//! A chain is a header and data that the device reads, then data and a status byte that it writes. Where one descriptor ends and the
//! next begins means nothing.

use godwit_core::GuestMemory;
use godwit_core::bitmap::PageBits;
use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_S_IOERR, VIRTIO_BLK_S_OK, VIRTIO_BLK_S_UNSUPP, VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_FLUSH,
    VIRTIO_BLK_T_GET_ID, VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT, VIRTIO_BLK_T_WRITE_ZEROES,
};
use virtio_queue::DescriptorChain;
use vm_memory::bitmap::BS;
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, VolatileSlice};

use super::image::SECTOR_BYTES;

/// The most descriptors in a chain. A driver makes none longer than the queue.
pub(super) const MAX_DESCRIPTORS: usize = super::QUEUE_SIZE as usize;

/// The most ranges in one request to discard.
pub(super) const MAX_DISCARD_RANGES: usize = 16;
/// The most sectors in one of them: 1 GiB.
pub(super) const MAX_DISCARD_SECTORS: u32 = 1 << 21;
/// The most ranges in one request to write zeroes.
pub(super) const MAX_ZEROES_RANGES: usize = 1;
/// The most sectors in it, 32 MiB: where the file system cannot do it, zeros are written, and a pause waits for that.
pub(super) const MAX_ZEROES_SECTORS: u32 = 1 << 16;

const HEADER_BYTES: usize = 16;
const RANGE_BYTES: usize = 16;
/// The only flag that a range can have.
const UNMAP: u32 = 1;

/// How a request ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub(super) enum Status {
    Ok = VIRTIO_BLK_S_OK as u8,
    IoError = VIRTIO_BLK_S_IOERR as u8,
    Unsupported = VIRTIO_BLK_S_UNSUPP as u8,
}

/// What a driver wants.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Request {
    /// Read from this offset into these buffers.
    Read { offset: u64, buffers: Buffers },
    /// Write these buffers from this offset on.
    Write { offset: u64, buffers: Buffers },
    /// Make what has been written last.
    Flush,
    /// Free these ranges.
    Discard(Vec<Range>),
    /// Make these ranges read as zeros.
    WriteZeroes(Vec<Range>),
    /// Put the disk's name there.
    Identify(Buffers),
    /// Nothing: the answer is clear.
    Answer(Status, String),
}

/// Part of the disk, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Range {
    pub(super) offset: u64,
    pub(super) length: u64,
    /// Whether it may be freed.
    pub(super) unmap: bool,
}

/// A request, and where its answer goes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Parsed {
    /// What names the chain in the used ring.
    pub(super) head: u16,
    pub(super) request: Request,
    /// Where the status byte goes.
    pub(super) status: GuestAddress,
    /// How many writable bytes lie before it.
    pub(super) writable_bytes: u64,
}

/// What requests are checked against.
#[derive(Debug, Clone, Copy)]
pub(super) struct Geometry {
    pub(super) size_bytes: u64,
    pub(super) block_bytes: u64,
    pub(super) read_only: bool,
}

impl Parsed {
    /// Reads a chain. None if it has no place for an answer: then the driver has lost its way.
    pub(super) fn read(chain: DescriptorChain<&GuestMemory>, geometry: Geometry) -> Option<Self> {
        let (head, memory) = (chain.head_index(), chain.memory());
        let (mut readable, mut writable) = (Buffers::default(), Buffers::default());
        let mut complete = false;
        for (count, descriptor) in chain.clone().enumerate() {
            if count == MAX_DESCRIPTORS || (!descriptor.is_write_only() && !writable.0.is_empty()) {
                return None;
            }
            let side = if descriptor.is_write_only() { &mut writable } else { &mut readable };
            side.0.push((descriptor.addr(), descriptor.len() as usize));
            // A chain that ends before its last descriptor leads to where nothing is.
            complete = !descriptor.has_next();
        }
        let status = writable.take_last_byte().filter(|_| complete)?;
        if !memory.check_range(status, 1) {
            return None;
        }
        let writable_bytes = writable.total();
        let request =
            request(memory, readable, writable, geometry).unwrap_or_else(|(status, why)| Request::Answer(status, why));
        Some(Self { head, request, status, writable_bytes })
    }

    /// What the used ring says has been written, from the first writable byte on: the status byte is the last of them, and
    /// counts only if all before it has been written.
    pub(super) fn used_length(&self, data_bytes: u64) -> u32 {
        let length = data_bytes + u64::from(data_bytes == self.writable_bytes);
        u32::try_from(length).unwrap_or(u32::MAX)
    }
}

/// What a chain asks for, or the answer to something that cannot be done.
fn request(
    memory: &GuestMemory,
    mut readable: Buffers,
    writable: Buffers,
    geometry: Geometry,
) -> Result<Request, (Status, String)> {
    let wrong = |why: &str| (Status::IoError, why.to_owned());
    let mut header = [0; HEADER_BYTES];
    readable.read_first(memory, &mut header).ok_or_else(|| wrong("a request without a whole header"))?;
    let [k0, k1, k2, k3, _, _, _, _, sector @ ..] = header;
    let (kind, sector) = (u32::from_le_bytes([k0, k1, k2, k3]), u64::from_le_bytes(sector));
    if matches!(kind, VIRTIO_BLK_T_OUT | VIRTIO_BLK_T_DISCARD | VIRTIO_BLK_T_WRITE_ZEROES) && geometry.read_only {
        return Err(wrong("a request to write to a disk that may only be read"));
    }
    match kind {
        VIRTIO_BLK_T_IN => {
            let offset = geometry.check(sector, writable.total())?;
            let buffers = writable.in_ram(memory)?;
            Ok(Request::Read { offset, buffers })
        }
        VIRTIO_BLK_T_OUT => {
            let offset = geometry.check(sector, readable.total())?;
            let buffers = readable.in_ram(memory)?;
            Ok(Request::Write { offset, buffers })
        }
        VIRTIO_BLK_T_FLUSH => Ok(Request::Flush),
        VIRTIO_BLK_T_GET_ID => Ok(Request::Identify(writable.in_ram(memory)?)),
        VIRTIO_BLK_T_DISCARD => {
            let ranges = ranges(memory, readable, geometry, (MAX_DISCARD_RANGES, MAX_DISCARD_SECTORS))?;
            match ranges.iter().any(|range| range.unmap) {
                true => Err((Status::Unsupported, "a discard with a flag".into())),
                false => Ok(Request::Discard(ranges)),
            }
        }
        VIRTIO_BLK_T_WRITE_ZEROES => {
            ranges(memory, readable, geometry, (MAX_ZEROES_RANGES, MAX_ZEROES_SECTORS)).map(Request::WriteZeroes)
        }
        kind => Err((Status::Unsupported, format!("a request of the unknown type {kind}"))),
    }
}

/// The ranges that a request to discard or write zeroes consists of.
fn ranges(
    memory: &GuestMemory,
    mut readable: Buffers,
    geometry: Geometry,
    (max_ranges, max_sectors): (usize, u32),
) -> Result<Vec<Range>, (Status, String)> {
    let wrong = |why: &str| (Status::IoError, why.to_owned());
    let total = readable.total();
    if total == 0 || !total.is_multiple_of(RANGE_BYTES as u64) || total > (max_ranges * RANGE_BYTES) as u64 {
        return Err(wrong("a wrong number of ranges"));
    }
    let mut ranges = Vec::new();
    for _ in 0..total / RANGE_BYTES as u64 {
        let mut range = [0; RANGE_BYTES];
        readable.read_first(memory, &mut range).ok_or_else(|| wrong("ranges outside of memory"))?;
        let [sector @ .., s0, s1, s2, s3, f0, f1, f2, f3] = range;
        let (sectors, flags) = (u32::from_le_bytes([s0, s1, s2, s3]), u32::from_le_bytes([f0, f1, f2, f3]));
        if flags & !UNMAP != 0 {
            return Err((Status::Unsupported, format!("a range with the unknown flags {flags:#x}")));
        }
        if sectors == 0 || sectors > max_sectors {
            return Err(wrong("a range that is too long or empty"));
        }
        let length = u64::from(sectors) * SECTOR_BYTES;
        let offset = geometry.check(u64::from_le_bytes(sector), length)?;
        ranges.push(Range { offset, length, unmap: flags & UNMAP != 0 });
    }
    Ok(ranges)
}

impl Geometry {
    /// The offset of a range in bytes, if it is made of whole blocks and lies within the disk.
    fn check(&self, sector: u64, length: u64) -> Result<u64, (Status, String)> {
        let wrong = |why: &str| Err((Status::IoError, format!("{length} bytes from sector {sector} on: {why}")));
        let Some(offset) = sector.checked_mul(SECTOR_BYTES) else { return wrong("beyond the disk's end") };
        if offset.checked_add(length).is_none_or(|end| end > self.size_bytes) {
            return wrong("beyond the disk's end");
        }
        if !offset.is_multiple_of(self.block_bytes) || !length.is_multiple_of(self.block_bytes) {
            return wrong("not in whole blocks");
        }
        Ok(offset)
    }
}

/// Pieces of guest memory, one after the other.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Buffers(Vec<(GuestAddress, usize)>);

impl Buffers {
    pub(super) fn total(&self) -> u64 {
        self.0.iter().map(|(_, length)| *length as u64).sum()
    }

    /// As slices of guest memory.
    pub(super) fn slices<'a>(&self, memory: &'a GuestMemory) -> Vec<VolatileSlice<'a, BS<'a, PageBits>>> {
        let slices = self.0.iter().flat_map(|(address, length)| memory.get_slices(*address, *length));
        // All of them were found to be RAM, and RAM does not go away.
        slices.filter_map(Result::ok).collect()
    }

    /// Writes `bytes`, cut off where the buffers end; how many.
    pub(super) fn fill(&self, memory: &GuestMemory, bytes: &[u8]) -> u64 {
        let mut done = 0;
        for slice in self.slices(memory) {
            let part = &bytes[done..bytes.len().min(done + slice.len())];
            slice.copy_from(part);
            done += part.len();
        }
        done as u64
    }

    fn in_ram(self, memory: &GuestMemory) -> Result<Self, (Status, String)> {
        match self.0.iter().all(|(address, length)| memory.check_range(*address, *length)) {
            true => Ok(self),
            false => Err((Status::IoError, "buffers outside of memory".into())),
        }
    }

    /// Takes the first bytes off and reads them; None if there are not so many.
    fn read_first(&mut self, memory: &GuestMemory, bytes: &mut [u8]) -> Option<()> {
        let mut done = 0;
        while done < bytes.len() {
            let (address, length) = self.0.first_mut()?;
            let part = (*length).min(bytes.len() - done);
            memory.read_slice(&mut bytes[done..done + part], *address).ok()?;
            done += part;
            *length -= part;
            *address = GuestAddress(address.0.checked_add(part as u64)?);
            if *length == 0 {
                self.0.remove(0);
            }
        }
        Some(())
    }

    /// Takes the last byte off.
    fn take_last_byte(&mut self) -> Option<GuestAddress> {
        while self.0.last().is_some_and(|(_, length)| *length == 0) {
            self.0.pop();
        }
        let (address, length) = self.0.last_mut()?;
        *length -= 1;
        let last = address.0.checked_add(*length as u64).map(GuestAddress);
        if *length == 0 {
            self.0.pop();
        }
        last
    }
}
