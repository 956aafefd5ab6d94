//! What is wrong with a page: for the person who looks for the cause.

use std::fmt;

use crate::workload::layout::HEADER;
use crate::workload::rules::page_key;

use super::facts::Facts;
use super::frames::{PageWords, expected};

/// How many versions back, and ahead, a page is looked for.
const SEARCHED_VERSIONS: u64 = 1 << 16;

/// A page that is not what it must be.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Mismatch {
    /// Where the page is.
    pub guest_address: u64,
    /// What it is for.
    pub place: Place,
    /// What seems to have happened to it.
    pub kind: MismatchKind,
    /// The first word that is wrong.
    pub word: usize,
    /// What it must be.
    pub expected: u64,
    /// What it is.
    pub found: u64,
}

/// What a page of RAM is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Place {
    /// Below the image.
    LowMemory,
    /// The header page.
    Header,
    /// Code and constants.
    Image,
    /// Page tables.
    Tables,
    /// Stacks.
    Stacks,
    /// Data.
    Frame {
        /// Its number.
        frame: u64,
    },
}

/// What seems to have happened to a page.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum MismatchKind {
    /// It is what it was this many writes ago.
    Stale {
        /// How many.
        versions: u64,
    },
    /// It has been written more often than the vCPU's count says: the header page is stale.
    Newer {
        /// How many times.
        versions: u64,
    },
    /// Its contents are gone: all zeros.
    Lost,
    /// One bit is wrong.
    BitFlip {
        /// Which bit of the word.
        bit: u32,
    },
    /// It was never written and yet holds something.
    NotZero,
    /// It must never change and has changed (expected and found are hashes of the page).
    Hash,
    /// Something else.
    Other {
        /// How many words are wrong.
        words: usize,
    },
}

impl Mismatch {
    /// Compares a page with what it must be, word by word; words for which `exempt` is true may hold anything.
    pub(super) fn find(
        guest_address: u64,
        place: Place,
        expected: &PageWords,
        found: &PageWords,
        exempt: impl Fn(usize) -> bool,
    ) -> Option<Self> {
        let wrong = |word: &usize| expected[*word] != found[*word] && !exempt(*word);
        let word = (0..expected.len()).find(wrong)?;
        let words = (0..expected.len()).filter(wrong).count();
        let difference = expected[word] ^ found[word];
        let zeros = |page: &PageWords| page.iter().all(|word| *word == 0);
        let kind = if zeros(expected) {
            MismatchKind::NotZero
        } else if zeros(found) {
            MismatchKind::Lost
        } else if words == 1 && difference.is_power_of_two() {
            MismatchKind::BitFlip { bit: difference.trailing_zeros() }
        } else {
            MismatchKind::Other { words }
        };
        Some(Self { guest_address, place, kind, word, expected: expected[word], found: found[word] })
    }

    /// Looks whether a frame that must have been written `writes` times is another version of itself. Tries very
    /// many: only for mismatches that a person will see.
    pub(super) fn look_for_version(&mut self, facts: &Facts, writes: u64, found: &PageWords) {
        let Place::Frame { frame } = self.place else { return };
        // A page that never held zeros and does now has not gone back to an older version of itself.
        let never_zero = frame < facts.fill_pages && self.kind == MismatchKind::Lost;
        if frame < facts.working_set_pages && !never_zero {
            self.kind = other_version(facts, frame, writes, self, found).unwrap_or(self.kind);
        }
    }
}

fn other_version(facts: &Facts, frame: u64, writes: u64, wrong: &Mismatch, found: &PageWords) -> Option<MismatchKind> {
    // One word tells nearly all versions apart; only then is the whole page computed.
    let increment = facts.rule.increment(page_key(facts.seed, frame), wrong.word);
    let is = |version| expected(facts, frame, version) == *found;
    let mut value = wrong.expected;
    for versions in 1..=writes.min(SEARCHED_VERSIONS) {
        value = facts.rule.step_back(value, increment);
        if value == wrong.found && is(writes - versions) {
            return Some(MismatchKind::Stale { versions });
        }
    }
    value = wrong.expected;
    for versions in 1..=(u64::MAX - writes).min(SEARCHED_VERSIONS) {
        value = facts.rule.step(value, increment);
        if value == wrong.found && is(writes + versions) {
            return Some(MismatchKind::Newer { versions });
        }
    }
    None
}

impl fmt::Display for Mismatch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.place {
            Place::LowMemory => f.write_str("low memory")?,
            Place::Header => write!(f, "the header page ({HEADER:#x})")?,
            Place::Image => f.write_str("the image")?,
            Place::Tables => f.write_str("a page table")?,
            Place::Stacks => f.write_str("the stacks")?,
            Place::Frame { frame } => write!(f, "frame {frame}")?,
        }
        write!(f, " at {:#x} {}", self.guest_address, self.kind)?;
        write!(f, " (word {}: expected {:#018x}, found {:#018x})", self.word, self.expected, self.found)
    }
}

impl fmt::Display for MismatchKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            MismatchKind::Stale { versions } => write!(f, "is stale by {versions} writes"),
            MismatchKind::Newer { versions } => write!(f, "is ahead of the header page by {versions} writes"),
            MismatchKind::Lost => f.write_str("is lost: all zeros"),
            MismatchKind::BitFlip { bit } => write!(f, "has bit {bit} of one word flipped"),
            MismatchKind::NotZero => f.write_str("was never written and is not zero"),
            MismatchKind::Hash => f.write_str("has changed and must not"),
            MismatchKind::Other { words } => write!(f, "has {words} wrong words"),
        }
    }
}
