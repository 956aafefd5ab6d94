//! What is in a guest's pages, found out by encoding some of them as a move would.
//!
//! Pages are copied once each, as in a move. What pages that are sent again cost is only known of pages that the guest has rewritten:
//! a copy is kept, and the page is encoded when a later look finds it dirty.

use std::time::Instant;

use super::{EstimateError, Options};
use crate::encoder::{ChannelEncoder, ZstdLevel};
use crate::layout::{StripeBits, set_bits};
use crate::memory::PAGE_SIZE;
use crate::predict::{Contents, Encoded, PageCost};
use crate::source::{AUTO_LEVEL, Compression};
use crate::table::Page;
use crate::touched::TouchedPages;
use crate::view::MemoryView;

/// Runs of pages that an estimate looks at, at most one of a stripe,
pub(crate) const RUNS: usize = 64;
/// and pages in each.
const RUN_PAGES: usize = 32;

/// What is encoded in one go, as under a cap of some 130 Mbit/s: less in one go compresses worse.
const QUANTUM_BYTES: usize = 16 << 10;

/// Touched pages, sent for the first time.
pub(super) struct FirstContents {
    pub(super) cost: Encoded,
    pub(super) zero_share: f64,
    pub(super) compressible_share: f64,
}

/// Pages that the guest has rewritten, sent again.
pub(crate) struct RewrittenContents {
    runs: usize,
    kept: Vec<Kept>,
    plain: Trial,
    slow: Trial,
    differences: Trial,
    with_bases: bool,
    auto: bool,
    delta_cache_bytes: u64,
}

struct Kept {
    stripe: usize,
    pages: Vec<(usize, Page)>,
}

/// One way to encode, and what came of it.
struct Trial {
    encoder: ChannelEncoder,
    wire_bytes: usize,
    /// Seconds for a page, run by run.
    took: Vec<f64>,
}

impl FirstContents {
    /// Encodes some of the touched pages of `stripes`.
    pub(super) fn sample(
        view: &MemoryView,
        touched: &dyn TouchedPages,
        stripes: &[usize],
        options: &Options,
    ) -> Result<Self, EstimateError> {
        let (mut plain, mut slow) = trials(options)?;
        // Whether pages compress is told in any case.
        let mut compressed = Trial::new(Some(AUTO_LEVEL))?;
        for (index, bits) in spread_out(stripes, RUNS, |index| touched.of(&view.layout().stripe(index))) {
            for trial in [&mut plain, &mut slow, &mut compressed] {
                trial.encode(view, index, set_bits(&bits).map(|offset| (offset, None)));
            }
        }
        let counts = compressed.encoder.counts();
        let full = counts.raw + counts.zstd;
        Ok(Self {
            cost: cost(&plain, &slow, options.compression == Compression::Auto)
                .unwrap_or(Encoded::always(PageCost::RAW)),
            zero_share: share(counts.zero, counts.visited()),
            compressible_share: share(counts.zstd, full),
        })
    }
}

impl RewrittenContents {
    /// Of pages that a move with these options sends; up to so many runs of them are kept at a time.
    pub(crate) fn new(options: &Options, runs: usize) -> Result<Self, EstimateError> {
        let (plain, slow) = trials(options)?;
        Ok(Self {
            runs,
            kept: Vec::new(),
            plain,
            slow,
            differences: Trial::new(None)?,
            with_bases: options.delta_cache_bytes > 0,
            auto: options.compression == Compression::Auto,
            delta_cache_bytes: options.delta_cache_bytes,
        })
    }

    /// Keeps copies of some of these pages.
    pub(crate) fn remember(&mut self, view: &MemoryView, pages: impl Fn(usize) -> StripeBits, stripes: &[usize]) {
        self.kept = spread_out(stripes, self.runs, pages)
            .map(|(index, bits)| {
                let stripe = view.layout().stripe(index);
                let copy = |offset| {
                    let mut page = [0; PAGE_SIZE];
                    view.copy_page(&stripe, offset, &mut page);
                    (offset, page)
                };
                Kept { stripe: index, pages: set_bits(&bits).map(copy).collect() }
            })
            .collect();
    }

