//! Turns chunks back into pages: the receiving side of one data channel, without I/O or clock.
//!
//! The driver asks what is wanted next ([`ChannelDecoder::wants`]), brings exactly that, and is told what it meant.
//! Raw pages are wanted in guest memory itself; all else goes through a small buffer.

use std::ops::Range;
use std::sync::Arc;

use crate::chunk::{Base, Chunk, ChunkError, DELTA_BYTES, DeltaHead, HEADER_BYTES, MAX_PAGES, ZERO_RUN_BYTES, ZeroRun};
use crate::delta::DeltaError;
use crate::layout::Layout;
use crate::memory::PAGE_SIZE;
use crate::table::Page;

/// What the decoder needs to go on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Wants {
    /// So many bytes, for [`ChannelDecoder::handle_bytes`].
    Bytes(usize),
    /// So many pages read straight into guest memory from this slot on, then [`ChannelDecoder::handle_pages`].
    Pages {
        /// The first page's slot.
        slot: usize,
        /// How many.
        pages: usize,
    },
    /// Nothing: the channel has ended.
    Nothing,
}

/// What bytes have meant.
#[derive(Debug, PartialEq, Eq)]
pub enum Decoded<'a> {
    /// Nothing yet.
    Incomplete,
    /// Pages that now stand in guest memory.
    Placed(Pages),
    /// Pages with these contents.
    Contents(Pages, &'a [Page]),
    /// Runs of pages that are zero.
    Zero(&'a [Pages]),
    /// Pages as differences.
    Deltas(&'a [Delta]),
    /// These will be sent soon.
    Coming(Pages),
    /// To be acknowledged.
    Mark(u64),
    /// The channel has ended, complete.
    End,
}

/// A run of pages.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Pages {
    /// First frame.
    pub frame: u64,
    /// Its slot.
    pub slot: usize,
    /// How many.
    pub pages: usize,
}

/// A page's difference from what was last applied there, or from zeros.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Delta {
    /// The page.
    pub page: Pages,
    /// From which of the two.
    pub base: Base,
    /// Where the difference ([`crate::delta`]) lies in the bytes that were handed over.
    pub bytes: Range<usize>,
}

/// Why a channel cannot be believed.
#[derive(Debug, thiserror::Error)]
pub enum DecodeError {
    /// A bad header.
    #[error(transparent)]
    Chunk(#[from] ChunkError),
    /// Frames that are no RAM of the machine.
    #[error("{pages} pages from frame {frame:#x} are not guest RAM")]
    NotRam {
        /// First frame.
        frame: u64,
        /// How many.
        pages: u64,
    },
    /// Pages that do not belong to this channel's stripes.
    #[error("frame {0:#x} belongs to another channel")]
    OtherChannel(u64),
    /// A malformed run of zero pages.
    #[error("a malformed run of zero pages at frame {0:#x}")]
    ZeroRun(u64),
    /// A malformed list of differences.
    #[error("a malformed list of pages that differ, at frame {0:#x}")]
    DeltaList(u64),
    /// A malformed difference.
    #[error("how the page at frame {frame:#x} differs: {error}")]
    Delta {
        /// The page's frame.
        frame: u64,
        /// Why.
        error: DeltaError,
    },
    /// A difference from what nobody knows.
    #[error("a difference for frame {0:#x}, of which nothing whole is there")]
    NoBase(u64),
    /// Compressed pages that do not decompress to what was announced.
    #[error("compressed pages at frame {frame:#x} do not decompress: {why}")]
    Zstd {
        /// First frame.
        frame: u64,
        /// Why.
        why: String,
    },
    /// Chunks have been lost or made up.
    #[error("the channel ended after {got} chunks, the source sent {sent}")]
    Count {
        /// Arrived.
        got: u64,
        /// Sent.
        sent: u64,
    },
    /// The driver brought what was not asked for.
    #[error("the decoder was given something it did not ask for")]
    Misuse,
}

/// The receiving side of one data channel.
pub struct ChannelDecoder {
    layout: Arc<Layout>,
    channel: usize,
    channels: usize,
    state: State,
    chunks: u64,
    decompressor: zstd::bulk::Decompressor<'static>,
    contents: Vec<Page>,
    zeros: Vec<Pages>,
    deltas: Vec<Delta>,
}

#[derive(Clone, Copy)]
enum State {
    Header,
    Pages(Pages),
    Payload(Chunk),
    Ended,
}

impl ChannelDecoder {
    /// The decoder of channel `channel` of `channels`, which may only touch its own stripes.
    pub fn new(layout: Arc<Layout>, channel: usize, channels: usize) -> std::io::Result<Self> {
        Ok(Self {
            layout,
            channel,
            channels,
            state: State::Header,
            chunks: 0,
            decompressor: zstd::bulk::Decompressor::new()?,
            contents: Vec::new(),
            zeros: Vec::new(),
            deltas: Vec::new(),
        })
    }

