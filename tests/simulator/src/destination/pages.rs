//! Post-copy at the receiving end, before the machine is its own: what will be missing, and the first needs.

use godwit_core::destination::control::Input;
use godwit_core::postcopy::{Missing, PageChannel, Wanted};

use super::{Blocked, DestinationEnd};
use crate::filling::service::{Service, Told};
use crate::filling::{Beginning, FillingEnd};
use crate::network::ConnectionId;
use crate::process::Role;
use crate::world::World;

impl DestinationEnd {
    /// Goes on if the channels for pages have come in.
    pub(super) fn takes_up_pages(&mut self) {
        if let Some(Blocked::OpeningPages { .. }) = self.blocked
            && self.page_channels.len() == usize::from(PageChannel::COUNT)
        {
            self.blocked = None;
            self.control.handle(Input::DataOpened(Ok(())));
        }
    }

    /// Notes what will be missing.
    pub(super) fn notes_missing(&mut self, part: &Missing) {
        let Some(pages) = &self.pages else { return };
        let layout = pages.view.layout();
        let wanted = self.wanted.get_or_insert_with(|| Wanted::new(layout));
        match part.stripes(layout) {
            Ok(stripes) => stripes.for_each(|(stripe, bits)| wanted.add(stripe, &bits)),
            Err(error) => self.control.handle(Input::Nonsense(error.to_string())),
        }
    }

    fn tell_of_pages(&mut self, told: Option<Told>) {
        // Who takes the machine over looks whether anything is missing.
        if let Some(Told::Lost(why)) = told {
            self.tell(Input::ChannelLost(why));
        }
    }
}

impl World {
    /// Forgets what is stale, and asks for what is needed from here on.
    pub(super) fn destination_begins_to_fill(&mut self, end: &mut DestinationEnd) {
        let (Some(wanted), Some(pages), Some(machine)) = (end.wanted.take(), end.pages.clone(), &end.machine) else {
            return;
        };
        match Service::start(machine, pages, wanted) {
            Ok(mut service) => {
                self.service_attaches(&mut service, &std::mem::take(&mut end.page_channels));
                machine.touch_for_loading();
                self.service_listens(&mut service);
                end.service = Some(service);
            }
            Err(error) => self.violate(&error.to_string()),
        }
    }

    /// Before the machine is this end's nobody waits for a page for ever: the move has failed then.
    pub(super) fn destination_waits_no_longer(&mut self, end: &mut DestinationEnd) {
        let (Some(Blocked::Loading(..)), Some(service)) = (&end.blocked, &end.service) else { return };
        let overdue = service.wanted().longest_wait().is_some_and(|since| self.now() - since > end.silence_limit);
        if overdue {
            service.complete();
            end.tell(Input::LinkLost("a page that was needed to load state did not come in time".into()));
        }
    }

    /// Bytes have arrived on a channel for pages.
    pub fn destination_reads_pages(&mut self, process: usize, id: ConnectionId) {
        self.with_destination(process, |world, (_, end)| {
            if let Some(service) = &mut end.service {
                let told = world.service_reads(service, id);
                end.tell_of_pages(told);
            }
        });
    }

    /// A channel for pages is broken.
    pub fn destination_loses_pages(&mut self, process: usize, id: ConnectionId) {
        self.with_destination(process, |_, (_, end)| {
            let told = end.service.as_ref().and_then(|service| service.loses(id));
            end.tell_of_pages(told);
        });
    }

    /// The machine is not this end's, or not yet: nobody fills its memory.
    pub(super) fn destination_stops_filling(&mut self, end: &mut DestinationEnd) {
        end.wanted = None;
        if let Some(mut service) = end.service.take() {
            self.service_detaches(&mut service);
        }
        for id in end.page_channels.drain(..) {
            self.network.close(id, 1, &mut self.agenda);
        }
    }

    /// The machine is this end's, and the rest of its memory is to come.
    pub(super) fn destination_fills(&mut self, process: usize, mut end: DestinationEnd, service: Service) {
        for id in end.accepted.drain(..) {
            self.network.close(id, 1, &mut self.agenda);
        }
        let lost = end.inputs.into_iter().filter_map(|(links, input)| match input {
            Input::LinkLost(why) | Input::ChannelLost(why) if links == end.links => Some(why),
            _ => None,
        });
        let beginning = Beginning {
            peer: end.control.peer().to_owned(),
            service,
            link: end.link,
            session: end.session,
            lost: end.lost.into_iter().chain(lost).collect(),
            returned: end.returned,
            silence_limit: end.silence_limit,
        };
        self.processes[process].role = Role::Filling(Box::new(FillingEnd::new(beginning, self.now())));
        self.filling_begins(process);
    }
}
