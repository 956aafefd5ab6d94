//! userfaultfd(2): who touches a page that is not there waits until it is put in place.
//!
//! The few calls that are needed, by hand. Faults of the kernel's own, KVM's above all, count as well.

use std::io;
use std::os::fd::{AsFd, FromRawFd, OwnedFd};
use std::time::Duration;

use godwit_core::{PAGE_SIZE, Placed};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use vmm_sys_util::ioctl::{ioctl_with_mut_ref, ioctl_with_ref};
use vmm_sys_util::{ioctl_ior_nr, ioctl_iowr_nr};

// From linux/userfaultfd.h.
const UFFDIO: u32 = 0xaa;
const UFFD_API: u64 = 0xaa;
const UFFD_FEATURE_MISSING_SHMEM: u64 = 1 << 5;
const UFFDIO_REGISTER_MODE_MISSING: u64 = 1 << 0;
const UFFD_EVENT_PAGEFAULT: u8 = 0x12;
/// Bytes in a `uffd_msg`; those of an address that was touched begin at [`MESSAGE_ADDRESS`].
const MESSAGE_BYTES: usize = 32;
const MESSAGE_ADDRESS: usize = 16;
/// So many messages are read at once.
const MESSAGES: usize = 64;
/// The kernel says EAGAIN while mappings of this process are being changed: for so often that is taken for an accident.
const MAX_TRIES: u32 = 1000;

#[repr(C)]
struct Api {
    api: u64,
    features: u64,
    ioctls: u64,
}

#[repr(C)]
struct UffdRange {
    start: u64,
    length: u64,
}

#[repr(C)]
struct Register {
    range: UffdRange,
    mode: u64,
    ioctls: u64,
}

#[repr(C)]
struct Copy {
    to: u64,
    from: u64,
    length: u64,
    mode: u64,
    copied: i64,
}

#[repr(C)]
struct ZeroPage {
    range: UffdRange,
    mode: u64,
    zeroed: i64,
}

ioctl_iowr_nr!(UFFDIO_API, UFFDIO, 0x3f, Api);
ioctl_iowr_nr!(UFFDIO_REGISTER, UFFDIO, 0x00, Register);
ioctl_ior_nr!(UFFDIO_UNREGISTER, UFFDIO, 0x01, UffdRange);
ioctl_ior_nr!(UFFDIO_WAKE, UFFDIO, 0x02, UffdRange);
ioctl_iowr_nr!(UFFDIO_COPY, UFFDIO, 0x03, Copy);
ioctl_iowr_nr!(UFFDIO_ZEROPAGE, UFFDIO, 0x04, ZeroPage);

/// A descriptor that hears of faults. Closing it lets whoever waits go on, on pages of zeros.
pub(super) struct Userfault {
    fd: OwnedFd,
}

impl Userfault {
    /// One that hears of the kernel's own faults, too: for that this process needs CAP_SYS_PTRACE, or vm.unprivileged_userfaultfd = 1.
    pub(super) fn open() -> io::Result<Self> {
        // SAFETY: the call takes flags only, and gives a new descriptor or an error.
        let fd = unsafe { libc::syscall(libc::SYS_userfaultfd, libc::O_CLOEXEC | libc::O_NONBLOCK) };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the descriptor has just been made, for nobody else.
        let fd = unsafe { OwnedFd::from_raw_fd(fd as i32) };
        let mut api = Api { api: UFFD_API, features: UFFD_FEATURE_MISSING_SHMEM, ioctls: 0 };
        // SAFETY: the kernel reads and writes exactly this structure.
        check(unsafe { ioctl_with_mut_ref(&fd, UFFDIO_API(), &mut api) })?;
        Ok(Self { fd })
    }

    /// From here on faults on pages of this mapping that are not there are heard of.
    pub(super) fn register(&self, start: *const u8, length: usize) -> io::Result<()> {
        let range = UffdRange { start: start as u64, length: length as u64 };
        let mut register = Register { range, mode: UFFDIO_REGISTER_MODE_MISSING, ioctls: 0 };
        // SAFETY: the kernel reads and writes exactly this structure. What it changes is who provides pages, not what is there.
        check(unsafe { ioctl_with_mut_ref(&self.fd, UFFDIO_REGISTER(), &mut register) })
    }

