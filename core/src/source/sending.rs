//! One data channel's sending side: the page scheduler and the encoder, without I/O, threads or a clock.
//!
//! Whoever drives it gives an order ([`SendingChannel::begin`]) and polls until that is done: bytes that come out are
//! written and said to be ([`SendingChannel::written`]); what a mark asks to be acknowledged is handed to an
//! [`Unacknowledged`]. Both outlive their link: after a break, [`break_off`] makes pending again what nobody knows to have
//! arrived.

mod announcing;
mod visiting;

use std::io;

use self::announcing::Announcing;
use self::visiting::{Current, Piece};
use super::Encodings;
use super::compressing::Compressing;
use super::unacknowledged::{Batch, Sent, Unacknowledged};
use crate::bases::Bases;
use crate::chunk::MAX_PROBE_BYTES;
use crate::encoder::{ChannelEncoder, OUTPUT_BYTES};
use crate::layout::set_bits;
use crate::machine::{DirtyLog, MachineError};
use crate::pending::Pending;
use crate::plants::{Plant, planted};
use crate::progress::PageCounts;
use crate::table::{PageHasher, PageTable};
use crate::touched::TouchedPages;
use crate::view::MemoryView;

/// How much may be under way without an acknowledgement being asked for: bytes on the wire, and pages that the destination
/// has to write, which may be far more where they shrink.
const MARK_INTERVAL_BYTES: u64 = 4 << 20;
const MARK_INTERVAL_PAGES: u64 = 512;

/// What all channels of a move share at the source.
pub struct SourcePages {
    /// The guest's memory.
    pub view: MemoryView,
    /// What is still to be sent.
    pub pending: Pending,
    /// What was last sent.
    pub table: PageTable,
    /// Hashes pages for the table.
    pub hasher: PageHasher,
    /// Which pages were ever touched.
    pub touched: Box<dyn TouchedPages>,
    /// Number of data channels.
    pub channels: usize,
}

/// What a channel is told.
#[derive(Debug, Clone, Copy)]
pub enum Order {
    /// Send so many bytes that mean nothing, and a mark.
    Probe(u64),
    /// Visit every stripe of the channel.
    Round {
        /// Leave untouched pages out.
        first: bool,
    },
    /// Send what is left, without cap, and end the channel.
    Final {
        /// What the link takes, if that is known: on a slow one it pays to compress, as in the rounds.
        link_bytes_per_s: Option<u64>,
    },
    /// End the channel: what is left follows in another way.
    End,
}

/// What a channel has done.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Report {
    /// The probe is under way.
    Probing,
    /// The round is sent.
    RoundSent {
        /// Pages in it.
        pages: u64,
        /// Of those, pages that had been sent before.
        again: u64,
    },
    /// The channel has ended; its share of the table's sum.
    Ended(u64),
}

/// What is to be done next.
#[derive(Debug)]
pub enum Polled<'c> {
    /// Write these bytes, then call [`SendingChannel::written`].
    Bytes {
        /// The bytes.
        bytes: &'c [u8],
        /// Others follow as soon as they are written.
        more: bool,
    },
    /// Keep this before anything else is written: its acknowledgement may be quick.
    Marked(Batch),
    /// The order has been carried out.
    Done(Report),
    /// There is no order.
    Idle,
}

/// What rules a channel from outside at a moment.
#[derive(Debug, Clone, Copy)]
pub struct Pace {
    /// The most to write in one go.
    pub quantum_bytes: usize,
    /// What the channel can count on: the cap in force, or less if the link was seen to take less.
    pub bytes_per_s: Option<u64>,
    /// Leave the round, also in the middle of a stripe.
    pub cut: bool,
}

