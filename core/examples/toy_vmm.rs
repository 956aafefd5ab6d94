//! A VMM that is not the KVM machine, moved by the engine: all that an author of another VMM has to write.
//!
//! Its "guest" is a thread that increments numbers in its memory, its dirty log is a bitmap that the thread keeps, and
//! its device state is a counter. Both ends run in this process and talk over a unix socket.
//!
//! `cargo run --package godwit-core --example toy_vmm`

use std::collections::BTreeSet;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use godwit_core::bitmap::PageBits;
use godwit_core::destination::{DestinationOptions, DestinationOutcome, receive};
use godwit_core::machine::{Hold, RegionDescription, SectionVersion};
use godwit_core::progress::Silent;
use godwit_core::source::{SourceMigration, SourceOptions, SourceOutcome};
use godwit_core::{
    DestinationHost, DestinationMachine, DirtyLog, FillableMemory, GuestMemory, LoadContext, MachineDescription,
    MachineError, PAGE_SIZE, PageIndex, PageRun, Placed, Refusal, Section, SourceMachine, Verdict,
};
use godwit_transport::{Options, Uri};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, MmapRegion};

/// The memory of a toy machine. A real VMM takes it from its own configuration.
pub const MEMORY_BYTES: usize = 64 << 20;
/// The part of it that the guest writes.
const WORKING_SET_BYTES: u64 = 4 << 20;
/// How the one section of state is called, and the version of its layout.
const COUNTER: &str = "counter";
const COUNTER_VERSION: u16 = 1;

/// A machine whose guest is a thread.
pub struct ToyMachine {
    inner: Arc<Inner>,
    guest: Mutex<Option<JoinHandle<()>>>,
}

struct Inner {
    memory: GuestMemory,
    dirty: Vec<AtomicU64>,
    logging: AtomicBool,
    running: AtomicBool,
    /// How many writes the guest has made: the machine's whole device state.
    writes: AtomicU64,
    /// Pages that are not there yet.
    absent: Absent,
}

/// Pages that are not there yet (post-copy). A real VMM has the kernel tell who touches them: userfaultfd(2).
#[derive(Default)]
struct Absent {
    pages: Mutex<BTreeSet<u64>>,
    /// Pages that somebody waits for.
    needed: Mutex<Vec<PageIndex>>,
    placed: Condvar,
}

impl ToyMachine {
    /// A machine with memory of zeros that does not run yet.
    pub fn new() -> Result<Self, MachineError> {
        let memory = GuestMemory::from_ranges(&[(GuestAddress(0), MEMORY_BYTES)])
            .map_err(|error| MachineError::with_source("cannot map the guest's memory", error))?;
        let inner = Inner {
            memory,
            dirty: (0..MEMORY_BYTES / 4096 / 64).map(|_| AtomicU64::new(0)).collect(),
            logging: AtomicBool::new(false),
            running: AtomicBool::new(false),
            writes: AtomicU64::new(0),
            absent: Absent::default(),
        };
        Ok(Self { inner: Arc::new(inner), guest: Mutex::new(None) })
    }

    /// Writes memory as the guest does, behind the dirty log's back: whoever calls it keeps the log.
    pub fn guest_write(&self, value: u64, address: u64) -> Result<(), MachineError> {
        self.inner.guest_write(value, address).map_err(memory_error)
    }

    /// How many writes the guest has made.
    pub fn writes(&self) -> u64 {
        self.inner.writes.load(Ordering::Relaxed)
    }

    /// Whether memory is what that many writes make of it, every byte of it. The guest must be paused.
    pub fn is_whole(&self) -> Result<bool, MachineError> {
        let slots = WORKING_SET_BYTES / 8;
        let mut word = [0; 8];
        for address in (0..MEMORY_BYTES as u64).step_by(8) {
            self.inner.memory.read_slice(&mut word, GuestAddress(address)).map_err(memory_error)?;
            let expected = (0..self.writes().div_ceil(slots))
                .filter(|pass| address < WORKING_SET_BYTES && pass * slots + slot_order(address / 8) < self.writes())
                .count() as u64;
            if u64::from_le_bytes(word) != expected {
                return Ok(false);
            }
        }
        Ok(true)
    }
}

/// The position at which a slot is written within a pass: one word of every page first, then the next word.
fn slot_order(slot: u64) -> u64 {
    let pages = WORKING_SET_BYTES / 4096;
    (slot % 512) * pages + slot / 512
}

impl Inner {
    /// A write by the guest. vm-memory takes it for one by the VMM and marks it in its own bitmap, which a real guest's
    /// writes never do: so the mark is taken back, and only the dirty log knows of it. (There are no devices, whose marks would go, too.)
    fn guest_write(&self, value: u64, address: u64) -> Result<(), vm_memory::GuestMemoryError> {
        self.memory.write_obj(value, GuestAddress(address))?;
        for region in self.memory.iter() {
            let mapping: &MmapRegion<PageBits> = region;
            mapping.bitmap().clear();
        }
        Ok(())
    }

