//! What a frame must hold: the closed form of the write rules.

use crate::workload::config::WriteUnit;
use crate::workload::layout::PAGE_BYTES;
use crate::workload::rules::{Jump, PAGE_WORDS, page_key, word_index};

use super::facts::Facts;

/// A page as it was read.
pub(super) type PageBytes = [u8; PAGE_BYTES as usize];

/// A page as words.
pub(super) type PageWords = [u64; PAGE_WORDS];

/// The words of a page.
pub(super) fn words(page: &PageBytes) -> impl Iterator<Item = u64> {
    page.as_chunks().0.iter().map(|bytes| u64::from_le_bytes(*bytes))
}

/// Whether `page` holds what `frame` must hold after `writes` writes.
pub(super) fn matches(facts: &Facts, frame: u64, writes: u64, page: &PageBytes) -> bool {
    let expected = FrameWords::new(facts, frame, writes);
    // No early end: nearly all pages match, and this way the loop has no branches.
    if expected.is_zero() {
        return words(page).fold(0, |bits, found| bits | found) == 0;
    }
    words(page).enumerate().fold(0, |wrong, (word, found)| wrong | (found ^ expected.word(word))) == 0
}

/// Whether `page` may be `frame` caught while it was written once more after `writes` writes: new words up to
/// some point, old ones from there on.
pub(super) fn matches_in_flight(facts: &Facts, frame: u64, writes: u64, page: &PageBytes) -> bool {
    let (old, new) = (expected(facts, frame, writes), expected(facts, frame, writes + 1));
    let mut words = words(page).zip(old.iter().zip(&new)).skip_while(|(found, (_, new))| found == *new);
    words.all(|(found, (old, _))| found == *old)
}

/// All words of `frame` after `writes` writes.
pub(super) fn expected(facts: &Facts, frame: u64, writes: u64) -> PageWords {
    let words = FrameWords::new(facts, frame, writes);
    std::array::from_fn(|word| words.word(word))
}

/// The words of a frame after a number of writes, computed when asked for.
struct FrameWords<'a> {
    facts: &'a Facts,
    key: u64,
    filled: bool,
    jump: Jump,
    /// The one word that is written, where a write is one word.
    only: Option<usize>,
}

impl<'a> FrameWords<'a> {
    fn new(facts: &'a Facts, frame: u64, writes: u64) -> Self {
        let key = page_key(facts.seed, frame);
        let only = match facts.write {
            WriteUnit::Word => Some(word_index(key)),
            WriteUnit::Page => None,
        };
        Self { facts, key, filled: frame < facts.fill_pages, jump: Jump::new(writes), only }
    }

    fn is_zero(&self) -> bool {
        !self.filled && self.jump == Jump::new(0)
    }

    #[inline(always)]
    fn word(&self, word: usize) -> u64 {
        let rule = self.facts.rule;
        let first = if self.filled { rule.initial(self.key, word) } else { 0 };
        if self.only.is_some_and(|only| only != word) {
            return first;
        }
        rule.jump(first, rule.increment(self.key, word), self.jump)
    }
}
