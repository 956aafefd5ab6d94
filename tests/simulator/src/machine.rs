//! A modelled machine: memory that is really mapped, a guest that writes to it, a dirty log as KVM keeps it, a disk.
//!
//! It implements what a VMM implements for the engine. Its vCPUs go on while the engine works: the guest also writes in the middle
//! of calls to the dirty log, on either side of what they do.

mod absent;

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use godwit_core::layout::{Layout, STRIPE_PAGES, Stripe, StripeBits};
use godwit_core::machine::{
    DestinationMachine, DirtyLog, FillableMemory, Hold, LoadContext, MachineDescription, MachineError, PageRun,
    Section, SectionVersion, SourceMachine,
};
use godwit_core::table::is_zero;
use godwit_core::touched::TouchedPages;
use godwit_core::view::MemoryView;
use godwit_core::{GuestMemory, PAGE_SIZE};
use vm_memory::{Bytes, GuestAddress};

use self::absent::Absent;
use crate::chance::Chance;
use crate::truth::Truth;

/// The truth, as all machines share it.
pub type SharedTruth = Arc<Mutex<Truth>>;

/// A lock that nobody else ever holds: everything happens in one thread.
pub fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The machine. Cheap to share.
pub struct Machine {
    description: MachineDescription,
    view: MemoryView,
    truth: SharedTruth,
    hardware: Mutex<Hardware>,
}

struct Hardware {
    chance: Chance,
    /// How likely the guest writes in the middle of a call to the dirty log.
    meddling: f64,
    /// The guest writes whole pages only.
    whole_pages: bool,
    /// What it writes arrives in memory that it shares with another machine.
    owns_memory: bool,
    running: bool,
    /// The vCPUs have been stopped; devices still finish what they have begun.
    halted: bool,
    /// The dirty log, by region, while it is on.
    log: Option<Vec<Vec<u64>>>,
    /// Disk writes under way.
    requests: Vec<u64>,
    /// The part of the guest's state that is not memory.
    progress: u64,
    throttle: f64,
    absent: Absent,
}

/// Where a page is: stripe and offset.
type Place = (usize, usize);

impl Machine {
    /// A machine that does not run, with memory that reads as zeros.
    pub fn new(description: MachineDescription, truth: SharedTruth, chance: Chance) -> Result<Self, MachineError> {
        let ranges: Vec<_> = description
            .memory
            .iter()
            .map(|region| (GuestAddress(region.guest_address), region.size_bytes as usize))
            .collect();
        let memory = GuestMemory::from_ranges(&ranges)
            .map_err(|error| MachineError::with_source("memory cannot be mapped", error))?;
        let machine = Self::over(description, memory, truth, chance)?;
        machine.hardware().owns_memory = true;
        Ok(machine)
    }

    /// A machine that does not run, and whose memory is another one's so far.
    pub fn over(
        description: MachineDescription,
        memory: GuestMemory,
        truth: SharedTruth,
        chance: Chance,
    ) -> Result<Self, MachineError> {
        let layout = Layout::new(&description.memory)
            .map_err(|error| MachineError::with_source("the machine's description", error))?;
        let hardware = Hardware {
            chance,
            meddling: 0.0,
            whole_pages: false,
            owns_memory: false,
            running: false,
            halted: false,
            log: None,
            requests: Vec::new(),
            progress: 0,
            throttle: 1.0,
            absent: Absent::default(),
        };
        let view = MemoryView::new(memory, Arc::new(layout))?;
        Ok(Self { description, view, truth, hardware: Mutex::new(hardware) })
    }

    /// How its guest is: how likely it writes in the middle of a call to the dirty log, and whether it writes whole pages only.
    pub fn behave(&self, meddling: f64, whole_pages: bool) {
        let mut hardware = self.hardware();
        (hardware.meddling, hardware.whole_pages) = (meddling, whole_pages);
    }

    /// The machine's memory.
    pub fn view(&self) -> &MemoryView {
        &self.view
    }

    /// Whether the guest runs, or would if its vCPUs had not just been stopped.
    pub fn runs(&self) -> bool {
        self.hardware().running
    }

