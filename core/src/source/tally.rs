//! Adds up what the channels report of one order.

use super::sending::Report;

/// What has been reported, and by how many not yet.
#[derive(Debug, Default)]
pub struct Tally {
    awaited: usize,
    pages: u64,
    again: u64,
    sum: u64,
}

/// What all have reported.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Tallied {
    /// A round has been sent.
    Round {
        /// Pages in it.
        pages: u64,
        /// Of those, pages that had been sent before.
        again: u64,
    },
    /// All channels have ended.
    Ended {
        /// The sum of the page table.
        sum: u64,
    },
}

impl Tally {
    /// An order has been given to so many channels.
    pub fn of(channels: usize) -> Self {
        Self { awaited: channels, ..Self::default() }
    }

    /// A channel has carried it out. Some: it was the last one. That a probe is under way is nobody's order any more: its
    /// acknowledgement may have come first, and the round after it have begun.
    pub fn note(&mut self, report: Report) -> Option<Tallied> {
        let tallied = match report {
            Report::Probing => return None,
            Report::RoundSent { pages, again } => {
                self.pages += pages;
                self.again += again;
                Tallied::Round { pages: self.pages, again: self.again }
            }
            Report::Ended(sum) => {
                self.sum = self.sum.wrapping_add(sum);
                Tallied::Ended { sum: self.sum }
            }
        };
        self.awaited = self.awaited.saturating_sub(1);
        (self.awaited == 0).then_some(tallied)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_round_ends_with_its_last_channel_also_when_a_probe_is_reported_late() {
        let mut tally = Tally::of(2);
        assert_eq!(tally.note(Report::Probing), None);
        assert_eq!(tally.note(Report::RoundSent { pages: 3, again: 1 }), None);
        let round = Tallied::Round { pages: 7, again: 1 };
        assert_eq!(tally.note(Report::RoundSent { pages: 4, again: 0 }), Some(round));
    }
}