    /// Whatever a page held is gone.
    fn forget(&self, page: u64) -> Result<(), vm_memory::GuestMemoryError> {
        self.memory.write_slice(&[0xee; PAGE_SIZE], GuestAddress(page * PAGE_SIZE as u64))
    }

    fn step(&self) -> Result<(), vm_memory::GuestMemoryError> {
        let (pages, slots) = (WORKING_SET_BYTES / 4096, WORKING_SET_BYTES / 8);
        let order = self.writes.load(Ordering::Relaxed) % slots;
        let (page, address) = (order % pages, (order % pages) * 4096 + (order / pages) * 8);
        self.absent.wait_for(page);
        let value: u64 = self.memory.read_obj(GuestAddress(address))?;
        self.guest_write(value + 1, address)?;
        // As hardware has it: the write first, the dirty bit after it, and both before anybody sees the guest stopped.
        self.dirty[page as usize / 64].fetch_or(1 << (page % 64), Ordering::AcqRel);
        self.writes.fetch_add(1, Ordering::Relaxed);
        Ok(())
    }
}

impl Absent {
    /// What touching a page comes to: waits until it is there.
    fn wait_for(&self, page: u64) {
        let pages = lock(&self.pages);
        if pages.contains(&page) {
            lock(&self.needed).push(PageIndex { region: 0, page });
            let here = self.placed.wait_while(pages, |pages| pages.contains(&page));
            drop(here.unwrap_or_else(PoisonError::into_inner));
        }
    }
}

impl FillableMemory for Inner {
    fn wait_for_need(&self, limit: Duration, needed: &mut Vec<PageIndex>) -> Result<bool, MachineError> {
        needed.append(&mut lock(&self.absent.needed));
        if needed.is_empty() {
            thread::sleep(limit.min(Duration::from_millis(1)));
        }
        Ok(true)
    }

    fn place(&self, page: PageIndex, contents: Option<&[u8; PAGE_SIZE]>) -> Result<Placed, MachineError> {
        let mut pages = lock(&self.absent.pages);
        if !pages.contains(&page.page) {
            return Ok(Placed::Already);
        }
        let address = GuestAddress(page.page * PAGE_SIZE as u64);
        self.memory.write_slice(contents.unwrap_or(&[0; PAGE_SIZE]), address).map_err(memory_error)?;
        // Only now: nobody may see a page that is half there.
        pages.remove(&page.page);
        self.absent.placed.notify_all();
        Ok(Placed::Now)
    }

