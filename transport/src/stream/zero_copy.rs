//! Sending without a copy (MSG_ZEROCOPY, Documentation/networking/msg_zerocopy.rst in the kernel tree): the kernel reads a buffer until the
//! peer has confirmed what is in it, and says so. Until then it is kept here, and another is written to.
//!
//! Over a device that cannot do it the kernel copies after all, at a higher price than a copy that was asked for: it says that too, and then
//! what follows goes as usual.

use std::collections::VecDeque;
use std::io;
use std::os::fd::AsRawFd;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::sys::socket::{ControlMessageOwned, MsgFlags, recvmsg};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use socket2::Socket;

/// So many buffers may be under way on a connection: a megabyte or so, which a peer that is 0.1 ms away confirms at 10 GB/s. More would be
/// memory that is in no cache.
const MOST_KEPT: usize = 8;
/// Below this a copy costs less than what keeping account of it does (the kernel's documentation: about 10 KB).
const LEAST_BYTES: usize = 16 << 10;
/// How long an end waits for the peer to confirm what is under way.
const END_LIMIT: Duration = Duration::from_secs(1);
/// What notices are read into (`linux/errqueue.h`): the origin of those about sending without a copy, and that a copy was made.
const SO_EE_ORIGIN_ZEROCOPY: u8 = 5;
const SO_EE_CODE_ZEROCOPY_COPIED: u8 = 1;

/// What is under way without having been copied, on one connection.
pub(super) struct ZeroCopy {
    /// What is sent next goes without a copy.
    on: bool,
    /// Why it does not, if nobody has been told yet.
    says: Option<String>,
    /// Calls made so far, modulo 2^32: the kernel numbers them.
    calls: u32,
    kept: VecDeque<Kept>,
    free: Vec<Vec<u8>>,
}

/// A buffer that the kernel reads, on behalf of so many calls from the first on.
struct Kept {
    first: u32,
    calls: u32,
    outstanding: u32,
    buffer: Vec<u8>,
}

/// Calls that are done, and whether the kernel has copied what they were to send.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Notice {
    first: u32,
    last: u32,
    copied: bool,
}

impl ZeroCopy {
    /// For a connection, which is told of it.
    pub(super) fn new(socket: &Socket) -> Self {
        let refused = super::tcp::set_option(socket, libc::SO_ZEROCOPY, 1).err();
        let says = refused.map(|error| format!("pages are copied to be sent: this kernel cannot do without ({error})"));
        Self { on: says.is_none(), says, calls: 0, kept: VecDeque::new(), free: Vec::new() }
    }

    /// What there is to say, once.
    pub(super) fn says(&mut self) -> Option<String> {
        self.says.take()
    }

    /// Whether so many bytes go without a copy.
    pub(super) fn pays_for(&self, bytes: usize) -> bool {
        self.on && bytes >= LEAST_BYTES
    }

    /// From here on all is copied: what has been copied is the socket's, and nobody waits for it.
    pub(super) fn stop(&mut self) {
        self.on = false;
    }

    /// Sends some of `rest`, which stays as it is until that is confirmed. What the kernel has no memory to keep account of is copied.
    pub(super) fn send(&mut self, socket: &Socket, rest: &[u8], flags: libc::c_int) -> io::Result<usize> {
        match socket.send_with_flags(rest, flags | libc::MSG_ZEROCOPY) {
            Ok(sent) => {
                self.calls = self.calls.wrapping_add(1);
                Ok(sent)
            }
            Err(error) if error.raw_os_error() == Some(libc::ENOBUFS) => socket.send_with_flags(rest, flags),
            Err(error) => Err(error),
        }
    }

    /// Number of the next call.
    pub(super) fn next_call(&self) -> u32 {
        self.calls
    }

    /// Keeps a buffer of which something was sent since call `first`, and puts another of its length in its place.
    pub(super) fn keep(&mut self, buffer: &mut Vec<u8>, first: u32) {
        let calls = self.calls.wrapping_sub(first);
        if calls == 0 {
            return;
        }
        let mut other = self.free.pop().unwrap_or_else(|| vec![0; buffer.len()]);
        other.resize(buffer.len(), 0);
        let buffer = std::mem::replace(buffer, other);
        self.kept.push_back(Kept { first, calls, outstanding: calls, buffer });
    }

    /// Takes back what is confirmed; if there is too much under way, waits until there is something to hear. Whether there is room then: if
    /// not, the connection may have failed, which its own error tells.
    pub(super) fn make_room(&mut self, socket: &Socket) -> io::Result<bool> {
        self.hear(socket)?;
        if self.kept.len() < MOST_KEPT {
            return Ok(true);
        }
        wait(socket, None)?;
        self.hear(socket)?;
        Ok(self.kept.len() < MOST_KEPT)
    }

    fn hear(&mut self, socket: &Socket) -> io::Result<()> {
        while let Some(notice) = next_notice(socket)? {
            self.note(notice);
        }
        Ok(())
    }

    fn note(&mut self, notice: Notice) {
        let Notice { first, last, copied } = notice;
        if copied && self.on {
            self.on = false;
            self.says = Some(
                "pages are copied to be sent: the kernel copies them over this link whatever it is asked for".into(),
            );
        }
        for kept in &mut self.kept {
            // Numbers wrap around: what counts is how far they are from the buffer's first.
            let confirmed = |call: u32| (call.wrapping_sub(first)) <= last.wrapping_sub(first);
            let calls = (0..kept.calls).filter(|call| confirmed(kept.first.wrapping_add(*call))).count() as u32;
            kept.outstanding = kept.outstanding.saturating_sub(calls);
        }
        while self.kept.front().is_some_and(|kept| kept.outstanding == 0) {
            self.free.extend(self.kept.pop_front().map(|kept| kept.buffer));
        }
    }

