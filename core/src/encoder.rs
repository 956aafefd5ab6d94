//! Turns pages into chunks: the sending side of one data channel, without I/O or clock.
//!
//! Pages go in one by one, grouped by stripe; bytes come out in [`ChannelEncoder::bytes`], to be written and cleared
//! by the driver whenever it likes. A page is copied from guest memory exactly once, into the place in the output
//! where it would stand if sent as it is; zero test, hash and compression all use that copy.

use crate::chunk::{Base, Chunk, DELTA_BYTES, DeltaHead, HEADER_BYTES, MAX_PAGES, MAX_PROBE_BYTES, ZeroRun};
use crate::delta;
use crate::memory::PAGE_SIZE;
use crate::output::Output;
use crate::progress::PageCounts;
use crate::table::{Page, is_zero};

/// Pages that are compressed together.
const ZSTD_RUN_PAGES: usize = 16;
/// Once differences come to this much, a chunk is made of them: a cap is kept in small steps.
const DELTA_CHUNK_BYTES: usize = 16 << 10;
/// Where pages are compressed too, only differences that are shorter than what that leaves of a page are sent. And no longer ones from
/// zeros, which are looked for on fast links too: a page of which more is set is given up after a few cache lines.
const SHORT_BYTES: usize = PAGE_SIZE / 8;
/// What sparse pages are differences from.
static ZEROS: Page = [0; PAGE_SIZE];
/// Once output grows beyond this much, the driver should write it.
pub const OUTPUT_BYTES: usize = 128 << 10;

/// Whether and how hard to compress from here on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ZstdLevel(pub i32);

/// The sending side of one data channel.
pub struct ChannelEncoder {
    out: Output,
    /// The run of raw pages at the end of `out` that is still open: where its header starts and its first frame.
    run: Option<Run>,
    zeros: Vec<ZeroRun>,
    deltas: Deltas,
    /// Whether pages that are zeros but for a few words may be sent as those.
    sparse: bool,
    /// The copy of a page that is compared with its base.
    page: Box<Page>,
    stripe_frame: u64,
    zstd: Option<Zstd>,
    chunks: u64,
    marks: u64,
    counts: PageCounts,
}

struct Run {
    header_at: usize,
    frame: u64,
    pages: usize,
}

/// Differences that no chunk has been made of yet.
#[derive(Default)]
struct Deltas {
    bytes: Vec<u8>,
    pages: usize,
}

struct Zstd {
    compressor: zstd::bulk::Compressor<'static>,
    scratch: Vec<u8>,
}

/// What became of a page.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Encoded<'a> {
    /// All zeros.
    Zero,
    /// These contents.
    Contents(&'a Page),
    /// Its base: nothing is sent.
    Same,
}

impl ChannelEncoder {
    /// An encoder that sends pages as they are (`None`) or compresses runs of them; of pages that are zeros but for a few words, only those.
    pub fn new(zstd: Option<ZstdLevel>) -> std::io::Result<Self> {
        let mut encoder = Self {
            out: Output::with_capacity(2 * OUTPUT_BYTES),
            run: None,
            zeros: Vec::new(),
            deltas: Deltas::default(),
            sparse: true,
            page: Box::new([0; PAGE_SIZE]),
            stripe_frame: 0,
            zstd: None,
            chunks: 0,
            marks: 0,
            counts: PageCounts::default(),
        };
        encoder.set_zstd(zstd)?;
        Ok(encoder)
    }

    /// Begins anew on another link: what was not written is forgotten. Marks and counts go on.
    pub fn restart(&mut self) {
        self.out.clear();
        self.run = None;
        self.zeros.clear();
        self.deltas = Deltas::default();
        self.chunks = 0;
    }

    /// The destination does not know differences from zeros.
    pub fn without_sparse(self) -> Self {
        Self { sparse: false, ..self }
    }