    fn complete(&self) -> Result<(), MachineError> {
        lock(&self.absent.pages).clear();
        self.absent.placed.notify_all();
        Ok(())
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn memory_error(error: vm_memory::GuestMemoryError) -> MachineError {
    MachineError::with_source("cannot access the guest's memory", error)
}

impl SourceMachine for ToyMachine {
    fn describe(&self) -> Result<MachineDescription, MachineError> {
        Ok(MachineDescription {
            name: "toy".into(),
            vcpus: 1,
            memory: vec![RegionDescription { guest_address: 0, size_bytes: MEMORY_BYTES as u64 }],
            sections: vec![SectionVersion { kind: COUNTER.into(), version: COUNTER_VERSION }],
            vmm: Vec::new(),
        })
    }

    fn memory(&self) -> GuestMemory {
        self.inner.memory.clone()
    }

    fn dirty_log(&self) -> &dyn DirtyLog {
        &*self.inner
    }

    fn is_running(&self) -> bool {
        self.inner.running.load(Ordering::Acquire)
    }

    fn pause(&self, _limit: Duration) -> Result<(), MachineError> {
        self.inner.running.store(false, Ordering::Release);
        match lock(&self.guest).take().map(JoinHandle::join) {
            Some(Err(_)) => Err(MachineError::new("the guest's thread died")),
            _ => Ok(()),
        }
    }

    fn save(&self) -> Result<Vec<Section>, MachineError> {
        let payload = self.writes().to_le_bytes().to_vec();
        Ok(vec![Section { kind: COUNTER.into(), version: COUNTER_VERSION, payload }])
    }

    fn resume(&self) -> Result<(), MachineError> {
        let inner = Arc::clone(&self.inner);
        if inner.running.swap(true, Ordering::AcqRel) {
            return Ok(());
        }
        let guest = thread::Builder::new().name("toy-guest".into()).spawn(move || {
            while inner.running.load(Ordering::Acquire) && inner.step().is_ok() {
                if inner.writes.load(Ordering::Relaxed).is_multiple_of(64) {
                    thread::sleep(Duration::from_micros(500));
                }
            }
        });
        let guest = guest.map_err(|error| MachineError::with_source("cannot start the guest's thread", error))?;
        *lock(&self.guest) = Some(guest);
        Ok(())
    }

    fn throttle(&self, _hold: Hold) {}
}

impl DirtyLog for Inner {
    fn start(&self) -> Result<(), MachineError> {
        self.dirty.iter().for_each(|word| word.store(u64::MAX, Ordering::Release));
        self.logging.store(true, Ordering::Release);
        Ok(())
    }

    fn stop(&self) -> Result<(), MachineError> {
        self.logging.store(false, Ordering::Release);
        Ok(())
    }

    fn harvest(&self, _region: usize, words: &mut [u64]) -> Result<(), MachineError> {
        words.iter_mut().zip(&self.dirty).for_each(|(word, dirty)| *word |= dirty.load(Ordering::Acquire));
        Ok(())
    }

    fn clear(&self, _region: usize, first_page: u64, words: &[u64]) -> Result<(), MachineError> {
        for (dirty, word) in self.dirty[first_page as usize / 64..].iter().zip(words) {
            dirty.fetch_and(!word, Ordering::AcqRel);
        }
        Ok(())
    }
}

/// Where toy machines arrive.
pub struct ToyHost;

impl DestinationHost for ToyHost {
    type Machine = ToyMachine;

    fn check(&mut self, description: &MachineDescription, _question: &[u8]) -> Verdict {
        let known = |section: &SectionVersion| section.kind == COUNTER && section.version == COUNTER_VERSION;
        let mut refusals = Vec::new();
        if description.memory_bytes() != MEMORY_BYTES as u64 {
            refusals.push(Refusal::new("memory", format!("a toy machine has {MEMORY_BYTES} bytes of memory")));
        }
        for section in description.sections.iter().filter(|section| !known(section)) {
            refusals.push(Refusal::new(&section.kind, format!("version {} is not known here", section.version)));
        }
        refusals.into()
    }

    fn check_filling(&mut self, _description: &MachineDescription) -> Result<(), Refusal> {
        Ok(())
    }

    fn prepare(&mut self, _description: &MachineDescription) -> Result<ToyMachine, MachineError> {
        ToyMachine::new()
    }
}

impl DestinationMachine for ToyMachine {
    fn memory(&self) -> GuestMemory {
        self.inner.memory.clone()
    }

    fn load(&mut self, sections: &[Section], _context: &LoadContext) -> Result<(), MachineError> {
        match sections {
            [section] if section.kind == COUNTER && section.version == COUNTER_VERSION => {
                let bytes = section.payload.as_slice().try_into();
                let bytes = bytes.map_err(|_| MachineError::new("the counter's state is not 8 bytes long"))?;
                self.inner.writes.store(u64::from_le_bytes(bytes), Ordering::Relaxed);
                Ok(())
            }
            _ => Err(MachineError::new("the state of a toy machine is one counter")),
        }
    }

    fn fill_later(
        &mut self,
        missing: &mut dyn Iterator<Item = PageRun>,
    ) -> Result<Arc<dyn FillableMemory>, MachineError> {
        for page in missing.flat_map(|run| run.pages) {
            lock(&self.inner.absent.pages).insert(page);
            self.inner.forget(page).map_err(memory_error)?;
        }
        Ok(Arc::clone(&self.inner) as _)
    }

    fn start(&mut self) -> Result<(), MachineError> {
        self.resume()
    }
}

// Not run when a test includes this file as a module.
#[allow(dead_code)]
fn main() -> Result<(), Box<dyn std::error::Error + Send + Sync>> {
    let socket = std::env::temp_dir().join(format!("toy-vmm-{}.sock", std::process::id()));
    let uri: Uri = format!("unix:{}", socket.display()).parse()?;
    let listener = godwit_transport::listen(&uri, Options::default())?;
    let destination = thread::spawn(move || -> Result<_, Box<dyn std::error::Error + Send + Sync>> {
        let control = listener.next_control(Duration::from_secs(10))?.ok_or("nobody came")?;
        let (mut data, options) = (listener.incoming_data(), DestinationOptions::default());
        match receive(control, &mut data, &mut ToyHost, &options, Arc::new(Silent)) {
            DestinationOutcome::Owned { machine, .. } => Ok(machine),
            DestinationOutcome::Ended(why) | DestinationOutcome::Dropped(why) => Err(Box::from(why)),
        }
    });

    let machine = Arc::new(ToyMachine::new()?);
    machine.resume()?;
    let dial = godwit_transport::connect(&uri, Options::default())?;
    let options = SourceOptions { downtime_limit: Duration::from_millis(20), audit: true, ..SourceOptions::default() };
    let migration = SourceMigration::start(machine, dial, options, Arc::new(Silent));
    match &*migration.wait() {
        SourceOutcome::Moved(report) => println!("moved: {report:#?}"),
        other => return Err(format!("not moved: {other:?}").into()),
    }
    let moved = destination.join().map_err(|_| "the destination died")??;
    moved.pause(Duration::from_secs(1))?;
    println!("{} writes so far, memory whole: {}", moved.writes(), moved.is_whole()?);
    Ok(())
}
