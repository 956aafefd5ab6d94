//! The source's data workers: one thread for each data channel.

use std::io;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender};
use std::time::Instant;

use super::Compression;
use super::driver::Event;
use super::flow::{Flow, Probe};
use crate::channel::ChannelWriter;
use crate::chunk::MAX_PROBE_BYTES;
use crate::encoder::{ChannelEncoder, Encoded, OUTPUT_BYTES, ZstdLevel};
use crate::layout::{STRIPE_WORDS, Stripe, StripeBits, set_bits};
use crate::machine::{MachineError, SourceMachine};
use crate::pending::Pending;
use crate::progress::PageCounts;
use crate::table::{PageHasher, PageTable};
use crate::touched::TouchedPages;
use crate::view::MemoryView;

/// How much may be under way without an acknowledgement being asked for.
const MARK_INTERVAL_BYTES: u64 = 4 << 20;
/// Below this cap a core compresses faster than the link takes (docs/performance.md), so `auto` tries it.
const COMPRESS_BELOW_BYTES_PER_S: u64 = 200_000_000;
const AUTO_LEVEL: ZstdLevel = ZstdLevel(1);
/// With `auto`: of so many stripes one is compressed to see whether it still does not pay.
const AUTO_SAMPLE_STRIPES: u32 = 32;

/// What all workers of a move share.
pub struct Shared {
    /// The machine that moves.
    pub machine: Arc<dyn SourceMachine>,
    /// Its memory.
    pub view: MemoryView,
    /// What is still to be sent.
    pub pending: Pending,
    /// What was last sent.
    pub table: PageTable,
    /// Hashes pages for the table.
    pub hasher: PageHasher,
    /// Which pages were ever touched.
    pub touched: TouchedPages,
    /// Cap, counters and the order to stop.
    pub flow: Arc<Flow>,
    /// Number of data channels.
    pub channels: usize,
    /// What the user wants compressed.
    pub compression: Compression,
}

/// What a worker is told.
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
    Final,
}

/// What a worker has done.
#[derive(Debug)]
pub enum Report {
    /// The probe is under way.
    Probing,
    /// The round is sent; pages in it.
    RoundSent(u64),
    /// The channel has ended; its share of the table's sum.
    Ended(u64),
    /// The channel broke; why.
    Broken(String),
}

/// One data channel's sending thread.
pub struct Worker {
    shared: Arc<Shared>,
    index: usize,
    writer: Box<dyn ChannelWriter>,
    encoder: ChannelEncoder,
    written_bytes: u64,
    wire_bytes: u64,
    marked_bytes: u64,
    sum: u64,
    untouched: u64,
    paced: bool,
    auto: Auto,
}

/// Whether compressing pays, as far as seen.
struct Auto {
    stripes: u32,
    pays: bool,
    compressing: bool,
}

