//! The rule for every page of RAM, by its address.

use crate::workload::access::GuestRead;
use crate::workload::header::{HeaderPage, vcpu_line};
use crate::workload::image::fnv1a;
use crate::workload::layout::{
    HEADER, IMAGE, LARGE_PAGE_FLAGS, LOW_MEMORY_END, PAGE_BYTES, STACK_BYTES, STACK_UNUSED_BYTES, TABLE_FLAGS,
    TRAMPOLINE, field, line,
};
use crate::workload::rules::PAGE_WORDS;

use super::CheckError;
use super::diagnose::{Mismatch, MismatchKind, Place};
use super::facts::{Facts, STATIC_TABLE_PAGES};
use super::frames::{self, PageBytes, PageWords};
use super::replay::Replay;

/// Bytes in a word.
const WORD_BYTES: u64 = 8;

/// What became of one page.
pub(super) enum Verdict {
    /// It is what it must be.
    Good,
    /// The guest does not count it as RAM.
    NotRam,
    /// It is not what it must be.
    Bad(Box<Mismatch>),
}

impl From<Option<Mismatch>> for Verdict {
    fn from(mismatch: Option<Mismatch>) -> Self {
        mismatch.map_or(Verdict::Good, |mismatch| Verdict::Bad(Box::new(mismatch)))
    }
}

/// All that is needed to judge any page.
pub(super) struct PageCheck<'a> {
    header: &'a HeaderPage,
    facts: &'a Facts,
    replay: &'a Replay,
    trampoline: PageWords,
}

impl<'a> PageCheck<'a> {
    pub(super) fn new<M: GuestRead + ?Sized>(
        memory: &M,
        header: &'a HeaderPage,
        facts: &'a Facts,
        replay: &'a Replay,
    ) -> Result<Self, CheckError> {
        // The trampoline's page begins with a copy from the image, which has hashes of its own.
        let source = header.u64(field::TRAMPOLINE_SOURCE);
        let length = header.u64(field::TRAMPOLINE_BYTES);
        let within = source >= IMAGE && source <= facts.tables && length <= PAGE_BYTES.min(facts.tables - source);
        if !within {
            return Err(CheckError::Damaged("the trampoline is not in the image".to_owned()));
        }
        let mut copy = [0; PAGE_BYTES as usize];
        memory
            .read(source, &mut copy[..length as usize])
            .map_err(|error| CheckError::Read { guest_address: source, source: error })?;
        Ok(Self { header, facts, replay, trampoline: to_words(&copy) })
    }

    /// Judges the page at `address`.
    pub(super) fn check(&self, address: u64, page: &PageBytes) -> Verdict {
        let Facts { tables, stacks, image_end, .. } = *self.facts;
        match address {
            0..LOW_MEMORY_END => self.low_memory(address, page),
            HEADER..IMAGE => self.header(page),
            _ if address < tables => self.image(address, page).into(),
            _ if address < stacks => {
                let expected = self.static_table((address - tables) / PAGE_BYTES);
                Mismatch::find(address, Place::Tables, &expected, &to_words(page), |_| false).into()
            }
            _ if address < image_end => self.stacks(address, page).into(),
            _ if address < self.facts.tables_end() => {
                let gib = STATIC_TABLE_PAGES - 2 + (address - image_end) / PAGE_BYTES;
                Mismatch::find(address, Place::Tables, &directory(gib), &to_words(page), |_| false).into()
            }
            _ => match self.facts.frame(address) {
                Some(frame) => self.frame(address, frame, page).into(),
                None => Verdict::NotRam,
            },
        }
    }

    /// Finds out more about a mismatch.
    pub(super) fn describe(&self, mut mismatch: Mismatch, page: &PageBytes) -> Mismatch {
        if let Place::Frame { frame } = mismatch.place {
            mismatch.look_for_version(self.facts, self.replay.frame(frame).0, &to_words(page));
        }
        mismatch
    }

    /// Zeros, but for the trampoline and for ROM.
    fn low_memory(&self, address: u64, page: &PageBytes) -> Verdict {
        let index = address / PAGE_BYTES;
        if self.header.u64(field::LOW_ROM + index / 64 * WORD_BYTES) >> (index % 64) & 1 == 1 {
            return Verdict::NotRam;
        }
        let expected = if address == TRAMPOLINE { self.trampoline } else { [0; PAGE_WORDS] };
        Mismatch::find(address, Place::LowMemory, &expected, &to_words(page), |_| false).into()
    }

