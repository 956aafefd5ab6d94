//! Post-copy at the sending end: what is asked for is sent at once, and the rest after it.

use std::time::Duration;

use godwit_core::PAGE_SIZE;
use godwit_core::message::Message;
use godwit_core::postcopy::{
    Known, Missing, PageChannel, PushOrder, RECORD_BYTES, REQUEST_BYTES, Record, missing_parts,
};
use godwit_core::progress::PageCounts;
use godwit_core::source::control::{Done, Input};
use godwit_core::source::serving;

use super::{End, SourceEnd};
use crate::chance::us;
use crate::event::Wake;
use crate::network::{ConnectionId, Kind};
use crate::world::World;

/// The most that is sent in one go of what nobody has asked for.
const MAX_PUSH_BYTES: usize = 32 << 10;

/// The channels for pages, and what is known of them.
#[derive(Default)]
pub struct Pages {
    channels: Vec<Wire>,
    /// Once they are served.
    serving: Option<Serving>,
    /// Whether it is known what the destination lacks.
    known: Known,
}

struct Wire {
    id: ConnectionId,
    which: PageChannel,
    broken: bool,
}

#[derive(Default)]
struct Serving {
    order: PushOrder,
    /// Also what nobody has asked for.
    pushing: bool,
    /// What is about to be pushed, and whether that is the end.
    output: Option<(Vec<u8>, bool)>,
    /// It is to go on when there is room.
    wants_room: bool,
    /// All has been pushed.
    ended: bool,
}

impl Pages {
    fn channel(&self, which: PageChannel) -> Option<&Wire> {
        self.channels.iter().find(|channel| channel.which == which)
    }
}

impl World {
    /// The channels for pages could be opened.
    pub(super) fn source_opens_pages(&mut self, (process, end): End<'_>) {
        for which in [PageChannel::Fault, PageChannel::Push] {
            let id = self.connect(Kind::Pages(which), process, end.to);
            end.postcopy.channels.push(Wire { id, which, broken: false });
            self.destination_accepts(end.to, id);
        }
        self.source_tells_pages_opened(end);
    }

    fn source_tells_pages_opened(&mut self, end: &mut SourceEnd) {
        if !end.postcopy.channels.is_empty() && end.postcopy.known == Known::All {
            self.source_input(end, Input::Done(Done::PagesOpened));
        }
    }

    /// The destination says what it lacks.
    pub(super) fn source_hears_missing(&mut self, end: &mut SourceEnd, part: &Missing) {
        let Some(data) = end.pages.as_ref().filter(|_| end.postcopy.known != Known::All) else {
            return self.source_input(end, Input::Failed("it said what it lacks without being asked".into()));
        };
        match end.postcopy.known.told(part, data.view.layout(), &data.pending) {
            Ok(()) => self.source_tells_pages_opened(end),
            Err(error) => self.source_input(end, Input::LinkLost(error.to_string())),
        }
    }

    /// Tells the destination what it lacks.
    pub(super) fn source_sends_missing(&mut self, end: &mut SourceEnd) {
        let Some(data) = end.pages.clone() else { return };
        serving::leave_out_untouched(&data);
        self.note(format_args!("{} pages are missing", data.pending.count()));
        for part in missing_parts(data.view.layout(), |stripe| data.pending.get(stripe)) {
            self.source_sends(end, &Message::Missing(part));
        }
    }

    /// From here on answers what is asked for.
    pub(super) fn source_serves(&mut self, end: &mut SourceEnd) {
        end.postcopy.serving = Some(Serving::default());
        let Some(Wire { id, broken, .. }) = end.postcopy.channel(PageChannel::Fault) else { return };
        match broken {
            true => self.source_input(end, Input::LinkLost("the channel for faults broke".into())),
            false => self.source_answers(end, *id),
        }
    }

    /// From here on sends the rest, too.
    pub(super) fn source_begins_to_push(&mut self, (process, end): End<'_>) {
        if let Some(serving) = &mut end.postcopy.serving {
            serving.pushing = true;
            self.source_pushes_on((process, end), Duration::ZERO);
        }
    }

    /// Bytes have arrived on a channel for pages: what the destination asks for.
    pub fn source_is_asked(&mut self, process: usize, id: ConnectionId) {
        self.with_source(process, |world, (_, end)| world.source_answers(end, id));
    }

