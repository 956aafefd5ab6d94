//! Post-copy before the machine is this end's: what will be missing, the channels for pages, and the first faults.

use std::io;

use super::super::filling::Service;
use super::Driver;
use crate::layout::{Layout, set_bits};
use crate::machine::{DestinationHost, DestinationMachine, MachineError, PageRun};
use crate::postcopy::{Missing, PageChannel, Wanted};

impl<H: DestinationHost> Driver<'_, H> {
    /// Takes the channels for pages in.
    pub(super) fn open_pages(&mut self, first: u16) -> io::Result<()> {
        self.first_page_channel = first;
        self.page_channels = self.accept_data(first..first + PageChannel::COUNT)?;
        Ok(())
    }

    /// Notes what will be missing; whatever it says, no more than there is.
    pub(super) fn note_missing(&mut self, part: &Missing) -> Result<(), String> {
        let Some(pages) = &self.pages else { return Ok(()) };
        let layout = pages.view.layout();
        let wanted = self.wanted.get_or_insert_with(|| Wanted::new(layout));
        let stripes = part.stripes(layout).map_err(|error| error.to_string())?;
        stripes.for_each(|(stripe, bits)| wanted.add(stripe, &bits));
        Ok(())
    }

    /// Forgets what is stale, and asks for what is needed from here on.
    pub(super) fn begin_to_fill(&mut self) -> Result<(), MachineError> {
        let (Some(wanted), Some(pages), Some(machine)) = (self.wanted.take(), self.pages.clone(), &mut self.machine)
        else {
            return Err(MachineError::new("there is no memory to be filled"));
        };
        // Whatever were made ready now would be missing, and look as if it were there.
        self.populating = None;
        let memory = machine.fill_later(&mut runs(pages.view.layout(), &wanted))?;
        let channels = std::mem::take(&mut self.page_channels);
        let limit = self.options.silence_limit;
        let service = Service::start(memory, pages, wanted, limit, self.sender.clone());
        let service = service.and_then(|service| {
            service.attach(channels, self.links)?;
            Ok(service)
        });
        let cannot =
            |error: io::Error| MachineError::with_source("memory cannot be filled while the guest runs", error);
        self.service = Some(service.map_err(cannot)?);
        Ok(())
    }

    /// The machine is not this end's: whoever waits for a page finds zeros, and nobody ever runs on them.
    pub(super) fn stop_filling(&mut self) {
        self.page_channels.drain(..).for_each(|channel| channel.hang_up.hang_up());
        self.wanted = None;
        if let Some(service) = self.service.take() {
            service.stop();
        }
    }
}

/// The pages that are wanted, one run after the other.
fn runs<'w>(layout: &'w Layout, wanted: &'w Wanted) -> impl Iterator<Item = PageRun> + 'w {
    let pages = (0..layout.stripes()).flat_map(move |index| {
        let stripe = layout.stripe(index);
        let offsets: Vec<_> = set_bits(&wanted.stripe(index)).collect();
        offsets.into_iter().map(move |offset| (stripe.region, stripe.first_page + offset as u64))
    });
    let mut pages = pages.peekable();
    std::iter::from_fn(move || {
        let (region, first) = pages.next()?;
        let mut end = first + 1;
        while pages.next_if_eq(&(region, end)).is_some() {
            end += 1;
        }
        Some(PageRun { region, pages: first..end })
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::layout::STRIPE_PAGES;
    use crate::machine::RegionDescription;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn runs_are_what_is_wanted(slots in prop::collection::btree_set(0..3 * STRIPE_PAGES, 0..40), whole in any::<bool>()) {
            let region = |guest_address, size_bytes| RegionDescription { guest_address, size_bytes };
            let layout = Layout::new(&[region(0, 3 << 20), region(4 << 30, 2 << 20)]).unwrap();
            let wanted = Wanted::new(&layout);
            let mut expected = std::collections::BTreeSet::new();
            for index in 0..layout.stripes() {
                let stripe = layout.stripe(index);
                let mut bits = stripe.all();
                for offset in set_bits(&stripe.all()) {
                    let missing = slots.contains(&(stripe.first_slot + offset)) || whole && index == 2;
                    match missing {
                        true => drop(expected.insert((stripe.region, stripe.first_page + offset as u64))),
                        false => bits[offset / 64] &= !(1 << (offset % 64)),
                    }
                }
                wanted.add(index, &bits);
            }
            let runs: Vec<_> = runs(&layout, &wanted).collect();
            let pages: Vec<_> = runs.iter().flat_map(|run| run.pages.clone().map(move |page| (run.region, page))).collect();
            prop_assert_eq!(pages, expected.into_iter().collect::<Vec<_>>());
            prop_assert!(runs.windows(2).all(|pair| pair[0].region < pair[1].region || pair[0].pages.end < pair[1].pages.start));
        }
    }
}
