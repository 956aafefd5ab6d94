//! What a VMM implements to be moved.
//!
//! At the source one object, a [`SourceMachine`]. At the destination two: a [`DestinationHost`] that judges
//! whether it can take a machine in and builds it, and the [`DestinationMachine`] that it built. State
//! crosses as [`Section`]s, which the engine carries without reading them.

use std::error::Error;
use std::fmt;
use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::memory::{GuestMemory, PAGE_SIZE};
use crate::memory_files::MemoryFile;

/// A running machine that can be sent away.
///
/// The engine calls these from its own threads, never two of `pause`, `save`, `resume` at once.
pub trait SourceMachine: Send + Sync {
    /// The machine's shape and all that a destination must be able to provide.
    fn describe(&self) -> Result<MachineDescription, MachineError>;

    /// What has to be found out together with a destination before the machine moves there, if anything: for example that
    /// both hosts see the same disks. Called once per move.
    fn inquire(&self) -> Result<Box<dyn Inquiry>, MachineError> {
        Ok(Box::new(NoInquiry))
    }

    /// Guest RAM.
    fn memory(&self) -> GuestMemory;

    /// The log of pages that the guest writes.
    fn dirty_log(&self) -> &dyn DirtyLog;

    /// Whether the guest's vCPUs are running (false: somebody paused it before the move began).
    fn is_running(&self) -> bool;

    /// Stops all vCPUs and drains and flushes all devices within `limit`. After it, nobody writes guest memory.
    /// On an error the machine runs on as it did. Pausing a paused machine does nothing.
    fn pause(&self, limit: Duration) -> Result<(), MachineError>;

    /// The state of every vCPU, chip and device of a paused machine. May be called several times.
    fn save(&self) -> Result<Vec<Section>, MachineError>;

    /// The memory of this paused machine is about to be another process's, as it is and where it is: from here on nothing in this
    /// process may touch it, until it is taken back. Asked for only if all of [`SourceMachine::memory`] can be handed over
    /// ([`crate::memory_files`]).
    fn let_go_of_memory(&self) -> Result<(), MachineError> {
        Ok(())
    }

    /// The memory is this machine's again after all. Does nothing if it was never let go of.
    fn take_back_memory(&self) -> Result<(), MachineError> {
        Ok(())
    }

    /// Lets a paused machine run on: also after a failed move, so every ready queue is processed as if kicked. Its memory is taken
    /// back first, if it was let go of.
    fn resume(&self) -> Result<(), MachineError>;

    /// Holds the guest back, by the vCPUs that write; those that only read are left alone, if the VMM can tell. [`Hold::NONE`]: not any more, from
    /// the moment this returns.
    fn throttle(&self, hold: Hold);

    /// Does now what would make [`SourceMachine::pause`] take longer, such as flushing disks. Called every now and then while
    /// the guest runs and its memory is being sent, from a thread of its own that nothing waits for.
    fn settle(&self) {}
}

/// What a guest is left while it is held back.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Hold {
    /// Of what it writes at its full speed, as a share of its time; 1: all of it.
    pub share: f64,
    /// It writes no more than so many clean pages a second, if the VMM can tell: a guest that is not busy all the time gets as much done in less
    /// time. `None`: its time alone is limited.
    pub pages_per_s: Option<f64>,
}

impl Hold {
    /// It runs at its full speed.
    pub const NONE: Self = Self::to(1.0);

    /// To a share of its time.
    pub const fn to(share: f64) -> Self {
        Self { share, pages_per_s: None }
    }
}

/// A question to a destination, and the judgement of its answer: the second leg of preflight. Dropped as soon as it has been
/// judged or the move has ended, whatever way: what was made for the question (files, say) goes with it.
pub trait Inquiry: Send {
    /// What [`DestinationHost::check`] is asked, encoded by the VMM.
    fn question(&self) -> Vec<u8>;

    /// Every reason against the move that the answer shows.
    fn judge(&self, evidence: &[u8]) -> Vec<Refusal>;
}

/// For machines that have nothing to ask.
struct NoInquiry;

impl Inquiry for NoInquiry {
    fn question(&self) -> Vec<u8> {
        Vec::new()
    }

    fn judge(&self, _evidence: &[u8]) -> Vec<Refusal> {
        Vec::new()
    }
}

/// The log of pages that a guest has written. Bits are one per page, least significant first, relative to the
/// start of a region; regions are numbered as in [`MachineDescription::memory`].
pub trait DirtyLog: Send + Sync {
    /// Starts logging. Every page counts as dirty from here on until it is cleared.
    fn start(&self) -> Result<(), MachineError>;

