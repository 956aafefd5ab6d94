//! Pages on the channels of post-copy, and what is asked for.
//!
//! A request is the number of a frame, eight bytes. A page is a header of fixed layout, then its contents; all little-endian:
//!
//! | offset | size | field |
//! |---|---|---|
//! | 0 | 4 | magic `GWPG` |
//! | 4 | 2 | 1: the page follows, as it is; 2: zeros; 3: no page follows any more on this channel |
//! | 6 | 2 | reserved, 0 |
//! | 8 | 8 | frame |
//! | 16 | 8 | the page's entry in the table of hashes ([`crate::table`]) |

use crate::memory::PAGE_SIZE;

/// Bytes in a request.
pub const REQUEST_BYTES: usize = 8;
/// Bytes in a page's header.
pub const RECORD_BYTES: usize = 24;
const MAGIC: [u8; 4] = *b"GWPG";

/// What follows a header.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RecordKind {
    /// The page, as it is.
    Contents,
    /// Nothing: the page is all zeros.
    Zero,
    /// Nothing any more.
    End,
}

/// A page's header.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Record {
    /// What follows.
    pub kind: RecordKind,
    /// The page.
    pub frame: u64,
    /// Its hash, bound to the frame.
    pub entry: u64,
}

/// Why bytes are no page's header.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum BadRecord {
    /// The stream is out of step, or not of this protocol.
    #[error("this is no page's header (it begins with {0:02x?})")]
    Magic([u8; 4]),
    /// It says that no page follows, and names one.
    #[error("the end of a channel for pages names a page")]
    End,
    /// Of a kind that this version does not know.
    #[error("a page of unknown kind {0}")]
    Kind(u16),
}

impl Record {
    /// The last one on a channel.
    pub const END: Self = Self { kind: RecordKind::End, frame: 0, entry: 0 };

    /// The header's bytes.
    pub fn encode(&self) -> [u8; RECORD_BYTES] {
        let mut bytes = [0; RECORD_BYTES];
        let kind: u16 = match self.kind {
            RecordKind::Contents => 1,
            RecordKind::Zero => 2,
            RecordKind::End => 3,
        };
        bytes[..4].copy_from_slice(&MAGIC);
        bytes[4..6].copy_from_slice(&kind.to_le_bytes());
        bytes[8..16].copy_from_slice(&self.frame.to_le_bytes());
        bytes[16..].copy_from_slice(&self.entry.to_le_bytes());
        bytes
    }

    /// The header that these bytes are.
    pub fn decode(bytes: &[u8; RECORD_BYTES]) -> Result<Self, BadRecord> {
        let magic = [bytes[0], bytes[1], bytes[2], bytes[3]];
        if magic != MAGIC || bytes[6..8] != [0, 0] {
            return Err(BadRecord::Magic(magic));
        }
        let number = |at: usize| std::array::from_fn(|index| bytes[at + index]);
        let kind = match u16::from_le_bytes([bytes[4], bytes[5]]) {
            1 => RecordKind::Contents,
            2 => RecordKind::Zero,
            3 => RecordKind::End,
            kind => return Err(BadRecord::Kind(kind)),
        };
        let record = Self { kind, frame: u64::from_le_bytes(number(8)), entry: u64::from_le_bytes(number(16)) };
        match record.kind {
            // A page whose header has changed on the way must not end the channel: nobody would miss what comes after it.
            RecordKind::End if record != Self::END => Err(BadRecord::End),
            _ => Ok(record),
        }
    }

    /// Bytes that follow the header.
    pub fn contents_bytes(&self) -> usize {
        match self.kind {
            RecordKind::Contents => PAGE_SIZE,
            RecordKind::Zero | RecordKind::End => 0,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn headers_are_read_back(kind in 0..3, frame in any::<u64>(), entry in any::<u64>()) {
            let kind = [RecordKind::Contents, RecordKind::Zero, RecordKind::End][kind as usize];
            let record = match kind {
                RecordKind::End => Record::END,
                kind => Record { kind, frame, entry },
            };
            prop_assert_eq!(Record::decode(&record.encode()), Ok(record));
        }

        /// Bits change on the way now and then, and are found by the hash: unless they make of a page something that has none.
        #[test]
        fn no_page_becomes_the_end_of_its_channel(contents in any::<bool>(), frame in any::<u64>(), entry in 1u64.., bit in 0usize..8 * RECORD_BYTES) {
            let kind = if contents { RecordKind::Contents } else { RecordKind::Zero };
            let mut bytes = Record { kind, frame, entry }.encode();
            bytes[bit / 8] ^= 1 << (bit % 8);
            prop_assert_ne!(Record::decode(&bytes).map(|record| record.kind), Ok(RecordKind::End));
        }

        #[test]
        fn invariant_5_any_bytes_are_a_header_or_refused(bytes in prop::array::uniform24(any::<u8>()), known in any::<bool>()) {
            let mut bytes = bytes;
            if known {
                bytes[..4].copy_from_slice(&MAGIC);
            }
            if let Ok(record) = Record::decode(&bytes) {
                prop_assert_eq!(record.encode(), bytes);
            }
        }
    }
}