    /// The kernel provides pages of this mapping again, and whoever waits goes on.
    pub(super) fn unregister(&self, start: *const u8, length: usize) -> io::Result<()> {
        let range = UffdRange { start: start as u64, length: length as u64 };
        // SAFETY: the kernel reads exactly this structure. What it changes is who provides pages, not what is there.
        check(unsafe { ioctl_with_ref(&self.fd, UFFDIO_UNREGISTER(), &range) })
    }

    /// Adds the addresses of faults to `addresses`, after waiting for one for `limit` at most.
    pub(super) fn wait(&self, limit: Duration, addresses: &mut Vec<u64>) -> io::Result<()> {
        let mut polled = [PollFd::new(&self.fd, PollFlags::IN)];
        match poll(&mut polled, Timespec::try_from(limit).ok().as_ref()) {
            Ok(0) | Err(rustix::io::Errno::INTR) => return Ok(()),
            Ok(_) => {}
            Err(error) => return Err(error.into()),
        }
        let mut messages = [0; MESSAGE_BYTES * MESSAGES];
        let length = match rustix::io::read(self.fd.as_fd(), &mut messages) {
            Ok(length) => length,
            // Somebody else has seen to it.
            Err(rustix::io::Errno::AGAIN | rustix::io::Errno::INTR) => return Ok(()),
            Err(error) => return Err(error.into()),
        };
        for message in messages[..length].chunks_exact(MESSAGE_BYTES) {
            if message[0] == UFFD_EVENT_PAGEFAULT {
                let mut address = [0; 8];
                address.copy_from_slice(&message[MESSAGE_ADDRESS..][..8]);
                addresses.push(u64::from_ne_bytes(address));
            }
        }
        Ok(())
    }

    /// Puts a page in place (`None`: zeros) and lets whoever waits for it go on.
    pub(super) fn place(&self, address: u64, contents: Option<&[u8; PAGE_SIZE]>) -> io::Result<Placed> {
        for _ in 0..MAX_TRIES {
            let placed = match contents {
                Some(contents) => self.copy(address, contents),
                None => self.zero(address),
            };
            match placed.map_err(|error| (error.raw_os_error(), error)) {
                Ok(()) => return Ok(Placed::Now),
                Err((Some(libc::EEXIST), _)) => return self.wake(address).map(|()| Placed::Already),
                // It is not registered any more.
                Err((Some(libc::ENOENT), _)) => return Ok(Placed::NotWanted),
                Err((Some(libc::EAGAIN), _)) => std::thread::yield_now(),
                Err((_, error)) => return Err(error),
            }
        }
        Err(io::Error::from_raw_os_error(libc::EAGAIN))
    }

    fn copy(&self, address: u64, contents: &[u8; PAGE_SIZE]) -> io::Result<()> {
        let from = contents.as_ptr() as u64;
        let mut copy = Copy { to: address, from, length: PAGE_SIZE as u64, mode: 0, copied: 0 };
        // SAFETY: the kernel reads a page from `contents`, and writes it only to where nothing was in a mapping that was registered,
        // which is guest memory.
        check(unsafe { ioctl_with_mut_ref(&self.fd, UFFDIO_COPY(), &mut copy) })
    }

    fn zero(&self, address: u64) -> io::Result<()> {
        let range = UffdRange { start: address, length: PAGE_SIZE as u64 };
        let mut zero = ZeroPage { range, mode: 0, zeroed: 0 };
        // SAFETY: as above, without anything to read.
        check(unsafe { ioctl_with_mut_ref(&self.fd, UFFDIO_ZEROPAGE(), &mut zero) })
    }

    fn wake(&self, address: u64) -> io::Result<()> {
        let range = UffdRange { start: address, length: PAGE_SIZE as u64 };
        // SAFETY: the kernel reads exactly this structure, and changes no memory.
        check(unsafe { ioctl_with_ref(&self.fd, UFFDIO_WAKE(), &range) })
    }
}

fn check(result: i32) -> io::Result<()> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}