    /// Stops logging. Stopping a stopped log does nothing.
    fn stop(&self) -> Result<(), MachineError>;

    /// ORs the dirty bits of `region` into `words` (one bit a page, the last word may be partly used). Clears nothing.
    fn harvest(&self, region: usize, words: &mut [u64]) -> Result<(), MachineError>;

    /// Clears exactly the bits that are set in `words`, whose first bit is page `first_page` of `region` (a
    /// multiple of 64), and sees to it that the next write to those pages is logged again.
    fn clear(&self, region: usize, first_page: u64, words: &[u64]) -> Result<(), MachineError>;
}

/// Judges and builds machines at the destination.
pub trait DestinationHost: Send {
    /// What [`DestinationHost::prepare`] builds.
    type Machine: DestinationMachine;

    /// Whether this host can take the machine in, and the answer to what [`SourceMachine::inquire`] asks. Must change nothing,
    /// but for what the answer needs: that is gone when the host is dropped or has prepared the machine.
    fn check(&mut self, description: &MachineDescription, question: &[u8]) -> Verdict;

    /// Keeps the files behind the memory of a machine that is on this host, for [`DestinationHost::check`] and
    /// [`DestinationHost::prepare`], or says why it cannot: then memory is sent. Before the machine is this end's
    /// ([`DestinationMachine::own_memory`]) they may be read and not written, since its guest still runs on them.
    fn take_memory(&mut self, _files: Vec<MemoryFile>) -> Result<(), String> {
        Err("this VMM cannot take memory over".into())
    }

    /// Whether the memory of such a machine can be filled while its guest runs in it ([`DestinationMachine::fill_later`]), or why not.
    fn check_filling(&mut self, _description: &MachineDescription) -> Result<(), Refusal> {
        Err(Refusal::new("post-copy", "this VMM cannot fill memory while the guest runs in it"))
    }

    /// Builds the machine, with memory that reads as zeros unless it was handed over, and does all that can be done before state arrives.
    fn prepare(&mut self, description: &MachineDescription) -> Result<Self::Machine, MachineError>;
}

/// A machine that is being filled with another one's memory and state.
pub trait DestinationMachine: Send {
    /// Guest RAM, as large as the source's.
    fn memory(&self) -> GuestMemory;

    /// Loads state. Called as a rehearsal before memory arrives (twice, with state that is soon stale) and once for good.
    fn load(&mut self, sections: &[Section], context: &LoadContext) -> Result<(), MachineError>;

    /// Forgets what the `missing` pages hold, and from here on says who needs one of them: they come in while the guest runs.
    /// Called before the last [`DestinationMachine::load`], which may need some of them; whoever does waits until it is there.
    fn fill_later(
        &mut self,
        _missing: &mut dyn Iterator<Item = PageRun>,
    ) -> Result<Arc<dyn FillableMemory>, MachineError> {
        Err(MachineError::new("this VMM cannot fill memory while the guest runs in it"))
    }

    /// The machine is this end's from here on, and so is memory that was handed over: it may be written. Called once, before
    /// [`DestinationMachine::start`], and for a machine that is to stay paused too.
    fn own_memory(&mut self) -> Result<(), MachineError> {
        Ok(())
    }

    /// Lets the guest run, after [`DestinationMachine::load`]. Not called for a machine that is to stay paused.
    fn start(&mut self) -> Result<(), MachineError>;
}

/// Guest memory of which some pages are missing, and come in while the guest runs in it.
///
/// Whoever touches a page that is not there, be it the guest, KVM or a device, waits until the page is put in place. The calls come
/// from several threads at once, none of which touches guest memory in any other way.
pub trait FillableMemory: Send + Sync {
    /// Waits, for `limit` at most, until somebody needs pages that are not there, and adds those to `needed`. That may be any page
    /// that nothing was ever written to, too, also one that was not said to be missing. False: as [`Placed::NotWanted`].
    fn wait_for_need(&self, limit: Duration, needed: &mut Vec<PageIndex>) -> Result<bool, MachineError>;

    /// Puts a page in place at once, as a whole, and lets whoever waits for it go on. `None`: zeros.
    fn place(&self, page: PageIndex, contents: Option<&[u8; PAGE_SIZE]>) -> Result<Placed, MachineError>;

    /// No page is missing any more: from here on this is memory as any other.
    fn complete(&self) -> Result<(), MachineError>;
}

