//! The source's data channels: what exists from the first time they are open, and their workers.

use std::io;
use std::ops::Range;
use std::sync::mpsc::{self, Sender};
use std::sync::{Arc, Mutex};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use super::Encodings;
use super::driver::Event;
use super::flow::Flow;
use super::sending::{BrokenOff, Order, SendingChannel, SourcePages, break_off};
use super::tally::Tally;
use super::unacknowledged::Unacknowledged;
use super::worker::{Shared, Worker};
use crate::channel::{Channel, Dial, HangUp, SessionToken};
use crate::layout::Layout;
use crate::machine::{MachineError, SourceMachine};
use crate::pending::{Harvester, Pending};
use crate::table::{PageHasher, PageTable};
use crate::touched::MappedPages;
use crate::view::MemoryView;

/// How long opening a channel may take.
pub const CONNECT_LIMIT: Duration = Duration::from_secs(10);

/// What exists once the data channels have been open.
pub struct Data {
    /// What the workers share.
    pub shared: Arc<Shared>,
    /// Collects dirty bits.
    pub harvester: Arc<Mutex<Harvester>>,
    /// What each channel has sent and is not acknowledged.
    pub unacknowledged: Vec<Unacknowledged>,
    /// What the workers have reported of their order.
    pub tally: Tally,
    /// The channels themselves, while no worker has them.
    idle: Vec<SendingChannel>,
    orders: Vec<Sender<Order>>,
    hang_ups: Vec<Arc<dyn HangUp>>,
    workers: Vec<JoinHandle<SendingChannel>>,
}

/// Opens data channels, one after the other.
pub fn dial_all(
    dial: &dyn Dial,
    token: SessionToken,
    channels: Range<u16>,
    limit: Duration,
) -> io::Result<Vec<Channel>> {
    let open = |index| {
        let cannot =
            |error: io::Error| io::Error::new(error.kind(), format!("cannot open data channel {index}: {error}"));
        dial.data(token, index, limit).map_err(cannot)
    };
    channels.map(open).collect()
}

impl Data {
    /// For a machine that is about to be sent.
    pub fn new(
        machine: Arc<dyn SourceMachine>,
        flow: Arc<Flow>,
        hasher: PageHasher,
        channels: u16,
        encodings: Encodings,
    ) -> Result<Self, MachineError> {
        let description = machine.describe()?;
        let layout = Layout::new(&description.memory)
            .map_err(|error| MachineError::with_source("the machine's description", error))?;
        let memory = machine.memory();
        let touched = MappedPages::new(&memory)
            .map_err(|error| MachineError::with_source("cannot read this process's page map", error))?;
        let layout = Arc::new(layout);
        let pages = SourcePages {
            view: MemoryView::new(memory, Arc::clone(&layout))?,
            pending: Pending::new(&layout),
            table: PageTable::new(&layout),
            hasher,
            touched: Box::new(touched),
            channels: channels.into(),
        };
        let idle = (0..channels).map(|index| SendingChannel::new(index.into(), encodings.of_each(channels)));
        let idle = idle
            .collect::<io::Result<_>>()
            .map_err(|error| MachineError::with_source("pages cannot be compressed", error))?;
        Ok(Self {
            shared: Arc::new(Shared { machine, pages, flow }),
            harvester: Arc::new(Mutex::new(Harvester::new(&layout))),
            unacknowledged: (0..channels).map(|_| Unacknowledged::default()).collect(),
            tally: Tally::default(),
            idle,
            orders: Vec::new(),
            hang_ups: Vec::new(),
            workers: Vec::new(),
        })
    }

    /// Starts a worker for each channel. `links` tells its events from those of workers before it.
    pub fn attach(&mut self, channels: Vec<Channel>, links: u32, events: &Sender<Event>) -> io::Result<()> {
        for (index, (sending, channel)) in self.idle.drain(..).zip(channels).enumerate() {
            let worker = Worker::new(Arc::clone(&self.shared), links, index, sending, channel.writer);
            let (orders, queue) = mpsc::channel();
            let events = events.clone();
            let thread =
                thread::Builder::new().name(format!("data-{index}")).spawn(move || worker.run(&queue, &events))?;
            self.orders.push(orders);
            self.hang_ups.push(channel.hang_up);
            self.workers.push(thread);
        }
        Ok(())
    }

    /// Gives an order to the first `workers` workers.
    pub fn order(&mut self, order: Order, workers: usize) {
        self.tally = Tally::of(self.orders.len().min(workers));
        for orders in self.orders.iter().take(workers) {
            // A worker that is gone has reported why.
            let _ = orders.send(order);
        }
    }

    /// Breaks every channel.
    pub fn hang_up(&self) {
        self.hang_ups.iter().for_each(|hang_up| hang_up.hang_up());
    }

    /// Lets the workers end: there will be no more orders. They are to be joined.
    pub fn dismiss(&mut self) -> Vec<JoinHandle<SendingChannel>> {
        self.orders.clear();
        self.hang_ups.clear();
        std::mem::take(&mut self.workers)
    }

    /// The workers have ended; whatever they had told has been taken in.
    pub fn break_off(&mut self, channels: Vec<SendingChannel>) -> BrokenOff {
        self.shared.flow.forget_queued();
        // A break while channels are being opened again finds none with a worker.
        if !channels.is_empty() {
            self.idle = channels;
        }
        break_off(&self.shared.pages, &mut self.idle, &mut self.unacknowledged)
    }

    /// Pages that the destination has yet to write, as far as is known.
    pub fn queued_pages(&self) -> u64 {
        self.unacknowledged.iter().map(Unacknowledged::pages).sum()
    }

    /// Bytes written and not acknowledged.
    pub fn queued_bytes(&self) -> u64 {
        let queued = |(index, channel): (usize, &Unacknowledged)| {
            self.shared.flow.written_bytes(index).saturating_sub(channel.applied_bytes())
        };
        self.unacknowledged.iter().enumerate().map(queued).sum()
    }
}
