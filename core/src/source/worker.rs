//! The source's data workers: one thread for each data channel, around its [`SendingChannel`].

use std::io;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender};
use std::time::{Duration, Instant};

use super::compressing::is_slow;
use super::driver::Event;
use super::flow::Flow;
use super::sending::{Order, Polled, Report, SendError, SendingChannel, SourcePages};
use super::unacknowledged::Batch;
use crate::channel::{ChannelWriter, Delivery};
use crate::machine::SourceMachine;

/// What all workers of a move share.
pub struct Shared {
    /// The machine that moves.
    pub machine: Arc<dyn SourceMachine>,
    /// Its pages.
    pub pages: SourcePages,
    /// Cap, counters and the order to stop.
    pub flow: Arc<Flow>,
}

/// What a worker tells.
pub enum Told {
    /// A mark is about to be written.
    Marked(Batch),
    /// An order has been carried out.
    Done(Report),
    /// What whoever started the move should know.
    Says(String),
    /// The channel broke; why.
    Broken(String),
    /// The channel holds, and what was to be sent cannot be; why.
    Failed(String),
}

/// One data channel's sending thread.
pub struct Worker {
    shared: Arc<Shared>,
    /// Which links of the move's it belongs to.
    links: u32,
    index: usize,
    channel: SendingChannel,
    writer: Box<dyn ChannelWriter>,
    link: LinkRate,
    /// Bytes that were charged, or sent before there was anything to charge.
    charged_bytes: u64,
    /// Bytes on the wire that the counters have.
    noted_bytes: u64,
}