    /// Changes compression for pages from here on.
    pub fn set_zstd(&mut self, level: Option<ZstdLevel>) -> std::io::Result<()> {
        self.close_run();
        self.zstd = match level {
            None => None,
            Some(ZstdLevel(level)) => {
                let compressor = zstd::bulk::Compressor::new(level)?;
                Some(Zstd { compressor, scratch: vec![0; ZSTD_RUN_PAGES * PAGE_SIZE] })
            }
        };
        Ok(())
    }

    /// Begins a stripe. Every page until [`ChannelEncoder::end_stripe`] lies in it, in ascending order.
    pub fn begin_stripe(&mut self, first_frame: u64) {
        self.end_stripe();
        self.stripe_frame = first_frame;
    }

    /// Encodes the page at `offset` in the stripe as its difference from `base`, which is what stands at the destination, if
    /// that pays. `copy` fetches its contents, once.
    pub fn page_with_base(&mut self, offset: usize, base: &Page, copy: impl FnOnce(&mut Page)) -> Encoded<'_> {
        copy(&mut self.page);
        if *self.page == *base {
            self.counts.same += 1;
            return Encoded::Same;
        }
        if is_zero(&self.page) {
            return self.zero_page(offset);
        }
        let most = if self.zstd.is_some() { SHORT_BYTES } else { delta::MOST_BYTES };
        if self.deltas.add(offset, (Base::Sent, base), &self.page, most) {
            self.counts.delta += 1;
            if self.deltas.bytes.len() >= DELTA_CHUNK_BYTES {
                self.put_deltas();
            }
            return Encoded::Contents(&self.page);
        }
        let page = *self.page;
        self.page(offset, |copy| *copy = page)
    }

    fn put_deltas(&mut self) {
        if self.deltas.pages == 0 {
            return;
        }
        self.close_run();
        let (pages, length) = (std::mem::take(&mut self.deltas.pages), self.deltas.bytes.len());
        self.put(Chunk::Delta { frame: self.stripe_frame, pages, length });
        self.out.extend(&self.deltas.bytes);
        self.deltas.bytes.clear();
    }

    /// Encodes the page at `offset` in the stripe. `copy` fetches its contents, once.
    pub fn page(&mut self, offset: usize, copy: impl FnOnce(&mut Page)) -> Encoded<'_> {
        // Before there is a page in the output: one that is sent as a difference is read there afterwards.
        if self.deltas.bytes.len() >= DELTA_CHUNK_BYTES {
            self.put_deltas();
        }
        let frame = self.stripe_frame + offset as u64;
        let most = if self.zstd.is_some() { ZSTD_RUN_PAGES } else { MAX_PAGES };
        if self.run.as_ref().is_some_and(|run| run.frame + run.pages as u64 != frame || run.pages == most) {
            self.close_run();
        }
        let header_at = self.out.len();
        if self.run.is_none() {
            self.out.add_room(HEADER_BYTES);
        }
        let page_at = self.out.len();
        self.out.add_room(PAGE_SIZE);
        let page = page_mut(&mut self.out, page_at);
        copy(page);
        // What was made room for goes again if nothing is put there: the page's place, and the header's if it was the run's first.
        let without = if self.run.is_none() { header_at } else { page_at };
        if is_zero(page) {
            self.out.truncate(without);
            return self.zero_page(offset);
        }
        if self.sparse && self.deltas.add(offset, (Base::Zeros, &ZEROS), page, SHORT_BYTES) {
            self.out.truncate(without);
            self.counts.delta += 1;
            return Encoded::Contents(page_of(&self.out.taken_away()[page_at - without..]));
        }
        let run = self.run.get_or_insert(Run { header_at, frame, pages: 0 });
        run.pages += 1;
        Encoded::Contents(page_mut(&mut self.out, page_at))
    }

    /// Encodes the page at `offset` in the stripe, which is known to be all zeros.
    pub fn zero_page(&mut self, offset: usize) -> Encoded<'_> {
        self.counts.zero += 1;
        self.zero(offset);
        Encoded::Zero
    }

    /// Ends the stripe: all of its pages are in the output.
    pub fn end_stripe(&mut self) {
        self.close_run();
        self.put_deltas();
        if self.zeros.is_empty() {
            return;
        }
        self.put(Chunk::Zero { frame: self.stripe_frame, runs: self.zeros.len() });
        for run in self.zeros.drain(..) {
            self.out.extend(&run.encode());
        }
    }

    /// Says that pages from `frame` on will be sent soon. Between stripes.
    pub fn coming(&mut self, frame: u64, pages: usize) {
        self.end_stripe();
        self.put(Chunk::Coming { frame, pages });
    }

    /// Asks for an acknowledgement of all before it and returns the mark's number.
    pub fn mark(&mut self) -> u64 {
        self.close_run();
        self.marks += 1;
        self.put(Chunk::Mark { number: self.marks });
        self.marks
    }

    /// Ends the channel.
    pub fn end(&mut self) {
        self.end_stripe();
        self.put(Chunk::End { chunks: self.chunks });
    }

    /// Bytes that mean nothing.
    pub fn probe(&mut self) {
        self.close_run();
        self.put(Chunk::Probe { length: MAX_PROBE_BYTES });
        // Not zeros: a link that compresses would look faster than it is.
        let mut x = 0x9e37_79b9_7f4a_7c15u64;
        let at = self.out.len();
        self.out.add_room(MAX_PROBE_BYTES);
        for word in self.out[at..].chunks_exact_mut(8) {
            x ^= x << 13;
            x ^= x >> 7;
            x ^= x << 17;
            word.copy_from_slice(&x.to_le_bytes());
        }
    }

    /// Bytes encoded and not yet cleared.
    pub fn output_bytes(&self) -> usize {
        self.out.len()
    }

    /// What is to be written. Closes an open run.
    pub fn bytes(&mut self) -> &[u8] {
        self.close_run();
        &self.out
    }

    /// The same bytes, and how many they are, for whoever puts another buffer of the same length in their place before they are cleared.
    pub fn buffer(&mut self) -> (&mut Vec<u8>, usize) {
        self.close_run();
        self.out.buffer()
    }

    /// Forgets the bytes: they have been written.
    pub fn clear(&mut self) {
        debug_assert!(self.run.is_none(), "cleared without having been asked for the bytes");
        self.out.clear();
    }

    /// Pages encoded so far.
    pub fn counts(&self) -> PageCounts {
        self.counts
    }

    fn zero(&mut self, offset: usize) {
        match self.zeros.last_mut() {
            Some(run) if usize::from(run.offset + run.pages) == offset => run.pages += 1,
            _ => self.zeros.push(ZeroRun { offset: offset as u16, pages: 1 }),
        }
    }

    fn put(&mut self, chunk: Chunk) {
        self.out.extend(&chunk.encode());
        self.chunks += 1;
    }

    fn close_run(&mut self) {
        let Some(Run { header_at, frame, pages }) = self.run.take() else { return };
        let contents_at = header_at + HEADER_BYTES;
        let compressed = self.zstd.as_mut().and_then(|zstd| zstd.compress(&self.out[contents_at..]));
        let chunk = match compressed {
            Some(compressed) => {
                self.counts.zstd += pages as u64;
                let length = compressed.len();
                self.out[contents_at..][..length].copy_from_slice(compressed);
                self.out.truncate(contents_at + length);
                Chunk::Zstd { frame, pages, length }
            }
            None => {
                self.counts.raw += pages as u64;
                Chunk::Raw { frame, pages }
            }
        };
        self.out[header_at..][..HEADER_BYTES].copy_from_slice(&chunk.encode());
        self.chunks += 1;
    }
}

