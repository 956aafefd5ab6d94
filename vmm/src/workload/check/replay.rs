//! How often each page has been written: replayed from the vCPUs' write counts.

use std::ops::Range;

use crate::workload::rules::Sequence;

use super::facts::{Facts, Part};
use super::{CheckError, in_parallel, threads};

/// More writes than this are not replayed: some minutes of work, and a quarter of an hour of writing flat out.
const MAX_REPLAYED: u64 = 1 << 36;

/// Writes replayed by one thread at a time.
const SLICE: u64 = 1 << 20;

/// How often each page of the working set has been written.
#[derive(Debug)]
pub(super) struct Replay {
    counts: Vec<u64>,
    /// The page that each vCPU writes next, or was just writing.
    in_flight: Vec<u64>,
}

impl Replay {
    pub(super) fn new(facts: &Facts) -> Result<Self, CheckError> {
        let to_replay = facts.parts.iter().filter(|part| !part.sequence.is_sequential());
        let writes = to_replay.fold(0u64, |sum, part| sum.saturating_add(part.writes));
        if writes > MAX_REPLAYED {
            return Err(CheckError::TooManyWrites { writes });
        }
        let mut counts = Vec::with_capacity(facts.working_set_pages as usize);
        let mut in_flight = Vec::new();
        for Part { first_frame, pages, sequence, writes } in &facts.parts {
            if *pages == 0 {
                continue;
            }
            in_flight.push(first_frame + sequence.page(*writes));
            if sequence.is_sequential() {
                counts.extend((0..*pages).map(|page| writes / pages + u64::from(page < writes % pages)));
            } else {
                counts.extend(count(sequence, *pages as usize, *writes));
            }
        }
        Ok(Self { counts, in_flight })
    }

    /// How often `frame` has been written, and whether it may have been being written once more.
    pub(super) fn frame(&self, frame: u64) -> (u64, bool) {
        (self.counts.get(frame as usize).copied().unwrap_or(0), self.in_flight.contains(&frame))
    }

    /// How many pages have been written at all.
    pub(super) fn pages_written(&self) -> u64 {
        self.counts.iter().filter(|count| **count != 0).count() as u64
    }
}

/// How often each page is among the first `writes` of the sequence.
fn count(sequence: &Sequence, pages: usize, writes: u64) -> Vec<u64> {
    let slices: Vec<(u64, u64)> =
        (0..writes.div_ceil(SLICE)).map(|slice| (slice * SLICE, writes.min((slice + 1) * SLICE))).collect();
    let count_slices = |slices: &mut dyn Iterator<Item = (u64, u64)>| {
        let mut counts = vec![0; pages];
        slices.for_each(|(start, end)| count_slice(sequence, start..end, &mut counts));
        counts
    };
    let threads = threads().min(slices.len()).max(1);
    let parts = in_parallel(threads, &slices, count_slices);
    let mut total = vec![0; pages];
    for part in parts {
        total.iter_mut().zip(part).for_each(|(total, count)| *total += count);
    }
    total
}

fn count_slice(sequence: &Sequence, indices: Range<u64>, counts: &mut [u64]) {
    for index in indices {
        if let Some(count) = counts.get_mut(sequence.page(index) as usize) {
            *count += 1;
        }
    }
}
