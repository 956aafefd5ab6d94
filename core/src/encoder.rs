//! Turns pages into chunks: the sending side of one data channel, without I/O or clock.
//!
//! Pages go in one by one, grouped by stripe; bytes come out in [`ChannelEncoder::bytes`], to be written and cleared
//! by the driver whenever it likes. A page is copied from guest memory exactly once, into the place in the output
//! where it would stand if sent as it is; zero test, hash and compression all use that copy.

use crate::chunk::{Chunk, DELTA_BYTES, DeltaHead, HEADER_BYTES, MAX_PAGES, MAX_PROBE_BYTES, ZeroRun};
use crate::delta;
use crate::memory::PAGE_SIZE;
use crate::output::Output;
use crate::progress::PageCounts;
use crate::table::{Page, is_zero};

/// Pages that are compressed together.
const ZSTD_RUN_PAGES: usize = 16;
/// Once differences come to this much, a chunk is made of them: a cap is kept in small steps.
const DELTA_CHUNK_BYTES: usize = 16 << 10;
/// Where pages are compressed too, only differences that are shorter than what that leaves of a page are sent.
const MOST_BESIDE_ZSTD_BYTES: usize = PAGE_SIZE / 8;
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
    deltas: Vec<u8>,
    delta_pages: usize,
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
    /// An encoder that sends pages as they are (`None`) or compresses runs of them.
    pub fn new(zstd: Option<ZstdLevel>) -> std::io::Result<Self> {
        let mut encoder = Self {
            out: Output::with_capacity(2 * OUTPUT_BYTES),
            run: None,
            zeros: Vec::new(),
            deltas: Vec::new(),
            delta_pages: 0,
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
        self.deltas.clear();
        self.delta_pages = 0;
        self.chunks = 0;
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
        if self.delta(offset, base) {
            self.counts.delta += 1;
            return Encoded::Contents(&self.page);
        }
        let page = *self.page;
        self.page(offset, |copy| *copy = page)
    }

    /// Adds the difference between the copy and `base` to the list, if it is short enough.
    fn delta(&mut self, offset: usize, base: &Page) -> bool {
        let most = if self.zstd.is_some() { MOST_BESIDE_ZSTD_BYTES } else { delta::MOST_BYTES };
        let head_at = self.deltas.len();
        self.deltas.resize(head_at + DELTA_BYTES, 0);
        let Some(length) = delta::encode(base, &self.page, most, &mut self.deltas) else {
            self.deltas.truncate(head_at);
            return false;
        };
        let head = DeltaHead { offset: offset as u16, length: length as u16 };
        self.deltas[head_at..][..DELTA_BYTES].copy_from_slice(&head.encode());
        self.delta_pages += 1;
        if self.deltas.len() >= DELTA_CHUNK_BYTES {
            self.put_deltas();
        }
        true
    }

    fn put_deltas(&mut self) {
        if self.delta_pages == 0 {
            return;
        }
        self.close_run();
        let (pages, length) = (std::mem::take(&mut self.delta_pages), self.deltas.len());
        self.put(Chunk::Delta { frame: self.stripe_frame, pages, length });
        self.out.extend(&self.deltas);
        self.deltas.clear();
    }

    /// Encodes the page at `offset` in the stripe. `copy` fetches its contents, once.
    pub fn page(&mut self, offset: usize, copy: impl FnOnce(&mut Page)) -> Encoded<'_> {
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
        copy(page_mut(&mut self.out, page_at));
        if is_zero(page_mut(&mut self.out, page_at)) {
            // What was made room for goes again: the page's place, and the header's if it was the run's first.
            self.out.truncate(if self.run.is_none() { header_at } else { page_at });
            return self.zero_page(offset);
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

impl Zstd {
    /// `None` if it would not shrink by at least an eighth, which is not worth the destination's work.
    fn compress(&mut self, contents: &[u8]) -> Option<&[u8]> {
        let limit = contents.len() - contents.len() / 8;
        let length = self.compressor.compress_to_buffer(contents, &mut self.scratch[..limit]).ok()?;
        Some(&self.scratch[..length])
    }
}

fn page_mut(out: &mut [u8], at: usize) -> &mut Page {
    match out[at..].first_chunk_mut() {
        Some(page) => page,
        None => unreachable!("the output was grown by a page"),
    }
}
