//! What O_DIRECT asks of addresses, offsets and lengths, and buffers that meet it.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use rustix::fs::{AtFlags, NFS_SUPER_MAGIC, StatxFlags, fstatfs, statx};
use vm_memory::VolatileSlice;
use vm_memory::bitmap::BitmapSlice;

use super::image::SECTOR_BYTES;

/// What any O_DIRECT is content with: a page.
const PAGE_BYTES: usize = 4096;

/// statx(2) tells about direct I/O (STATX_DIOALIGN, Linux 6.1).
const STATX_DIOALIGN: StatxFlags = StatxFlags::from_bits_retain(0x2000);

/// What a file asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Alignment {
    /// Of addresses in memory.
    memory: usize,
    /// Of offsets and lengths.
    block: usize,
}

impl Alignment {
    /// Of a file that is read through the page cache.
    pub(super) const NONE: Alignment = Alignment { memory: 1, block: 1 };

    /// Of a file that has been opened with O_DIRECT: what the kernel says, or what is found by trying.
    pub(super) fn of(file: &File) -> io::Result<Self> {
        let status = statx(file, "", AtFlags::EMPTY_PATH, STATX_DIOALIGN)?;
        if status.stx_mask & STATX_DIOALIGN.bits() != 0 {
            return match (status.stx_dio_mem_align as usize, status.stx_dio_offset_align as usize) {
                (0, _) | (_, 0) => Err(io::Error::new(
                    io::ErrorKind::Unsupported,
                    "it cannot be accessed around the page cache (O_DIRECT); --unsafe-cache goes through it",
                )),
                (memory, block) => Ok(Self { memory, block }),
            };
        }
        if fstatfs(file)?.f_type == NFS_SUPER_MAGIC {
            return Ok(Self::NONE);
        }
        let mut page = AlignedBuffer::new(PAGE_BYTES);
        for block in [SECTOR_BYTES as usize, PAGE_BYTES] {
            match file.read_at(&mut page.bytes_mut()[..block], 0) {
                Err(error) if error.kind() == io::ErrorKind::InvalidInput => {}
                Err(error) => return Err(error),
                Ok(_) => return Ok(Self { memory: block, block }),
            }
        }
        Err(io::Error::new(io::ErrorKind::Unsupported, "it cannot be read in blocks of 4096 bytes with O_DIRECT"))
    }

    /// The smallest unit of requests: at least a sector.
    pub(super) fn block_bytes(self) -> u64 {
        (self.block as u64).max(SECTOR_BYTES)
    }

    /// Whether these pieces of memory can be read and written as they are.
    pub(super) fn admits<B: BitmapSlice>(self, pieces: &[VolatileSlice<B>]) -> bool {
        pieces.iter().all(|piece| {
            let guard = piece.ptr_guard();
            (guard.as_ptr() as usize).is_multiple_of(self.memory) && guard.len().is_multiple_of(self.block)
        })
    }
}

/// Bytes that begin at a page's first.
pub(super) struct AlignedBuffer {
    bytes: Vec<u8>,
    start: usize,
    length: usize,
}

impl AlignedBuffer {
    /// So many zeros.
    pub(super) fn new(length: usize) -> Self {
        let bytes = vec![0; length + PAGE_BYTES];
        let start = bytes.as_ptr().align_offset(PAGE_BYTES);
        Self { bytes, start, length }
    }

    pub(super) fn bytes(&self) -> &[u8] {
        &self.bytes[self.start..self.start + self.length]
    }

    pub(super) fn bytes_mut(&mut self) -> &mut [u8] {
        &mut self.bytes[self.start..self.start + self.length]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buffers_begin_at_a_page() {
        for length in [0, 1, 512, 100_000] {
            let mut buffer = AlignedBuffer::new(length);
            assert_eq!(buffer.bytes_mut().len(), length);
            assert_eq!(buffer.bytes().as_ptr() as usize % PAGE_BYTES, 0);
        }
    }

    #[test]
    fn pieces_are_judged_by_address_and_length() {
        let mut buffer = AlignedBuffer::new(8192);
        let whole = VolatileSlice::from(buffer.bytes_mut());
        let strict = Alignment { memory: 512, block: 4096 };
        assert!(strict.admits(&[whole]));
        assert!(!strict.admits(&[whole.subslice(0, 512).unwrap()]), "a short length");
        assert!(!strict.admits(&[whole.subslice(4, 4096).unwrap()]), "a crooked address");
        assert!(Alignment::NONE.admits(&[whole.subslice(3, 7).unwrap()]));
    }
}
