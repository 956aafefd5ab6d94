//! A raw disk image: a file or block device, read and written around the host's page cache (O_DIRECT) unless told otherwise.
//!
//! What O_DIRECT asks of addresses and lengths is met here: pieces of guest memory that are not aligned for it go through an aligned
//! buffer.

use std::fs::{File, OpenOptions};
use std::io::{self, Seek, SeekFrom};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};

use rustix::fs::{Advice, FallocateFlags, fadvise, fallocate};
use vm_memory::VolatileSlice;
use vm_memory::bitmap::BitmapSlice;

use super::alignment::{AlignedBuffer, Alignment};
use super::vectored::{Direction, transfer};
use crate::config::DiskConfig;
use crate::error::VmmError;

/// What requests count in, whatever the block size.
pub(super) const SECTOR_BYTES: u64 = 512;

/// The most that goes through an aligned buffer at once.
const BOUNCE_BYTES: usize = 1 << 20;

/// How an image is accessed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum CacheMode {
    /// Around the host's page cache: what one host has written, the other one reads.
    Direct,
    /// Through the host's page cache, which may be stale on another host (`unsafe_cache`).
    PageCache,
}

impl CacheMode {
    /// What `unsafe_cache` means.
    pub(crate) fn of(unsafe_cache: bool) -> Self {
        if unsafe_cache { CacheMode::PageCache } else { CacheMode::Direct }
    }
}

/// An open image. Its size is fixed when it is opened.
pub(super) struct Image {
    file: File,
    size_bytes: u64,
    alignment: Alignment,
    read_only: bool,
    /// Something may have been written since the last sync.
    unsynced: AtomicBool,
    /// A sync that no guest asked for has failed: the next one that a guest asks for has to tell.
    sync_failed: AtomicBool,
    /// Storage that does not answer for as long as a test holds this.
    #[cfg(test)]
    pub(super) stall: std::sync::Mutex<()>,
}

impl Image {
    /// Opens an image. Writes nothing.
    pub(super) fn open(disk: &DiskConfig, cache: CacheMode) -> Result<Self, VmmError> {
        let failed = |what: &str| VmmError::os(format!("disk {}: cannot {what} {}", disk.id, disk.path.display()));
        let mut file = open_file(&disk.path, disk.readonly, cache).map_err(failed("open"))?;
        let size_bytes = file.seek(SeekFrom::End(0)).map_err(failed("find the size of"))?;
        let alignment = match cache {
            CacheMode::PageCache => Alignment::NONE,
            CacheMode::Direct => Alignment::of(&file).map_err(failed("find out how to access"))?,
        };
        let unit = alignment.block_bytes();
        if size_bytes == 0 || !size_bytes.is_multiple_of(unit) {
            return Err(VmmError::Status(format!(
                "disk {}: {} has {size_bytes} bytes, which is not one or more blocks of {unit} bytes",
                disk.id,
                disk.path.display()
            )));
        }
        Ok(Self {
            file,
            size_bytes,
            alignment,
            read_only: disk.readonly,
            unsynced: AtomicBool::new(!disk.readonly),
            sync_failed: AtomicBool::new(false),
            #[cfg(test)]
            stall: std::sync::Mutex::default(),
        })
    }

    /// The open file.
    pub(super) fn file(&self) -> &File {
        &self.file
    }

    pub(super) fn size_bytes(&self) -> u64 {
        self.size_bytes
    }

    /// The smallest unit that it can be read and written in.
    pub(super) fn block_bytes(&self) -> u64 {
        self.alignment.block_bytes()
    }

    pub(super) fn read_only(&self) -> bool {
        self.read_only
    }

    #[cfg(test)]
    pub(super) fn unsynced(&self) -> bool {
        self.unsynced.load(Ordering::Acquire)
    }

    /// Reads into guest memory and marks it.
    pub(super) fn read<B: BitmapSlice>(&self, pieces: &[VolatileSlice<B>], offset: u64) -> io::Result<()> {
        let result = self.copy(Direction::Read, pieces, offset);
        // After the data has landed, and also on an error: some of it may have.
        pieces.iter().for_each(|piece| piece.bitmap().mark_dirty(0, piece.len()));
        result
    }

