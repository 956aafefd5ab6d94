//! Post-copy at the source: one thread answers what is asked for, another one sends the rest.
//!
//! The guest stands still: its pages are read where they are. Both threads take what they send out of what is pending, by
//! [`PushOrder`].

use std::io::{self, Read};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::Sender;
use std::sync::{Arc, Mutex};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use super::driver::Event;
use super::sending::SourcePages;
use super::worker::Shared;
use crate::channel::{Channel, ChannelReader, ChannelWriter, HangUp};
use crate::layout::{Layout, set_bits};
use crate::memory::PAGE_SIZE;
use crate::postcopy::{PageChannel, PushOrder, RECORD_BYTES, REQUEST_BYTES, Record, RecordKind};
use crate::progress::PageCounts;
use crate::sync::lock;
use crate::table::is_zero;

/// How often who may not push yet looks again.
const PUSH_POLL: Duration = Duration::from_millis(1);
/// The most that is sent in one go of what nobody has asked for: what is asked for meanwhile waits behind it on the link.
const MAX_PUSH_BYTES: usize = 32 << 10;

/// The threads that serve, over one pair of links.
pub struct Serving {
    pushing: Arc<AtomicBool>,
    hang_ups: Vec<Arc<dyn HangUp>>,
    threads: Vec<JoinHandle<()>>,
}

/// What both threads share.
struct Pages {
    shared: Arc<Shared>,
    order: Arc<Mutex<PushOrder>>,
}

/// Why pages cannot be sent any more.
#[derive(Debug, thiserror::Error)]
enum ServeError {
    #[error("a channel for pages broke: {0}")]
    Io(#[from] io::Error),
    #[error("the destination asked for frame {0:#x}, which is no RAM")]
    NoRam(u64),
}

impl Serving {
    /// Starts to answer. `channels`: in the order of [`PageChannel`].
    pub fn start(shared: Arc<Shared>, channels: Vec<Channel>, links: u32, events: &Sender<Event>) -> io::Result<Self> {
        let order = Arc::new(Mutex::new(PushOrder::default()));
        let pushing = Arc::new(AtomicBool::new(false));
        let mut serving = Self { pushing: Arc::clone(&pushing), hang_ups: Vec::new(), threads: Vec::new() };
        for (which, channel) in [PageChannel::Fault, PageChannel::Push].into_iter().zip(channels) {
            serving.hang_ups.push(Arc::clone(&channel.hang_up));
            let pages = Pages { shared: Arc::clone(&shared), order: Arc::clone(&order) };
            let (events, pushing) = (events.clone(), Arc::clone(&pushing));
            let thread = thread::Builder::new().name(format!("pages-{which:?}").to_lowercase()).spawn(move || {
                let result = match which {
                    PageChannel::Fault => pages.answer(channel.reader, channel.writer),
                    PageChannel::Push => pages.push(channel.writer, &pushing),
                };
                lock(&pages.order).put_back(&pages.shared.pages.pending);
                if let Err(error) = result {
                    // Nobody listens any more: the move is over.
                    let _ = events.send(Event::PagesLost { links, why: error.to_string() });
                }
            })?;
            serving.threads.push(thread);
        }
        Ok(serving)
    }

    /// Sends pages that nobody has asked for, too.
    pub fn push(&self) {
        self.pushing.store(true, Ordering::Release);
    }

    /// Breaks both channels.
    pub fn hang_up(&self) {
        self.hang_ups.iter().for_each(|hang_up| hang_up.hang_up());
    }

    /// The threads, which end once their channels are broken. They are to be joined.
    pub fn dismiss(self) -> Vec<JoinHandle<()>> {
        self.hang_up();
        self.threads
    }
}

impl Pages {
    /// Sends what is asked for, at once: the cap is not for what somebody waits for.
    fn answer(&self, reader: Box<dyn ChannelReader>, mut writer: Box<dyn ChannelWriter>) -> Result<(), ServeError> {
        let flow = &self.shared.flow;
        let channel = flow.page_channel(PageChannel::Fault);
        let (mut reader, mut counts, mut noted_bytes) = (Reader(reader), flow.plain_pages(channel), 0);
        let (mut request, mut bytes) = ([0; REQUEST_BYTES], Vec::with_capacity(RECORD_BYTES + PAGE_SIZE));
        loop {
            reader.read_exact(&mut request)?;
            let frame = u64::from_le_bytes(request);
            let slot = self.shared.pages.view.layout().slot_of(frame, 1).ok_or(ServeError::NoRam(frame))?;
            lock(&self.order).needed(&self.shared.pages.pending, slot);
            bytes.clear();
            encode(&self.shared.pages, slot, &mut counts, &mut bytes);
            writer.write_all(&bytes)?;
            let wire_bytes = writer.bytes_on_wire();
            flow.wrote(channel, bytes.len() as u64, wire_bytes - noted_bytes);
            noted_bytes = wire_bytes;
            flow.encoded(channel, counts);
        }
    }

