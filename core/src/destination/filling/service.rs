//! Those who fill memory while the guest runs in it: one thread hears who needs a page and asks for it, and one thread for each channel
//! puts in place what comes.
//!
//! Nobody else in this process may have to do anything for a page to come, since anybody may be waiting for one.

use std::io::{self, BufReader, Read};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::Sender;
use std::sync::{Arc, Mutex};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use super::super::control::Input;
use super::super::driver::FromLinks;
use super::super::receiving::DestinationPages;
use super::arrived::{BadPage, place_of};
use crate::channel::{Channel, ChannelReader, ChannelWriter, HangUp};
use crate::layout::{Layout, STRIPE_PAGES};
use crate::machine::{FillableMemory, MachineError, PageIndex, Placed};
use crate::memory::PAGE_SIZE;
use crate::message::Filled;
use crate::postcopy::{Answer, BadRecord, PageChannel, RECORD_BYTES, Record, RecordKind, Wanted};
use crate::sync::lock;

/// How often the thread that hears of needs looks whether it is over.
const TICK: Duration = Duration::from_millis(100);
/// What is read from a channel at once.
const BUFFER_BYTES: usize = 64 << 10;

/// Fills memory.
pub struct Service {
    memory: Arc<dyn FillableMemory>,
    pages: Arc<DestinationPages>,
    wanted: Wanted,
    /// Where pages are asked for, while there is a link.
    asks: Mutex<Option<Box<dyn ChannelWriter>>>,
    links: Mutex<Links>,
    /// The machine is this end's: whoever waits for a page waits for as long as it takes.
    owned: AtomicBool,
    /// Before that, for so long.
    limit: Duration,
    over: AtomicBool,
    began: Instant,
    inputs: Sender<FromLinks>,
    listener: Mutex<Option<JoinHandle<()>>>,
}

/// What there is of the links that pages come over.
#[derive(Default)]
struct Links {
    number: u32,
    hang_ups: Vec<Arc<dyn HangUp>>,
    readers: Vec<JoinHandle<()>>,
}