/// A page, by the number of its region and its own in that.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct PageIndex {
    /// Number of the region, as in [`MachineDescription::memory`].
    pub region: usize,
    /// Number of the page, from the start of the region.
    pub page: u64,
}

/// Pages one after the other.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PageRun {
    /// Number of the region, as in [`MachineDescription::memory`].
    pub region: usize,
    /// Numbers of the pages, from the start of the region.
    pub pages: Range<u64>,
}

/// What became of a page that was to be put in place.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Placed {
    /// It is in place.
    Now,
    /// There was one, which stays.
    Already,
    /// No page is missing any more, whatever was said: the guest has booted anew, for example.
    NotWanted,
}

/// What a destination needs beside the sections to load state.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct LoadContext {
    /// This host's CLOCK_REALTIME less the source's, in nanoseconds, as measured in the handshake.
    pub clock_offset_ns: i64,
}

/// The shape of a machine: what the two ends agree on before any memory is sent.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct MachineDescription {
    /// The machine's name.
    pub name: String,
    /// Number of vCPUs.
    pub vcpus: u32,
    /// RAM regions in ascending order; addresses and sizes are multiples of [`crate::PAGE_SIZE`].
    pub memory: Vec<RegionDescription>,
    /// The sections that [`SourceMachine::save`] will produce.
    pub sections: Vec<SectionVersion>,
    /// What only the VMM understands (CPU features, devices and what backs them), encoded by the VMM.
    pub vmm: Vec<u8>,
}

impl MachineDescription {
    /// Bytes of RAM.
    pub fn memory_bytes(&self) -> u64 {
        self.memory.iter().fold(0, |sum, region| sum.saturating_add(region.size_bytes))
    }
}

/// One contiguous range of guest RAM.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct RegionDescription {
    /// First guest-physical address.
    pub guest_address: u64,
    /// Length in bytes.
    pub size_bytes: u64,
}

/// A kind of section and the version of its layout.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SectionVersion {
    /// For example `vcpu/0` or `irqchip`.
    pub kind: String,
    /// Version of the payload's layout.
    pub version: u16,
}

/// The saved state of one part of a machine.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Section {
    /// For example `vcpu/0` or `irqchip`.
    pub kind: String,
    /// Version of the payload's layout.
    pub version: u16,
    /// The state, encoded by the VMM.
    pub payload: Vec<u8>,
}

impl fmt::Debug for Section {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} v{} ({} bytes)", self.kind, self.version, self.payload.len())
    }
}

/// What a destination thinks of a machine that wants to move there.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Verdict {
    /// Every reason against it; empty: it can.
    pub refusals: Vec<Refusal>,
    /// What the user should know all the same, one sentence each.
    pub warnings: Vec<String>,
    /// The answer to the source's question, for [`Inquiry::judge`].
    pub evidence: Vec<u8>,
}

impl From<Vec<Refusal>> for Verdict {
    fn from(refusals: Vec<Refusal>) -> Self {
        Self { refusals, ..Self::default() }
    }
}

/// One reason why a move cannot take place.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Refusal {
    /// What is in the way: `cpu`, `memory`, `tsc`, `disk root`, …
    pub subject: String,
    /// Why, in one sentence that a person can act on.
    pub reason: String,
}

impl Refusal {
    /// A refusal of `subject` because of `reason`.
    pub fn new(subject: impl Into<String>, reason: impl Into<String>) -> Self {
        Self { subject: subject.into(), reason: reason.into() }
    }
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.subject, self.reason)
    }
}

/// Something the VMM was asked to do and could not.
#[derive(Debug)]
pub struct MachineError {
    what: String,
    source: Option<Box<dyn Error + Send + Sync>>,
}

impl MachineError {
    /// An error that says what failed, on what, and why.
    pub fn new(what: impl Into<String>) -> Self {
        Self { what: what.into(), source: None }
    }

    /// The same, with the error that caused it.
    pub fn with_source(what: impl Into<String>, source: impl Into<Box<dyn Error + Send + Sync>>) -> Self {
        Self { what: what.into(), source: Some(source.into()) }
    }
}

impl fmt::Display for MachineError {
    /// The whole chain on one line: these errors cross the wire as text.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.what)?;
        let mut cause = self.source.as_deref().map(|source| source as &dyn Error);
        while let Some(error) = cause {
            write!(f, ": {error}")?;
            cause = error.source();
        }
        Ok(())
    }
}

impl Error for MachineError {}