    /// Sends everything else, under the cap.
    fn push(&self, mut writer: Box<dyn ChannelWriter>, pushing: &AtomicBool) -> Result<(), ServeError> {
        let flow = &self.shared.flow;
        let channel = flow.page_channel(PageChannel::Push);
        let (mut counts, mut noted_bytes, mut charged_bytes) = (flow.plain_pages(channel), 0, 0);
        while !pushing.load(Ordering::Acquire) {
            flow.check_stopped()?;
            thread::sleep(PUSH_POLL);
        }
        let (mut bytes, mut ended) = (Vec::with_capacity(MAX_PUSH_BYTES), false);
        while !ended {
            bytes.clear();
            let quantum = flow.pace().quantum_bytes.min(MAX_PUSH_BYTES);
            while !ended && (bytes.is_empty() || bytes.len() + RECORD_BYTES + PAGE_SIZE <= quantum) {
                let next = lock(&self.order).next(&self.shared.pages.pending);
                match next {
                    Some(slot) => encode(&self.shared.pages, slot, &mut counts, &mut bytes),
                    None => {
                        bytes.extend(Record::END.encode());
                        ended = true;
                    }
                }
            }
            flow.wait_for_turn(bytes.len() as u64)?;
            writer.write_all(&bytes)?;
            let wire_bytes = writer.bytes_on_wire();
            charged_bytes += bytes.len() as u64;
            // As for data channels: what a transport adds is charged once it is known.
            if wire_bytes > charged_bytes {
                flow.charge_extra(wire_bytes - charged_bytes);
                charged_bytes = wire_bytes;
            }
            flow.wrote(channel, bytes.len() as u64, wire_bytes - noted_bytes);
            noted_bytes = wire_bytes;
            flow.encoded(channel, counts);
        }
        writer.finish()?;
        Ok(())
    }
}

/// Appends a page as it is sent, and notes that in the table.
pub fn encode(pages: &SourcePages, slot: usize, counts: &mut PageCounts, bytes: &mut Vec<u8>) {
    let stripe = pages.view.layout().stripe(Layout::stripe_of_slot(slot));
    let offset = slot - stripe.first_slot;
    let frame = stripe.first_frame + offset as u64;
    let mut page = [0; PAGE_SIZE];
    pages.view.copy_page(&stripe, offset, &mut page);
    let (kind, entry) = match is_zero(&page) {
        true => (RecordKind::Zero, pages.hasher.zero(frame)),
        false => (RecordKind::Contents, pages.hasher.page(frame, &page)),
    };
    pages.table.set(slot, entry);
    bytes.extend(Record { kind, frame, entry }.encode());
    match kind {
        RecordKind::Contents => {
            bytes.extend(&page);
            counts.raw += 1;
        }
        RecordKind::Zero | RecordKind::End => counts.zero += 1,
    }
}

/// Pages that were never touched nor sent are zeros at the destination, too: they need not follow.
pub fn leave_out_untouched(pages: &SourcePages) {
    let layout = pages.view.layout();
    for index in pages.pending.stripes() {
        let stripe = layout.stripe(index);
        let mut pending = pages.pending.get(index);
        let was_sent = |offset: &usize| pages.table.entry(stripe.first_slot + offset).is_some();
        if set_bits(&pending).all(|offset| was_sent(&offset)) {
            continue;
        }
        let touched = pages.touched.of(&stripe);
        for offset in set_bits(&pending.clone()).filter(|offset| !was_sent(offset)) {
            let bit = 1 << (offset % 64);
            pending[offset / 64] &= !bit | (touched[offset / 64] & bit);
        }
        pages.pending.take(index);
        pages.pending.merge(index, &pending);
    }
}

/// For `read_exact`.
struct Reader(Box<dyn ChannelReader>);

impl Read for Reader {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.0.read(buffer)
    }
}
