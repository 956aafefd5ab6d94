//! The workload guest's header page, from outside.

use std::{fmt, io};

use super::access::{GuestRange, GuestRead, GuestWrite};
use super::config::{Contents, Order, Rate, WriteUnit, WriterConfig};
use super::layout::{self, HEADER, MAX_RANGES, MAX_VCPUS, PAGE_BYTES, VCPU_LINE_BYTES, field, line, status};

/// The header page of a workload guest whose memory is `M`: what can be seen and set while it runs.
#[derive(Debug, Clone, Copy)]
pub struct Header<'m, M: ?Sized> {
    memory: &'m M,
}

impl<'m, M: GuestRead + ?Sized> Header<'m, M> {
    /// Finds the header page; fails if this is not a workload guest of a known layout.
    pub fn new(memory: &'m M) -> Result<Self, HeaderError> {
        let header = Self { memory };
        header.snapshot()?;
        Ok(header)
    }

    /// A copy of the whole page.
    pub fn snapshot(&self) -> Result<HeaderPage, HeaderError> {
        let mut bytes = Box::new([0; PAGE_BYTES as usize]);
        self.memory.read(HEADER, bytes.as_mut_slice()).map_err(HeaderError::Read)?;
        let page = HeaderPage { bytes };
        match (page.u64(field::MAGIC), page.u32(field::LAYOUT_VERSION)) {
            (layout::MAGIC, layout::LAYOUT_VERSION) => Ok(page),
            (layout::MAGIC, version) => Err(HeaderError::Version { version }),
            (magic, _) => Err(HeaderError::NoWorkloadGuest { magic }),
        }
    }

    /// How far the guest is.
    pub fn status(&self) -> Result<Status, HeaderError> {
        Ok(self.snapshot()?.status())
    }

    /// The heartbeat of one vCPU: the cheapest thing to sample.
    pub fn heartbeat(&self, vcpu: usize) -> Result<u64, HeaderError> {
        let mut bytes = [0; 8];
        let address = HEADER + vcpu_line(vcpu.min(MAX_VCPUS - 1)) + line::HEARTBEAT;
        self.memory.read(address, &mut bytes).map_err(HeaderError::Read)?;
        Ok(u64::from_le_bytes(bytes))
    }

    /// The heartbeats of all vCPUs at work.
    pub fn heartbeats(&self) -> Result<Vec<u64>, HeaderError> {
        Ok(self.snapshot()?.heartbeats())
    }

    /// Pages per second that the guest is asked to write, all vCPUs together.
    pub fn rate(&self) -> Result<Rate, HeaderError> {
        Ok(self.snapshot()?.rate())
    }
}

impl<M: GuestWrite + ?Sized> Header<'_, M> {
    /// Asks the guest to write at `rate` from now on.
    pub fn set_rate(&self, rate: Rate) -> Result<(), HeaderError> {
        self.memory.write(HEADER + field::RATE, &rate.setting().to_le_bytes()).map_err(HeaderError::Write)
    }
}

/// A copy of a header page.
#[derive(Clone)]
pub struct HeaderPage {
    bytes: Box<[u8; PAGE_BYTES as usize]>,
}

impl HeaderPage {
    /// How far the guest is.
    pub fn status(&self) -> Status {
        match self.u32(field::STATUS) {
            status::BOOTING => Status::Booting,
            status::RUNNING => Status::Running,
            status::DOES_NOT_FIT => Status::DoesNotFit {
                asked_pages: self.working_set_pages().max(self.fill_pages()),
                frames: self.u64(field::FRAMES),
            },
            code => Status::Error { code },
        }
    }

    /// vCPUs at work (0 while it boots).
    pub fn vcpus(&self) -> usize {
        (self.u32(field::VCPUS) as usize).min(MAX_VCPUS)
    }

    /// The heartbeats of all vCPUs at work.
    pub fn heartbeats(&self) -> Vec<u64> {
        (0..self.vcpus()).map(|vcpu| self.u64(vcpu_line(vcpu) + line::HEARTBEAT)).collect()
    }

    /// How many pages each vCPU at work has written.
    pub fn writes(&self) -> Vec<u64> {
        (0..self.vcpus()).map(|vcpu| self.u64(vcpu_line(vcpu) + line::WRITES)).collect()
    }

    /// Pages per second that the guest is asked to write, all vCPUs together.
    pub fn rate(&self) -> Rate {
        Rate::from_setting(self.u64(field::RATE))
    }

