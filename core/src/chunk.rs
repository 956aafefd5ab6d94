//! Chunks: what data channels carry.
//!
//! A chunk is a header of fixed layout and, for most kinds, a payload. All integers are little-endian.
//!
//! | offset | size | field |
//! |---|---|---|
//! | 0 | 1 | kind, 0 is invalid |
//! | 1 | 1 | reserved, 0 |
//! | 2 | 2 | magic `GW` |
//! | 4 | 4 | count: pages, or runs for *zero* |
//! | 8 | 8 | frame of the first page, or the number that *mark* and *end* carry |
//! | 16 | 4 | payload length in bytes |
//! | 20 | 4 | CRC-32C of the first 20 bytes |
//!
//! The header has a checksum of its own because a length or frame read wrongly would put good bytes in wrong places;
//! the pages themselves are covered by the table of page hashes.

use std::ops::RangeInclusive;

use crate::delta;
use crate::layout::STRIPE_PAGES;
use crate::memory::PAGE_SIZE;

/// Bytes in a chunk header.
pub const HEADER_BYTES: usize = 24;
/// Bytes of one run in a *zero* chunk: offset from the chunk's frame and number of pages, 16 bits each.
pub const ZERO_RUN_BYTES: usize = 4;
/// Bytes before each page's difference in a *delta* chunk: offset from the chunk's frame, and length and base, 16 bits each.
pub const DELTA_BYTES: usize = 4;
/// The most pages a chunk can hold: a stripe.
pub const MAX_PAGES: usize = STRIPE_PAGES;
/// The largest *probe* payload.
pub const MAX_PROBE_BYTES: usize = 64 << 10;

const MAGIC: [u8; 2] = *b"GW";
const RAW: u8 = 1;
const ZERO: u8 = 2;
const ZSTD: u8 = 3;
const MARK: u8 = 4;
const END: u8 = 5;
const PROBE: u8 = 6;
const DELTA: u8 = 7;
const COMING: u8 = 8;

/// A chunk's header, checked: whatever it says is within the format's limits. Whether the frames are RAM is for the
/// memory's owner to say.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Chunk {
    /// `pages` × 4096 bytes as they are.
    Raw {
        /// First frame.
        frame: u64,
        /// 1 to [`MAX_PAGES`].
        pages: usize,
    },
    /// Runs of zero pages within a stripe's length of `frame`.
    Zero {
        /// What the runs' offsets count from.
        frame: u64,
        /// 1 to [`MAX_PAGES`].
        runs: usize,
    },
    /// `pages` × 4096 bytes as one zstd frame.
    Zstd {
        /// First frame.
        frame: u64,
        /// 1 to [`MAX_PAGES`].
        pages: usize,
        /// Bytes of the zstd frame; less than the pages have.
        length: usize,
    },
    /// Asks the destination to acknowledge that everything before it has been applied.
    Mark {
        /// Ascending from 1 on each channel.
        number: u64,
    },
    /// The last chunk of the channel.
    End {
        /// Chunks before it.
        chunks: u64,
    },
    /// Bytes that mean nothing, to measure the link.
    Probe {
        /// 1 to [`MAX_PROBE_BYTES`].
        length: usize,
    },
    /// Pages within a stripe's length of `frame`, as differences from what was last sent of them or from zeros.
    Delta {
        /// What the pages' offsets count from.
        frame: u64,
        /// 1 to [`MAX_PAGES`].
        pages: usize,
        /// Bytes of all of them, at most [`DELTA_BYTES`] + [`delta::MOST_BYTES`] each.
        length: usize,
    },
    /// Pages that will be sent on this channel soon: memory for them can be made ready.
    Coming {
        /// First frame.
        frame: u64,
        /// 1 to [`MAX_PAGES`].
        pages: usize,
    },
}

/// Why bytes are no chunk.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum ChunkError {
    /// Wrong magic or reserved byte.
    #[error("not a chunk header")]
    Magic,
    /// The header's checksum does not fit.
    #[error("a chunk header's checksum is wrong")]
    Checksum,
    /// A kind that this version does not know.
    #[error("unknown chunk kind {0}")]
    Kind(u8),
    /// Count or payload length are not possible for the kind.
    #[error("a chunk of kind {kind} cannot have count {count} and {length} bytes")]
    Size {
        /// The kind.
        kind: u8,
        /// Its count.
        count: u32,
        /// Its payload length.
        length: u32,
    },
}

impl Chunk {
    /// Payload bytes that follow the header.
    pub fn payload_bytes(&self) -> usize {
        match *self {
            Chunk::Raw { pages, .. } => pages * PAGE_SIZE,
            Chunk::Zero { runs, .. } => runs * ZERO_RUN_BYTES,
            Chunk::Zstd { length, .. } | Chunk::Probe { length } | Chunk::Delta { length, .. } => length,
            Chunk::Mark { .. } | Chunk::End { .. } | Chunk::Coming { .. } => 0,
        }
    }

