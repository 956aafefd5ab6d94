//! The data channels' sending sides, polled one thing at a time.

use std::time::Duration;

use godwit_core::machine::SourceMachine;
use godwit_core::source::control::{Done, Input, RoundSent};
use godwit_core::source::sending::{Order, Pace, Polled, Report};
use godwit_core::source::tally::{Tallied, Tally};
use godwit_core::source::{SendingChannel, jobs};

use super::{End, SourceEnd};
use crate::chance::us;
use crate::event::Wake;
use crate::network::ConnectionId;
use crate::world::World;

/// A data channel's connection.
pub struct Wire {
    /// The connection.
    pub id: ConnectionId,
    /// Waits for its turn, or for room.
    pub output: Option<Output>,
    /// It is to go on when there is room.
    pub wants_room: bool,
    /// Writing to it fails.
    pub broken: bool,
}

/// What is about to be written.
pub struct Output {
    bytes: Vec<u8>,
    paced: bool,
}

impl World {
    /// There may be room again on a connection.
    pub fn source_has_room(&mut self, process: usize, id: ConnectionId) {
        self.with_source(process, |world, (process, end)| {
            let waiting = end.wires.iter().position(|wire| wire.id == id && wire.wants_room);
            if let Some(index) = waiting {
                end.wires[index].wants_room = false;
                world.source_polls((process, end), index);
            }
        });
    }

    /// A data channel of a process is broken. Nobody reads from it here: that shows only in writing.
    pub fn source_loses_data(&mut self, process: usize, id: ConnectionId) {
        self.with_source(process, |world, (process, end)| {
            let Some(index) = end.wires.iter().position(|wire| wire.id == id) else { return };
            end.wires[index].broken = true;
            if std::mem::take(&mut end.wires[index].wants_room) {
                world.source_writes((process, end), index);
            }
        });
    }

    /// Gives an order to the first `count` channels.
    pub(super) fn source_orders(&mut self, (process, end): End<'_>, order: Order, count: usize) {
        let count = end.sending.len().min(count);
        end.tally = Tally::of(count);
        for index in 0..count {
            end.sending[index].begin(order);
            self.source_goes_on((process, end), index, Duration::ZERO);
        }
    }

    /// One step of a data channel.
    pub(super) fn source_polls(&mut self, (process, end): End<'_>, index: usize) {
        let Some(pages) = end.pages.clone() else { return };
        let (Some(sending), Some(wire)) = (end.sending.get_mut(index), end.wires.get_mut(index)) else { return };
        if wire.output.is_some() {
            return self.source_writes((process, end), index);
        }
        let paced = sending.is_paced();
        let pace =
            Pace { quantum_bytes: end.pacer.quantum_bytes(), bytes_per_s: end.pacer.bytes_per_s(), cut: end.cut };
        match sending.poll(&pages, end.machine.dirty_log(), pace) {
            Ok(Polled::Bytes { bytes, .. }) => {
                wire.output = Some(Output { bytes: bytes.to_vec(), paced });
                self.source_writes((process, end), index);
            }
            Ok(Polled::Marked(batch)) => match end.unacknowledged[index].sent(batch) {
                Ok(()) => self.source_goes_on((process, end), index, Duration::ZERO),
                Err(error) => self.source_input(end, Input::Failed(error.to_string())),
            },
            Ok(Polled::Done(report)) => self.source_reported(end, report),
            Ok(Polled::Idle) => {}
            Err(error) => self.source_input(end, Input::Failed(error.to_string())),
        }
    }

    /// Writes, if the cap and the connection let it.
    fn source_writes(&mut self, (process, end): End<'_>, index: usize) {
        let wire = &mut end.wires[index];
        let Some(Output { bytes, paced }) = wire.output.take() else { return };
        if wire.broken {
            return self.source_input(end, Input::LinkLost(format!("data channel {index} broke")));
        }
        let now = self.agenda.now() - end.began;
        let wait = if paced { end.pacer.delay(now) } else { Duration::ZERO };
        let room = self.network.has_room(wire.id, 0, bytes.len());
        if !room || !wait.is_zero() {
            wire.output = Some(Output { bytes, paced });
            // Without room it goes on when something has arrived.
            wire.wants_room = !room;
            if room {
                self.source_goes_on((process, end), index, wait);
            }
            return;
        }
        self.network.write(wire.id, 0, &bytes, &mut self.chance, &mut self.agenda);
        end.sending[index].written();
        if paced {
            end.pacer.charge(now, bytes.len() as u64);
        }
        self.trace.small_step(self.agenda.now(), bytes.len() as u64);
        self.source_goes_on((process, end), index, Duration::ZERO);
    }

    fn source_goes_on(&mut self, (process, end): End<'_>, index: usize, wait: Duration) {
        let delay = wait + self.chance.time(us(1), us(100));
        self.wake_after(process, delay, Wake::Channel(end.links, index));
    }

    fn source_reported(&mut self, end: &mut SourceEnd, report: Report) {
        match end.tally.note(report) {
            None => {}
            Some(Tallied::Ended { sum }) => self.source_input(end, Input::Done(Done::FinalSent { sum })),
            Some(Tallied::Round { pages, again }) => self.source_ends_round(end, pages, again),
        }
    }

    /// Looks at what the guest has dirtied so far in the first pass, if that is due.
    pub(super) fn source_looks(&mut self, end: &mut SourceEnd) {
        let (Some(watch), Some(pages), Some((began, written))) = (&mut end.watch, &end.pages, end.round) else {
            return;
        };
        let now = self.now();
        if watch.due().is_none_or(|due| now - end.began < due) {
            return;
        }
        let input = match watch.look(pages, end.machine.dirty_log(), &|| now - end.began) {
            Ok(seen) => Input::Looked(RoundSent {
                duration: now - began,
                pages: end.sending.iter().map(|sending| sending.counts().visited()).sum(),
                wire_bytes: end.sending.iter().map(SendingChannel::written_bytes).sum::<u64>() - written,
                seen,
                ..RoundSent::default()
            }),
            Err(error) => Input::Failed(error.to_string()),
        };
        self.source_input(end, input);
    }

    pub(super) fn source_notes_held(&mut self, end: &mut SourceEnd, share: f64) {
        let now = self.now() - end.began;
        if let Some(watch) = &mut end.watch {
            watch.held(now, share);
        }
    }

    fn source_ends_round(&mut self, end: &mut SourceEnd, sent_pages: u64, again: u64) {
        let (Some(pages), Some(harvester)) = (&end.pages, &end.harvester) else { return };
        let Some((began, written)) = end.round.take() else { return };
        if let Err(error) = jobs::harvest(&*end.machine, pages, harvester) {
            return self.source_input(end, Input::Failed(error.to_string()));
        }
        let seen = end.watch.as_mut().map(|watch| watch.round_ended(pages, self.agenda.now() - end.began));
        let sent = RoundSent {
            duration: self.now() - began,
            pages: sent_pages,
            again,
            wire_bytes: end.written_bytes() - written,
            dirty_pages: pages.pending.count(),
            queued_bytes: end.queued_bytes(),
            // Writing modelled memory takes no time.
            applying: Duration::ZERO,
            harvest: us(20),
            capped: end.pacer.bytes_per_s().is_some(),
            by_pages: false,
            seen: seen.unwrap_or_default(),
        };
        let RoundSent { pages, dirty_pages, queued_bytes, .. } = sent;
        self.note(format_args!("round sent: {pages} pages, {dirty_pages} dirty, {queued_bytes} bytes queued"));
        self.source_input(end, Input::Done(Done::RoundSent(sent)));
    }
}
