//! The source's data channels: opening them, and what exists once they are open.

use std::sync::Arc;
use std::sync::mpsc::{self, Sender};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use super::Compression;
use super::driver::Event;
use super::flow::Flow;
use super::sending::{Order, SendingChannel, SourcePages};
use super::unacknowledged::Unacknowledged;
use super::worker::{Shared, Worker};
use crate::channel::{Dial, HangUp, SessionToken};
use crate::layout::Layout;
use crate::machine::{MachineError, SourceMachine};
use crate::pending::{Harvester, Pending};
use crate::table::{PageHasher, PageTable};
use crate::touched::MappedPages;
use crate::view::MemoryView;

/// How long opening a channel may take.
pub const CONNECT_LIMIT: Duration = Duration::from_secs(10);

/// What exists once the data channels are open.
pub struct Data {
    /// What the workers share.
    pub shared: Arc<Shared>,
    /// Gone once the last harvest is under way.
    pub harvester: Option<Harvester>,
    /// To each worker.
    pub orders: Vec<Sender<Order>>,
    /// Breaks each channel.
    pub hang_ups: Vec<Arc<dyn HangUp>>,
    /// The workers' threads.
    pub workers: Vec<JoinHandle<()>>,
    /// Workers that have not reported yet.
    pub awaited: usize,
    /// What each has sent and is not acknowledged.
    pub unacknowledged: Vec<Unacknowledged>,
    /// What they have reported of a round.
    pub pages: u64,
    /// What they have reported of the table.
    pub sum: u64,
}

/// What it takes to open the data channels.
pub struct Opening {
    /// The machine that moves.
    pub machine: Arc<dyn SourceMachine>,
    /// Reaches the destination.
    pub dial: Arc<dyn Dial>,
    /// Cap and counters.
    pub flow: Arc<Flow>,
    /// To the coordinator.
    pub events: Sender<Event>,
    /// For the table.
    pub hasher: PageHasher,
    /// How many.
    pub channels: u16,
    /// What the user wants compressed.
    pub compression: Compression,
    /// What the channels show.
    pub token: SessionToken,
}

impl Opening {
    /// Opens every channel and starts its worker.
    pub fn open(self) -> Result<Data, MachineError> {
        let description = self.machine.describe()?;
        let layout = Layout::new(&description.memory)
            .map_err(|error| MachineError::with_source("the machine's description", error))?;
        let memory = self.machine.memory();
        let touched = MappedPages::new(&memory)
            .map_err(|error| MachineError::with_source("cannot read this process's page map", error))?;
        let layout = Arc::new(layout);
        let shared = Arc::new(Shared {
            machine: self.machine,
            pages: SourcePages {
                view: MemoryView::new(memory, Arc::clone(&layout))?,
                pending: Pending::new(&layout),
                table: PageTable::new(&layout),
                hasher: self.hasher,
                touched: Box::new(touched),
                channels: self.channels.into(),
            },
            flow: self.flow,
        });
        let mut data = Data {
            harvester: Some(Harvester::new(&layout)),
            shared: Arc::clone(&shared),
            orders: Vec::new(),
            hang_ups: Vec::new(),
            workers: Vec::new(),
            awaited: 0,
            unacknowledged: (0..self.channels).map(|_| Unacknowledged::default()).collect(),
            pages: 0,
            sum: 0,
        };
        for index in 0..self.channels {
            let cannot = |error| MachineError::with_source(format!("cannot open data channel {index}"), error);
            let channel = self.dial.data(self.token, index, CONNECT_LIMIT).map_err(cannot)?;
            let sending = SendingChannel::new(index.into(), self.compression).map_err(cannot)?;
            let worker = Worker::new(Arc::clone(&shared), index.into(), sending, channel.writer);
            let (orders, queue) = mpsc::channel();
            let events = self.events.clone();
            let thread = thread::Builder::new()
                .name(format!("data-{index}"))
                .spawn(move || worker.run(&queue, &events))
                .map_err(cannot)?;
            data.orders.push(orders);
            data.hang_ups.push(channel.hang_up);
            data.workers.push(thread);
        }
        Ok(data)
    }
}

impl Data {
    /// Lets the workers end: there will be no more orders. They are to be joined.
    pub fn dismiss(&mut self) -> Vec<JoinHandle<()>> {
        self.orders.clear();
        std::mem::take(&mut self.workers)
    }

    /// Collects what has been dirtied since.
    pub fn harvest(&mut self) -> Result<(), MachineError> {
        let Shared { machine, pages, .. } = &*self.shared;
        if let Some(harvester) = &mut self.harvester {
            harvester.harvest(pages.view.layout(), machine.dirty_log(), pages.view.memory(), &pages.pending)?;
        }
        Ok(())
    }

    /// Bytes written and not acknowledged.
    pub fn queued_bytes(&self) -> u64 {
        let queued = |(index, channel): (usize, &Unacknowledged)| {
            self.shared.flow.written_bytes(index).saturating_sub(channel.applied_bytes())
        };
        self.unacknowledged.iter().enumerate().map(queued).sum()
    }
}