    /// The header's bytes.
    pub fn encode(&self) -> [u8; HEADER_BYTES] {
        let (kind, count, number) = match *self {
            Chunk::Raw { frame, pages } => (RAW, pages, frame),
            Chunk::Zero { frame, runs } => (ZERO, runs, frame),
            Chunk::Zstd { frame, pages, .. } => (ZSTD, pages, frame),
            Chunk::Mark { number } => (MARK, 0, number),
            Chunk::End { chunks } => (END, 0, chunks),
            Chunk::Probe { .. } => (PROBE, 0, 0),
            Chunk::Delta { frame, pages, .. } => (DELTA, pages, frame),
            Chunk::Coming { frame, pages } => (COMING, pages, frame),
        };
        let mut bytes = [0; HEADER_BYTES];
        bytes[0] = kind;
        bytes[2..4].copy_from_slice(&MAGIC);
        bytes[4..8].copy_from_slice(&(count as u32).to_le_bytes());
        bytes[8..16].copy_from_slice(&number.to_le_bytes());
        bytes[16..20].copy_from_slice(&(self.payload_bytes() as u32).to_le_bytes());
        let checksum = crc32c::crc32c(&bytes[..20]);
        bytes[20..].copy_from_slice(&checksum.to_le_bytes());
        bytes
    }

    /// Checks a header.
    pub fn decode(bytes: &[u8; HEADER_BYTES]) -> Result<Self, ChunkError> {
        let word = |at: usize| u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]]);
        if bytes[1] != 0 || bytes[2..4] != MAGIC {
            return Err(ChunkError::Magic);
        }
        if crc32c::crc32c(&bytes[..20]) != word(20) {
            return Err(ChunkError::Checksum);
        }
        let (kind, count, length) = (bytes[0], word(4), word(16));
        let number = u64::from(word(8)) | u64::from(word(12)) << 32;
        let pages = (1..=MAX_PAGES as u32).contains(&count).then_some(count as usize);
        let chunk = match (kind, pages) {
            (RAW, Some(pages)) => Chunk::Raw { frame: number, pages },
            (ZERO, Some(runs)) => Chunk::Zero { frame: number, runs },
            (ZSTD, Some(pages)) if (1..(pages * PAGE_SIZE) as u32).contains(&length) => {
                Chunk::Zstd { frame: number, pages, length: length as usize }
            }
            (MARK, None) => Chunk::Mark { number },
            (END, None) => Chunk::End { chunks: number },
            (PROBE, None) if (1..=MAX_PROBE_BYTES as u32).contains(&length) => Chunk::Probe { length: length as usize },
            (DELTA, Some(pages)) if delta_bytes(pages).contains(&(length as usize)) => {
                Chunk::Delta { frame: number, pages, length: length as usize }
            }
            (COMING, Some(pages)) => Chunk::Coming { frame: number, pages },
            (RAW..=COMING, _) => return Err(ChunkError::Size { kind, count, length }),
            _ => return Err(ChunkError::Kind(kind)),
        };
        // Whatever is redundant must agree, so that there is one encoding of each chunk.
        match chunk.encode() == *bytes {
            true => Ok(chunk),
            false => Err(ChunkError::Size { kind, count, length }),
        }
    }
}

/// What the differences of so many pages can come to.
fn delta_bytes(pages: usize) -> RangeInclusive<usize> {
    pages * DELTA_BYTES..=pages * (DELTA_BYTES + delta::MOST_BYTES)
}

/// What a page differs from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Base {
    /// What was last sent of it.
    Sent,
    /// A page of zeros, whatever was sent before.
    Zeros,
}

/// The head of a page's difference: offset from the chunk's frame, number of bytes that follow, and from what it differs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DeltaHead {
    /// Less than [`MAX_PAGES`].
    pub offset: u16,
    /// At most [`delta::MOST_BYTES`].
    pub length: u16,
    /// The highest bit of the second number.
    pub base: Base,
}

/// Set in a difference's length if it is one from zeros.
const FROM_ZEROS: u16 = 1 << 15;

impl DeltaHead {
    /// The head's bytes.
    pub fn encode(&self) -> [u8; DELTA_BYTES] {
        let base = match self.base {
            Base::Sent => 0,
            Base::Zeros => FROM_ZEROS,
        };
        let ([a, b], [c, d]) = (self.offset.to_le_bytes(), (self.length | base).to_le_bytes());
        [a, b, c, d]
    }