#[derive(Debug, thiserror::Error)]
enum WorkerError {
    #[error("data channel: {0}")]
    Io(#[from] io::Error),
    #[error(transparent)]
    Machine(#[from] MachineError),
}

impl Worker {
    /// A worker for data channel `index`.
    pub fn new(shared: Arc<Shared>, index: usize, writer: Box<dyn ChannelWriter>) -> io::Result<Self> {
        let level = match shared.compression {
            Compression::Zstd(level) => Some(ZstdLevel(level)),
            Compression::Auto | Compression::None => None,
        };
        let encoder = ChannelEncoder::new(level)?;
        let auto = Auto { stripes: 0, pays: true, compressing: false };
        let wire_bytes = writer.bytes_on_wire();
        Ok(Self {
            shared,
            index,
            writer,
            encoder,
            written_bytes: 0,
            wire_bytes,
            marked_bytes: 0,
            sum: 0,
            untouched: 0,
            paced: true,
            auto,
        })
    }

    /// Carries out orders until there are none, or the channel breaks.
    pub fn run(mut self, orders: &Receiver<Order>, events: &Sender<Event>) {
        while let Ok(order) = orders.recv() {
            let report = self.carry_out(order).unwrap_or_else(|error| Report::Broken(error.to_string()));
            let over = matches!(report, Report::Ended(_) | Report::Broken(_));
            if events.send(Event::Worker(report)).is_err() || over {
                return;
            }
        }
    }

    fn carry_out(&mut self, order: Order) -> Result<Report, WorkerError> {
        match order {
            Order::Probe(bytes) => {
                self.paced = false;
                let began = Instant::now();
                for _ in 0..bytes / MAX_PROBE_BYTES as u64 {
                    self.encoder.probe();
                    self.flush()?;
                }
                self.shared.flow.probing(Probe { bytes, began });
                self.mark()?;
                self.paced = true;
                Ok(Report::Probing)
            }
            Order::Round { first } => {
                let before = self.pages();
                self.visit_all(|worker, stripe, bits| {
                    // The order that loses nothing: bits were taken, now the log is cleared, then pages are copied.
                    let log = worker.shared.machine.dirty_log();
                    let words = stripe.pages.div_ceil(64).min(STRIPE_WORDS);
                    log.clear(stripe.region, stripe.first_page, &bits[..words])?;
                    if first {
                        worker.leave_out_untouched(stripe, bits);
                    }
                    worker.send(stripe, bits)
                })?;
                self.mark()?;
                Ok(Report::RoundSent(self.pages() - before))
            }
            Order::Final => {
                self.paced = false;
                self.visit_all(|worker, stripe, bits| worker.send(stripe, bits))?;
                self.encoder.end();
                self.flush()?;
                self.writer.finish()?;
                Ok(Report::Ended(self.sum))
            }
        }
    }

    /// Takes the pending bits of each of the channel's stripes, in order.
    fn visit_all(
        &mut self,
        visit: impl Fn(&mut Self, &Stripe, &mut StripeBits) -> Result<(), WorkerError>,
    ) -> Result<(), WorkerError> {
        let shared = Arc::clone(&self.shared);
        for index in (self.index..shared.view.layout().stripes()).step_by(shared.channels) {
            shared.flow.check_stopped()?;
            if self.paced && shared.flow.is_cut() {
                break;
            }
            let mut bits = shared.pending.take(index);
            if bits != StripeBits::default() {
                visit(self, &shared.view.layout().stripe(index), &mut bits)?;
            }
        }
        Ok(())
    }

    /// Nothing was ever sent in the first pass, so what was never touched reads as zeros at the destination anyway.
    /// The log was cleared before, so a first write that comes now is logged.
    fn leave_out_untouched(&mut self, stripe: &Stripe, bits: &mut StripeBits) {
        let touched = self.shared.touched.of(stripe);
        for (word, touched) in bits.iter_mut().zip(touched) {
            self.untouched += u64::from((*word & !touched).count_ones());
            *word &= touched;
        }
    }

    fn send(&mut self, stripe: &Stripe, bits: &StripeBits) -> Result<(), WorkerError> {
        self.choose_compression()?;
        let shared = Arc::clone(&self.shared);
        let (view, hasher) = (&shared.view, &shared.hasher);
        let quantum = match self.paced {
            true => shared.flow.quantum_bytes(),
            false => OUTPUT_BYTES,
        };
        let before = (self.encoder.counts(), self.written_bytes);
        self.encoder.begin_stripe(stripe.first_frame);
        for offset in set_bits(bits) {
            let frame = stripe.first_frame + offset as u64;
            let entry = match self.encoder.page(offset, |page| view.copy_page(stripe, offset, page)) {
                Encoded::Zero => hasher.zero(frame),
                Encoded::Contents(page) => hasher.page(frame, page),
            };
            self.sum = self.sum.wrapping_add(shared.table.set(stripe.first_slot + offset, entry));
            if self.encoder.output_bytes() >= quantum {
                self.flush()?;
            }
        }
        self.encoder.end_stripe();
        if self.encoder.output_bytes() >= quantum {
            self.flush()?;
        }
        shared.flow.encoded(self.index, PageCounts { untouched: self.untouched, ..self.encoder.counts() });
        self.judge_compression(before.0);
        if self.written_bytes - self.marked_bytes >= MARK_INTERVAL_BYTES {
            self.mark()?;
        }
        Ok(())
    }

    fn mark(&mut self) -> Result<(), WorkerError> {
        let mark = self.encoder.mark();
        let until = self.written_bytes + self.encoder.bytes().len() as u64;
        // Noted before it leaves: the answer may be quick.
        self.shared.flow.marked(self.index, mark, until);
        self.flush()?;
        self.marked_bytes = self.written_bytes;
        Ok(())
    }

    fn flush(&mut self) -> Result<(), WorkerError> {
        let bytes = self.encoder.bytes();
        if bytes.is_empty() {
            return Ok(());
        }
        let (flow, length) = (&self.shared.flow, bytes.len() as u64);
        match self.paced {
            true => flow.wait_for_turn(length)?,
            false => flow.check_stopped()?,
        }
        self.writer.write_all(bytes)?;
        self.encoder.clear();
        self.written_bytes += length;
        let wire_bytes = self.writer.bytes_on_wire();
        flow.wrote(self.index, length, wire_bytes);
        // A transport with packets of its own sends more than it was given, and not at once: what it has sent beyond all
        // that was charged is charged now.
        let charged = self.wire_bytes + length;
        if self.paced && wire_bytes > charged {
            flow.charge_extra(wire_bytes - charged);
        }
        self.wire_bytes = charged.max(wire_bytes);
        Ok(())
    }

    fn pages(&self) -> u64 {
        let counts = self.encoder.counts();
        counts.raw + counts.zero + counts.zstd
    }

    /// With `auto`: compress while the cap leaves a core time to, as long as contents shrink, and look again now and then.
    fn choose_compression(&mut self) -> io::Result<()> {
        if self.shared.compression != Compression::Auto {
            return Ok(());
        }
        let slow = self.paced && self.shared.flow.bytes_per_s().is_some_and(|cap| cap <= COMPRESS_BELOW_BYTES_PER_S);
        self.auto.stripes += 1;
        let compress = slow && (self.auto.pays || self.auto.stripes.is_multiple_of(AUTO_SAMPLE_STRIPES));
        if compress != self.auto.compressing {
            self.auto.compressing = compress;
            self.encoder.set_zstd(compress.then_some(AUTO_LEVEL))?;
        }
        Ok(())
    }

    fn judge_compression(&mut self, before: PageCounts) {
        let now = self.encoder.counts();
        if self.auto.compressing && now != before {
            self.auto.pays = now.zstd - before.zstd >= now.raw - before.raw;
        }
    }
}
