//! What a vCPU does to one page: fill it, or write it once.
//!
//! Stores are volatile and ascending, so that a page caught in the middle of a write is a new beginning
//! followed by an old end. The library's tests run this very code on modelled memory.

use super::rules::{GOLDEN, PAGE_WORDS, WordRule, word_index};

/// Gives a page of zeros its first contents.
///
/// # Safety
/// `page` must point to [`PAGE_WORDS`] words that may be written.
#[inline(always)]
pub(crate) unsafe fn fill(page: *mut u64, rule: WordRule, page_key: u64) {
    for word in 0..PAGE_WORDS {
        // SAFETY: within the page, by the caller's promise.
        unsafe { page.add(word).write_volatile(rule.initial(page_key, word)) };
    }
}

/// Writes one word of the page.
///
/// # Safety
/// `page` must point to [`PAGE_WORDS`] words that may be read and written.
#[inline(always)]
pub(crate) unsafe fn write_word(page: *mut u64, rule: WordRule, page_key: u64) {
    let word = word_index(page_key);
    // SAFETY: `word_index` is below PAGE_WORDS.
    unsafe {
        let cell = page.add(word);
        cell.write_volatile(rule.step(cell.read_volatile(), rule.increment(page_key, word)));
    }
}

/// Writes all words of the page, first to last.
///
/// # Safety
/// `page` must point to [`PAGE_WORDS`] words that may be read and written.
#[inline(always)]
pub(crate) unsafe fn write_page(page: *mut u64, rule: WordRule, page_key: u64) {
    let group_words = 1 << rule.group_shift;
    let mut increment = rule.increment(page_key, 0);
    for group in 0..PAGE_WORDS / group_words {
        for word in group * group_words..(group + 1) * group_words {
            // SAFETY: within the page, by the caller's promise.
            unsafe {
                let cell = page.add(word);
                cell.write_volatile(rule.step(cell.read_volatile(), increment));
            }
        }
        increment = increment.wrapping_add(GOLDEN.wrapping_mul(2));
    }
}
