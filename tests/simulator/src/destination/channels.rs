//! The data channels' receiving sides, and the links' breaks and returns.

use std::sync::Arc;

use godwit_core::PAGE_SIZE;
use godwit_core::decoder::Wants;
use godwit_core::destination::ReceivingChannel;
use godwit_core::destination::control::Input;
use godwit_core::destination::receiving::Received;
use godwit_core::message::{Applied, Message};

use super::{Blocked, DestinationEnd, LAST_WORD_LIMIT};
use crate::network::{ConnectionId, Kind};
use crate::process::Role;
use crate::world::World;

impl DestinationEnd {
    /// Goes on if all data channels have come in.
    pub(super) fn takes_up_data(&mut self) {
        let (Some(pages), Some(Blocked::OpeningData { count, .. })) = (&self.pages, &self.blocked) else { return };
        if self.accepted.len() < *count {
            return;
        }
        if self.receiving.is_empty() {
            let new = (0..*count).map(|index| ReceivingChannel::new(pages, index, *count));
            self.receiving = new.filter_map(Result::ok).collect();
        }
        self.blocked = None;
        self.control.handle(Input::DataOpened(Ok(())));
    }
}

impl World {
    /// A data channel has come in.
    pub fn destination_accepts(&mut self, process: usize, id: ConnectionId) {
        if let Role::Filling(_) = self.processes[process].role {
            return self.filling_accepts(process, id);
        }
        self.with_destination(process, |world, (_, end)| {
            match world.network.kind(id) {
                Kind::Pages(_) => end.page_channels.push(id),
                Kind::Control | Kind::Data(_) => end.accepted.push(id),
            }
            end.takes_up_data();
            end.takes_up_pages();
        });
    }

    /// A control channel of the session has come back.
    pub fn destination_is_back(&mut self, process: usize, id: ConnectionId) {
        if let Role::Filling(_) = self.processes[process].role {
            return self.filling_is_back(process, id);
        }
        self.with_destination(process, |world, (_, end)| {
            if let Some(earlier) = end.returned.replace(id) {
                world.network.close(earlier, 1, &mut world.agenda);
            }
            if let Some(Blocked::OpeningData { .. } | Blocked::OpeningPages { .. }) = end.blocked {
                end.blocked = None;
                let why = "the source came back before its data channels did";
                end.control.handle(Input::DataOpened(Err(why.into())));
            }
        });
    }

    /// A data channel of a process is broken.
    pub fn destination_loses_data(&mut self, process: usize, id: ConnectionId) {
        self.with_destination(process, |_, (_, end)| {
            let Some(index) = end.data().position(|data| data == id) else { return };
            // One that has ended may close.
            if end.receiving.get(index).is_some_and(|channel| channel.wants() != Wants::Nothing) {
                end.tell(Input::ChannelLost("a data channel broke".into()));
            }
        });
    }

    /// Bytes have arrived on a data channel.
    pub fn destination_reads(&mut self, process: usize, id: ConnectionId) {
        self.with_destination(process, |world, (_, end)| {
            let Some(index) = end.data().position(|data| data == id) else { return };
            while let Some(received) = world.receives(end, id, index) {
                match received {
                    Ok(Received::Nothing | Received::Coming(_)) => {}
                    Ok(Received::Mark(mark)) => {
                        let applied = Applied { channel: index as u16, mark };
                        world.send(end.link.id, 1, &Message::Applied(applied));
                    }
                    Ok(Received::Ended(sum)) => end.tell(Input::ChannelEnded { sum }),
                    Err(why) => return end.tell(Input::Nonsense(why)),
                }
            }
        });
    }

    /// Brings a channel what it wants, if that has arrived.
    fn receives(
        &mut self,
        end: &mut DestinationEnd,
        id: ConnectionId,
        index: usize,
    ) -> Option<Result<Received, String>> {
        let (pages, channel) = (Arc::clone(end.pages.as_ref()?), end.receiving.get_mut(index)?);
        let arrived = self.network.arrived(id, 1);
        let received = match channel.wants() {
            Wants::Bytes(count) if arrived.len() >= count => {
                let bytes: Vec<u8> = arrived.drain(..count).collect();
                channel.handle_bytes(&pages, &bytes)
            }
            Wants::Pages { slot, pages: count } if arrived.len() >= count * PAGE_SIZE => {
                let bytes: Vec<u8> = arrived.drain(..count * PAGE_SIZE).collect();
                pages.view.pages(slot, count).copy_from(&bytes);
                channel.handle_pages(&pages)
            }
            Wants::Bytes(_) | Wants::Pages { .. } | Wants::Nothing => return None,
        };
        Some(received.map_err(|error| error.to_string()))
    }

    /// Closes the data channels and keeps what has arrived: also what has arrived of pages that were being read into guest memory. The source
    /// may still have a last word.
    pub(super) fn destination_detaches(&mut self, end: &mut DestinationEnd) {
        match end.link.lost {
            true => self.network.close(end.link.id, 1, &mut self.agenda),
            false => end.last_word_until = Some(self.now() + LAST_WORD_LIMIT),
        }
        self.destination_stops_filling(end);
        let Some(pages) = end.pages.clone() else { return };
        for (id, channel) in end.accepted.drain(..).zip(&mut end.receiving) {
            if let Wants::Pages { slot, pages: count } = channel.wants() {
                let arrived = self.network.arrived(id, 1);
                let torn = arrived.len().min(count * PAGE_SIZE);
                pages.view.pages(slot, count).copy_from(&arrived[..torn]);
            }
            self.network.close(id, 1, &mut self.agenda);
        }
        end.receiving.iter_mut().for_each(|channel| channel.reattach(&pages));
    }
}
