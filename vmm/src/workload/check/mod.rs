//! The check: is every page of RAM what the workload guest's writes made it?
//!
//! It knows only the header page and the write rules, nothing of how the memory got where it is. The guest
//! must not run meanwhile.

mod diagnose;
mod facts;
mod frames;
mod pages;
mod replay;

use std::fmt;
use std::io;
use std::num::NonZero;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;

use serde::Serialize;

pub use diagnose::{Mismatch, MismatchKind, Place};
use facts::Facts;
use frames::PageBytes;
use pages::{PageCheck, Verdict};
use replay::Replay;

use super::access::{GuestRange, GuestRead};
use super::header::{Header, HeaderError, Status};
use super::layout::PAGE_BYTES;

/// How much is read and checked at a time.
const CHUNK_BYTES: u64 = 256 << 10;

/// Threads that share the work.
const MAX_THREADS: usize = 8;

/// How many mismatches are described one by one.
const MAX_DESCRIBED: usize = 64;

/// Checks every page of RAM of a workload guest that does not run at the moment.
///
/// A page that a vCPU was writing when it was stopped may be old, new, or new up to some word; every other page
/// must be exactly what its number of writes makes it.
pub fn check<M: GuestRead + ?Sized>(memory: &M) -> Result<CheckReport, CheckError> {
    let header = Header::new(memory)?.snapshot()?;
    match header.status() {
        Status::Running => {}
        status => return Err(CheckError::NotRunning(status)),
    }
    let facts = Facts::new(&header)?;
    let ranges = memory.ranges();
    facts.check_covered_by(&ranges)?;
    let replay = Replay::new(&facts)?;
    let pages = PageCheck::new(memory, &header, &facts, &replay)?;

    let chunks: Vec<GuestRange> = ranges.iter().flat_map(|range| chunks(*range)).collect();
    let mut tally = Tally::default();
    for part in in_parallel(threads(), &chunks, |chunks| check_chunks(memory, &pages, chunks)) {
        tally.add(part?);
    }
    let report = CheckReport {
        pages_checked: tally.pages_checked,
        pages_not_ram: tally.pages_not_ram,
        pages_written: replay.pages_written(),
        writes: facts.writes(),
        vcpus: facts.parts.len(),
    };
    if tally.mismatches == 0 {
        return Ok(report);
    }
    tally.described.sort_by_key(|mismatch| mismatch.guest_address);
    Err(CheckError::Mismatch(Mismatches { pages: tally.mismatches, described: tally.described, report }))
}

/// What a check covered.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct CheckReport {
    /// Pages compared with what they must hold.
    pub pages_checked: u64,
    /// Pages that the guest does not count as RAM (ROM, ranges that its memory map leaves out): not compared.
    pub pages_not_ram: u64,
    /// Pages that were written at least once since the fill.
    pub pages_written: u64,
    /// Page writes by all vCPUs together.
    pub writes: u64,
    /// vCPUs at work.
    pub vcpus: usize,
}

/// Why a check did not find all in order.
#[derive(Debug, thiserror::Error)]
pub enum CheckError {
    /// There is no usable header page.
    #[error(transparent)]
    Header(#[from] HeaderError),
    /// The guest does not write (yet, or any more), so that there is nothing to check by.
    #[error("the workload guest cannot be checked: it is {0}")]
    NotRunning(Status),
    /// The header page contradicts itself: it is damaged.
    #[error("the workload guest's header page is damaged: {0}")]
    Damaged(String),
    /// The header page counts so many writes that replaying them would take hours.
    #[error("the workload guest counts {writes} page writes: more than a check can replay")]
    TooManyWrites {
        /// How many.
        writes: u64,
    },
    /// The guest uses memory that cannot be reached.
    #[error("the workload guest uses {size_bytes} bytes of memory at {guest_address:#x} that were not given")]
    Missing {
        /// Where.
        guest_address: u64,
        /// How many bytes.
        size_bytes: u64,
    },
    /// Its memory cannot be read.
    #[error("cannot read the guest's memory at {guest_address:#x}")]
    Read {
        /// Where.
        guest_address: u64,
        /// Why.
        source: io::Error,
    },
    /// Pages are not what they must be.
    #[error(transparent)]
    Mismatch(Mismatches),
}

/// Pages that are not what they must be.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub struct Mismatches {
    /// How many.
    pub pages: u64,
    /// The first ones, in ascending order of addresses.
    pub described: Vec<Mismatch>,
    /// What the check covered.
    pub report: CheckReport,
}