    fn source_answers(&mut self, end: &mut SourceEnd, id: ConnectionId) {
        let (Some(data), Some(Serving { order, .. })) = (&end.pages, &mut end.postcopy.serving) else { return };
        while let Some(request) = self.network.arrived(id, 0).first_chunk::<REQUEST_BYTES>() {
            let frame = u64::from_le_bytes(*request);
            self.network.arrived(id, 0).drain(..REQUEST_BYTES);
            let Some(slot) = data.view.layout().slot_of(frame, 1) else {
                self.violate("a page is asked for that there is not");
                return;
            };
            order.needed(&data.pending, slot);
            let (mut counts, mut bytes) = (PageCounts::default(), Vec::new());
            serving::encode(data, slot, &mut counts, &mut bytes);
            self.network.write(id, 0, &bytes, &mut self.chance, &mut self.agenda);
            self.trace.small_step(self.agenda.now(), frame);
        }
    }

    /// There may be room again on the channel for what nobody has asked for.
    pub fn source_may_push(&mut self, process: usize, id: ConnectionId) {
        self.with_source(process, |world, (process, end)| {
            let is_push = end.postcopy.channel(PageChannel::Push).is_some_and(|channel| channel.id == id);
            if let Some(serving) = end.postcopy.serving.as_mut().filter(|serving| is_push && serving.wants_room) {
                serving.wants_room = false;
                world.source_pushes((process, end));
            }
        });
    }

    /// Sends something that nobody has asked for, if the cap and the connection let it.
    pub(super) fn source_pushes(&mut self, (process, end): End<'_>) {
        let Some(&Wire { id, broken, .. }) = end.postcopy.channel(PageChannel::Push) else { return };
        let (Some(data), Some(serving)) = (&end.pages, &mut end.postcopy.serving) else { return };
        if serving.ended || !serving.pushing {
            return;
        }
        if broken {
            return self.source_input(end, Input::LinkLost("the channel for all other pages broke".into()));
        }
        let quantum = end.pacer.quantum_bytes().min(MAX_PUSH_BYTES);
        let (bytes, last) = serving.output.take().unwrap_or_else(|| {
            let (mut counts, mut bytes) = (PageCounts::default(), Vec::new());
            while bytes.is_empty() || bytes.len() + RECORD_BYTES + PAGE_SIZE <= quantum {
                let Some(slot) = serving.order.next(&data.pending) else {
                    bytes.extend(Record::END.encode());
                    return (bytes, true);
                };
                serving::encode(data, slot, &mut counts, &mut bytes);
            }
            (bytes, false)
        });
        let now = self.agenda.now() - end.began;
        let wait = end.pacer.delay(now);
        let room = self.network.has_room(id, 0, bytes.len());
        if !room || !wait.is_zero() {
            serving.output = Some((bytes, last));
            serving.wants_room = !room;
            if room {
                self.source_pushes_on((process, end), wait);
            }
            return;
        }
        self.network.write(id, 0, &bytes, &mut self.chance, &mut self.agenda);
        end.pacer.charge(now, bytes.len() as u64);
        self.trace.small_step(self.agenda.now(), bytes.len() as u64);
        serving.ended = last;
        match serving.ended {
            true => self.network.close(id, 0, &mut self.agenda),
            false => self.source_pushes_on((process, end), Duration::ZERO),
        }
    }

    fn source_pushes_on(&mut self, (process, end): End<'_>, wait: Duration) {
        let delay = wait + self.chance.time(us(1), us(100));
        self.wake_after(process, delay, Wake::Push(end.links));
    }

    /// A channel for pages is broken. That of faults is read from; on the other one it shows only in writing.
    pub fn source_loses_pages(&mut self, process: usize, id: ConnectionId) {
        self.with_source(process, |world, (process, end)| {
            let Some(channel) = end.postcopy.channels.iter_mut().find(|channel| channel.id == id) else { return };
            channel.broken = true;
            let which = channel.which;
            match (which, &mut end.postcopy.serving) {
                (PageChannel::Fault, Some(_)) => {
                    world.source_input(end, Input::LinkLost("the channel for faults broke".into()));
                }
                (PageChannel::Push, Some(serving)) if serving.wants_room => {
                    serving.wants_room = false;
                    world.source_pushes((process, end));
                }
                _ => {}
            }
        });
    }

    /// The links broke in post-copy: what is missing is not known any more.
    pub(super) fn source_leaves_pages(&mut self, end: &mut SourceEnd) {
        self.source_leaves_links(end);
        end.postcopy.known = Known::Nothing;
        self.source_input(end, Input::Done(Done::BrokenOff(Default::default())));
    }

    /// Closes the channels for pages; what was not sent is pending as before.
    pub(super) fn source_closes_pages(&mut self, end: &mut SourceEnd) {
        if let (Some(mut serving), Some(data)) = (end.postcopy.serving.take(), &end.pages) {
            serving.order.put_back(&data.pending);
        }
        for channel in end.postcopy.channels.drain(..) {
            self.network.close(channel.id, 0, &mut self.agenda);
        }
    }
}
