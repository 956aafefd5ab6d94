//! What pages cost that are sent again, found out while they are being sent for the first time.
//!
//! Over a slow link differences are sent instead of pages, and how short those are decides whether a move converges. So some pages
//! that were sent and are clean are copied; those that are dirty at a later look are encoded as a round would.

use std::time::Duration;

use crate::estimate::{EstimateError, Options, RewrittenContents};
use crate::layout::{Stripe, StripeBits};
use crate::source::Encodings;
use crate::view::MemoryView;

/// Runs of pages that are copied at a time: half a MiB of memory, and a few milliseconds.
const RUNS: usize = 16;
/// The time that the guest is given to rewrite them.
const INTERVAL: Duration = Duration::from_millis(100);
/// So many rewritten pages say something: a guest that writes to few of many pages rewrites hardly one of the copied ones between two looks.
const TELLING_PAGES: u64 = 16;
/// So many say enough.
const ENOUGH_PAGES: u64 = 64;

/// The pages that are copied.
pub(super) struct Resent {
    rewritten: RewrittenContents,
    copied_at: Option<Duration>,
}

impl Resent {
    /// With a move's options. `None`: nothing is sent instead of pages.
    pub(super) fn new(encodings: Encodings) -> Result<Option<Self>, EstimateError> {
        let Encodings { compression, delta_cache_bytes, .. } = encodings;
        if delta_cache_bytes == 0 {
            return Ok(None);
        }
        let options = Options { time: Duration::ZERO, compression, delta_cache_bytes };
        Ok(Some(Self { rewritten: RewrittenContents::new(&options, RUNS)?, copied_at: None }))
    }

    /// A look has found these pages dirty in the stripes that have been visited.
    pub(super) fn look(
        &mut self,
        view: &MemoryView,
        now: Duration,
        visited: &[usize],
        dirty: &dyn Fn(usize) -> StripeBits,
    ) {
        if self.rewritten.pages() >= ENOUGH_PAGES || self.copied_at.is_some_and(|at| now < at + INTERVAL) {
            return;
        }
        self.rewritten.compare(view, dirty);
        let clean = |index: usize| clean(&view.layout().stripe(index), &dirty(index));
        self.rewritten.remember(view, clean, visited);
        self.copied_at = Some(now);
    }

    /// Bytes on the wire of a page that is sent again. `None`: too few were rewritten so far.
    pub(super) fn wire_bytes(&self) -> Option<f64> {
        self.rewritten.slow_wire_bytes().filter(|_| self.rewritten.pages() >= TELLING_PAGES)
    }
}

fn clean(stripe: &Stripe, dirty: &StripeBits) -> StripeBits {
    let all = stripe.all();
    std::array::from_fn(|word| all[word] & !dirty[word])
}
