//! Whether both hosts of a move see the same disks, proved before anything is sent; and locks that keep others off them.
//!
//! ```text
//! source                                        destination
//! makes a file beside each image ─ Question ──→ may it open that image? is it the same file? reads the file,
//! reads that one back            ←─ Evidence ── makes one of its own
//! ```
//!
//! A local copy, an unmounted share, another file system, a read-only export or a squashed root: each shows in one of the
//! steps. The files are removed by whoever made them, however the move ends.

mod inquiry;
mod locks;
mod nonce;
mod verdict;

#[cfg(test)]
mod tests;

use std::fs::Metadata;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::time::Duration;

use godwit_core::ownership::timed::within;
use serde::{Deserialize, Serialize};

pub(crate) use self::inquiry::DiskInquiry;
pub(crate) use self::locks::{Company, ImageLock};
use self::nonce::Nonce;
pub(crate) use self::verdict::DiskVerdict;

/// How long storage may take to answer all that is asked of it in preflight.
const STORAGE_LIMIT: Duration = Duration::from_secs(10);

/// What a source asks a destination, version 1.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Question {
    /// Whether disks go through the source's page cache.
    unsafe_cache: bool,
    disks: Vec<AskedDisk>,
}

/// A disk as the source sees it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct AskedDisk {
    id: String,
    /// Whether its image is locked.
    locked: bool,
    seen: Result<(Identity, Mark), String>,
}

/// What tells a file from others.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
struct Identity {
    inode: u64,
    size_bytes: u64,
    /// Seconds and nanoseconds of its last change.
    modified: (i64, i64),
    block_device: bool,
}

/// How the source has marked the folder of an image.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
enum Mark {
    /// Not at all: nobody writes this disk.
    None,
    /// With this file.
    File(Nonce),
}

/// A destination's answer, version 1: its own mark beside each disk that is written.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
struct Evidence {
    disks: Vec<(String, Nonce)>,
}

impl Identity {
    fn of(metadata: &Metadata) -> Self {
        Self {
            inode: metadata.ino(),
            size_bytes: metadata.len(),
            modified: (metadata.mtime(), metadata.mtime_nsec()),
            block_device: metadata.file_type().is_block_device(),
        }
    }
}

/// Does something with storage that may not answer: whoever has waited for [`STORAGE_LIMIT`] is gone, and what was made for it
/// goes, too.
pub(crate) fn with_storage<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> Result<T, String> {
    within(STORAGE_LIMIT, work)
}