impl Deltas {
    /// Adds how `page` differs from `base`, if that takes at most `most_bytes`.
    fn add(&mut self, offset: usize, (kind, base): (Base, &Page), page: &Page, most_bytes: usize) -> bool {
        let head_at = self.bytes.len();
        self.bytes.resize(head_at + DELTA_BYTES, 0);
        let Some(length) = delta::encode(base, page, most_bytes, &mut self.bytes) else {
            self.bytes.truncate(head_at);
            return false;
        };
        let head = DeltaHead { offset: offset as u16, length: length as u16, base: kind };
        self.bytes[head_at..][..DELTA_BYTES].copy_from_slice(&head.encode());
        self.pages += 1;
        true
    }
}

impl Zstd {
    /// `None` if it would not shrink by at least an eighth, which is not worth the destination's work.
    fn compress(&mut self, contents: &[u8]) -> Option<&[u8]> {
        let limit = contents.len() - contents.len() / 8;
        let length = self.compressor.compress_to_buffer(contents, &mut self.scratch[..limit]).ok()?;
        Some(&self.scratch[..length])
    }
}

fn page_of(bytes: &[u8]) -> &Page {
    match bytes.first_chunk() {
        Some(page) => page,
        None => unreachable!("there was room for a page"),
    }
}

fn page_mut(out: &mut [u8], at: usize) -> &mut Page {
    match out[at..].first_chunk_mut() {
        Some(page) => page,
        None => unreachable!("the output was grown by a page"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A page with so many words that are not zero, every other one.
    fn sparse(words: usize) -> Page {
        let mut page = [0; PAGE_SIZE];
        page.as_chunks_mut::<16>().0.iter_mut().take(words).for_each(|pair| pair[3] = 5);
        page
    }

    fn sent(encoder: &mut ChannelEncoder, pages: &[Page]) -> Vec<u8> {
        encoder.begin_stripe(0);
        for (offset, page) in pages.iter().enumerate() {
            match encoder.page(offset, |copy| *copy = *page) {
                Encoded::Contents(contents) => assert_eq!(contents, page),
                other => panic!("{other:?}"),
            }
        }
        encoder.end_stripe();
        let bytes = encoder.bytes().to_vec();
        encoder.clear();
        bytes
    }

    #[test]
    fn of_a_page_that_is_zeros_but_for_a_few_words_only_those_are_sent() {
        let mut encoder = ChannelEncoder::new(None).unwrap();
        let most = SHORT_BYTES / 12;
        assert_eq!(sent(&mut encoder, &[sparse(1); 20]).len(), HEADER_BYTES + 20 * (DELTA_BYTES + 12));
        assert_eq!(sent(&mut encoder, &[sparse(most)]).len(), HEADER_BYTES + DELTA_BYTES + 12 * most);
        assert_eq!(sent(&mut encoder, &[sparse(most + 1)]).len(), HEADER_BYTES + PAGE_SIZE);
        let counts = encoder.counts();
        assert_eq!((counts.delta, counts.raw), (21, 1));
    }

    #[test]
    fn many_such_pages_among_others_are_several_chunks() {
        let mut encoder = ChannelEncoder::new(None).unwrap();
        let pages: Vec<Page> = (0..MAX_PAGES).map(|at| if at % 8 == 0 { [7; PAGE_SIZE] } else { sparse(40) }).collect();
        let bytes = sent(&mut encoder, &pages).len();
        let (whole, short) = (MAX_PAGES / 8, MAX_PAGES - MAX_PAGES / 8);
        let without_deltas = whole * (HEADER_BYTES + PAGE_SIZE) + short * (DELTA_BYTES + 480);
        assert_eq!(bytes, without_deltas + HEADER_BYTES * (short * 484).div_ceil(DELTA_CHUNK_BYTES));
    }

    #[test]
    fn a_destination_that_does_not_know_that_is_sent_whole_pages() {
        let mut encoder = ChannelEncoder::new(None).unwrap().without_sparse();
        assert_eq!(sent(&mut encoder, &[sparse(1); 20]).len(), HEADER_BYTES + 20 * PAGE_SIZE);
    }
}