    /// Encodes those of them that have been dirtied since.
    pub(crate) fn compare(&mut self, view: &MemoryView, dirty: impl Fn(usize) -> StripeBits) {
        for Kept { stripe, pages } in std::mem::take(&mut self.kept) {
            let bits = dirty(stripe);
            let again = || pages.iter().filter(|(offset, _)| bits[offset / 64] >> (offset % 64) & 1 == 1);
            let bare = || again().map(|(offset, _)| (*offset, None));
            let with_base = || again().map(|(offset, base)| (*offset, Some(base)));
            self.plain.encode(view, stripe, bare());
            match self.with_bases {
                true => self.slow.encode(view, stripe, with_base()),
                false => self.slow.encode(view, stripe, bare()),
            }
            self.differences.encode(view, stripe, with_base());
        }
    }

    /// What pages cost; `dirty_pages` compete for the delta cache. Without any that were rewritten: as the first time.
    pub(super) fn costs(&self, first: &FirstContents, dirty_pages: f64) -> Contents {
        let auto = self.auto && !self.with_bases;
        let Some(mut again) = cost(&self.plain, &self.slow, auto) else { return Contents::always(first.cost) };
        let mut in_pause = again;
        if self.with_bases {
            // A page that has lost its place in the cache is sent as the first time.
            let hit = (self.delta_cache_bytes as f64 / (dirty_pages * PAGE_SIZE as f64).max(1.0)).min(1.0);
            let mixed = |hits: f64, others: f64| hit * hits + (1.0 - hit) * others;
            again.slow.wire_bytes = mixed(again.slow.wire_bytes, first.cost.slow.wire_bytes);
            in_pause = again;
            if let Some(differences) = self.differences.cost() {
                in_pause.plain.wire_bytes = mixed(differences.wire_bytes, again.plain.wire_bytes);
            }
        }
        Contents { first: first.cost, again, in_pause }
    }

    /// Pages that have been encoded.
    pub(crate) fn pages(&self) -> u64 {
        self.slow.encoder.counts().visited()
    }

    /// Bytes on a slow link for each of them. `None`: there were none.
    pub(crate) fn slow_wire_bytes(&self) -> Option<f64> {
        Some(self.slow.cost()?.wire_bytes)
    }

    /// Of rewritten pages, those whose differences are short.
    pub(super) fn delta_share(&self) -> f64 {
        let counts = self.differences.encoder.counts();
        share(counts.delta, counts.visited())
    }

    /// Of rewritten pages, those that hold what they did before.
    pub(super) fn same_share(&self) -> f64 {
        let counts = self.differences.encoder.counts();
        share(counts.same, counts.visited())
    }
}

impl Trial {
    fn new(level: Option<ZstdLevel>) -> Result<Self, EstimateError> {
        let encoder =
            ChannelEncoder::new(level).map_err(|error| EstimateError::Io("pages cannot be compressed", error))?;
        Ok(Self { encoder, wire_bytes: 0, took: Vec::new() })
    }

    /// Encodes these pages of a stripe, against a base where there is one.
    fn encode<'p>(&mut self, view: &MemoryView, stripe: usize, pages: impl Iterator<Item = (usize, Option<&'p Page>)>) {
        let stripe = view.layout().stripe(stripe);
        let (began, before) = (Instant::now(), self.encoder.counts().visited());
        self.encoder.begin_stripe(stripe.first_frame);
        for (offset, base) in pages {
            let copy = |page: &mut Page| view.copy_page(&stripe, offset, page);
            match base {
                Some(base) => self.encoder.page_with_base(offset, base, copy),
                None => self.encoder.page(offset, copy),
            };
            if self.encoder.output_bytes() >= QUANTUM_BYTES {
                self.put();
            }
        }
        self.encoder.end_stripe();
        let pages = self.encoder.counts().visited() - before;
        if pages > 0 {
            self.took.push(began.elapsed().as_secs_f64() / pages as f64);
        }
        self.put();
    }

    fn put(&mut self) {
        self.wire_bytes += self.encoder.bytes().len();
        self.encoder.clear();
    }

    /// What a page cost: bytes on average, time in the median run, since some are interrupted. `None`: there were none.
    fn cost(&self) -> Option<PageCost> {
        let pages = self.encoder.counts().visited() as f64;
        let mut took = self.took.clone();
        took.sort_unstable_by(f64::total_cmp);
        let seconds = took.get(took.len() / 2)?;
        Some(PageCost { wire_bytes: self.wire_bytes as f64 / pages, pages_per_s: 1.0 / seconds.max(1e-9) })
    }
}