#[derive(Debug, thiserror::Error)]
enum WorkerError {
    #[error(transparent)]
    Io(#[from] io::Error),
    #[error(transparent)]
    Send(#[from] SendError),
    #[error("nobody hears of what is sent any more")]
    Alone,
}

impl Worker {
    /// A worker that writes what data channel `index` sends.
    pub fn new(
        shared: Arc<Shared>,
        links: u32,
        index: usize,
        channel: SendingChannel,
        writer: Box<dyn ChannelWriter>,
    ) -> Self {
        let charged_bytes = writer.bytes_on_wire();
        Self { shared, links, index, channel, writer, link: LinkRate::default(), charged_bytes, noted_bytes: 0 }
    }

    /// Carries out orders until there are none, or the channel breaks, and gives back what outlives it.
    pub fn run(mut self, orders: &Receiver<Order>, events: &Sender<Event>) -> SendingChannel {
        while let Ok(order) = orders.recv() {
            let told = match self.carry_out(order, events) {
                Ok(report) => Told::Done(report),
                Err(WorkerError::Io(error)) => Told::Broken(format!("data channel {}: {error}", self.index)),
                Err(error) => Told::Failed(error.to_string()),
            };
            let over = !matches!(told, Told::Done(Report::Probing | Report::RoundSent { .. }));
            if events.send(self.event(told)).is_err() || over {
                break;
            }
        }
        self.channel
    }

    fn event(&self, told: Told) -> Event {
        Event::Worker { links: self.links, index: self.index, told }
    }

    fn carry_out(&mut self, order: Order, events: &Sender<Event>) -> Result<Report, WorkerError> {
        let shared = Arc::clone(&self.shared);
        let (flow, log) = (&shared.flow, shared.machine.dirty_log());
        if let Order::Final { .. } = order {
            self.writer.hasten();
        }
        self.channel.begin(order);
        loop {
            flow.check_stopped()?;
            let paced = self.channel.is_paced();
            let mut pace = flow.pace();
            pace.bytes_per_s = pace.bytes_per_s.into_iter().chain(self.link.bytes_per_s()).min();
            match self.channel.poll(&shared.pages, log, pace)? {
                Polled::Bytes { bytes, more } => {
                    let length = bytes.len() as u64;
                    if paced {
                        flow.wait_for_turn(length)?;
                    }
                    let began = Instant::now();
                    let (buffer, length_bytes) = self.channel.buffer();
                    self.writer.write_kept(buffer, length_bytes, more)?;
                    let ended = Instant::now();
                    if let Some(text) = self.writer.says() {
                        events.send(self.event(Told::Says(text))).map_err(|_| WorkerError::Alone)?;
                    }
                    self.link.wrote(length, began, ended, || self.writer.delivery());
                    flow.link_is_slow(self.index, is_slow(self.link.bytes_per_s()));
                    self.channel.written();
                    let wire_bytes = self.writer.bytes_on_wire();
                    flow.wrote(self.index, length, wire_bytes - self.noted_bytes);
                    self.noted_bytes = wire_bytes;
                    // A transport with packets of its own sends more than it was given, and not at once: what it has sent
                    // beyond all that was charged is charged now.
                    let charged = self.charged_bytes + length;
                    if paced && wire_bytes > charged {
                        flow.charge_extra(wire_bytes - charged);
                    }
                    self.charged_bytes = charged.max(wire_bytes);
                    flow.encoded(self.index, self.channel.counts());
                    // All marks are written: what is waited for is on its way.
                    if paced {
                        flow.wait_for_destination(self.index)?;
                    }
                }
                Polled::Marked(batch) => {
                    flow.queued(self.index, batch.pages);
                    let told = Event::Worker { links: self.links, index: self.index, told: Told::Marked(batch) };
                    events.send(told).map_err(|_| WorkerError::Alone)?;
                }
                Polled::Done(report) => {
                    flow.encoded(self.index, self.channel.counts());
                    if let Report::Ended(_) = report {
                        self.writer.finish()?;
                    }
                    return Ok(report);
                }
                Polled::Idle => return Err(WorkerError::Alone),
            }
        }
    }
}

/// How fast the link takes what is written, if it is the link that is waited for, and not the peer or ourselves: only then does it
/// pay to send less.
#[derive(Debug, Default)]
struct LinkRate {
    window: Option<Window>,
    bytes_per_s: Option<u64>,
}

#[derive(Debug)]
struct Window {
    began: Instant,
    bytes: u64,
    blocked: Duration,
    before: Delivery,
    /// The most that was arriving, in bytes per second, when it was asked for.
    arriving_bytes_per_s: u64,
    asked_at_bytes: u64,
}

impl LinkRate {
    /// Long enough for more than what a socket swallows at once.
    const WINDOW: Duration = Duration::from_millis(25);
    /// Often enough to meet one that was not held up by anything but the link.
    const ASK_EVERY_BYTES: u64 = 256 << 10;

    /// So many bytes were written between two moments.
    fn wrote(&mut self, bytes: u64, began: Instant, ended: Instant, delivery: impl FnOnce() -> Option<Delivery>) {
        let Some(window) = &mut self.window else {
            // From the end of a write on: of what held that one up nothing is known.
            self.window = delivery().map(|before| Window::new(ended, before));
            return;
        };
        window.bytes += bytes;
        window.blocked += ended - began;
        let length = ended - window.began;
        if window.bytes - window.asked_at_bytes < Self::ASK_EVERY_BYTES && length < Self::WINDOW {
            return;
        }
        let Some(now) = delivery() else { return };
        window.asked_at_bytes = window.bytes;
        window.arriving_bytes_per_s = window.arriving_bytes_per_s.max(now.bytes_per_s);
        if length >= Self::WINDOW {
            let rate = (window.bytes as f64 / length.as_secs_f64()) as u64;
            self.bytes_per_s = match window.waited_for_link(length, now) {
                // Who is kept from a core writes little too, but some of that arrives at once. Little may do so also over a link that
                // is known to be slow: of that one only what is written says more.
                true => Some(rate.max(window.arriving_bytes_per_s.min(self.bytes_per_s.unwrap_or(u64::MAX)))),
                // What has shrunk does not try the link.
                false => self.bytes_per_s.filter(|link| rate < link / 2),
            };
            self.window = None;
        }
    }

    /// None: not known, or faster than what is written.
    fn bytes_per_s(&self) -> Option<u64> {
        self.bytes_per_s
    }
}

impl Window {
    fn new(began: Instant, before: Delivery) -> Self {
        Self { began, bytes: 0, blocked: Duration::ZERO, before, arriving_bytes_per_s: 0, asked_at_bytes: 0 }
    }

    /// Whether the link took more than half of its length. Time spent elsewhere (encoding, waiting for a turn) says nothing about it.
    fn waited_for_link(&self, length: Duration, now: Delivery) -> bool {
        let by_peer = now.held_up_by_peer.saturating_sub(self.before.held_up_by_peer);
        self.blocked.saturating_sub(by_peer) * 2 > length
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Forty writes of 1 MB, 10 ms apart, of which each blocks for so long, the peer holds it up for so long, and this has arrived of late.
    fn written(
        link: &mut LinkRate,
        start: Instant,
        from_ms: u64,
        (blocks_ms, by_peer_ms): (u64, u64),
        bytes_per_s: u64,
    ) {
        let at = |ms: u64| start + Duration::from_millis(ms);
        for ms in (from_ms..from_ms + 400).step_by(10) {
            let held_up_by_peer = Duration::from_millis(ms / 10 * by_peer_ms);
            link.wrote(1_000_000, at(ms), at(ms + blocks_ms), || Some(Delivery { held_up_by_peer, bytes_per_s }));
        }
    }

    fn is_near_100_mb_per_s(link: &LinkRate) -> bool {
        link.bytes_per_s().is_some_and(|rate| (90_000_000..130_000_000).contains(&rate))
    }

    #[test]
    fn a_link_that_blocks_shows_its_rate_and_one_that_does_not_shows_none() {
        let (start, mut link) = (Instant::now(), LinkRate::default());
        written(&mut link, start, 0, (9, 0), 100_000_000);
        assert!(is_near_100_mb_per_s(&link), "{link:?}");
        written(&mut link, start, 400, (1, 0), 100_000_000);
        assert_eq!(link.bytes_per_s(), None);
    }

    #[test]
    fn a_link_is_slow_until_more_has_gone_over_it() {
        let (start, mut link) = (Instant::now(), LinkRate::default());
        let quickly = |link: &mut LinkRate, n: u64, blocks_ms: u64| {
            let at = |ms: u64| start + Duration::from_millis(ms);
            let delivery = Delivery { held_up_by_peer: Duration::ZERO, bytes_per_s: 1_000_000_000 };
            link.wrote(100_000, at(n * 10), at(n * 10 + blocks_ms), || Some(delivery));
        };
        written(&mut link, start, 0, (9, 0), 100_000_000);
        // A tenth as much, which it takes at once, and then not quite.
        (40..60).for_each(|n| quickly(&mut link, n, 1));
        assert!(is_near_100_mb_per_s(&link), "{link:?}");
        (60..80).for_each(|n| quickly(&mut link, n, 8));
        assert!(is_near_100_mb_per_s(&link), "{link:?}");
        written(&mut link, start, 800, (1, 0), 100_000_000);
        assert_eq!(link.bytes_per_s(), None);
    }

    #[test]
    fn a_peer_that_is_slow_to_read_is_no_slow_link() {
        let (start, mut link) = (Instant::now(), LinkRate::default());
        written(&mut link, start, 0, (9, 7), 100_000_000);
        assert_eq!(link.bytes_per_s(), None);
        let mut unknown = LinkRate::default();
        let at = |ms: u64| start + Duration::from_millis(ms);
        (0..40).for_each(|n| unknown.wrote(1_000_000, at(n * 10), at(n * 10 + 9), || None));
        assert_eq!(unknown.bytes_per_s(), None, "who is waited for is not known");
    }

    #[test]
    fn a_writer_that_is_kept_from_a_core_is_no_slow_link() {
        let (start, mut link) = (Instant::now(), LinkRate::default());
        written(&mut link, start, 0, (9, 0), 4_000_000_000);
        assert_eq!(link.bytes_per_s(), Some(4_000_000_000));
        written(&mut link, start, 400, (9, 0), 100_000_000);
        assert!(is_near_100_mb_per_s(&link), "{link:?}");
    }
}
