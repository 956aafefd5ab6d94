//! The links to the destination: opened, opened again, and closed.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use godwit_core::machine::MachineError;
use godwit_core::pending::{Harvester, Pending};
use godwit_core::source::control::{Done, Input};
use godwit_core::source::{SendingChannel, SourcePages, Unacknowledged, jobs};
use godwit_core::table::{PageHasher, PageTable};

use super::channels::Wire;
use super::{End, SourceEnd};
use crate::event::{Dial, Reached, Wake};
use crate::link::LinkEnd;
use crate::machine::Touched;
use crate::network::Kind;
use crate::world::World;

/// How long opening a channel may take.
const CONNECT_LIMIT: Duration = Duration::from_secs(10);
/// How long opening one again may take.
const CONNECT_AGAIN_LIMIT: Duration = Duration::from_secs(3);

impl World {
    /// Tries to open a channel, or all data channels.
    pub(super) fn source_dials(&mut self, (process, end): End<'_>, dial: Dial) {
        let limit = match dial {
            Dial::First => CONNECT_LIMIT,
            Dial::Data(_) if end.links == 0 => CONNECT_LIMIT,
            Dial::Again(_) | Dial::Data(_) | Dial::Pages(_) => CONNECT_AGAIN_LIMIT,
        };
        let (reached, at) = self.reach(process, end.to, limit);
        self.wake_at(process, at, Wake::Dialled(end.links, dial, reached));
    }

    /// What came of it.
    pub(super) fn source_dialled(&mut self, (process, end): End<'_>, dial: Dial, reached: bool) {
        if end.control.is_ending() {
            return;
        }
        let answer = match reached {
            true => self.answers(end.to, dial),
            false => Reached::Nobody,
        };
        match (dial, answer) {
            (_, Reached::Nobody) => self.source_input(end, unreachable("it does not answer", false)),
            (_, Reached::Stranger) => self.source_input(end, unreachable("it says no", true)),
            (Dial::First | Dial::Again(_), Reached::Peer) => {
                let id = self.connect(Kind::Control, process, end.to);
                end.link = Some(LinkEnd::new(id, 0, self.now()));
                match dial {
                    Dial::First => self.destination_begins(end.to, id),
                    _ => self.destination_is_back(end.to, id),
                }
                self.source_input(end, Input::Done(Done::Connected));
            }
            (Dial::Data(_), Reached::Peer) => self.source_opens_data((process, end)),
            (Dial::Pages(_), Reached::Peer) => self.source_opens_pages((process, end)),
        }
    }

    fn source_opens_data(&mut self, (process, end): End<'_>) {
        if end.pages.is_none()
            && let Err(error) = prepare(end)
        {
            return self.source_input(end, Input::Failed(error.to_string()));
        }
        for index in 0..end.channel_count {
            let id = self.connect(Kind::Data(index), process, end.to);
            end.wires.push(Wire { id, output: None, wants_room: false, broken: false });
            self.destination_accepts(end.to, id);
        }
        if end.links == 0 {
            let capped = end.pacer.bytes_per_s().is_some();
            return self.source_input(end, Input::Done(Done::DataOpened { capped }));
        }
        let (Some(pages), Some(harvester)) = (&end.pages, &end.harvester) else { return };
        let input = match jobs::harvest(&*end.machine, pages, harvester) {
            Ok(dirtied_pages) => Input::Done(Done::Reattached { dirtied_pages }),
            Err(error) => Input::Failed(error.to_string()),
        };
        self.source_input(end, input);
    }

    /// Closes what is left of the links; what still comes of them is late.
    pub(super) fn source_leaves_links(&mut self, end: &mut SourceEnd) {
        end.links += 1;
        end.queue_awaited = false;
        (end.probe, end.round) = (None, None);
        self.source_hangs_up(end);
        if let Some(LinkEnd { id, side, .. }) = end.link.take() {
            self.network.close(id, side, &mut self.agenda);
        }
    }

    /// Closes the data channels, and those for pages.
    pub(super) fn source_hangs_up(&mut self, end: &mut SourceEnd) {
        self.source_closes_pages(end);
        for Wire { id, .. } in end.wires.drain(..) {
            self.network.close(id, 0, &mut self.agenda);
        }
    }
}

/// What exists once data channels are open.
fn prepare(end: &mut SourceEnd) -> Result<(), MachineError> {
    let encodings = end.control.encodings().of_each(end.channel_count);
    let channels = (0..end.channel_count).map(|index| SendingChannel::new(index.into(), encodings));
    end.sending = channels.collect::<Result<_, _>>().map_err(|error| MachineError::new(error.to_string()))?;
    end.unacknowledged = end.sending.iter().map(|_| Unacknowledged::default()).collect();
    let layout = end.machine.view().layout();
    end.harvester = Some(Mutex::new(Harvester::new(layout)));
    end.pages = Some(Arc::new(SourcePages {
        view: end.machine.view().clone(),
        pending: Pending::new(layout),
        table: PageTable::new(layout),
        hasher: PageHasher::new(end.table_seed, end.verify),
        touched: Box::new(Touched(Arc::clone(&end.machine))),
        channels: end.channel_count.into(),
    }));
    Ok(())
}

fn unreachable(why: &str, gone: bool) -> Input {
    Input::Unreachable { why: why.into(), gone }
}