    /// Whether nothing of a move is left: the log is off, the vCPUs are not throttled.
    pub fn is_untouched(&self) -> bool {
        let hardware = self.hardware();
        hardware.log.is_none() && hardware.throttle == 1.0
    }

    /// Whether its vCPUs are held back.
    pub fn is_throttled(&self) -> bool {
        self.hardware().throttle < 1.0
    }

    /// A machine that was just switched on runs.
    pub fn boot(&self) {
        lock(&self.truth).boot();
        self.run();
    }

    /// The guest does something. Some: the number of a disk write that it has begun.
    pub fn step(&self, disk: bool) -> Option<u64> {
        let mut hardware = self.hardware();
        if !hardware.running || hardware.halted {
            return None;
        }
        let share = hardware.throttle;
        if share < 1.0 && !hardware.chance.hit(share) {
            return None;
        }
        self.guest_writes(&mut hardware, None);
        if !disk || hardware.absent.is_guest_waiting() {
            return None;
        }
        let request = lock(&self.truth).ask_disk();
        hardware.requests.push(request);
        Some(request)
    }

    /// A disk write has been carried out: the VMM tells the guest, in its memory.
    pub fn disk_write_done(&self, request: u64) {
        let mut hardware = self.hardware();
        let place = self.place(&mut hardware, None);
        if self.is_there_for_device(&mut hardware, place, request) {
            self.tell_disk_write_done(&mut hardware, request, place);
        }
    }

    fn tell_disk_write_done(&self, hardware: &mut Hardware, request: u64, place: Place) {
        hardware.requests.retain(|under_way| *under_way != request);
        lock(&self.truth).disk_done(request);
        self.write(hardware, place, true);
    }

    /// Stops the vCPUs, as the beginning of a pause.
    pub fn halt(&self) {
        self.hardware().halted = true;
    }

    /// Whether no disk write is under way.
    pub fn is_drained(&self) -> bool {
        self.hardware().requests.is_empty()
    }

    /// The first page that is not as the guest left it, of those that are there.
    fn first_difference(&self) -> Option<String> {
        let (hardware, truth) = (self.hardware(), lock(&self.truth));
        let layout = self.view.layout();
        let mut copy = [0; PAGE_SIZE];
        let mut number = 0;
        for index in 0..layout.stripes() {
            let stripe = layout.stripe(index);
            for offset in 0..stripe.pages {
                self.view.copy_page(&stripe, offset, &mut copy);
                let is_there = !hardware.absent.has(stripe.first_slot + offset);
                if is_there && copy[..] != *truth.page(number) {
                    return Some(format!("frame {:#x}", stripe.first_frame + offset as u64));
                }
                number += 1;
            }
        }
        None
    }

    /// The guest runs from here on: everything must be as it left it, wherever that was.
    fn run(&self) {
        let differs = self.first_difference();
        let mut hardware = self.hardware();
        let mut truth = lock(&self.truth);
        if let Some(page) = differs {
            truth.violate(|| format!("a guest runs over memory that is not what it wrote: {page} differs"));
        }
        let (ours, theirs) = (hardware.progress, truth.progress);
        if ours != theirs {
            truth
                .violate(|| format!("a guest runs with the state it had after {ours} steps, and it has done {theirs}"));
        }
        if hardware.requests != truth.outstanding() {
            truth.violate(|| "a guest runs without a disk write that it has asked for".into());
        }
        if hardware.throttle < 1.0 {
            truth.violate(|| "a guest goes on throttled that had been stopped".into());
        }
        hardware.running = true;
        hardware.halted = false;
    }

