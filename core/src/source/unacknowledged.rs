//! What one data channel has sent and the destination has not acknowledged as applied.

use std::collections::VecDeque;

use crate::layout::StripeBits;
use crate::pending::Pending;
use crate::plants::{Plant, planted};

/// More marks than this are never under way: buffers on the way hold far less. Bounds what a destination that
/// acknowledges nothing makes us remember.
const MAX_BATCHES: usize = 1 << 14;

/// Pages of one stripe.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Sent {
    /// The stripe.
    pub stripe: usize,
    /// Which pages of it.
    pub bits: StripeBits,
}

/// All that was sent between one mark and the next.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Batch {
    /// The mark at its end.
    pub mark: u64,
    /// Bytes that the channel has written up to there.
    pub until_bytes: u64,
    /// Pages that the destination has to write.
    pub pages: u64,
    /// The pages in it.
    pub sent: Vec<Sent>,
}

/// An acknowledgement that cannot be.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum BadAcknowledgement {
    /// No such mark is under way.
    #[error("mark {0} was acknowledged and is not under way")]
    NotSent(u64),
    /// It falls silent.
    #[error("none of the last {MAX_BATCHES} marks were acknowledged")]
    Missing,
}

/// The batches of one channel whose marks are under way.
#[derive(Debug, Default)]
pub struct Unacknowledged {
    batches: VecDeque<Batch>,
    applied_bytes: u64,
}

impl Unacknowledged {
    /// A mark is about to be sent.
    pub fn sent(&mut self, batch: Batch) -> Result<(), BadAcknowledgement> {
        if self.batches.len() >= MAX_BATCHES {
            return Err(BadAcknowledgement::Missing);
        }
        self.batches.push_back(batch);
        Ok(())
    }

    /// All up to a mark has been applied. Returns how many pages the destination has written for it.
    pub fn applied(&mut self, mark: u64) -> Result<u64, BadAcknowledgement> {
        let known = self.batches.binary_search_by_key(&mark, |batch| batch.mark);
        let last = known.map_err(|_| BadAcknowledgement::NotSent(mark))?;
        let last = if planted(Plant::AcknowledgeTooMuch) { self.batches.len() - 1 } else { last };
        let mut pages = 0;
        for batch in self.batches.drain(..=last) {
            self.applied_bytes = batch.until_bytes;
            pages += batch.pages;
        }
        Ok(pages)
    }

    /// Of the bytes that the channel has written, those known to be applied (or given back).
    pub fn applied_bytes(&self) -> u64 {
        self.applied_bytes
    }

    /// Pages that the destination has yet to write, as far as is known.
    pub fn pages(&self) -> u64 {
        self.batches.iter().map(|batch| batch.pages).sum()
    }

    /// The link broke after `written_bytes`: what is not known to be applied is pending again. Returns how many pages that
    /// adds to those that were pending anyway.
    pub fn give_back(&mut self, pending: &Pending, written_bytes: u64) -> u64 {
        self.applied_bytes = written_bytes;
        if planted(Plant::ForgetUnacknowledged) {
            self.batches.clear();
        }
        let sent = self.batches.drain(..).flat_map(|batch| batch.sent);
        sent.map(|Sent { stripe, bits }| pending.merge(stripe, &bits)).sum()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::layout::Layout;
    use crate::machine::RegionDescription;

    fn batch(mark: u64, bit: u64) -> Batch {
        let mut bits = StripeBits::default();
        bits[0] = bit;
        Batch { mark, until_bytes: mark * 100, pages: 1, sent: vec![Sent { stripe: 0, bits }] }
    }

    #[test]
    fn what_is_not_acknowledged_is_given_back() {
        let layout = Layout::new(&[RegionDescription { guest_address: 0, size_bytes: 2 << 20 }]).unwrap();
        let pending = Pending::new(&layout);
        let mut channel = Unacknowledged::default();
        (3..7).for_each(|mark| channel.sent(batch(mark, 1 << mark)).unwrap());
        assert_eq!(channel.applied(4), Ok(2));
        assert_eq!(channel.pages(), 2);
        assert_eq!(channel.applied_bytes(), 400);
        assert_eq!(channel.applied(4), Err(BadAcknowledgement::NotSent(4)), "twice");
        assert_eq!(channel.applied(9), Err(BadAcknowledgement::NotSent(9)));
        let mut again = StripeBits::default();
        again[0] = 1 << 5;
        pending.merge(0, &again);
        assert_eq!(channel.give_back(&pending, 650), 1, "one of the two was pending anyway");
        assert_eq!(pending.take(0)[0], 1 << 5 | 1 << 6);
        assert_eq!(channel.applied_bytes(), 650);
    }
}
