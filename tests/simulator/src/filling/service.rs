//! Those who fill memory while the guest runs in it: who needs a page is heard and the page asked for, and what comes is put in place.
//!
//! In life these are threads of their own: whatever else the process waits for, they go on.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use godwit_core::destination::DestinationPages;
use godwit_core::destination::filling::arrived::place_of;
use godwit_core::layout::{Layout, STRIPE_PAGES, set_bits};
use godwit_core::machine::{DestinationMachine, FillableMemory, MachineError, PageIndex, PageRun};
use godwit_core::message::Filled;
use godwit_core::postcopy::{Answer, PageChannel, RECORD_BYTES, Record, RecordKind, Wanted};

use crate::machine::{Incoming, Machine};
use crate::network::{ConnectionId, Kind};
use crate::world::World;

/// Fills memory.
pub struct Service {
    machine: Arc<Machine>,
    memory: Arc<dyn FillableMemory>,
    pages: Arc<DestinationPages>,
    wanted: Wanted,
    channels: Vec<PageStream>,
    /// What has been asked for over these channels.
    asked: BTreeSet<usize>,
    /// The source had sent all that nobody has asked for, and a page was missing that nobody has asked for.
    left_behind: bool,
}

/// A channel that pages come over.
struct PageStream {
    id: ConnectionId,
    which: PageChannel,
    /// Nothing more is to come.
    ended: bool,
}

/// What those who fill memory tell.
pub enum Told {
    /// No page is missing any more.
    Filled,
    /// A channel is of no use any more; why.
    Lost(String),
}

impl Service {
    /// Forgets what is stale, and begins to hear who needs a page.
    pub fn start(machine: &Arc<Machine>, pages: Arc<DestinationPages>, wanted: Wanted) -> Result<Self, MachineError> {
        let memory = Incoming(Arc::clone(machine)).fill_later(&mut missing(pages.view.layout(), &wanted))?;
        let (channels, asked) = (Vec::new(), BTreeSet::new());
        Ok(Self { machine: Arc::clone(machine), memory, pages, wanted, channels, asked, left_behind: false })
    }

    /// What is missing.
    pub fn wanted(&self) -> &Wanted {
        &self.wanted
    }

    /// How memory is numbered.
    pub fn layout(&self) -> &Layout {
        self.pages.view.layout()
    }

    /// No page is missing any more, or whoever waits for one is to go on without it.
    pub fn complete(&self) {
        // It does not fail here.
        let _ = self.memory.complete();
    }

    /// How it went.
    pub fn filled(&self) -> Filled {
        Filled { faults: self.wanted.latencies().count(), ..Filled::default() }
    }

    /// Who waits for a page that has not been asked for, though there is a channel for that.
    pub fn forgotten(&self) -> Option<usize> {
        let waits = || self.machine.waits_for().into_iter().find(|slot| !self.asked.contains(slot));
        if self.channels.is_empty() { None } else { waits() }
    }

    /// Whether the source has overlooked a page.
    pub fn is_left_behind(&self) -> bool {
        self.left_behind
    }

    /// The channel of a connection broke: whether that is news.
    pub fn loses(&self, id: ConnectionId) -> Option<Told> {
        let channel = self.channels.iter().find(|channel| channel.id == id && !channel.ended)?;
        Some(Told::Lost(format!("the channel for pages {:?} broke", channel.which)))
    }

    fn is_one_overlooked(&self) -> bool {
        let layout = self.layout();
        (0..layout.stripes()).any(|index| {
            let first = layout.stripe(index).first_slot;
            set_bits(&self.wanted.stripe(index)).any(|offset| !self.asked.contains(&(first + offset)))
        })
    }

    fn slot_of(&self, page: PageIndex) -> usize {
        self.layout().region_first_stripe(page.region) * STRIPE_PAGES + page.page as usize
    }

    fn frame_of(&self, slot: usize) -> u64 {
        let stripe = self.layout().stripe(Layout::stripe_of_slot(slot));
        stripe.first_frame + (slot - stripe.first_slot) as u64
    }