/// Why a channel cannot go on, though its link holds.
#[derive(Debug, thiserror::Error)]
pub enum SendError {
    /// The compressor cannot be set up.
    #[error("pages cannot be compressed: {0}")]
    Compressor(#[from] io::Error),
    /// The dirty log failed.
    #[error(transparent)]
    Machine(#[from] MachineError),
}

/// The sending side of one data channel.
pub struct SendingChannel {
    index: usize,
    encoder: ChannelEncoder,
    compressing: Compressing,
    /// What was last sent of some pages, over this link.
    bases: Bases,
    /// Whether what is sent is kept as a base: on links that are slower than looking for differences.
    keeping: bool,
    work: Work,
    current: Option<Current>,
    /// All that is in the output is to be written before anything is added to it.
    flush: bool,
    /// Sent since the last mark.
    open: Vec<Sent>,
    written_bytes: u64,
    marked_bytes: u64,
    /// Pages with contents since the last mark.
    open_pages: u64,
    /// By how much this channel has made the table's sum grow.
    sum: u64,
    untouched: u64,
    /// Pages of this round that had been sent before.
    again: u64,
    piece: Piece,
    announcing: Announcing,
}

#[derive(Debug, Clone, Copy)]
enum Work {
    Idle,
    Probe {
        chunks: u64,
    },
    Visit {
        next: usize,
        visit: Visit,
    },
    /// Only the output is left to be written.
    Finish(Report),
}

#[derive(Debug, Clone, Copy)]
enum Visit {
    Round { first: bool, pages: u64 },
    Final { link_bytes_per_s: Option<u64> },
}

impl SourcePages {
    /// Pages pending that have been sent before.
    fn pending_again(&self) -> u64 {
        let layout = self.view.layout();
        let again = |index: usize| {
            let first_slot = layout.stripe(index).first_slot;
            let was_sent = |offset: &usize| self.table.entry(first_slot + offset).is_some();
            set_bits(&self.pending.get(index)).filter(was_sent).count() as u64
        };
        self.pending.stripes().map(again).sum()
    }
}

/// What a broken link leaves to be done.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct BrokenOff {
    /// Pages that are pending again because nobody knows whether they have arrived.
    pub unacknowledged_pages: u64,
    /// Pages that were pending anyway, and had been sent before.
    pub anyway_pages: u64,
    /// Pages that the round that broke off had sent again.
    pub again_pages: u64,
}

/// The links broke, and nothing is being sent any more: makes pending again whatever is not known to have been applied, and the
/// channels ready for other links.
pub fn break_off(
    pages: &SourcePages,
    channels: &mut [SendingChannel],
    unacknowledged: &mut [Unacknowledged],
) -> BrokenOff {
    channels.iter_mut().for_each(|channel| channel.put_back(&pages.pending));
    let mut broken = BrokenOff { anyway_pages: pages.pending_again(), ..BrokenOff::default() };
    for (channel, unacknowledged) in channels.iter_mut().zip(unacknowledged) {
        broken.again_pages += std::mem::take(&mut channel.again);
        broken.unacknowledged_pages += unacknowledged.give_back(&pages.pending, channel.written_bytes);
        broken.unacknowledged_pages += channel.reattach(&pages.pending);
    }
    broken
}

impl SendingChannel {
    /// Data channel `index`, which sends every stripe whose number leaves this remainder.
    pub fn new(index: usize, encodings: Encodings) -> io::Result<Self> {
        let compressing = Compressing::new(encodings.compression);
        let encoder = ChannelEncoder::new(compressing.level())?;
        Ok(Self {
            index,
            encoder: if encodings.sparse { encoder } else { encoder.without_sparse() },
            compressing,
            bases: Bases::new(encodings.delta_cache_bytes),
            keeping: false,
            work: Work::Idle,
            current: None,
            flush: false,
            open: Vec::new(),
            written_bytes: 0,
            marked_bytes: 0,
            open_pages: 0,
            sum: 0,
            untouched: 0,
            again: 0,
            piece: Piece::default(),
            announcing: Announcing::new(encodings.coming),
        })
    }

    /// Takes an order. The one before must be done.
    pub fn begin(&mut self, order: Order) {
        self.work = match order {
            Order::Probe(bytes) => Work::Probe { chunks: bytes / MAX_PROBE_BYTES as u64 },
            Order::Round { first } => {
                self.again = 0;
                self.begin_with_small_pieces();
                let visit = Visit::Round { first, pages: self.pages() };
                Work::Visit { next: self.index, visit }
            }
            Order::Final { link_bytes_per_s } => {
                Work::Visit { next: self.index, visit: Visit::Final { link_bytes_per_s } }
            }
            Order::End => {
                self.encoder.end();
                self.flush = true;
                Work::Finish(Report::Ended(self.sum))
            }
        };
    }

    /// Whether what comes out counts against the cap.
    pub fn is_paced(&self) -> bool {
        !matches!(
            self.work,
            Work::Probe { .. }
                | Work::Finish(Report::Probing | Report::Ended(_))
                | Work::Visit { visit: Visit::Final { .. }, .. }
        )
    }

