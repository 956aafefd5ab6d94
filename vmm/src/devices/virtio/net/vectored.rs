//! Moving frames between a tap and guest memory without a copy in between: the one place where guest memory is handed to the kernel.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;

use vm_memory::bitmap::Bitmap;

use super::chain::Piece;

/// The most pieces that the kernel takes at once (IOV_MAX), with room for the buffer beside guest memory.
pub(super) const MAX_PIECES: usize = 1023;

/// Reads one frame into these pieces of guest memory, and what does not fit there into `rest`. Returns the frame's length. Marks as
/// written what it has written.
pub(super) fn read(file: &File, pieces: &[Piece], rest: &mut [u8]) -> io::Result<usize> {
    let mut vectors = vectors(pieces)?;
    vectors.push(libc::iovec { iov_base: rest.as_mut_ptr().cast(), iov_len: rest.len() });
    // SAFETY: each vector but the last is a piece of mapped guest memory that its slice borrows, the last one is borrowed
    // exclusively. Guest memory is only ever accessed as volatile, so that its contents may change under any reader.
    let length = again(|| unsafe { libc::readv(file.as_raw_fd(), vectors.as_ptr(), vectors.len() as libc::c_int) })?;
    // After the data has landed: a mark that is harvested before would leave it behind.
    let mut left = length;
    for piece in pieces {
        piece.bitmap().mark_dirty(0, piece.len().min(left));
        left = left.saturating_sub(piece.len());
    }
    Ok(length)
}

/// Writes one frame from these pieces of guest memory.
pub(super) fn write(file: &File, pieces: &[Piece]) -> io::Result<usize> {
    let vectors = vectors(pieces)?;
    // SAFETY: each vector is a piece of mapped guest memory that its slice borrows, and the kernel only reads it.
    again(|| unsafe { libc::writev(file.as_raw_fd(), vectors.as_ptr(), vectors.len() as libc::c_int) })
}

fn vectors(pieces: &[Piece]) -> io::Result<Vec<libc::iovec>> {
    if pieces.len() > MAX_PIECES {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    let mut vectors = Vec::with_capacity(pieces.len() + 1);
    // Memory that is mapped for as long as the machine exists needs no guard beyond the borrow.
    vectors.extend(
        pieces
            .iter()
            .map(|piece| libc::iovec { iov_base: piece.ptr_guard_mut().as_ptr().cast(), iov_len: piece.len() }),
    );
    Ok(vectors)
}

/// Repeats a call that a signal has interrupted.
fn again(mut call: impl FnMut() -> isize) -> io::Result<usize> {
    loop {
        match usize::try_from(call()) {
            Ok(length) => return Ok(length),
            Err(_) => match io::Error::last_os_error() {
                error if error.kind() == io::ErrorKind::Interrupted => {}
                error => return Err(error),
            },
        }
    }
}
