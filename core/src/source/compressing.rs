//! Whether pages are compressed: what the user wants, and with `auto` whether it pays.

use super::Compression;
use crate::encoder::ZstdLevel;
use crate::progress::PageCounts;

/// Below this cap a core compresses faster than the link takes (docs/performance.md), so `auto` tries it.
const COMPRESS_BELOW_BYTES_PER_S: u64 = 200_000_000;
/// How hard `auto` compresses.
pub(crate) const AUTO_LEVEL: ZstdLevel = ZstdLevel(1);
/// With `auto`: of so many stripes one is compressed to see whether it still does not pay.
const AUTO_SAMPLE_STRIPES: u32 = 32;

/// Whether looking for what need not be sent is quicker than sending it.
pub(crate) fn is_slow(bytes_per_s: Option<u64>) -> bool {
    bytes_per_s.is_some_and(|rate| rate <= COMPRESS_BELOW_BYTES_PER_S)
}

/// Decides for one channel, stripe by stripe.
pub(super) struct Compressing {
    wanted: Compression,
    stripes: u32,
    pays: bool,
    on: bool,
    before: PageCounts,
}

impl Compressing {
    pub(super) fn new(wanted: Compression) -> Self {
        Self { wanted, stripes: 0, pays: true, on: false, before: PageCounts::default() }
    }

    /// What to begin with.
    pub(super) fn level(&self) -> Option<ZstdLevel> {
        match self.wanted {
            Compression::Zstd(level) => Some(ZstdLevel(level)),
            Compression::Auto | Compression::None => None,
        }
    }

    /// A stripe begins, under this cap or over a link of this rate; some: what to change to. With `auto`: compress while that leaves a
    /// core time to, as long as contents shrink, and look again now and then.
    pub(super) fn choose(&mut self, rate: Option<u64>, counts: PageCounts) -> Option<Option<ZstdLevel>> {
        if self.wanted != Compression::Auto {
            return None;
        }
        self.before = counts;
        self.stripes += 1;
        let compress = is_slow(rate) && (self.pays || self.stripes.is_multiple_of(AUTO_SAMPLE_STRIPES));
        let changed = compress != self.on;
        self.on = compress;
        changed.then(|| compress.then_some(AUTO_LEVEL))
    }

    /// A stripe has ended.
    pub(super) fn judge(&mut self, now: PageCounts) {
        if self.on && now != self.before {
            self.pays = now.zstd - self.before.zstd >= now.raw - self.before.raw;
        }
    }
}