    /// Begins anew on another link.
    pub fn restart(&mut self) {
        self.state = State::Header;
        self.chunks = 0;
    }

    /// What is needed next.
    pub fn wants(&self) -> Wants {
        match self.state {
            State::Header => Wants::Bytes(HEADER_BYTES),
            State::Pages(Pages { slot, pages, .. }) => Wants::Pages { slot, pages },
            State::Payload(chunk) => Wants::Bytes(chunk.payload_bytes()),
            State::Ended => Wants::Nothing,
        }
    }

    /// The pages that were wanted stand in guest memory.
    pub fn handle_pages(&mut self) -> Result<Decoded<'_>, DecodeError> {
        let State::Pages(pages) = self.state else { return Err(DecodeError::Misuse) };
        self.state = State::Header;
        self.chunks += 1;
        Ok(Decoded::Placed(pages))
    }

    /// Takes the bytes that were wanted.
    pub fn handle_bytes(&mut self, bytes: &[u8]) -> Result<Decoded<'_>, DecodeError> {
        if self.wants() != Wants::Bytes(bytes.len()) {
            return Err(DecodeError::Misuse);
        }
        match self.state {
            State::Header => self.header(bytes),
            State::Payload(chunk) => {
                self.state = State::Header;
                self.chunks += 1;
                self.payload(chunk, bytes)
            }
            State::Pages(_) | State::Ended => Err(DecodeError::Misuse),
        }
    }

    fn header(&mut self, bytes: &[u8]) -> Result<Decoded<'_>, DecodeError> {
        let header = bytes.first_chunk().ok_or(DecodeError::Misuse)?;
        match Chunk::decode(header)? {
            Chunk::Raw { frame, pages } => self.state = State::Pages(self.own_pages(frame, pages)?),
            Chunk::Mark { number } => {
                self.chunks += 1;
                return Ok(Decoded::Mark(number));
            }
            Chunk::Coming { frame, pages } => {
                self.chunks += 1;
                return Ok(Decoded::Coming(self.own_pages(frame, pages)?));
            }
            Chunk::End { chunks } if chunks == self.chunks => {
                self.state = State::Ended;
                return Ok(Decoded::End);
            }
            Chunk::End { chunks } => return Err(DecodeError::Count { got: self.chunks, sent: chunks }),
            chunk => self.state = State::Payload(chunk),
        }
        Ok(Decoded::Incomplete)
    }

    fn payload(&mut self, chunk: Chunk, bytes: &[u8]) -> Result<Decoded<'_>, DecodeError> {
        match chunk {
            Chunk::Zero { frame, .. } => {
                self.zeros.clear();
                for run in bytes.as_chunks::<ZERO_RUN_BYTES>().0 {
                    let run = ZeroRun::decode(*run).ok_or(DecodeError::ZeroRun(frame))?;
                    let first = frame.checked_add(run.offset.into()).ok_or(DecodeError::ZeroRun(frame))?;
                    let pages = self.own_pages(first, run.pages.into())?;
                    self.zeros.push(pages);
                }
                Ok(Decoded::Zero(&self.zeros))
            }
            Chunk::Zstd { frame, pages, .. } => {
                let run = self.own_pages(frame, pages)?;
                debug_assert!(pages <= MAX_PAGES);
                self.contents.resize(pages, [0; PAGE_SIZE]);
                let length = self
                    .decompressor
                    .decompress_to_buffer(bytes, self.contents.as_flattened_mut())
                    .map_err(|error| DecodeError::Zstd { frame, why: error.to_string() })?;
                if length != pages * PAGE_SIZE {
                    return Err(DecodeError::Zstd { frame, why: format!("{length} bytes instead of {pages} pages") });
                }
                Ok(Decoded::Contents(run, &self.contents))
            }
            Chunk::Delta { frame, pages, .. } => self.deltas(frame, pages, bytes),
            _ => Ok(Decoded::Incomplete),
        }
    }

    fn deltas(&mut self, frame: u64, pages: usize, bytes: &[u8]) -> Result<Decoded<'_>, DecodeError> {
        self.deltas.clear();
        let mut at = 0;
        while let Some(head) = bytes[at..].first_chunk::<DELTA_BYTES>() {
            let head = DeltaHead::decode(*head).ok_or(DecodeError::DeltaList(frame))?;
            let page = frame.checked_add(head.offset.into()).ok_or(DecodeError::DeltaList(frame))?;
            let page = self.own_pages(page, 1)?;
            let start = at + DELTA_BYTES;
            at = start + usize::from(head.length);
            if at > bytes.len() {
                return Err(DecodeError::DeltaList(frame));
            }
            self.deltas.push(Delta { page, base: head.base, bytes: start..at });
        }
        match at == bytes.len() && self.deltas.len() == pages {
            true => Ok(Decoded::Deltas(&self.deltas)),
            false => Err(DecodeError::DeltaList(frame)),
        }
    }

    /// A stripe belongs to one channel: so versions of a page never overtake each other, and two channels never write
    /// the same page, whatever a peer sends.
    fn own_pages(&self, frame: u64, pages: usize) -> Result<Pages, DecodeError> {
        let not_ram = DecodeError::NotRam { frame, pages: pages as u64 };
        let slot = self.layout.slot_of(frame, pages as u64).ok_or(not_ram)?;
        let stripes = Layout::stripe_of_slot(slot)..=Layout::stripe_of_slot(slot + pages - 1);
        match stripes.into_iter().all(|stripe| stripe % self.channels == self.channel) {
            true => Ok(Pages { frame, slot, pages }),
            false => Err(DecodeError::OtherChannel(frame)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::encoder::{ChannelEncoder, Encoded, ZstdLevel};
    use crate::machine::RegionDescription;
    use proptest::prelude::*;
    use std::collections::BTreeMap;

    fn layout() -> Layout {
        let region = |guest_address, size_bytes| RegionDescription { guest_address, size_bytes };
        Layout::new(&[region(0, 5 << 20), region(4 << 30, 3 << 20)]).unwrap()
    }

    /// Every page's last contents by frame, the marks, and whether the stream was complete.
    type Arrived = (BTreeMap<u64, Page>, Vec<u64>, bool);
    /// The pages of one visit to a stripe: offset, and kind and seed of the contents.
    type Visited = BTreeMap<usize, (u8, u64)>;

    /// Feeds bytes to a decoder and returns every page's last contents, by frame.
    fn decode(bytes: &[u8], channel: usize, channels: usize) -> Result<Arrived, DecodeError> {
        let mut decoder = ChannelDecoder::new(Arc::new(layout()), channel, channels).unwrap();
        let (mut pages, mut marks, mut rest) = (BTreeMap::new(), Vec::new(), bytes);
        loop {
            let (decoded, raw) = match decoder.wants() {
                Wants::Bytes(count) => {
                    let Some((now, later)) = rest.split_at_checked(count) else { return Ok((pages, marks, false)) };
                    rest = later;
                    (decoder.handle_bytes(now)?, now)
                }
                Wants::Pages { pages: count, .. } => {
                    let Some((now, later)) = rest.split_at_checked(count * PAGE_SIZE) else {
                        return Ok((pages, marks, false));
                    };
                    rest = later;
                    (decoder.handle_pages()?, now)
                }
                Wants::Nothing => return Ok((pages, marks, rest.is_empty())),
            };
            match decoded {
                Decoded::Placed(run) => {
                    for (index, page) in raw.as_chunks().0.iter().enumerate() {
                        pages.insert(run.frame + index as u64, *page);
                    }
                }
                Decoded::Contents(run, contents) => {
                    for (index, page) in contents.iter().enumerate() {
                        pages.insert(run.frame + index as u64, *page);
                    }
                }
                Decoded::Zero(runs) => {
                    for run in runs {
                        pages.extend((0..run.pages as u64).map(|index| (run.frame + index, [0; PAGE_SIZE])));
                    }
                }
                Decoded::Deltas(deltas) => {
                    for Delta { page: Pages { frame, .. }, base, bytes } in deltas {
                        let sent = pages.get(frame).filter(|_| *base == Base::Sent);
                        let mut page = sent.copied().unwrap_or([0; PAGE_SIZE]);
                        crate::delta::apply(&mut page, &raw[bytes.clone()])
                            .map_err(|error| DecodeError::Delta { frame: *frame, error })?;
                        pages.insert(*frame, page);
                    }
                }
                Decoded::Mark(number) => marks.push(number),
                Decoded::Incomplete | Decoded::Coming(_) | Decoded::End => {}
            }
        }
    }

    /// A page of one of four kinds: zero, one byte set, repetitive, random.
    fn page(kind: u8, seed: u64) -> Page {
        let mut page = [0; PAGE_SIZE];
        let mut x = seed | 1;
        match kind {
            0 => {}
            1 => page[(seed % 4096) as usize] = 1,
            2 => page.fill(seed as u8 | 1),
            _ => page.iter_mut().for_each(|byte| {
                x = x.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
                *byte = (x >> 56) as u8;
            }),
        }
        page
    }

    fn encode(visits: &[(usize, Visited)], zstd: Option<i32>, every: usize) -> (Vec<u8>, BTreeMap<u64, Page>) {
        let layout = layout();
        let mut encoder = ChannelEncoder::new(zstd.map(ZstdLevel)).unwrap();
        let (mut bytes, mut expected) = (Vec::new(), BTreeMap::new());
        for (stripe, pages) in visits {
            let stripe = layout.stripe(*stripe);
            if pages.len() > 1 {
                encoder.coming(stripe.first_frame, stripe.pages);
            }
            encoder.begin_stripe(stripe.first_frame);
            for (&offset, &(kind, seed)) in pages.range(..stripe.pages) {
                let contents = page(kind, seed);
                let encoded = encoder.page(offset, |page| *page = contents);
                match encoded {
                    Encoded::Zero => assert_eq!(kind, 0),
                    Encoded::Contents(page) => assert_eq!(*page, contents),
                    Encoded::Same => unreachable!("there is no base"),
                }
                expected.insert(stripe.first_frame + offset as u64, contents);
                if encoder.output_bytes() > every {
                    bytes.extend_from_slice(encoder.bytes());
                    encoder.clear();
                }
            }
            encoder.end_stripe();
            encoder.mark();
        }
        encoder.end();
        bytes.extend_from_slice(encoder.bytes());
        (bytes, expected)
    }

    fn visits() -> impl Strategy<Value = Vec<(usize, Visited)>> {
        let pages = prop::collection::btree_map(0usize..64, (0u8..4, any::<u64>()), 0..40);
        prop::collection::vec((0usize..5, pages), 0..6)
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        #[test]
        fn what_was_sent_last_arrives(visits in visits(), zstd in prop::option::of(1i32..4), every in 1usize..200_000) {
            let (bytes, expected) = encode(&visits, zstd, every);
            let (pages, marks, complete) = decode(&bytes, 0, 1).unwrap();
            prop_assert!(complete);
            prop_assert_eq!(marks, (1..=visits.len() as u64).collect::<Vec<_>>());
            prop_assert!(pages == expected);
        }

        #[test]
        fn invariant_5_damaged_streams_end_in_an_error_or_are_incomplete(visits in visits(), at in 0.0..1.0f64, bit in 0u8..8, cut in 0.0..1.0f64) {
            let (mut bytes, _) = encode(&visits, Some(1), 4096);
            let at = (at * bytes.len() as f64) as usize;
            bytes[at] ^= 1 << bit;
            let _ = decode(&bytes, 0, 1);
            bytes.truncate((cut * bytes.len() as f64) as usize);
            prop_assert!(!matches!(decode(&bytes, 0, 1), Ok((_, _, true))));
        }

        #[test]
        fn invariant_5_random_bytes_are_refused(bytes in prop::collection::vec(any::<u8>(), 24..500)) {
            prop_assert!(decode(&bytes, 0, 1).is_err());
        }
    }

    #[test]
    fn pages_outside_of_memory_or_of_the_channel_are_refused() {
        for at in [
            |frame, pages| Chunk::Raw { frame, pages }.encode(),
            |frame, pages| Chunk::Coming { frame, pages }.encode(),
        ] {
            refuses_what_is_not_the_channels(at);
        }
    }

    fn refuses_what_is_not_the_channels(at: impl Fn(u64, usize) -> [u8; HEADER_BYTES]) {
        assert!(matches!(decode(&at(5 << 8, 1), 0, 1), Err(DecodeError::NotRam { .. })), "in the gap");
        assert!(matches!(decode(&at(1270, 20), 0, 1), Err(DecodeError::NotRam { .. })), "across the end of a region");
        assert!(matches!(decode(&at(u64::MAX, 1), 0, 1), Err(DecodeError::NotRam { .. })));
        assert!(matches!(decode(&at(512, 1), 0, 2), Err(DecodeError::OtherChannel(512))));
        assert!(matches!(decode(&at(510, 4), 0, 2), Err(DecodeError::OtherChannel(510))));
        assert!(decode(&at(512, 1), 1, 2).is_ok());
    }

    #[test]
    fn a_lost_chunk_is_noticed_at_the_end() {
        let (mut bytes, _) = encode(&[(0, [(3, (3, 1))].into()), (1, BTreeMap::new())], None, 1 << 20);
        bytes.drain(HEADER_BYTES + PAGE_SIZE..2 * HEADER_BYTES + PAGE_SIZE);
        assert!(matches!(decode(&bytes, 0, 1), Err(DecodeError::Count { got: 2, sent: 3 })));
    }

    #[test]
    fn a_decompression_bomb_is_refused() {
        let bomb = zstd::bulk::compress(&vec![0u8; 1 << 20], 1).unwrap();
        let mut bytes = Chunk::Zstd { frame: 0, pages: 1, length: bomb.len() }.encode().to_vec();
        bytes.extend_from_slice(&bomb);
        assert!(matches!(decode(&bytes, 0, 1), Err(DecodeError::Zstd { .. })));
    }
}
