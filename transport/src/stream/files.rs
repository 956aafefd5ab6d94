//! Files passed on over unix sockets (SCM_RIGHTS).

use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{BorrowedFd, OwnedFd};

use godwit_core::memory_files::MAX_FILES;
use rustix::cmsg_space;
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage, SendFlags,
    recvmsg, sendmsg,
};
use socket2::Socket;

/// Room for the most files that come with one message. The kernel closes what does not fit.
const ANCILLARY_BYTES: usize = cmsg_space!(ScmRights(MAX_FILES));

/// Reads some bytes, and adds the files that come with them.
pub(super) fn receive(socket: &Socket, buffer: &mut [u8], files: &mut Vec<OwnedFd>) -> io::Result<usize> {
    let mut space = [MaybeUninit::uninit(); ANCILLARY_BYTES];
    let mut ancillary = RecvAncillaryBuffer::new(&mut space);
    let received = recvmsg(socket, &mut [IoSliceMut::new(buffer)], &mut ancillary, RecvFlags::CMSG_CLOEXEC)?;
    for message in ancillary.drain() {
        if let RecvAncillaryMessage::ScmRights(passed) = message {
            // All are taken out, and so closed if there are too many.
            files.extend(passed);
            files.truncate(MAX_FILES);
        }
    }
    Ok(received.bytes)
}

/// Writes some bytes, and passes `files` on with the first.
pub(super) fn send(socket: &Socket, buffer: &[u8], files: &[BorrowedFd<'_>]) -> io::Result<usize> {
    let mut space = [MaybeUninit::uninit(); ANCILLARY_BYTES];
    let mut ancillary = SendAncillaryBuffer::new(&mut space);
    let fits = files.len() <= MAX_FILES && (files.is_empty() || ancillary.push(SendAncillaryMessage::ScmRights(files)));
    if !fits {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, format!("{} files are too many", files.len())));
    }
    Ok(sendmsg(socket, &[IoSlice::new(buffer)], &mut ancillary, SendFlags::NOSIGNAL)?)
}