    /// The connection is about to end. What is sent last must not be written over by whoever gets the memory next.
    pub(super) fn end(&mut self, socket: &Socket) {
        let deadline = Instant::now() + END_LIMIT;
        while !self.kept.is_empty() {
            let left = deadline.saturating_duration_since(Instant::now());
            let waited = if left.is_zero() { Err(io::ErrorKind::TimedOut.into()) } else { wait(socket, Some(left)) };
            let before = self.kept.len();
            let heard = waited.and_then(|()| self.hear(socket));
            if heard.is_err() || (self.kept.len() == before && socket.take_error().is_ok_and(|error| error.is_some())) {
                tracing::debug!("{} buffers stay with a connection that has ended", self.kept.len());
                self.kept.drain(..).for_each(|kept| std::mem::forget(kept.buffer));
            } else if self.kept.len() == before {
                // It is over, and the kernel is not done with it.
                std::thread::sleep(Duration::from_millis(1));
            }
        }
    }
}

/// Waits until there is a notice, or the connection is over.
fn wait(socket: &Socket, limit: Option<Duration>) -> io::Result<()> {
    let limit = limit.and_then(|limit| Timespec::try_from(limit).ok());
    // Errors are always looked for, and notices come as those.
    poll(&mut [PollFd::new(socket, PollFlags::empty())], limit.as_ref())?;
    Ok(())
}

/// The next notice on the socket's error queue; `None`: there is none now.
fn next_notice(socket: &Socket) -> io::Result<Option<Notice>> {
    let mut space = nix::cmsg_space!(libc::sock_extended_err, libc::sockaddr_in6);
    let flags = MsgFlags::MSG_ERRQUEUE | MsgFlags::MSG_DONTWAIT;
    let message = match recvmsg::<()>(socket.as_raw_fd(), &mut [], Some(&mut space), flags) {
        Err(Errno::EAGAIN) => return Ok(None),
        other => other?,
    };
    for message in message.cmsgs()? {
        if let ControlMessageOwned::Ipv4RecvErr(error, _) | ControlMessageOwned::Ipv6RecvErr(error, _) = message
            && error.ee_origin == SO_EE_ORIGIN_ZEROCOPY
            && error.ee_errno == 0
        {
            let copied = error.ee_code & SO_EE_CODE_ZEROCOPY_COPIED != 0;
            return Ok(Some(Notice { first: error.ee_info, last: error.ee_data, copied }));
        }
    }
    Err(io::Error::other("a notice on the connection's error queue is about something else"))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn idle(calls: u32) -> ZeroCopy {
        ZeroCopy { on: true, says: None, calls, kept: VecDeque::new(), free: Vec::new() }
    }

    proptest! {
        /// Buffers of a few calls each, from any number on; notices of all calls, cut and ordered at random.
        #[test]
        fn a_buffer_is_free_once_all_of_its_calls_are_confirmed(
            start in prop_oneof![any::<u32>(), u32::MAX - 5..],
            calls in prop::collection::vec(1u32..4, 1..6),
            cuts in prop::collection::vec((1u32..4, any::<u32>()), 20),
        ) {
            let mut state = idle(start);
            for (number, calls) in calls.iter().enumerate() {
                let (first, mut buffer) = (state.next_call(), vec![number as u8; 3]);
                state.calls = state.calls.wrapping_add(*calls);
                state.keep(&mut buffer, first);
                prop_assert_eq!(buffer.len(), 3);
            }
            let total: u32 = calls.iter().sum();
            let (mut at, mut notices) = (0, Vec::new());
            for (length, order) in cuts.into_iter().cycle() {
                if at == total {
                    break;
                }
                let last = (at + length).min(total) - 1;
                notices.push((order, at, last));
                at = last + 1;
            }
            notices.sort_unstable();
            let mut confirmed = vec![false; total as usize];
            for (_, first, last) in notices {
                state.note(Notice { first: start.wrapping_add(first), last: start.wrapping_add(last), copied: false });
                confirmed[first as usize..=last as usize].fill(true);
                let mut at = 0;
                let done = |calls: &u32| {
                    let from = at;
                    at += *calls as usize;
                    confirmed[from..at].iter().all(|confirmed| *confirmed)
                };
                // One that waits for an earlier one is only kept longer.
                let expected = calls.iter().map(done).take_while(|done| *done).count();
                prop_assert_eq!(calls.len() - state.kept.len(), expected);
                prop_assert_eq!(state.free.len(), expected);
            }
            prop_assert!(state.kept.is_empty());
        }
    }

    #[test]
    fn once_the_kernel_copies_nothing_more_goes_so_and_it_is_said_once() {
        let mut state = idle(7);
        assert!(state.pays_for(LEAST_BYTES) && !state.pays_for(LEAST_BYTES - 1));
        state.note(Notice { first: 7, last: 7, copied: true });
        state.note(Notice { first: 8, last: 8, copied: true });
        assert!(!state.pays_for(1 << 20));
        assert!(state.says().unwrap().contains("copied"));
        assert_eq!(state.says(), None);
    }
}
