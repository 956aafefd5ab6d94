//! The records that `fw1` writes to its disk: 64 bytes each, numbered from 1, each with a checksum; printable, so that a
//! person can read the file as well.

use std::str;

/// Bytes in a record, its newline included.
pub const RECORD_BYTES: usize = 64;

/// Where `fw1` keeps its records.
pub const RECORDS_FILE: &str = "/var/lib/lab/records";

/// Bytes before the checksum.
const CHECKED_BYTES: usize = 54;

/// The record with this number, written at this time (nanoseconds since 1970).
pub fn encode(number: u64, written_ns: u64) -> [u8; RECORD_BYTES] {
    let mut text = format!("{number:>20} {written_ns:>20}");
    text = format!("{text:<CHECKED_BYTES$}");
    text = format!("{text} {:08x}\n", crc32c::crc32c(text.as_bytes()));
    let mut record = [b' '; RECORD_BYTES];
    record.copy_from_slice(text.as_bytes());
    record
}

/// The number of a record, unless it is damaged.
pub fn decode(record: &[u8]) -> Option<u64> {
    let (checked, rest) = record.split_at_checked(CHECKED_BYTES)?;
    let checksum = str::from_utf8(rest.strip_prefix(b" ")?.strip_suffix(b"\n")?).ok()?;
    (checksum == format!("{:08x}", crc32c::crc32c(checked))).then_some(())?;
    str::from_utf8(checked).ok()?.split_whitespace().next()?.parse().ok()
}

/// Why a file does not hold every confirmed record.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum RecordsError {
    /// It is too short.
    #[error("{found} records were found, {confirmed} were confirmed")]
    Missing {
        /// Whole records in the file.
        found: u64,
        /// How many there should be at least.
        confirmed: u64,
    },
    /// A record is not one.
    #[error("record {number} is damaged")]
    Damaged {
        /// Which.
        number: u64,
    },
    /// A record is at the wrong place.
    #[error("where record {number} should be there is record {found}")]
    Misplaced {
        /// The one that should be there.
        number: u64,
        /// The one that is there.
        found: u64,
    },
}

/// Checks that every record up to `confirmed` is there, in order, and gives how many there are.
///
/// What was written but never confirmed may be there or not, and the last of that may be torn.
pub fn check(file: &[u8], confirmed: u64) -> Result<u64, RecordsError> {
    let mut found = 0;
    for record in file.chunks(RECORD_BYTES) {
        let number = found + 1;
        match decode(record) {
            Some(there) if there == number => found = number,
            Some(there) => return Err(RecordsError::Misplaced { number, found: there }),
            None if number <= confirmed && record.len() == RECORD_BYTES => {
                return Err(RecordsError::Damaged { number });
            }
            None => break,
        }
    }
    if found < confirmed { Err(RecordsError::Missing { found, confirmed }) } else { Ok(found) }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn file(numbers: impl IntoIterator<Item = u64>) -> Vec<u8> {
        numbers.into_iter().flat_map(|number| encode(number, 1_700_000_000_000_000_000 + number)).collect()
    }

    #[test]
    fn a_record_is_a_line_that_a_person_can_read() {
        let record = encode(u64::MAX, u64::MAX);
        assert_eq!((record.len(), record.last()), (RECORD_BYTES, Some(&b'\n')));
        assert!(record[..63].iter().all(|byte| (b' '..=b'~').contains(byte)));
        assert_eq!(decode(&record), Some(u64::MAX));
    }

    #[test]
    fn records_beyond_the_confirmed_ones_may_be_there_or_torn() {
        assert_eq!(check(&file(1..=5), 5), Ok(5));
        assert_eq!(check(&file(1..=7), 5), Ok(7));
        let torn = file(1..=6);
        assert_eq!(check(&torn[..torn.len() - 10], 5), Ok(5));
        assert_eq!(check(&[], 0), Ok(0));
    }

    #[test]
    fn a_missing_a_swapped_and_a_damaged_record_are_noticed() {
        assert_eq!(check(&file(1..=4), 5), Err(RecordsError::Missing { found: 4, confirmed: 5 }));
        assert_eq!(check(&file([1, 3, 2]), 3), Err(RecordsError::Misplaced { number: 2, found: 3 }));
        assert_eq!(check(&file([1, 2, 2, 3]), 3), Err(RecordsError::Misplaced { number: 3, found: 2 }));
        let mut damaged = file(1..=5);
        damaged[RECORD_BYTES + 30] ^= 1;
        assert_eq!(check(&damaged, 5), Err(RecordsError::Damaged { number: 2 }));
        // A block of zeros: size was written, contents were not.
        let mut zeroed = file(1..=5);
        zeroed[2 * RECORD_BYTES..3 * RECORD_BYTES].fill(0);
        assert_eq!(check(&zeroed, 5), Err(RecordsError::Damaged { number: 3 }));
        let torn = file(1..=5);
        assert_eq!(check(&torn[..torn.len() - 1], 5), Err(RecordsError::Missing { found: 4, confirmed: 5 }));
    }

    proptest! {
        #[test]
        fn any_flipped_bit_is_noticed(number: u64, written: u64, bit in 0..RECORD_BYTES * 8) {
            let mut record = encode(number, written);
            record[bit / 8] ^= 1 << (bit % 8);
            prop_assert_eq!(decode(&record), None);
        }
    }
}
