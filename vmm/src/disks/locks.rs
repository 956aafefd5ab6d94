//! Locks on disk images, on the bytes that QEMU uses: whoever runs an image keeps QEMU, qemu-img and Godwit off it.
//!
//! Byte 100 + i of an image says "I use permission i", byte 200 + i "I let nobody else have permission i". All locks are shared
//! ones. Who wants an image takes its bytes first, and then tests that nobody else holds what speaks against that; of two at the same
//! time at most one gets it. The image's contents have nothing to do with these bytes.
//!
//! In a move the destination cannot make that test, since the source holds the image. It takes its bytes before the pause, the source drops
//! its own after the guest runs there; nobody else gets in between. The source has tested, from its own descriptor, that
//! nobody holds the image but what knows the rules of a move: [`GODWIT`].

#[cfg(test)]
pub(super) mod tests;

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::sync::{Arc, Mutex};

use libc::{F_RDLCK, F_UNLCK, F_WRLCK};
use nix::errno::Errno;
use nix::fcntl::{FcntlArg, fcntl};

use super::with_storage;
use crate::config::DiskConfig;
use crate::error::VmmError;
use crate::sync::lock;

/// "I use permission i" is this byte plus i.
const USES: i64 = 100;
/// "I let nobody else have permission i" is this byte plus i.
const REFUSES: i64 = 200;
/// To read what does not change by itself (QEMU's BLK_PERM_CONSISTENT_READ).
const READ: i64 = 0;
/// To write (BLK_PERM_WRITE).
const WRITE: i64 = 1;
/// "I am Godwit": QEMU does not know this byte. What holds an image beside its machine and is Godwit too is another end of one of
/// that machine's moves that has not let go yet: any other one would have been refused when it started.
const GODWIT: i64 = 300;

/// Why storage that is otherwise there may not answer when it is asked for locks.
const GRACE: &str = "an NFS server that has just started gives out no locks until its grace period is over (90 s by default): \
                     try again then";

/// What a person can do about an image in use.
const ADVICE: &str = "end whatever uses it, or wait for its end; if its host is dead, the storage lets go after a while \
                      (docs/handover.md, Locks on images)";

/// Whom a machine finds using its images.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Company {
    /// Nobody: it is started here.
    Nobody,
    /// Its source, from which it moves here.
    Source,
}

/// The locks of one machine on the image of one disk. They last until [`ImageLock::release`], or until this is dropped.
#[derive(Debug)]
pub(crate) struct ImageLock {
    disk: DiskConfig,
    /// A descriptor for nothing else. Locks belong to it: whatever is done with others of the same file, they stay. None: there are no
    /// locks, because the file system has none, or not any more.
    file: Mutex<Option<Arc<File>>>,
}

impl ImageLock {
    /// Locks an open image; or nothing, with a warning, if its file system has no locks.
    ///
    /// # Errors
    /// If somebody else uses the image in a way that does not go together with the machine's, or the storage does not answer.
    pub(crate) fn take(disk: &DiskConfig, image: &File, company: Company) -> Result<Self, VmmError> {
        let access = Access::of(disk);
        let failed = || VmmError::os(format!("disk {}: cannot lock {}", disk.id, disk.path.display()));
        let image = image.try_clone().map_err(failed())?;
        let taken = with_storage(move || access.take(&image, company))
            .map_err(|why| failed()(io::Error::other(format!("{why}; {GRACE}"))))?;
        let file = match taken {
            Ok(file) => Some(Arc::new(file)),
            Err(LockError::Unsupported(error)) => {
                // A source has been told in preflight.
                if company == Company::Nobody {
                    tracing::warn!("{}", unlocked(disk, &error));
                }
                None
            }
            Err(LockError::InUse(how)) => {
                let (disk, path) = (disk.id.clone(), disk.path.clone());
                return Err(VmmError::ImageInUse { disk, path, how: format!("{how}; {ADVICE}") });
            }
            Err(LockError::Os(error)) => return Err(failed()(error)),
        };
        Ok(Self { disk: disk.clone(), file: Mutex::new(file) })
    }

    /// Whether the image is locked.
    pub(crate) fn is_held(&self) -> bool {
        lock(&self.file).is_some()
    }

    /// Tests that nobody else uses the image, but for ends of moves. May block as long as the storage does not answer.
    pub(crate) fn test(&self) -> Result<(), String> {
        let Some(file) = lock(&self.file).clone() else { return Ok(()) };
        let path = self.disk.path.display();
        match Access::of(&self.disk).test(&file, |_| true) {
            Ok(()) => Ok(()),
            Err(LockError::InUse(how)) if is_held(&file, GODWIT).unwrap_or(false) => {
                tracing::warn!("disk {}: {path}: {how}: an end of an earlier move has not let go yet", self.disk.id);
                Ok(())
            }
            Err(LockError::InUse(how)) => Err(format!("{path} is in use beside the machine: {how}; {ADVICE}")),
            Err(LockError::Unsupported(error) | LockError::Os(error)) => {
                Err(format!("it cannot be found out whether others use {path}: {error}"))
            }
        }
    }

    /// Lets others have the image: the machine does not touch it any more.
    pub(crate) fn release(&self) {
        let Some(file) = lock(&self.file).take() else { return };
        // Closing asks a network file system.
        if let Err(why) = with_storage(move || drop(file)) {
            tracing::warn!("disk {}: the image's locks have not been let go yet: {why}", self.disk.id);
        }
    }
}

