//! One stripe: its pages are made ready to be copied, and encoded.
//!
//! The order that loses nothing: bits are taken, then the log is cleared, then pages are copied. Between clear and copy a write is
//! both in the copy and in the log, and its page is sent once more as it is. So on a slow link a stripe is taken in pieces, each
//! just before its pages are copied: all of it takes longer there than a busy guest needs to write it.

use std::time::Duration;

use super::{Pace, SendError, SendingChannel, SourcePages, Visit};
use crate::encoder::Encoded;
use crate::layout::{STRIPE_WORDS, Stripe, StripeBits, set_bits, take_first_bit};
use crate::machine::DirtyLog;
use crate::pending::Pending;
use crate::plants::{Plant, planted};
use crate::source::compressing::is_slow;
use crate::source::unacknowledged::Sent;
use crate::table::Page;

/// So much of a slow link's time is made ready at once. To clear less in one go costs more: each time the kernel makes the vCPUs forget what
/// they know of the page tables.
const READY_FOR: Duration = Duration::from_millis(5);

/// The stripe that is being encoded.
pub(super) struct Current {
    index: usize,
    stripe: Stripe,
    visit: Visit,
    /// The link was known to be slow when what is encoded now was chosen.
    slow: bool,
    /// Its pages that may be copied. Those that are not ready are pending.
    ready: StripeBits,
    /// Pages may be holes.
    look_for_holes: bool,
    /// Of those that are ready, pages that were holes: zeros, though something else was sent before.
    holes: StripeBits,
}

/// What was made ready last.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Piece {
    words: usize,
    /// What the channel had produced before.
    since_bytes: u64,
}

impl Piece {
    /// How many words may follow one that has cost so much, where so many bytes are taken in time. At most twice as many: words that cost
    /// nothing, as those of pages that were never touched, do not say what the next ones cost.
    fn next_words(&self, taken_bytes: f64, cost_bytes: u64) -> usize {
        let words = taken_bytes * self.words as f64 / cost_bytes.max(1) as f64;
        (words.round() as usize).min(2 * self.words).clamp(1, STRIPE_WORDS)
    }
}

impl SendingChannel {
    /// What was taken to be sent and has not been encoded is pending as before.
    pub(super) fn put_back(&mut self, pending: &Pending) {
        if let Some(Current { index, ready, .. }) = self.current.take() {
            pending.merge(index, &ready);
        }
    }

    /// Leaves a stripe in the middle; the rest of it stays pending.
    pub(super) fn leave_stripe(&mut self, pending: &Pending) {
        self.put_back(pending);
        self.encoder.end_stripe();
        self.compressing.judge(self.encoder.counts());
    }

    /// Makes a stripe the current one.
    pub(super) fn visit(
        &mut self,
        index: usize,
        visit: Visit,
        pages: &SourcePages,
        log: &dyn DirtyLog,
        pace: Pace,
    ) -> Result<(), SendError> {
        let bits = pages.pending.get(index);
        if bits == StripeBits::default() {
            return Ok(());
        }
        let stripe = pages.view.layout().stripe(index);
        let first = matches!(visit, Visit::Round { first: true, .. });
        let look_for_holes = pages.pending.take_holes(index) || first;
        let rate = match visit {
            Visit::Round { .. } => pace.bytes_per_s,
            Visit::Final { link_bytes_per_s } => link_bytes_per_s,
        };
        self.choose_encoding(rate)?;
        if first {
            self.announcing.announce(index, pages, &mut self.encoder);
        }
        self.encoder.begin_stripe(stripe.first_frame);
        let [ready, holes] = [StripeBits::default(); 2];
        self.current = Some(Current { index, stripe, visit, slow: is_slow(rate), ready, look_for_holes, holes });
        if planted(Plant::CopyBeforeClear) && matches!(visit, Visit::Round { .. }) {
            self.encode(pages, log, Pace { bytes_per_s: None, ..pace }, usize::MAX)?;
            log.clear(stripe.region, stripe.first_page, &bits[..stripe.pages.div_ceil(64)])?;
        }
        Ok(())
    }

    /// How pages are encoded over a link of this rate, from here on.
    fn choose_encoding(&mut self, rate: Option<u64>) -> Result<(), SendError> {
        if self.is_paced() {
            self.keeping = is_slow(rate) && self.bases.has_room();
        }
        if let Some(level) = self.compressing.choose(rate, self.encoder.counts()) {
            self.encoder.set_zstd(level)?;
        }
        Ok(())
    }

    /// The link turns out to be slow in the middle of a stripe, which may take it long: what is left of it goes as it does there.
    fn slow_down(&mut self, current: &mut Current, pending: &Pending, pace: Pace) -> Result<(), SendError> {
        if current.slow || !matches!(current.visit, Visit::Round { .. }) || !is_slow(pace.bytes_per_s) {
            return Ok(());
        }
        current.slow = true;
        pending.merge(current.index, &std::mem::take(&mut current.ready));
        self.begin_with_small_pieces();
        self.choose_encoding(pace.bytes_per_s)
    }