/// What a move with these options does on a fast link and on a slow one.
fn trials(options: &Options) -> Result<(Trial, Trial), EstimateError> {
    let (plain, slow) = match options.compression {
        Compression::None => (None, None),
        Compression::Auto => (None, Some(AUTO_LEVEL)),
        Compression::Zstd(level) => (Some(ZstdLevel(level)), Some(ZstdLevel(level))),
    };
    Ok((Trial::new(plain)?, Trial::new(slow)?))
}

/// With `auto`, compression that does not pay is left out, as in a move.
fn cost(plain: &Trial, slow: &Trial, auto: bool) -> Option<Encoded> {
    let counts = slow.encoder.counts();
    let plain = plain.cost()?;
    let slow = match auto && counts.zstd < counts.raw {
        true => plain,
        false => slow.cost()?,
    };
    // Copying and encoding are not all that the data path does with a page. Short differences are no quicker than whole pages: both ends
    // look at what the page held before, too.
    let within = |cost: PageCost| PageCost { pages_per_s: cost.pages_per_s.min(PageCost::RAW.pages_per_s), ..cost };
    Some(Encoded { plain: within(plain), slow: within(slow) })
}

/// So many runs of up to [`RUN_PAGES`] neighbouring pages, evenly spread over all pages that `pages` finds in the stripes: a stripe with
/// few of them does not count for more.
fn spread_out(
    stripes: &[usize],
    runs: usize,
    pages: impl Fn(usize) -> StripeBits,
) -> impl Iterator<Item = (usize, StripeBits)> {
    let having: Vec<(usize, StripeBits, usize)> =
        stripes.iter().map(|index| (*index, pages(*index))).map(|(index, bits)| (index, bits, count(&bits))).collect();
    let total: usize = having.iter().map(|(_, _, count)| count).sum();
    let step = (total / runs.max(1)).max(RUN_PAGES);
    let mut before = 0;
    having.into_iter().filter_map(move |(index, bits, count)| {
        let begin = before;
        before += count;
        // Where runs begin: at every `step`th page of all.
        let first = begin.next_multiple_of(step);
        (first < before).then(|| (index, run(&bits, first - begin)))
    })
}

/// Set bits from the `from`th on.
fn run(bits: &StripeBits, from: usize) -> StripeBits {
    let mut run = StripeBits::default();
    for offset in set_bits(bits).skip(from).take(RUN_PAGES) {
        run[offset / 64] |= 1 << (offset % 64);
    }
    run
}

fn count(bits: &StripeBits) -> usize {
    bits.iter().map(|word| word.count_ones() as usize).sum()
}

fn share(part: u64, whole: u64) -> f64 {
    if whole == 0 { 0.0 } else { part as f64 / whole as f64 }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runs_are_spread_over_pages_not_over_stripes() {
        // A stripe with one page among full ones: it is hardly ever taken.
        let bits = |index: usize| if index == 7 { [1, 0, 0, 0, 0, 0, 0, 0] } else { [u64::MAX; 8] };
        let stripes: Vec<usize> = (0..100).collect();
        let runs: Vec<_> = spread_out(&stripes, RUNS, bits).collect();
        assert!((60..=RUNS + 1).contains(&runs.len()), "{}", runs.len());
        let whole = runs.iter().filter(|(_, run)| count(run) == RUN_PAGES).count();
        assert!(whole >= runs.len() - 5 && runs.iter().all(|(_, run)| count(run) > 0), "{whole}");
        assert_eq!(spread_out(&stripes, RUNS, |_| StripeBits::default()).count(), 0);
        let few = [0b1011, 0, 0, 0, 0, 0, 0, 1 << 63];
        assert_eq!(spread_out(&[3], RUNS, |_| few).collect::<Vec<_>>(), [(3, few)]);
    }
}