    /// Checks a head.
    pub fn decode(bytes: [u8; DELTA_BYTES]) -> Option<Self> {
        let [a, b, c, d] = bytes;
        let length = u16::from_le_bytes([c, d]);
        let base = if length & FROM_ZEROS == 0 { Base::Sent } else { Base::Zeros };
        let head = Self { offset: u16::from_le_bytes([a, b]), length: length & !FROM_ZEROS, base };
        (usize::from(head.offset) < MAX_PAGES && usize::from(head.length) <= delta::MOST_BYTES).then_some(head)
    }
}

/// A run of zero pages: offset from the chunk's frame, and number of pages.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ZeroRun {
    /// Less than [`MAX_PAGES`].
    pub offset: u16,
    /// At least 1; offset + pages is at most [`MAX_PAGES`].
    pub pages: u16,
}

impl ZeroRun {
    /// The run's bytes.
    pub fn encode(&self) -> [u8; ZERO_RUN_BYTES] {
        let ([a, b], [c, d]) = (self.offset.to_le_bytes(), self.pages.to_le_bytes());
        [a, b, c, d]
    }

    /// Checks a run.
    pub fn decode(bytes: [u8; ZERO_RUN_BYTES]) -> Option<Self> {
        let [a, b, c, d] = bytes;
        let run = Self { offset: u16::from_le_bytes([a, b]), pages: u16::from_le_bytes([c, d]) };
        (run.pages > 0 && usize::from(run.offset) + usize::from(run.pages) <= MAX_PAGES).then_some(run)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn chunks() -> impl Strategy<Value = Chunk> {
        let pages = 1..=MAX_PAGES;
        prop_oneof![
            (any::<u64>(), pages.clone()).prop_map(|(frame, pages)| Chunk::Raw { frame, pages }),
            (any::<u64>(), pages.clone()).prop_map(|(frame, runs)| Chunk::Zero { frame, runs }),
            (any::<u64>(), pages, 0.0..1.0f64).prop_map(|(frame, pages, share)| {
                let length = 1 + (share * (pages * PAGE_SIZE - 2) as f64) as usize;
                Chunk::Zstd { frame, pages, length }
            }),
            any::<u64>().prop_map(|number| Chunk::Mark { number }),
            any::<u64>().prop_map(|chunks| Chunk::End { chunks }),
            (1..=MAX_PROBE_BYTES).prop_map(|length| Chunk::Probe { length }),
            (any::<u64>(), 1..=MAX_PAGES, 0.0..1.0f64).prop_map(|(frame, pages, share)| {
                let length = DELTA_BYTES + (share * delta::MOST_BYTES as f64) as usize;
                Chunk::Delta { frame, pages, length: pages * length }
            }),
            (any::<u64>(), 1..=MAX_PAGES).prop_map(|(frame, pages)| Chunk::Coming { frame, pages }),
        ]
    }

    proptest! {
        #[test]
        fn round_trip(chunk in chunks()) {
            prop_assert_eq!(Chunk::decode(&chunk.encode()), Ok(chunk));
        }

        #[test]
        fn any_flipped_bit_is_found(chunk in chunks(), bit in 0..HEADER_BYTES * 8) {
            let mut bytes = chunk.encode();
            bytes[bit / 8] ^= 1 << (bit % 8);
            prop_assert!(Chunk::decode(&bytes).is_err());
        }

        #[test]
        fn impossible_headers_are_refused_even_with_a_right_checksum(mut bytes in prop::array::uniform24(any::<u8>()), kind in 0u8..10) {
            bytes[0] = kind;
            bytes[1] = 0;
            bytes[2..4].copy_from_slice(&MAGIC);
            let checksum = crc32c::crc32c(&bytes[..20]);
            bytes[20..].copy_from_slice(&checksum.to_le_bytes());
            if let Ok(chunk) = Chunk::decode(&bytes) {
                prop_assert_eq!(chunk.encode(), bytes);
                prop_assert!(chunk.payload_bytes() <= MAX_PAGES * PAGE_SIZE);
            }
        }

        #[test]
        fn heads_of_differences_stay_within_a_stripe_and_a_page(bytes in prop::array::uniform4(any::<u8>())) {
            if let Some(head) = DeltaHead::decode(bytes) {
                prop_assert_eq!(head.encode(), bytes);
                prop_assert!(usize::from(head.offset) < MAX_PAGES && usize::from(head.length) <= delta::MOST_BYTES);
            }
        }

        #[test]
        fn zero_runs_stay_within_a_stripe(bytes in prop::array::uniform4(any::<u8>())) {
            if let Some(run) = ZeroRun::decode(bytes) {
                prop_assert_eq!(run.encode(), bytes);
                prop_assert!(usize::from(run.offset) + usize::from(run.pages) <= MAX_PAGES);
            }
        }
    }
}