    fn hardware(&self) -> MutexGuard<'_, Hardware> {
        lock(&self.hardware)
    }

    /// A vCPU writes: KVM logs it, if the log is on. In the pages of `near`, if that says something.
    fn guest_writes(&self, hardware: &mut Hardware, near: Option<&Stripe>) {
        let waited = hardware.absent.take_guest();
        let place = waited.unwrap_or_else(|| self.place(hardware, near));
        if !self.is_there_for_guest(hardware, place, waited.is_some()) {
            return;
        }
        hardware.progress += 1;
        lock(&self.truth).progress += 1;
        self.write(hardware, place, false);
        self.log(hardware, place);
    }

    /// The VMM writes for a device: vm-memory's bitmap is marked, after the data has landed.
    fn vmm_writes(&self, hardware: &mut Hardware) {
        let place = self.place(hardware, None);
        self.write(hardware, place, true);
    }

    /// KVM itself writes, on behalf of an ioctl: it logs that, too.
    fn kvm_writes(&self, hardware: &mut Hardware) {
        let place = self.place(hardware, None);
        self.write(hardware, place, false);
        self.log(hardware, place);
    }

    /// A guest writes again and again to a few pages, and now and then to any.
    fn place(&self, hardware: &mut Hardware, near: Option<&Stripe>) -> Place {
        let layout = self.view.layout();
        let index = match near {
            Some(stripe) => stripe.first_slot / STRIPE_PAGES,
            None => hardware.chance.below(layout.stripes()),
        };
        let pages = layout.stripe(index).pages;
        let hot = if hardware.chance.hit(0.6) { pages.min(3) } else { pages };
        (index, hardware.chance.below(hot))
    }

    fn write(&self, hardware: &mut Hardware, (index, offset): Place, by_vmm: bool) {
        let layout = self.view.layout();
        let mut truth = lock(&self.truth);
        if !hardware.owns_memory {
            truth.violate(|| "a machine writes to memory that is not its own".into());
        }
        let page = truth.page_mut(self.number((index, offset)));
        let (from, length) = match hardware.chance.below(if hardware.whole_pages { 5 } else { 10 }) {
            0 => (0, PAGE_SIZE),
            1..4 => {
                hardware.chance.fill(page);
                (0, PAGE_SIZE)
            }
            // As a compressor likes it.
            4 => {
                page.fill(hardware.chance.below(256) as u8);
                (0, PAGE_SIZE)
            }
            _ => (hardware.chance.below(PAGE_SIZE / 8) * 8, 8),
        };
        match length {
            PAGE_SIZE if from == 0 && hardware.chance.hit(0.5) => page.fill(0),
            8 => hardware.chance.fill(&mut page[from..from + 8]),
            _ => {}
        }
        let stripe = layout.stripe(index);
        let bytes = &page[from..from + length];
        if by_vmm {
            let address = (stripe.first_frame + offset as u64) * PAGE_SIZE as u64 + from as u64;
            // The place is RAM: this does not fail.
            let _ = self.view.memory().write_slice(bytes, GuestAddress(address));
        } else if let Ok(target) = self.view.pages(stripe.first_slot + offset, 1).offset(from) {
            target.copy_from(bytes);
        }
    }

    /// The page's number in the truth.
    fn number(&self, (index, offset): Place) -> usize {
        let layout = self.view.layout();
        (0..index).map(|index| layout.stripe(index).pages).sum::<usize>() + offset
    }

    fn log(&self, hardware: &mut Hardware, (index, offset): Place) {
        let stripe = self.view.layout().stripe(index);
        if let Some(log) = &mut hardware.log {
            let page = stripe.first_page as usize + offset;
            log[stripe.region][page / 64] |= 1 << (page % 64);
        }
    }

    /// In the middle of a call to the dirty log, a vCPU may write.
    fn meddling(&self, hardware: &mut Hardware, region: usize) {
        if !hardware.running || hardware.halted || !hardware.chance.hit(hardware.meddling) {
            return;
        }
        let layout = self.view.layout();
        let stripe = layout.stripe(layout.region_first_stripe(region));
        match hardware.chance.hit(0.2) {
            true => self.vmm_writes(hardware),
            false => self.guest_writes(hardware, Some(&stripe)),
        }
    }
}

impl DirtyLog for Machine {
    fn start(&self) -> Result<(), MachineError> {
        let layout = self.view.layout();
        let full = |region| vec![u64::MAX; layout.region_pages(region).div_ceil(64) as usize];
        self.hardware().log = Some((0..layout.regions()).map(full).collect());
        Ok(())
    }

    fn stop(&self) -> Result<(), MachineError> {
        self.hardware().log = None;
        Ok(())
    }

    fn harvest(&self, region: usize, words: &mut [u64]) -> Result<(), MachineError> {
        let mut hardware = self.hardware();
        self.meddling(&mut hardware, region);
        let log = hardware.log.as_ref().ok_or_else(|| MachineError::new("the dirty log is off"))?;
        words.iter_mut().zip(&log[region]).for_each(|(word, logged)| *word |= logged);
        self.meddling(&mut hardware, region);
        Ok(())
    }

