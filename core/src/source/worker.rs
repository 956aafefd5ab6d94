//! The source's data workers: one thread for each data channel, around its [`SendingChannel`].

use std::io;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender};
use std::time::{Duration, Instant};

use super::driver::Event;
use super::flow::Flow;
use super::sending::{Order, Polled, Report, SendError, SendingChannel, SourcePages};
use super::unacknowledged::Batch;
use crate::channel::ChannelWriter;
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
        self.channel.begin(order);
        loop {
            flow.check_stopped()?;
            let paced = self.channel.is_paced();
            let mut pace = flow.pace();
            pace.bytes_per_s = pace.bytes_per_s.into_iter().chain(self.link.bytes_per_s()).min();
            match self.channel.poll(&shared.pages, log, pace)? {
                Polled::Bytes(bytes) => {
                    let length = bytes.len() as u64;
                    if paced {
                        flow.wait_for_turn(length)?;
                    }
                    let began = Instant::now();
                    self.writer.write_all(bytes)?;
                    self.link.wrote(length, began, Instant::now());
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
                }
                Polled::Marked(batch) => {
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

/// How fast the link takes what is written, if it is the link that is waited for.
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
}

impl LinkRate {
    /// Long enough for more than what sockets swallow at once.
    const WINDOW: Duration = Duration::from_millis(100);

    /// So many bytes were written between two moments.
    fn wrote(&mut self, bytes: u64, began: Instant, ended: Instant) {
        let window = self.window.get_or_insert(Window { began, bytes: 0, blocked: Duration::ZERO });
        window.bytes += bytes;
        window.blocked += ended - began;
        let length = ended - window.began;
        if length >= Self::WINDOW {
            // Time spent elsewhere (encoding, waiting for a turn) says nothing about the link.
            let waited_for = window.blocked * 2 > length;
            self.bytes_per_s = waited_for.then(|| (window.bytes as f64 / length.as_secs_f64()) as u64);
            self.window = None;
        }
    }

    /// None: not known, or faster than what is written.
    fn bytes_per_s(&self) -> Option<u64> {
        self.bytes_per_s
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_link_that_blocks_shows_its_rate_and_one_that_does_not_shows_none() {
        let start = Instant::now();
        let at = |ms: u64| start + Duration::from_millis(ms);
        let mut link = LinkRate::default();
        for ms in (0..200).step_by(10) {
            link.wrote(1_000_000, at(ms), at(ms + 9));
        }
        let rate = link.bytes_per_s().unwrap();
        assert!((90_000_000..130_000_000).contains(&rate), "{rate}");
        for ms in (200..400).step_by(10) {
            link.wrote(1_000_000, at(ms), at(ms + 1));
        }
        assert_eq!(link.bytes_per_s(), None);
    }
}