    /// Writes from guest memory.
    pub(super) fn write<B: BitmapSlice>(&self, pieces: &[VolatileSlice<B>], offset: u64) -> io::Result<()> {
        let result = self.copy(Direction::Write, pieces, offset);
        self.unsynced.store(true, Ordering::Release);
        result
    }

    /// Frees a range, whose contents are then anything. Only a hint.
    pub(super) fn discard(&self, offset: u64, length: u64) -> io::Result<()> {
        match self.allocate(FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE, offset, length) {
            Err(error) if unsupported(&error) => Ok(()),
            result => result,
        }
    }

    /// Makes a range read as zeros; `may_free`: also by freeing it.
    pub(super) fn write_zeroes(&self, offset: u64, length: u64, may_free: bool) -> io::Result<()> {
        let punch = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        let zero = FallocateFlags::ZERO_RANGE | FallocateFlags::KEEP_SIZE;
        // NFS can punch holes and not zero ranges; some file systems can do neither.
        for flags in may_free.then_some(punch).into_iter().chain([zero]) {
            match self.allocate(flags, offset, length) {
                Err(error) if unsupported(&error) => {}
                result => return result,
            }
        }
        let zeros = AlignedBuffer::new(BOUNCE_BYTES.min(usize::try_from(length).unwrap_or(BOUNCE_BYTES)));
        let mut done = 0;
        while done < length {
            let chunk = zeros.bytes().len().min(usize::try_from(length - done).unwrap_or(usize::MAX));
            self.file.write_all_at(&zeros.bytes()[..chunk], offset + done)?;
            done += chunk as u64;
        }
        self.unsynced.store(true, Ordering::Release);
        Ok(())
    }

    /// What the guest has written so far outlives this host, or an error.
    pub(super) fn flush(&self) -> io::Result<()> {
        let missed = self.sync_failed.swap(false, Ordering::AcqRel);
        self.sync_all()?;
        // The kernel reports a lost write once only: whoever was told then was not the guest.
        if missed { Err(io::Error::other("an earlier write was lost")) } else { Ok(()) }
    }

    /// The same without a guest having asked. Does nothing if nothing has been written since the last time.
    pub(super) fn sync(&self) -> io::Result<()> {
        if self.read_only || !self.unsynced.load(Ordering::Acquire) {
            return Ok(());
        }
        self.sync_all().inspect_err(|_| self.sync_failed.store(true, Ordering::Release))
    }

    /// Drops what this host's page cache holds of it, and has been written.
    pub(super) fn forget_cached(&self) -> io::Result<()> {
        Ok(fadvise(&self.file, 0, None, Advice::DontNeed)?)
    }

    fn sync_all(&self) -> io::Result<()> {
        #[cfg(test)]
        drop(crate::sync::lock(&self.stall));
        // Before the call: what is written during it may not be covered.
        self.unsynced.store(false, Ordering::Release);
        self.file.sync_data().inspect_err(|_| self.unsynced.store(true, Ordering::Release))
    }

    fn allocate(&self, flags: FallocateFlags, offset: u64, length: u64) -> io::Result<()> {
        let result = fallocate(&self.file, flags, offset, length);
        self.unsynced.store(true, Ordering::Release);
        result.map_err(io::Error::from)
    }

    fn copy<B: BitmapSlice>(&self, direction: Direction, pieces: &[VolatileSlice<B>], offset: u64) -> io::Result<()> {
        #[cfg(test)]
        drop(crate::sync::lock(&self.stall));
        if !self.alignment.admits(pieces) {
            return self.bounce(direction, pieces, offset);
        }
        match self.copy_straight(direction, pieces, offset) {
            // The file system is more particular than it says.
            Err(error) if error.kind() == io::ErrorKind::InvalidInput => self.bounce(direction, pieces, offset),
            result => result,
        }
    }