    /// Goes on until there is something to be done outside.
    pub fn poll(&mut self, pages: &SourcePages, log: &dyn DirtyLog, pace: Pace) -> Result<Polled<'_>, SendError> {
        loop {
            let quantum = if self.is_paced() { pace.quantum_bytes } else { OUTPUT_BYTES };
            if self.flush || self.encoder.output_bytes() >= quantum {
                self.flush = false;
                if self.encoder.output_bytes() > 0 {
                    // Smaller ones are paced. A stripe that is left in the middle is followed by a mark.
                    let more = self.current.is_some() && quantum >= OUTPUT_BYTES;
                    return Ok(Polled::Bytes { bytes: self.encoder.bytes(), more });
                }
            }
            if self.current.is_some() {
                match pace.cut && matches!(self.work, Work::Visit { visit: Visit::Round { .. }, .. }) {
                    true => self.leave_stripe(&pages.pending),
                    false => self.encode(pages, log, pace, quantum)?,
                }
                continue;
            }
            match self.work {
                Work::Idle => return Ok(Polled::Idle),
                Work::Probe { chunks: 0 } => {
                    self.work = Work::Finish(Report::Probing);
                    return Ok(Polled::Marked(self.mark()));
                }
                Work::Probe { chunks } => {
                    self.work = Work::Probe { chunks: chunks - 1 };
                    self.encoder.probe();
                    self.flush = true;
                }
                Work::Visit { .. } if self.is_mark_due() => {
                    return Ok(Polled::Marked(self.mark()));
                }
                Work::Visit { next, visit } => {
                    let left = pace.cut && matches!(visit, Visit::Round { .. });
                    let found = if left { None } else { pages.pending.next(next, pages.channels) };
                    if let Some(stripe) = found {
                        self.work = Work::Visit { next: stripe + pages.channels, visit };
                        self.visit(stripe, visit, pages, log, pace)?;
                    } else if let Some(batch) = self.end_visit(visit) {
                        return Ok(Polled::Marked(batch));
                    }
                }
                Work::Finish(report) => {
                    self.work = Work::Idle;
                    return Ok(Polled::Done(report));
                }
            }
        }
    }

    /// What [`Polled::Bytes`] has brought and how many bytes that are, for whoever puts another buffer of the same length in its place.
    pub fn buffer(&mut self) -> (&mut Vec<u8>, usize) {
        self.encoder.buffer()
    }

    /// The bytes have been written.
    pub fn written(&mut self) {
        self.written_bytes += self.encoder.output_bytes() as u64;
        self.encoder.clear();
    }

    /// Bytes written so far, over all links.
    pub fn written_bytes(&self) -> u64 {
        self.written_bytes
    }

    /// Pages encoded so far, over all links.
    pub fn counts(&self) -> PageCounts {
        PageCounts { untouched: self.untouched, ..self.encoder.counts() }
    }

    /// Its link broke, and it is to go on over another. What was sent since the last mark is pending again. Returns how
    /// many pages that adds to those that were pending anyway.
    fn reattach(&mut self, pending: &Pending) -> u64 {
        self.encoder.restart();
        // What was under way may not have arrived: nothing is built upon it.
        if !planted(Plant::ReuseDeltaBase) {
            self.bases.clear();
        }
        self.work = Work::Idle;
        self.flush = false;
        self.marked_bytes = self.written_bytes;
        self.open_pages = 0;
        self.open.drain(..).map(|Sent { stripe, bits }| pending.merge(stripe, &bits)).sum()
    }

    fn end_visit(&mut self, visit: Visit) -> Option<Batch> {
        self.flush = true;
        match visit {
            Visit::Round { pages, .. } => {
                let batch = self.mark();
                let report = Report::RoundSent { pages: self.pages() - pages, again: self.again };
                self.work = Work::Finish(report);
                Some(batch)
            }
            Visit::Final { .. } => {
                if !planted(Plant::SkipEnd) {
                    self.encoder.end();
                }
                self.work = Work::Finish(Report::Ended(self.sum));
                None
            }
        }
    }

    fn is_mark_due(&self) -> bool {
        self.written_bytes - self.marked_bytes >= MARK_INTERVAL_BYTES || self.open_pages >= MARK_INTERVAL_PAGES
    }

    /// Puts a mark behind all that was encoded.
    fn mark(&mut self) -> Batch {
        let mark = self.encoder.mark();
        let until_bytes = self.written_bytes + self.encoder.output_bytes() as u64;
        self.marked_bytes = until_bytes;
        self.flush = true;
        Batch { mark, until_bytes, pages: std::mem::take(&mut self.open_pages), sent: std::mem::take(&mut self.open) }
    }

    fn pages(&self) -> u64 {
        self.encoder.counts().visited()
    }
}