    /// Bytes that are no field are zeros; lines of vCPUs that do not exist are zeros.
    fn header(&self, page: &PageBytes) -> Verdict {
        let vcpus = self.facts.parts.len();
        let is_field = |word: usize| {
            let offset = word as u64 * WORD_BYTES;
            let in_line = |vcpu| offset.checked_sub(vcpu_line(vcpu)).is_some_and(is_line_field);
            is_common_field(offset) || (0..vcpus).any(in_line)
        };
        Mismatch::find(HEADER, Place::Header, &[0; PAGE_WORDS], &to_words(page), is_field).into()
    }

    /// The hash that the header page has for it.
    fn image(&self, address: u64, page: &PageBytes) -> Option<Mismatch> {
        let index = (address - IMAGE) / PAGE_BYTES;
        let expected = self.header.u64(field::IMAGE_HASHES + index * WORD_BYTES);
        let found = fnv1a(page);
        (expected != found).then_some(Mismatch {
            guest_address: address,
            place: Place::Image,
            kind: MismatchKind::Hash,
            word: 0,
            expected,
            found,
        })
    }

    /// The page tables that the image brings along; the second one also points to those that were added.
    fn static_table(&self, index: u64) -> PageWords {
        let tables = self.facts.tables;
        let table = |index: u64| tables + index * PAGE_BYTES + TABLE_FLAGS;
        let mut words = [0; PAGE_WORDS];
        match index {
            0 => words[0] = table(1),
            1 => {
                for (gib, word) in (0..self.facts.mapped_gib).zip(&mut words) {
                    *word = match (2 + gib).checked_sub(STATIC_TABLE_PAGES) {
                        None => table(2 + gib),
                        Some(added) => self.facts.image_end + added * PAGE_BYTES + TABLE_FLAGS,
                    };
                }
            }
            _ => words = directory(index - 2),
        }
        words
    }

    /// Anything where a vCPU's stack may reach, zeros elsewhere.
    fn stacks(&self, address: u64, page: &PageBytes) -> Option<Mismatch> {
        let vcpus = self.facts.parts.len() as u64;
        let in_use = |word: usize| {
            let offset = address - self.facts.stacks + word as u64 * WORD_BYTES;
            offset / STACK_BYTES < vcpus && offset % STACK_BYTES >= STACK_UNUSED_BYTES
        };
        Mismatch::find(address, Place::Stacks, &[0; PAGE_WORDS], &to_words(page), in_use)
    }

    /// What its writes made of it.
    fn frame(&self, address: u64, frame: u64, page: &PageBytes) -> Option<Mismatch> {
        let (writes, in_flight) = self.replay.frame(frame);
        let good = frames::matches(self.facts, frame, writes, page)
            || in_flight && frames::matches_in_flight(self.facts, frame, writes, page);
        if good {
            return None;
        }
        let expected = frames::expected(self.facts, frame, writes);
        Mismatch::find(address, Place::Frame { frame }, &expected, &to_words(page), |_| false)
    }
}

/// The table that maps GiB number `gib`.
fn directory(gib: u64) -> PageWords {
    std::array::from_fn(|entry| (gib << 30) + ((entry as u64) << 21) + LARGE_PAGE_FLAGS)
}

fn is_common_field(offset: u64) -> bool {
    const FIELDS: [std::ops::Range<u64>; 5] = [
        field::MAGIC..field::TRAMPOLINE_BYTES + 8,
        field::WORKING_SET_PAGES..field::CONTENTS + 8,
        field::VCPUS..field::MAPPED_GIB + 8,
        field::LOW_ROM..field::LOW_ROM + 32,
        field::RANGES..field::COMMON_END,
    ];
    FIELDS.iter().any(|range| range.contains(&offset))
}

fn is_line_field(offset: u64) -> bool {
    const COUNTERS: std::ops::Range<u64> = line::HEARTBEAT..line::WRITES + 8;
    const PVCLOCK: std::ops::Range<u64> = line::PVCLOCK..line::PVCLOCK + line::PVCLOCK_BYTES;
    COUNTERS.contains(&offset) || PVCLOCK.contains(&offset)
}

fn to_words(page: &PageBytes) -> PageWords {
    let mut words = [0; PAGE_WORDS];
    words.iter_mut().zip(frames::words(page)).for_each(|(word, found)| *word = found);
    words
}