impl fmt::Display for Mismatches {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} of {} pages are wrong", self.pages, self.report.pages_checked)?;
        if let Some(first) = self.described.first() {
            write!(f, "; the first: {first}")?;
        }
        Ok(())
    }
}

/// What one thread found.
#[derive(Default)]
struct Tally {
    pages_checked: u64,
    pages_not_ram: u64,
    mismatches: u64,
    described: Vec<Mismatch>,
}

impl Tally {
    fn count(&mut self, pages: &PageCheck<'_>, address: u64, page: &PageBytes) {
        match pages.check(address, page) {
            Verdict::NotRam => {
                self.pages_not_ram += 1;
                return;
            }
            Verdict::Good => {}
            Verdict::Bad(mismatch) => {
                self.mismatches += 1;
                if self.described.len() < MAX_DESCRIBED {
                    self.described.push(pages.describe(*mismatch, page));
                }
            }
        }
        self.pages_checked += 1;
    }

    fn add(&mut self, other: Tally) {
        self.pages_checked += other.pages_checked;
        self.pages_not_ram += other.pages_not_ram;
        self.mismatches += other.mismatches;
        self.described.extend(other.described);
        self.described.sort_by_key(|mismatch| mismatch.guest_address);
        self.described.truncate(MAX_DESCRIBED);
    }
}

fn check_chunks<M: GuestRead + ?Sized>(
    memory: &M,
    pages: &PageCheck<'_>,
    chunks: &mut dyn Iterator<Item = GuestRange>,
) -> Result<Tally, CheckError> {
    let mut buffer = vec![0; CHUNK_BYTES as usize];
    let mut tally = Tally::default();
    for GuestRange { guest_address, size_bytes } in chunks {
        let bytes = &mut buffer[..size_bytes as usize];
        memory.read(guest_address, bytes).map_err(|source| CheckError::Read { guest_address, source })?;
        let addresses = (guest_address..).step_by(PAGE_BYTES as usize);
        for (address, page) in addresses.zip(bytes.as_chunks().0) {
            tally.count(pages, address, page);
        }
    }
    Ok(tally)
}

fn chunks(range: GuestRange) -> impl Iterator<Item = GuestRange> {
    let end = range.guest_address.saturating_add(range.size_bytes);
    (range.guest_address..end)
        .step_by(CHUNK_BYTES as usize)
        .map(move |guest_address| GuestRange { guest_address, size_bytes: CHUNK_BYTES.min(end - guest_address) })
}

fn threads() -> usize {
    thread::available_parallelism().map_or(1, NonZero::get).min(MAX_THREADS)
}

/// Runs `work` on `threads` threads that take items from one list. One result per thread.
fn in_parallel<T: Copy + Sync, R: Send>(
    threads: usize,
    items: &[T],
    work: impl Fn(&mut dyn Iterator<Item = T>) -> R + Sync,
) -> Vec<R> {
    let next = AtomicUsize::new(0);
    let take = || items.get(next.fetch_add(1, Ordering::Relaxed)).copied();
    thread::scope(|scope| {
        let others: Vec<_> = (1..threads).map(|_| scope.spawn(|| work(&mut std::iter::from_fn(take)))).collect();
        let mut results = vec![work(&mut std::iter::from_fn(take))];
        for other in others {
            match other.join() {
                Ok(result) => results.push(result),
                Err(panic) => std::panic::resume_unwind(panic),
            }
        }
        results
    })
}