    fn clear(&self, region: usize, first_page: u64, words: &[u64]) -> Result<(), MachineError> {
        let mut hardware = self.hardware();
        self.meddling(&mut hardware, region);
        let log = hardware.log.as_mut().ok_or_else(|| MachineError::new("the dirty log is off"))?;
        log[region][first_page as usize / 64..].iter_mut().zip(words).for_each(|(logged, word)| *logged &= !word);
        self.meddling(&mut hardware, region);
        Ok(())
    }
}

impl SourceMachine for Machine {
    fn describe(&self) -> Result<MachineDescription, MachineError> {
        Ok(self.description.clone())
    }

    fn memory(&self) -> GuestMemory {
        self.view.memory().clone()
    }

    fn dirty_log(&self) -> &dyn DirtyLog {
        self
    }

    fn is_running(&self) -> bool {
        self.runs()
    }

    fn pause(&self, _limit: Duration) -> Result<(), MachineError> {
        let mut hardware = self.hardware();
        hardware.halted = false;
        if !hardware.requests.is_empty() {
            return Err(MachineError::new("the disk did not finish its writes in time"));
        }
        hardware.running = false;
        Ok(())
    }

    fn save(&self) -> Result<Vec<Section>, MachineError> {
        let mut hardware = self.hardware();
        if hardware.chance.hit(0.3) {
            self.kvm_writes(&mut hardware);
        }
        let payload = hardware.progress.to_le_bytes().into();
        Ok(vec![Section { kind: "guest".into(), version: 1, payload }])
    }

    fn let_go_of_memory(&self) -> Result<(), MachineError> {
        self.hardware().owns_memory = false;
        Ok(())
    }

    fn take_back_memory(&self) -> Result<(), MachineError> {
        self.hardware().owns_memory = true;
        Ok(())
    }

    fn resume(&self) -> Result<(), MachineError> {
        self.hardware().owns_memory = true;
        self.run();
        Ok(())
    }

    fn throttle(&self, hold: Hold) {
        self.hardware().throttle = hold.share;
    }
}

/// Whatever is not zero was touched, and a page of zeros may have been or not.
pub struct Touched(pub Arc<Machine>);

impl TouchedPages for Touched {
    fn of(&self, stripe: &Stripe) -> StripeBits {
        let mut bits = StripeBits::default();
        let mut page = [0; PAGE_SIZE];
        let mut hardware = self.0.hardware();
        for offset in 0..stripe.pages {
            self.0.view.copy_page(stripe, offset, &mut page);
            if !is_zero(&page) || hardware.chance.hit(0.2) {
                bits[offset / 64] |= 1 << (offset % 64);
            }
        }
        self.0.meddling(&mut hardware, stripe.region);
        bits
    }
}

/// At the destination.
pub struct Incoming(pub Arc<Machine>);

impl DestinationMachine for Incoming {
    fn memory(&self) -> GuestMemory {
        self.0.view.memory().clone()
    }

    fn load(&mut self, sections: &[Section], _context: &LoadContext) -> Result<(), MachineError> {
        let [Section { payload, .. }] = sections else { return Err(MachineError::new("there is no one section")) };
        let progress = payload.first_chunk().ok_or_else(|| MachineError::new("the section is too short"))?;
        self.0.hardware().progress = u64::from_le_bytes(*progress);
        Ok(())
    }

    fn fill_later(
        &mut self,
        missing: &mut dyn Iterator<Item = PageRun>,
    ) -> Result<Arc<dyn FillableMemory>, MachineError> {
        self.0.forget(missing);
        Ok(Arc::clone(&self.0) as Arc<dyn FillableMemory>)
    }

    fn own_memory(&mut self) -> Result<(), MachineError> {
        self.0.take_back_memory()
    }

    fn start(&mut self) -> Result<(), MachineError> {
        self.0.run();
        Ok(())
    }
}

/// What the modelled machine saves.
pub fn sections() -> Vec<SectionVersion> {
    vec![SectionVersion { kind: "guest".into(), version: 1 }]
}
