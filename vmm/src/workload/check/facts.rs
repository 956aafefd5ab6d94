//! What the header page says, once it has been seen to make sense.

use crate::workload::access::GuestRange;
use crate::workload::config::WriteUnit;
use crate::workload::header::HeaderPage;
use crate::workload::layout::{
    HEADER, IMAGE, LOW_MEMORY_END, MAX_GIB, MAX_IMAGE_PAGES, MAX_RANGES, MAX_VCPUS, PAGE_BYTES, STACK_BYTES,
    STATIC_GIB, field,
};
use crate::workload::rules::{Sequence, WordRule, share, writers};

use super::CheckError;

/// Pages of the page tables in the image: two levels of pointers, then a table per GiB.
pub(super) const STATIC_TABLE_PAGES: u64 = 2 + STATIC_GIB;

/// The facts that the check rests on. Addresses and sums made from them cannot overflow.
#[derive(Debug)]
pub(super) struct Facts {
    pub(super) tables: u64,
    pub(super) stacks: u64,
    pub(super) image_end: u64,
    pub(super) mapped_gib: u64,
    pub(super) ranges: Vec<GuestRange>,
    pub(super) working_set_pages: u64,
    pub(super) fill_pages: u64,
    pub(super) seed: u64,
    pub(super) write: WriteUnit,
    pub(super) rule: WordRule,
    /// One per vCPU.
    pub(super) parts: Vec<Part>,
}

/// The part of the working set that one vCPU writes.
#[derive(Debug)]
pub(super) struct Part {
    pub(super) first_frame: u64,
    pub(super) pages: u64,
    pub(super) sequence: Sequence,
    /// How many pages it has written.
    pub(super) writes: u64,
}

impl Facts {
    pub(super) fn new(header: &HeaderPage) -> Result<Self, CheckError> {
        let config = header.config().ok_or_else(|| damaged("a setting has no meaning"))?;
        let rule = WordRule::new(config.contents.setting()).ok_or_else(|| damaged("unknown contents"))?;
        let vcpus = header.u32(field::VCPUS) as u64;
        if !(1..=MAX_VCPUS as u64).contains(&vcpus) {
            return Err(damaged(format!("{vcpus} vCPUs")));
        }
        let facts = Self {
            tables: header.u64(field::TABLES),
            stacks: header.u64(field::STACKS),
            image_end: header.u64(field::IMAGE_END),
            mapped_gib: header.u64(field::MAPPED_GIB),
            ranges: header.ranges(),
            working_set_pages: header.working_set_pages(),
            fill_pages: header.fill_pages(),
            seed: config.seed,
            write: config.write,
            rule,
            parts: Vec::new(),
        };
        facts.check_image()?;
        facts.check_ranges(header)?;
        let writers = writers(config.writers, vcpus);
        let part = |(vcpu, writes)| {
            let (first_frame, pages) = share(facts.working_set_pages, vcpu, writers);
            let sequence = Sequence::new(config.order.setting(), config.seed, vcpu, pages)
                .ok_or_else(|| damaged("unknown order"))?;
            if pages == 0 && writes != 0 {
                return Err(damaged(format!("vCPU {vcpu} counts {writes} writes but has no pages to write")));
            }
            Ok(Part { first_frame, pages, sequence, writes })
        };
        let parts = (0..).zip(header.writes()).map(part).collect::<Result<_, _>>()?;
        Ok(Self { parts, ..facts })
    }

    /// Page writes by all vCPUs together.
    pub(super) fn writes(&self) -> u64 {
        self.parts.iter().fold(0, |sum, part| sum.saturating_add(part.writes))
    }

    /// First address above the page tables that the guest added: where frames begin.
    pub(super) fn tables_end(&self) -> u64 {
        self.image_end + (self.mapped_gib - STATIC_GIB) * PAGE_BYTES
    }

    /// Which frame a page of RAM is.
    pub(super) fn frame(&self, address: u64) -> Option<u64> {
        let mut first = 0;
        for range in &self.ranges {
            if address >= range.guest_address && address - range.guest_address < range.size_bytes {
                return Some(first + (address - range.guest_address) / PAGE_BYTES);
            }
            first += range.size_bytes / PAGE_BYTES;
        }
        None
    }

    /// All that the guest uses must be there to be checked.
    pub(super) fn check_covered_by(&self, given: &[GuestRange]) -> Result<(), CheckError> {
        let low = GuestRange { guest_address: 0, size_bytes: self.tables_end() };
        for used in std::iter::once(&low).chain(&self.ranges) {
            let end = used.guest_address + used.size_bytes;
            // Ranges may be given in pieces.
            let mut covered = used.guest_address;
            for piece in given {
                if piece.guest_address <= covered {
                    covered = covered.max(piece.guest_address.saturating_add(piece.size_bytes));
                }
            }
            if covered < end {
                return Err(CheckError::Missing { guest_address: covered, size_bytes: end - covered });
            }
        }
        Ok(())
    }

    fn check_image(&self) -> Result<(), CheckError> {
        let aligned = [self.tables, self.stacks, self.image_end].iter().all(|address| address % PAGE_BYTES == 0);
        let image_pages = self.tables.saturating_sub(IMAGE) / PAGE_BYTES;
        let stacks_bytes = (MAX_VCPUS as u64 * STACK_BYTES).next_multiple_of(PAGE_BYTES);
        let ordered = self.tables > IMAGE
            && image_pages <= MAX_IMAGE_PAGES as u64
            && self.stacks == self.tables + STATIC_TABLE_PAGES * PAGE_BYTES
            && self.image_end == self.stacks + stacks_bytes;
        const { assert!(LOW_MEMORY_END == HEADER && HEADER < IMAGE) };
        if !aligned || !ordered || !(STATIC_GIB..=MAX_GIB).contains(&self.mapped_gib) {
            return Err(damaged("the parts of the image are not where they can be"));
        }
        Ok(())
    }

    fn check_ranges(&self, header: &HeaderPage) -> Result<(), CheckError> {
        if header.u32(field::RANGE_COUNT) as usize > MAX_RANGES {
            return Err(damaged("too many ranges of RAM"));
        }
        let mut end = self.tables_end();
        let mut frames = 0;
        for range in &self.ranges {
            let range_end = range.guest_address.checked_add(range.size_bytes);
            let mapped = range_end.is_some_and(|range_end| range_end <= self.mapped_gib << 30);
            if range.guest_address % PAGE_BYTES != 0 || range.guest_address < end || !mapped {
                return Err(damaged(format!("RAM at {:#x} cannot be", range.guest_address)));
            }
            end = range.guest_address + range.size_bytes;
            frames += range.size_bytes / PAGE_BYTES;
        }
        if frames != header.u64(field::FRAMES) || self.working_set_pages.max(self.fill_pages) > frames {
            return Err(damaged(format!("working set, fill and {frames} frames do not agree")));
        }
        Ok(())
    }
}

fn damaged(what: impl Into<String>) -> CheckError {
    CheckError::Damaged(what.into())
}
