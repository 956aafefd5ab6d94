//! Reading and writing a file straight from and to guest memory: the one unsafe part of the block device.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;

use vm_memory::VolatileSlice;
use vm_memory::bitmap::BitmapSlice;

/// The most pieces that the kernel takes at once (IOV_MAX).
const MAX_PIECES: usize = 1024;

/// Which way data goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Direction {
    /// From the file into guest memory.
    Read,
    /// From guest memory into the file.
    Write,
}

/// Moves bytes between the file from `offset` on and these pieces of guest memory: as many as one system call does. Marks nothing
/// dirty: that is for the caller to do, afterwards.
pub(super) fn transfer<B: BitmapSlice>(
    file: &File,
    direction: Direction,
    pieces: &[VolatileSlice<B>],
    offset: u64,
) -> io::Result<usize> {
    let offset = libc::off64_t::try_from(offset).map_err(|_| io::ErrorKind::InvalidInput)?;
    let guards: Vec<_> = pieces.iter().take(MAX_PIECES).map(VolatileSlice::ptr_guard_mut).collect();
    let vectors: Vec<_> =
        guards.iter().map(|guard| libc::iovec { iov_base: guard.as_ptr().cast(), iov_len: guard.len() }).collect();
    let count = vectors.len() as libc::c_int;
    loop {
        // SAFETY: each vector is a piece of mapped guest memory that its slice borrows and its guard keeps accessible through the
        // call. Guest memory is only ever accessed as volatile, so that its contents may change under any reader.
        let done = unsafe {
            match direction {
                Direction::Read => libc::preadv64(file.as_raw_fd(), vectors.as_ptr(), count, offset),
                Direction::Write => libc::pwritev64(file.as_raw_fd(), vectors.as_ptr(), count, offset),
            }
        };
        match usize::try_from(done) {
            Ok(done) => return Ok(done),
            Err(_) => match io::Error::last_os_error() {
                error if error.kind() == io::ErrorKind::Interrupted => {}
                error => return Err(error),
            },
        }
    }
}
