//! Pages that are not there yet, in a machine whose guest runs before all of its memory has come (post-copy).
//!
//! As userfaultfd has it: whoever touches one waits until it is put in place, be it the guest, a device or who loads state. Pages that
//! nothing was ever written to are not there either, and nobody sends them.

use std::collections::BTreeSet;
use std::time::Duration;

use godwit_core::PAGE_SIZE;
use godwit_core::layout::{Layout, STRIPE_PAGES};
use godwit_core::machine::{FillableMemory, MachineError, PageIndex, PageRun, Placed};
use godwit_core::table::is_zero;

use super::{Hardware, Machine, Place, lock};

/// Pages that loading state needs, at most.
const MOST_FOR_LOADING: usize = 3;

/// What is not there, and who waits for it.
#[derive(Default)]
pub(super) struct Absent {
    /// By slot.
    pages: BTreeSet<usize>,
    /// Somebody has begun to wait for these, and nobody has heard of it.
    needed: Vec<usize>,
    /// Where the guest's vCPU waits.
    guest: Option<Place>,
    /// Disk writes that are done, and cannot be said to be.
    devices: Vec<(u64, Place)>,
    /// Where who loads state waits.
    loading: Vec<usize>,
}

impl Absent {
    pub(super) fn has(&self, slot: usize) -> bool {
        self.pages.contains(&slot)
    }

    pub(super) fn is_guest_waiting(&self) -> bool {
        self.guest.is_some()
    }

    /// Where the guest waits; it tries again.
    pub(super) fn take_guest(&mut self) -> Option<Place> {
        self.guest.take()
    }
}

fn slot_of(layout: &Layout, (stripe, offset): Place) -> usize {
    layout.stripe(stripe).first_slot + offset
}

impl Machine {
    /// Forgets what is stale; from here on some pages are not there.
    pub fn forget(&self, missing: &mut dyn Iterator<Item = PageRun>) {
        let layout = self.view.layout();
        for PageRun { region, pages } in missing {
            let first = layout.region_first_stripe(region) * STRIPE_PAGES;
            pages.for_each(|page| self.view.write_page(first + page as usize, &[0; PAGE_SIZE]));
        }
        let mut copy = [0; PAGE_SIZE];
        let absent = &mut self.hardware().absent;
        for stripe in (0..layout.stripes()).map(|index| layout.stripe(index)) {
            for offset in 0..stripe.pages {
                self.view.copy_page(&stripe, offset, &mut copy);
                if is_zero(&copy) {
                    absent.pages.insert(stripe.first_slot + offset);
                }
            }
        }
    }

    /// Who loads state touches memory.
    pub fn touch_for_loading(&self) {
        let mut hardware = self.hardware();
        let count = hardware.chance.below(MOST_FOR_LOADING + 1);
        for _ in 0..count {
            let place = self.place(&mut hardware, None);
            let slot = slot_of(self.view.layout(), place);
            if hardware.absent.has(slot) {
                hardware.absent.needed.push(slot);
                hardware.absent.loading.push(slot);
            }
        }
    }

    /// Whether who loads state still waits for a page.
    pub fn waits_to_load(&self) -> bool {
        !self.hardware().absent.loading.is_empty()
    }

    /// Whether every page is there.
    pub fn is_whole(&self) -> bool {
        self.hardware().absent.pages.is_empty()
    }

    /// The pages that somebody waits for.
    pub fn waits_for(&self) -> Vec<usize> {
        let (hardware, layout) = (self.hardware(), self.view.layout());
        let Absent { guest, devices, loading, .. } = &hardware.absent;
        let places = guest.iter().chain(devices.iter().map(|(_, place)| place));
        let slots = places.map(|place| slot_of(layout, *place)).chain(loading.iter().copied());
        // Whose page has just come goes on as soon as it gets its turn.
        slots.filter(|slot| hardware.absent.has(*slot)).collect()
    }

    /// Whether a page is there. If not, the guest waits for it.
    pub(super) fn is_there_for_guest(&self, hardware: &mut Hardware, place: Place, waited: bool) -> bool {
        let slot = slot_of(self.view.layout(), place);
        let absent = &mut hardware.absent;
        if !absent.has(slot) {
            return true;
        }
        absent.guest = Some(place);
        if !waited {
            absent.needed.push(slot);
        }
        false
    }

    /// The same for a device, which waits with the answer to this request.
    pub(super) fn is_there_for_device(&self, hardware: &mut Hardware, place: Place, request: u64) -> bool {
        let slot = slot_of(self.view.layout(), place);
        let absent = &mut hardware.absent;
        if !absent.has(slot) {
            return true;
        }
        absent.devices.push((request, place));
        absent.needed.push(slot);
        false
    }

    /// Devices go on whose page is there by now.
    fn devices_go_on(&self, hardware: &mut Hardware) {
        let layout = self.view.layout();
        let absent = &mut hardware.absent;
        let (waiting, going_on): (Vec<_>, Vec<_>) = std::mem::take(&mut absent.devices)
            .into_iter()
            .partition(|(_, place)| absent.pages.contains(&slot_of(layout, *place)));
        absent.devices = waiting;
        going_on.into_iter().for_each(|(request, place)| self.tell_disk_write_done(hardware, request, place));
    }
}

impl FillableMemory for Machine {
    fn wait_for_need(&self, _limit: Duration, needed: &mut Vec<PageIndex>) -> Result<bool, MachineError> {
        let layout = self.view.layout();
        needed.extend(self.hardware().absent.needed.drain(..).map(|slot| {
            let stripe = layout.stripe(Layout::stripe_of_slot(slot));
            PageIndex { region: stripe.region, page: stripe.first_page + (slot - stripe.first_slot) as u64 }
        }));
        Ok(true)
    }

    fn place(&self, page: PageIndex, contents: Option<&[u8; PAGE_SIZE]>) -> Result<Placed, MachineError> {
        let slot = self.view.layout().region_first_stripe(page.region) * STRIPE_PAGES + page.page as usize;
        {
            let mut hardware = self.hardware();
            if !hardware.absent.pages.remove(&slot) {
                return Ok(Placed::Already);
            }
            hardware.absent.loading.retain(|waited| *waited != slot);
            if let Some(contents) = contents {
                self.view.write_page(slot, contents);
            }
            let index = Layout::stripe_of_slot(slot);
            let number = self.number((index, slot - self.view.layout().stripe(index).first_slot));
            let mut truth = lock(&self.truth);
            // A copy whose guest does not run may be out of date.
            if hardware.running && contents.unwrap_or(&[0; PAGE_SIZE])[..] != *truth.page(number) {
                truth.violate(|| "a page was put in place that is not what the guest left there".into());
            }
        }
        self.devices_go_on(&mut self.hardware());
        Ok(Placed::Now)
    }

    fn complete(&self) -> Result<(), MachineError> {
        {
            let absent = &mut self.hardware().absent;
            absent.pages.clear();
            absent.loading.clear();
        }
        if self.runs()
            && let Some(page) = self.first_difference()
        {
            lock(&self.truth).violate(|| format!("memory is said to be complete, and {page} differs"));
        }
        self.devices_go_on(&mut self.hardware());
        Ok(())
    }
}