    /// True: it was the last one.
    fn place(&self, slot: usize, contents: Option<&[u8; 4096]>, now: Duration) -> Result<bool, MachineError> {
        if self.wanted.is_missing(slot) {
            let stripe = self.layout().stripe(Layout::stripe_of_slot(slot));
            let page = stripe.first_page + (slot - stripe.first_slot) as u64;
            self.memory.place(PageIndex { region: stripe.region, page }, contents)?;
        }
        Ok(self.wanted.placed(slot, now))
    }

    /// Takes the next record from what has arrived.
    fn take(&mut self, index: usize, arrived: &mut Vec<u8>, now: Duration) -> Option<Told> {
        let lost = |why: String| Some(Told::Lost(why));
        while !self.channels[index].ended {
            let header = arrived.first_chunk::<RECORD_BYTES>()?;
            let record = match Record::decode(header) {
                Ok(record) => record,
                Err(error) => return lost(error.to_string()),
            };
            let length = RECORD_BYTES + record.contents_bytes();
            if arrived.len() < length {
                return None;
            }
            let bytes: Vec<u8> = arrived.drain(..length).collect();
            let contents = bytes[RECORD_BYTES..].first_chunk();
            if record.kind == RecordKind::End {
                self.channels[index].ended = true;
                self.left_behind = self.is_one_overlooked();
                return None;
            }
            let placed = match place_of(&self.pages, &record, contents) {
                Ok(slot) => self.place(slot, contents, now),
                Err(error) => return lost(error.to_string()),
            };
            match placed {
                Ok(true) => return Some(Told::Filled),
                Ok(false) => {}
                Err(error) => return lost(error.to_string()),
            }
        }
        None
    }
}

/// The pages that are wanted.
fn missing<'w>(layout: &'w Layout, wanted: &'w Wanted) -> impl Iterator<Item = PageRun> + 'w {
    (0..layout.stripes()).flat_map(move |index| {
        let stripe = layout.stripe(index);
        let offsets: Vec<_> = set_bits(&wanted.stripe(index)).collect();
        offsets.into_iter().map(move |offset| {
            let page = stripe.first_page + offset as u64;
            PageRun { region: stripe.region, pages: page..page + 1 }
        })
    })
}

impl World {
    /// Pages come over these channels. What was asked for over others is asked for again.
    pub fn service_attaches(&mut self, service: &mut Service, ids: &[ConnectionId]) {
        service.channels = ids
            .iter()
            .filter_map(|id| match self.network.kind(*id) {
                Kind::Pages(which) => Some(PageStream { id: *id, which, ended: false }),
                Kind::Control | Kind::Data(_) => None,
            })
            .collect();
        service.asked.clear();
        for slot in service.wanted.unanswered() {
            self.service_asks(service, slot);
        }
    }

    /// Closes the channels, and keeps what has come.
    pub fn service_detaches(&mut self, service: &mut Service) {
        for channel in service.channels.drain(..) {
            self.network.close(channel.id, 1, &mut self.agenda);
        }
    }

    /// Hears who needs a page.
    pub fn service_listens(&mut self, service: &mut Service) {
        let mut needed = Vec::new();
        // It does not fail here.
        let _ = service.memory.wait_for_need(Duration::ZERO, &mut needed);
        for page in needed {
            let slot = service.slot_of(page);
            match service.wanted.needed(slot, self.now()) {
                Answer::Ask => self.service_asks(service, slot),
                Answer::Wait => {}
                Answer::Zeros => drop(service.memory.place(page, None)),
            }
        }
    }

    fn service_asks(&mut self, service: &mut Service, slot: usize) {
        let channel = service.channels.iter().find(|channel| channel.which == PageChannel::Fault);
        if let Some(PageStream { id, .. }) = channel {
            let frame = service.frame_of(slot).to_le_bytes();
            self.network.write(*id, 1, &frame, &mut self.chance, &mut self.agenda);
            service.asked.insert(slot);
        }
    }

    /// Puts in place what has arrived over a connection.
    pub fn service_reads(&mut self, service: &mut Service, id: ConnectionId) -> Option<Told> {
        let index = service.channels.iter().position(|channel| channel.id == id)?;
        let now = self.now();
        service.take(index, self.network.arrived(id, 1), now)
    }
}
