//! A page as its difference from what was last sent of it, or from a page of zeros.
//!
//! The base is nothing that has to be kept at the destination: it is what stands in its memory, or zeros. Pages are compared in
//! words of 8 bytes, and the words that changed are sent as they are now, in runs:
//!
//! | size | field |
//! |---|---|
//! | 2 | unchanged words before the run |
//! | 2 | changed words in it, at least 1 |
//! | 8 × count | the words |
//!
//! Numbers are little-endian. A page ends with the last run's bytes: what follows is unchanged.

use crate::memory::PAGE_SIZE;
use crate::table::Page;

/// Bytes in a word.
const WORD_BYTES: usize = 8;
/// Words in a page.
const WORDS: usize = PAGE_SIZE / WORD_BYTES;
/// Bytes before a run's words.
const RUN_BYTES: usize = 4;
/// A difference that is longer is not worth the destination's work.
pub const MOST_BYTES: usize = PAGE_SIZE / 2;

/// Why bytes are no difference.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum DeltaError {
    /// A run reaches beyond the page.
    #[error("a run of changed words reaches beyond the page")]
    Beyond,
    /// A run of nothing.
    #[error("a run of changed words is empty")]
    Empty,
    /// The bytes end in the middle of a run.
    #[error("a run of changed words is cut short")]
    Short,
}

/// Appends how `page` differs from `base` to `out` and gives the number of bytes, or appends nothing if that would be more
/// than `most_bytes`. Equal pages differ by 0 bytes.
pub fn encode(base: &Page, page: &Page, most_bytes: usize, out: &mut Vec<u8>) -> Option<usize> {
    let start = out.len();
    let (mut word, mut ended) = (0, 0);
    while let Some(first) = next_difference(base, page, word) {
        // A run that is too long need not be followed to its end: most pages that do not pay are left early.
        let room = most_bytes.saturating_sub(out.len() - start + RUN_BYTES) / WORD_BYTES;
        let limit = (first + room + 1).min(WORDS);
        let mut end = first + 1;
        while end < limit && differ(base, page, end) {
            end += 1;
        }
        let (skipped, count) = (first - ended, end - first);
        if count > room {
            out.truncate(start);
            return None;
        }
        out.extend_from_slice(&(skipped as u16).to_le_bytes());
        out.extend_from_slice(&(count as u16).to_le_bytes());
        out.extend_from_slice(&page[first * WORD_BYTES..end * WORD_BYTES]);
        (word, ended) = (end, end);
    }
    Some(out.len() - start)
}

/// Makes `page`, which holds the base, what the difference says. On an error it may have been altered in part.
pub fn apply(page: &mut Page, mut bytes: &[u8]) -> Result<(), DeltaError> {
    let mut at = 0;
    while !bytes.is_empty() {
        let (header, rest) = bytes.split_first_chunk::<RUN_BYTES>().ok_or(DeltaError::Short)?;
        let skipped = usize::from(u16::from_le_bytes([header[0], header[1]]));
        let length = usize::from(u16::from_le_bytes([header[2], header[3]])) * WORD_BYTES;
        let first = at + skipped * WORD_BYTES;
        if length == 0 {
            return Err(DeltaError::Empty);
        }
        let run = page.get_mut(first..first + length).ok_or(DeltaError::Beyond)?;
        let (words, rest) = rest.split_at_checked(length).ok_or(DeltaError::Short)?;
        run.copy_from_slice(words);
        (at, bytes) = (first + length, rest);
    }
    Ok(())
}

/// The first word from `from` on in which the pages differ. Equal stretches are skipped a cache line at a time.
fn next_difference(base: &Page, page: &Page, from: usize) -> Option<usize> {
    const LINE_WORDS: usize = 8;
    let mut word = from;
    while word < WORDS {
        let line = word * WORD_BYTES..(word + LINE_WORDS).min(WORDS) * WORD_BYTES;
        if word.is_multiple_of(LINE_WORDS) && base[line.clone()] == page[line] {
            word += LINE_WORDS;
        } else if differ(base, page, word) {
            return Some(word);
        } else {
            word += 1;
        }
    }
    None
}

fn differ(base: &Page, page: &Page, word: usize) -> bool {
    base.as_chunks::<WORD_BYTES>().0[word] != page.as_chunks::<WORD_BYTES>().0[word]
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn page(words: &[(usize, u64)]) -> Page {
        let mut page = [0; PAGE_SIZE];
        for &(word, value) in words {
            page[word * 8..][..8].copy_from_slice(&value.to_le_bytes());
        }
        page
    }

    #[test]
    fn one_changed_word_costs_twelve_bytes() {
        let mut out = vec![9];
        assert_eq!(encode(&page(&[(3, 1)]), &page(&[(3, 1), (511, 2)]), 4096, &mut out), Some(12));
        assert_eq!(&out[..5], [9, 0xff, 1, 1, 0]);
        assert_eq!(encode(&page(&[]), &page(&[]), 0, &mut out), Some(0));
    }

    #[test]
    fn what_does_not_pay_is_left() {
        let mut out = vec![];
        assert_eq!(encode(&[0; PAGE_SIZE], &[1; PAGE_SIZE], 4096, &mut out), None);
        assert!(out.is_empty());
        assert_eq!(encode(&[0; PAGE_SIZE], &[1; PAGE_SIZE], 4100, &mut out), Some(4100));
    }

    #[test]
    fn malformed_differences_are_refused() {
        let refused = |bytes: &[u8]| apply(&mut [0; PAGE_SIZE], bytes).unwrap_err();
        assert_eq!(refused(&[0, 0, 1]), DeltaError::Short);
        assert_eq!(refused(&[0, 0, 1, 0, 1, 2]), DeltaError::Short);
        assert_eq!(refused(&[0, 0, 0, 0]), DeltaError::Empty);
        assert_eq!(refused(&[0, 2, 1, 0, 1, 2, 3, 4, 5, 6, 7, 8]), DeltaError::Beyond);
        assert_eq!(refused(&[0xff, 0xff, 0xff, 0xff]), DeltaError::Beyond);
    }

    proptest! {
        #[test]
        fn round_trip(changes in prop::collection::vec((0..WORDS, any::<u64>()), 0..600), seed: u64, most in 0usize..5000) {
            let mut base = [0; PAGE_SIZE];
            base.chunks_mut(8).enumerate().for_each(|(word, bytes)| {
                bytes.copy_from_slice(&(seed.wrapping_mul(word as u64 | 1)).to_le_bytes());
            });
            let mut changed = base;
            for (word, value) in changes {
                changed[word * 8..][..8].copy_from_slice(&value.to_le_bytes());
            }
            let mut out = vec![];
            match encode(&base, &changed, most, &mut out) {
                Some(length) => {
                    prop_assert!(length == out.len() && length <= most);
                    apply(&mut base, &out).unwrap();
                    prop_assert!(base == changed);
                }
                None => prop_assert!(out.is_empty()),
            }
        }

        #[test]
        fn invariant_5_any_bytes_are_applied_or_refused(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            let _ = apply(&mut [0; PAGE_SIZE], &bytes);
        }
    }
}