    /// Takes pages of the current stripe and makes them ready to be copied, from the first word on that has any. Whether there were any.
    fn make_ready(
        &mut self,
        current: &mut Current,
        pages: &SourcePages,
        log: &dyn DirtyLog,
        pace: Pace,
    ) -> Result<bool, SendError> {
        let Current { index, stripe, visit, .. } = *current;
        let Some(first) = pages.pending.get(index).iter().position(|word| *word != 0) else { return Ok(false) };
        let end = match visit {
            Visit::Round { .. } => (first + self.words_at_once(pages, pace)).min(stripe.pages.div_ceil(64)),
            // Nobody writes any more.
            Visit::Final { .. } => STRIPE_WORDS,
        };
        let mut bits = pages.pending.take_words(index, first..end);
        let early = matches!(visit, Visit::Round { first: true, .. }) && planted(Plant::JudgeBeforeClear);
        if early {
            current.holes = self.leave_out_untouched(&stripe, &mut bits, pages);
        }
        if matches!(visit, Visit::Round { .. }) && !planted(Plant::CopyBeforeClear) {
            let cleared = if planted(Plant::ClearBeforeHarvest) { stripe.all() } else { bits };
            log.clear(stripe.region, stripe.first_page + first as u64 * 64, &cleared[first..end])?;
        }
        if current.look_for_holes && !early {
            current.holes = self.leave_out_untouched(&stripe, &mut bits, pages);
        }
        current.ready = bits;
        self.piece = Piece { words: end - first, since_bytes: self.produced_bytes() };
        self.open.push(Sent { stripe: index, bits });
        Ok(true)
    }

    /// How many words of a stripe are made ready in one go: as many as this channel's share of a slow link takes in a short while, by what
    /// the last ones have cost; all of them on a fast one, and where there is hardly anything to send.
    fn words_at_once(&self, pages: &SourcePages, pace: Pace) -> usize {
        let Some(rate) = pace.bytes_per_s.filter(|rate| is_slow(Some(*rate))) else { return STRIPE_WORDS };
        let cost_bytes = self.produced_bytes().saturating_sub(self.piece.since_bytes);
        self.piece.next_words(rate as f64 / pages.channels as f64 * READY_FOR.as_secs_f64(), cost_bytes)
    }

    /// What a round sends costs something else than what the one before sent last.
    pub(super) fn begin_with_small_pieces(&mut self) {
        self.piece = Piece { words: 0, since_bytes: self.produced_bytes() };
    }

    fn produced_bytes(&self) -> u64 {
        self.written_bytes + self.encoder.output_bytes() as u64
    }

    /// What was never touched, or was given back, and was never sent reads as zeros at the destination anyway. The log was
    /// cleared before, so a first write that comes now is logged. Returns the untouched pages that have been sent: zeros are due,
    /// and the page need not be read, which would make the kernel provide it again.
    fn leave_out_untouched(&mut self, stripe: &Stripe, bits: &mut StripeBits, pages: &SourcePages) -> StripeBits {
        let mut untouched = *bits;
        untouched.iter_mut().zip(pages.touched.of(stripe)).for_each(|(word, touched)| *word &= !touched);
        if planted(Plant::LeaveOutTouched) {
            untouched[0] |= bits[0] & 1;
        }
        for offset in set_bits(&untouched) {
            if pages.table.entry(stripe.first_slot + offset).is_none() {
                self.untouched += 1;
                bits[offset / 64] &= !(1 << (offset % 64));
            }
        }
        std::array::from_fn(|index| untouched[index] & bits[index])
    }

    /// Encodes pages of the current stripe until there is enough to write.
    pub(super) fn encode(
        &mut self,
        pages: &SourcePages,
        log: &dyn DirtyLog,
        pace: Pace,
        quantum: usize,
    ) -> Result<(), SendError> {
        let Some(mut current) = self.current.take() else { return Ok(()) };
        self.slow_down(&mut current, &pages.pending, pace)?;
        loop {
            while let Some(offset) = take_first_bit(&mut current.ready) {
                self.encode_page(&current, offset, pages);
                if self.encoder.output_bytes() >= quantum {
                    self.current = Some(current);
                    return Ok(());
                }
            }
            if !self.make_ready(&mut current, pages, log, pace)? {
                break;
            }
        }
        self.encoder.end_stripe();
        self.compressing.judge(self.encoder.counts());
        Ok(())
    }

    fn encode_page(&mut self, Current { stripe, holes, .. }: &Current, offset: usize, pages: &SourcePages) {
        let frame = stripe.first_frame + offset as u64;
        let slot = stripe.first_slot + offset;
        let copy = |page: &mut Page| pages.view.copy_page(stripe, offset, page);
        let encoded = match self.bases.get(slot) {
            _ if holes[offset / 64] >> (offset % 64) & 1 == 1 => self.encoder.zero_page(offset),
            Some(base) => self.encoder.page_with_base(offset, base, copy),
            None => self.encoder.page(offset, copy),
        };
        let entry = match encoded {
            Encoded::Same => return,
            Encoded::Zero => {
                self.bases.forget(slot);
                pages.hasher.zero(frame)
            }
            Encoded::Contents(page) => {
                if self.keeping {
                    self.bases.keep(slot, page);
                } else {
                    self.bases.forget(slot);
                }
                self.open_pages += 1;
                pages.hasher.page(frame, page)
            }
        };
        let replaced = pages.table.set(slot, entry);
        self.again += u64::from(replaced.was_sent);
        self.sum = self.sum.wrapping_add(replaced.growth);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_next_piece_follows_from_what_the_last_one_has_cost() {
        let next = |words, cost_bytes| Piece { words, since_bytes: 0 }.next_words(600_000.0, cost_bytes);
        assert_eq!(next(0, 0), 1, "a round begins with one word, whatever the last one has ended with");
        assert_eq!(next(8, 8 * 64 * 4104), 2);
        assert_eq!(next(2, 2 * 64 * 24), 4, "quickly more where they cost little");
        assert_eq!(next(4, 0), 8);
        assert_eq!(next(1, 0), 2, "words that cost nothing say little");
        assert_eq!(next(1, 64 * 4104), 2);
        assert_eq!(next(1, 10_000_000), 1);
    }
}
