//! The source's data workers: one thread for each data channel, around its [`SendingChannel`].

use std::io;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender};

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
        Self { shared, links, index, channel, writer, charged_bytes, noted_bytes: 0 }
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
            match self.channel.poll(&shared.pages, log, flow.pace())? {
                Polled::Bytes(bytes) => {
                    let length = bytes.len() as u64;
                    if paced {
                        flow.wait_for_turn(length)?;
                    }
                    self.writer.write_all(bytes)?;
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