    fn copy_straight<B: BitmapSlice>(
        &self,
        direction: Direction,
        pieces: &[VolatileSlice<B>],
        mut offset: u64,
    ) -> io::Result<()> {
        let mut left = pieces.to_vec();
        while !left.is_empty() {
            let done = transfer(&self.file, direction, &left, offset)?;
            if done == 0 {
                return Err(ended(direction));
            }
            offset += done as u64;
            left = without_first(left, done)?;
        }
        Ok(())
    }

    fn bounce<B: BitmapSlice>(
        &self,
        direction: Direction,
        pieces: &[VolatileSlice<B>],
        mut offset: u64,
    ) -> io::Result<()> {
        let total = pieces.iter().map(VolatileSlice::len).sum::<usize>();
        let mut buffer = AlignedBuffer::new(total.min(BOUNCE_BYTES));
        let mut left = pieces.to_vec();
        while !left.is_empty() {
            let (now, later) = split(left, buffer.bytes().len())?;
            let length = now.iter().map(VolatileSlice::len).sum::<usize>();
            let bytes = &mut buffer.bytes_mut()[..length];
            if direction == Direction::Read {
                self.file.read_exact_at(bytes, offset)?;
            }
            let mut at = 0;
            for piece in &now {
                let part = &mut bytes[at..at + piece.len()];
                match direction {
                    Direction::Read => piece.copy_from(part),
                    Direction::Write => drop(piece.copy_to(part)),
                }
                at += piece.len();
            }
            if direction == Direction::Write {
                self.file.write_all_at(bytes, offset)?;
            }
            offset += length as u64;
            left = later;
        }
        Ok(())
    }
}

/// Whether the file system cannot do it at all.
fn unsupported(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EOPNOTSUPP | libc::ENOSYS))
}

/// Opens an image as the guest is to use it.
pub(crate) fn open_file(path: &Path, read_only: bool, cache: CacheMode) -> io::Result<File> {
    let direct = if cache == CacheMode::Direct { libc::O_DIRECT } else { 0 };
    // Without waiting: a FIFO that lies where an image should must not keep the machine from starting.
    let file = OpenOptions::new()
        .read(true)
        .write(!read_only)
        .custom_flags(direct | libc::O_NONBLOCK | libc::O_NOCTTY)
        .open(path)
        .map_err(|error| match error.raw_os_error() {
            Some(libc::EINVAL) if direct != 0 => io::Error::new(
                io::ErrorKind::Unsupported,
                "its file system cannot go around the page cache (O_DIRECT); --unsafe-cache goes through it",
            ),
            _ => error,
        })?;
    let kind = rustix::fs::FileType::from_raw_mode(rustix::fs::fstat(&file)?.st_mode);
    match kind {
        rustix::fs::FileType::RegularFile | rustix::fs::FileType::BlockDevice => Ok(file),
        _ => Err(io::Error::new(io::ErrorKind::InvalidInput, "it is neither a file nor a block device")),
    }
}

fn ended(direction: Direction) -> io::Error {
    match direction {
        Direction::Read => io::Error::new(io::ErrorKind::UnexpectedEof, "the image has become shorter"),
        Direction::Write => io::ErrorKind::WriteZero.into(),
    }
}

/// The pieces without their first `count` bytes.
fn without_first<B: BitmapSlice>(
    pieces: Vec<VolatileSlice<'_, B>>,
    count: usize,
) -> io::Result<Vec<VolatileSlice<'_, B>>> {
    split(pieces, count).map(|(_, later)| later)
}

/// The first `count` bytes of the pieces, or all of them, and the rest.
#[allow(clippy::type_complexity)]
fn split<B: BitmapSlice>(
    pieces: Vec<VolatileSlice<'_, B>>,
    count: usize,
) -> io::Result<(Vec<VolatileSlice<'_, B>>, Vec<VolatileSlice<'_, B>>)> {
    let (mut first, mut rest) = (Vec::new(), Vec::new());
    let mut left = count;
    for piece in pieces {
        if piece.len() <= left {
            left -= piece.len();
            first.push(piece);
        } else if left == 0 {
            rest.push(piece);
        } else {
            first.push(piece.subslice(0, left).map_err(io::Error::other)?);
            rest.push(piece.offset(left).map_err(io::Error::other)?);
            left = 0;
        }
    }
    Ok((first, rest))
}