/// Why no more pages come over a channel.
#[derive(Debug, thiserror::Error)]
enum FillError {
    #[error("a channel for pages broke: {0}")]
    Io(#[from] io::Error),
    #[error("a channel for pages: {0}")]
    Record(#[from] BadRecord),
    #[error(transparent)]
    Page(#[from] BadPage),
    #[error(transparent)]
    Machine(#[from] MachineError),
}

impl Service {
    /// Begins to hear of needs.
    pub fn start(
        memory: Arc<dyn FillableMemory>,
        pages: Arc<DestinationPages>,
        wanted: Wanted,
        limit: Duration,
        inputs: Sender<FromLinks>,
    ) -> io::Result<Arc<Self>> {
        let service = Arc::new(Self {
            memory,
            pages,
            wanted,
            asks: Mutex::default(),
            links: Mutex::default(),
            owned: AtomicBool::new(false),
            limit,
            over: AtomicBool::new(false),
            began: Instant::now(),
            inputs,
            listener: Mutex::default(),
        });
        let listening = Arc::clone(&service);
        let thread = thread::Builder::new().name("page-needs".into()).spawn(move || listening.listen())?;
        *lock(&service.listener) = Some(thread);
        Ok(service)
    }

    /// Pages come over these channels, in the order of [`PageChannel`]. What was asked for over others is asked for again.
    pub fn attach(self: &Arc<Self>, channels: Vec<Channel>, number: u32) -> io::Result<()> {
        let mut links = lock(&self.links);
        links.number = number;
        for (which, channel) in [PageChannel::Fault, PageChannel::Push].into_iter().zip(channels) {
            let Channel { reader, writer, hang_up, .. } = channel;
            links.hang_ups.push(hang_up);
            let mut unused = None;
            match which {
                PageChannel::Fault => *lock(&self.asks) = Some(writer),
                // It stays open until the channel has ended: closing it early could reset the connection.
                PageChannel::Push => unused = Some(writer),
            }
            let service = Arc::clone(self);
            let name = format!("pages-{which:?}").to_lowercase();
            links.readers.push(thread::Builder::new().name(name).spawn(move || {
                let _unused = unused;
                if let Err(error) = service.take_in(reader) {
                    service.tell(number, Input::ChannelLost(error.to_string()));
                }
            })?);
        }
        drop(links);
        self.wanted.unanswered().into_iter().for_each(|slot| self.ask(slot));
        Ok(())
    }

    /// Closes the links, and keeps what has come.
    pub fn detach(&self) {
        let Links { hang_ups, readers, .. } = std::mem::take(&mut *lock(&self.links));
        hang_ups.iter().for_each(|hang_up| hang_up.hang_up());
        *lock(&self.asks) = None;
        readers.into_iter().for_each(|reader| drop(reader.join()));
    }

    /// The machine is this end's.
    pub fn own(&self) {
        self.owned.store(true, Ordering::Release);
    }

    /// Pages that are missing.
    pub fn wanted(&self) -> &Wanted {
        &self.wanted
    }

    /// How memory is numbered.
    pub fn layout(&self) -> &Layout {
        self.pages.view.layout()
    }

    /// No page is missing any more: from here on memory is as any other.
    pub fn complete(&self) {
        if let Err(error) = self.memory.complete() {
            tracing::error!("{error}");
        }
    }

    /// Ends all of it: whoever waits for a page goes on, on zeros.
    pub fn stop(&self) {
        self.over.store(true, Ordering::Release);
        self.complete();
        self.detach();
        if let Some(listener) = lock(&self.listener).take() {
            let _ = listener.join();
        }
    }

    /// How it went.
    pub fn filled(&self) -> Filled {
        let latencies = self.wanted.latencies();
        Filled {
            faults: latencies.count(),
            fault_p50_us: latencies.percentile_us(0.5),
            fault_p99_us: latencies.percentile_us(0.99),
            fault_max_us: latencies.max_us(),
        }
    }

    fn now(&self) -> Duration {
        self.began.elapsed()
    }

    fn tell(&self, links: u32, input: Input) {
        // Nobody listens any more: the machine is gone.
        let _ = self.inputs.send((links, input));
    }

    fn tell_filled(&self) {
        let number = lock(&self.links).number;
        self.tell(number, Input::Filled);
    }

    /// Hears who needs a page, until it is over.
    fn listen(&self) {
        let mut needed = Vec::new();
        while !self.over.load(Ordering::Acquire) {
            needed.clear();
            match self.memory.wait_for_need(TICK, &mut needed) {
                Ok(true) => {}
                Ok(false) => return self.nothing_is_wanted(),
                Err(error) => {
                    tracing::error!("nobody hears any more which pages the guest needs: {error}");
                    return;
                }
            }
            for page in &needed {
                if let Err(error) = self.needed(*page) {
                    tracing::error!("{error}");
                }
            }
            self.check_limit();
        }
    }

    fn needed(&self, page: PageIndex) -> Result<(), MachineError> {
        let slot = self.layout().region_first_stripe(page.region) * STRIPE_PAGES + page.page as usize;
        match self.wanted.needed(slot, self.now()) {
            Answer::Ask => self.ask(slot),
            Answer::Wait => {}
            Answer::Zeros => drop(self.memory.place(page, None)?),
        }
        Ok(())
    }

    /// Before the machine is this end's nobody waits for a page for ever: the move has failed then.
    fn check_limit(&self) {
        let overdue = || self.wanted.longest_wait().is_some_and(|since| self.now().saturating_sub(since) > self.limit);
        if !self.owned.load(Ordering::Acquire) && overdue() {
            let number = lock(&self.links).number;
            self.tell(
                number,
                Input::LinkLost(format!("a page that was needed to load state did not come within {:?}", self.limit)),
            );
            self.complete();
        }
    }

    fn ask(&self, slot: usize) {
        let stripe = self.layout().stripe(Layout::stripe_of_slot(slot));
        let frame = stripe.first_frame + (slot - stripe.first_slot) as u64;
        let mut asks = lock(&self.asks);
        let Some(writer) = &mut *asks else { return };
        if let Err(error) = writer.write_all(&frame.to_le_bytes()) {
            // The reading side of the channel tells; it is asked again over the next.
            tracing::debug!("cannot ask for a page: {error}");
            *asks = None;
        }
    }

    /// Puts what comes over a channel in place, until it ends.
    fn take_in(&self, reader: Box<dyn ChannelReader>) -> Result<(), FillError> {
        let mut reader = BufReader::with_capacity(BUFFER_BYTES, Reader(reader));
        let (mut header, mut page) = ([0; RECORD_BYTES], Box::new([0; PAGE_SIZE]));
        loop {
            reader.read_exact(&mut header)?;
            let record = Record::decode(&header)?;
            let contents = match record.kind {
                RecordKind::End => return Ok(()),
                RecordKind::Zero => None,
                RecordKind::Contents => {
                    reader.read_exact(&mut page[..])?;
                    Some(&*page)
                }
            };
            let slot = place_of(&self.pages, &record, contents)?;
            self.place(slot, contents)?;
        }
    }

    fn place(&self, slot: usize, contents: Option<&[u8; PAGE_SIZE]>) -> Result<(), MachineError> {
        let last = match self.wanted.is_missing(slot) {
            // It came over the other channel. Whatever became of it since is the guest's affair.
            false => self.wanted.placed(slot, self.now()),
            true => {
                let stripe = self.layout().stripe(Layout::stripe_of_slot(slot));
                let page = stripe.first_page + (slot - stripe.first_slot) as u64;
                match self.memory.place(PageIndex { region: stripe.region, page }, contents)? {
                    Placed::Now | Placed::Already => self.wanted.placed(slot, self.now()),
                    Placed::NotWanted => {
                        self.nothing_is_wanted();
                        return Ok(());
                    }
                }
            }
        };
        if last {
            self.tell_filled();
        }
        Ok(())
    }

    fn nothing_is_wanted(&self) {
        self.wanted.forget();
        self.tell_filled();
    }
}

/// For `read_exact`.
struct Reader(Box<dyn ChannelReader>);

impl Read for Reader {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.0.read(buffer)
    }
}