    /// What the guest was asked to do. `None` if a setting has no meaning.
    pub fn config(&self) -> Option<WriterConfig> {
        Some(WriterConfig {
            working_set_bytes: self.working_set_pages().checked_mul(PAGE_BYTES)?,
            fill_bytes: self.fill_pages().checked_mul(PAGE_BYTES)?,
            rate: self.rate(),
            order: Order::from_setting(self.u32(field::ORDER))?,
            write: WriteUnit::from_setting(self.u32(field::WRITE))?,
            contents: Contents::from_setting(self.u32(field::CONTENTS))?,
            writers: self.u32(field::WRITERS),
            seed: self.u64(field::SEED),
        })
    }

    /// The ranges of RAM that frames are counted through.
    pub fn ranges(&self) -> Vec<GuestRange> {
        let count = (self.u32(field::RANGE_COUNT) as usize).min(MAX_RANGES) as u64;
        let range = |index: u64| GuestRange {
            guest_address: self.u64(field::RANGES + index * 16),
            size_bytes: self.u64(field::RANGES + index * 16 + 8).saturating_mul(PAGE_BYTES),
        };
        (0..count).map(range).collect()
    }

    pub(super) fn working_set_pages(&self) -> u64 {
        self.u64(field::WORKING_SET_PAGES)
    }

    pub(super) fn fill_pages(&self) -> u64 {
        self.u64(field::FILL_PAGES)
    }

    /// The u64 at one of the layout's offsets.
    pub(super) fn u64(&self, offset: u64) -> u64 {
        let mut bytes = [0; 8];
        bytes.copy_from_slice(&self.bytes[offset as usize..][..8]);
        u64::from_le_bytes(bytes)
    }

    /// The u32 at one of the layout's offsets.
    pub(super) fn u32(&self, offset: u64) -> u32 {
        let mut bytes = [0; 4];
        bytes.copy_from_slice(&self.bytes[offset as usize..][..4]);
        u32::from_le_bytes(bytes)
    }
}

impl fmt::Debug for HeaderPage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("HeaderPage")
            .field("status", &self.status())
            .field("config", &self.config())
            .field("heartbeats", &self.heartbeats())
            .field("writes", &self.writes())
            .field("ranges", &self.ranges())
            .finish()
    }
}

/// Offset of a vCPU's line in the header page.
pub(super) const fn vcpu_line(vcpu: usize) -> u64 {
    field::VCPU_LINES + vcpu as u64 * VCPU_LINE_BYTES
}

/// How far a workload guest is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Status {
    /// Loaded, not yet writing.
    Booting,
    /// Writing.
    Running,
    /// Stopped: working set or fill are larger than the RAM there is for them.
    DoesNotFit {
        /// Pages that were asked for.
        asked_pages: u64,
        /// Pages there are.
        frames: u64,
    },
    /// Stopped for another reason.
    Error {
        /// One of [`layout::status`].
        code: u32,
    },
}

impl fmt::Display for Status {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            Status::Booting => f.write_str("booting"),
            Status::Running => f.write_str("running"),
            Status::DoesNotFit { asked_pages, frames } => write!(
                f,
                "stopped: {} MiB of working set or fill do not fit into the {} MiB of RAM above the image",
                asked_pages.saturating_mul(PAGE_BYTES).div_ceil(1 << 20),
                frames.saturating_mul(PAGE_BYTES) >> 20
            ),
            Status::Error { code: status::NO_MEMORY_MAP } => {
                f.write_str("stopped: it was not booted by the PVH protocol with a memory map")
            }
            Status::Error { code: status::MEMORY_MAP_TOO_LARGE } => {
                f.write_str("stopped: the memory map has too many ranges, or RAM above 512 GiB")
            }
            Status::Error { code: status::BAD_SETTING } => f.write_str("stopped: a setting has no meaning"),
            Status::Error { code } => write!(f, "stopped with status {code:#x}"),
        }
    }
}

/// Why a header page cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum HeaderError {
    /// Its memory cannot be read.
    #[error("cannot read the workload guest's header page at guest address {HEADER:#x}")]
    Read(#[source] io::Error),
    /// Its memory cannot be written.
    #[error("cannot write the workload guest's header page at guest address {HEADER:#x}")]
    Write(#[source] io::Error),
    /// There is something else.
    #[error("this is not the workload guest: there is no header page at guest address {HEADER:#x} (found {magic:#x})")]
    NoWorkloadGuest {
        /// What was found where the magic should be.
        magic: u64,
    },
    /// It was built by another version.
    #[error("the workload guest has layout version {version}; this program knows version {}", layout::LAYOUT_VERSION)]
    Version {
        /// The guest's layout version.
        version: u32,
    },
}