/// What a destination sees, before it takes anything, of the locks on an open image that its source says it holds: something to
/// warn of, or an error if the image is in use in a way in which the source does not use it.
pub(crate) fn look(disk: &DiskConfig, image: &File, source_holds: bool) -> Result<Option<String>, String> {
    let (access, path) = (Access::of(disk), disk.path.display());
    let seen = access
        .test(image, |byte| !(source_holds && access.bytes().any(|held| held == byte)))
        .and_then(|()| access.bytes().try_fold(true, |all, byte| Ok(all && is_held(image, byte)?)));
    match seen {
        _ if !source_holds && seen.is_ok() => {
            Ok(Some(format!("disk {}: the source has no locks on its image: {}", disk.id, keeps_nobody_off())))
        }
        Ok(true) => Ok(None),
        Ok(false) => Ok(Some(format!(
            "disk {}: the source's locks on {path} are not seen here (is it mounted with nolock or local_lock?): QEMU and \
             qemu-img at one host are not kept off it while the other one runs it",
            disk.id
        ))),
        Err(LockError::Unsupported(error)) => Ok(Some(unlocked(disk, &error))),
        Err(LockError::InUse(how)) => Err(format!("{path} is in use: {how}; {ADVICE}")),
        Err(LockError::Os(error)) => Err(format!("it cannot be found out whether others use {path}: {error}")),
    }
}

fn unlocked(disk: &DiskConfig, error: &io::Error) -> String {
    let path = disk.path.display();
    format!("disk {}: {path} cannot be locked ({error}): {}", disk.id, keeps_nobody_off())
}

fn keeps_nobody_off() -> &'static str {
    "nothing keeps QEMU, qemu-img or another godwit off it"
}

/// What a machine uses of an image, and what it lets nobody else have: the same as a virtio-blk device of QEMU.
#[derive(Debug, Clone, Copy)]
struct Access {
    uses: &'static [i64],
    refuses: &'static [i64],
}

impl Access {
    fn of(disk: &DiskConfig) -> Self {
        let uses: &[i64] = if disk.readonly { &[READ] } else { &[READ, WRITE] };
        Self { uses, refuses: &[WRITE] }
    }

    /// The bytes that are held.
    fn bytes(self) -> impl Iterator<Item = i64> {
        let (uses, refuses) = (self.uses.iter().map(|i| USES + i), self.refuses.iter().map(|i| REFUSES + i));
        uses.chain(refuses).chain([GODWIT])
    }

    /// The bytes that nobody else may hold: uses of what is refused, and refusals of what is used.
    fn opposed(self) -> impl Iterator<Item = i64> {
        self.refuses.iter().map(|i| USES + i).chain(self.uses.iter().map(|i| REFUSES + i))
    }

    /// Takes the bytes, on a descriptor of their own, and tests that nobody is opposed, as far as that can be known.
    fn take(self, image: &File, company: Company) -> Result<File, LockError> {
        // The same file whatever its path leads to by now, and not the same open file.
        let file = File::open(format!("/proc/self/fd/{}", image.as_raw_fd())).map_err(LockError::Os)?;
        for byte in self.bytes() {
            match hold(&file, byte) {
                Err(LockError::Os(error)) if matches!(error.raw_os_error(), Some(libc::EAGAIN | libc::EACCES)) => {
                    return Err(LockError::InUse(format!("a program has locked byte {byte} of it for itself alone")));
                }
                held => held?,
            }
        }
        let held_by_source = |byte| company == Company::Source && self.bytes().any(|held| held == byte);
        self.test(&file, |byte| !held_by_source(byte))?;
        Ok(file)
    }

    /// Tests that nobody holds those opposed bytes that are `of_interest`. Locks of `file` itself do not count.
    fn test(self, file: &File, of_interest: impl Fn(i64) -> bool) -> Result<(), LockError> {
        for byte in self.opposed().filter(|byte| of_interest(*byte)) {
            if is_held(file, byte)? {
                let who =
                    if is_held(file, GODWIT)? { "another Godwit machine" } else { "another program (QEMU, qemu-img?)" };
                return Err(LockError::InUse(format!("{who} {} (a lock on byte {byte})", meaning(byte))));
            }
        }
        Ok(())
    }
}

/// What somebody who holds this byte does with the image.
fn meaning(byte: i64) -> &'static str {
    match byte - USES {
        WRITE => "has it open for writing",
        READ => "has it open for reading",
        _ if byte == REFUSES + WRITE => "has it open and lets nobody write to it",
        _ => "has it open and lets nobody read it",
    }
}

/// Why an image could not be locked.
#[derive(Debug)]
enum LockError {
    /// Somebody uses it, and how.
    InUse(String),
    /// The file system has no locks.
    Unsupported(io::Error),
    Os(io::Error),
}

impl From<Errno> for LockError {
    fn from(error: Errno) -> Self {
        match error {
            Errno::ENOLCK | Errno::EOPNOTSUPP | Errno::ENOSYS => LockError::Unsupported(error.into()),
            error => LockError::Os(error.into()),
        }
    }
}

/// Whether anybody holds `byte`, locks of `file` itself aside.
fn is_held(file: &File, byte: i64) -> Result<bool, LockError> {
    let mut range = range(F_WRLCK, byte);
    call(file, FcntlArg::F_OFD_GETLK(&mut range))?;
    Ok(i32::from(range.l_type) != F_UNLCK)
}

fn hold(file: &File, byte: i64) -> Result<(), LockError> {
    call(file, FcntlArg::F_OFD_SETLK(&range(F_RDLCK, byte)))
}

fn call(file: &File, argument: FcntlArg<'_>) -> Result<(), LockError> {
    Ok(fcntl(file, argument).map(drop)?)
}

fn range(kind: i32, byte: i64) -> libc::flock {
    libc::flock { l_type: kind as i16, l_whence: libc::SEEK_SET as i16, l_start: byte, l_len: 1, l_pid: 0 }
}
