//! A guest and the way in which it is held.

use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::sync::atomic::Ordering::Relaxed;
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow};
use godwit_core::layout::STRIPE_PAGES;
use godwit_core::machine::Hold;
use godwit_core::{GuestMemory, SourceMachine};
use godwit_vmm::config::{ByteSize, GuestKind};
use godwit_vmm::workload::WriterConfig;
use godwit_vmm::{BootOptions, Machine, MachineConfig};

use super::ring_machine::RingMachine;
use super::watching::cpu_time_of;

/// In which way a vCPU is held.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Way {
    /// The product's: bitmap and duty cycle.
    DutyCycle,
    /// When its ring of so many entries is full.
    RingFull(usize),
    /// When a look at its ring of so many entries, every millisecond, shows that it has written enough.
    RingMetered(usize),
}

/// What is written is protected again this often, by either way of tracking: often enough for every write to be a first write.
const PROTECT_INTERVAL: Duration = Duration::from_millis(100);

/// Between two looks at rings: as often as the product's duty cycle.
const LOOK_INTERVAL: Duration = Duration::from_millis(1);

/// Threads are told apart by their names. The first is the product's.
const THROTTLE: &str = "throttle";
const CLEAR: &str = "clear";
const METER: &str = "meter";

/// A guest that can be held.
pub trait Subject {
    fn memory(&self) -> GuestMemory;
    /// Its writes are tracked from here on, and protected again and again.
    fn start_log(&mut self) -> Result<()>;
    /// Leaves it this share of its full rate (1 for all of it), which is this many pages per second.
    fn hold(&self, share: f64, full_pages_per_s: f64);
    /// CPU time that was spent so far on holding the guest, and on tracking what it writes.
    fn spent(&self) -> (Duration, Duration);
}

impl Way {
    /// Boots a guest.
    pub fn boot(self, memory_bytes: u64, writer: &WriterConfig, vcpus: u32) -> Result<Box<dyn Subject>> {
        let ring = |entries, at_full| {
            let machine = RingMachine::boot(memory_bytes, writer, u64::from(vcpus), entries, at_full)?;
            Ok(Box::new(Rings { meter: None, machine: Arc::new(machine) }) as Box<dyn Subject>)
        };
        match self {
            Way::RingFull(entries) => ring(entries, true),
            Way::RingMetered(entries) => ring(entries, false),
            Way::DutyCycle => {
                let config = MachineConfig {
                    memory: ByteSize(memory_bytes),
                    guest: Some(GuestKind::Writer),
                    writer: Some(writer.clone()),
                    vcpus,
                    ..MachineConfig::default()
                };
                let machine = Machine::boot(&config, &BootOptions::default())?;
                Ok(Box::new(Bitmap { clear: None, machine }))
            }
        }
    }
}

/// A machine of the product.
struct Bitmap {
    clear: Option<Background>,
    machine: Machine,
}

impl Subject for Bitmap {
    fn memory(&self) -> GuestMemory {
        self.machine.memory()
    }

    fn start_log(&mut self) -> Result<()> {
        self.machine.dirty_log().start().map_err(|error| anyhow!("{error}"))?;
        let machine = self.machine.clone();
        let mut words = vec![0; (machine.ram()[0].size_bytes / 4096).div_ceil(64) as usize];
        self.clear = Some(Background::every(CLEAR, PROTECT_INTERVAL, move || {
            words.fill(0);
            let log = machine.dirty_log();
            let mut cleared = log.harvest(0, &mut words);
            // Stripe by stripe, as a move does.
            for (stripe, words) in words.chunks(STRIPE_PAGES / 64).enumerate() {
                cleared = cleared.and_then(|()| log.clear(0, (stripe * STRIPE_PAGES) as u64, words));
            }
            if let Err(error) = cleared {
                eprintln!("{error}");
            }
        })?);
        Ok(())
    }

    fn hold(&self, share: f64, _full_pages_per_s: f64) {
        self.machine.throttle(Hold::to(share));
    }

    fn spent(&self) -> (Duration, Duration) {
        (cpu_time_of(THROTTLE), cpu_time_of(CLEAR))
    }
}

/// A machine with rings.
struct Rings {
    meter: Option<Background>,
    machine: Arc<RingMachine>,
}

impl Subject for Rings {
    fn memory(&self) -> GuestMemory {
        self.machine.memory.clone()
    }

    fn start_log(&mut self) -> Result<()> {
        self.machine.start_log()?;
        let machine = Arc::clone(&self.machine);
        let mut protected = Instant::now();
        let interval = if machine.holding.at_full { PROTECT_INTERVAL } else { LOOK_INTERVAL };
        self.meter = Some(Background::every(METER, interval, move || {
            machine.holding.look().for_each(|vcpu| machine.kick(vcpu));
            if protected.elapsed() >= PROTECT_INTERVAL {
                machine.holding.reset();
                protected = Instant::now();
            }
        })?);
        Ok(())
    }

    fn hold(&self, share: f64, full_pages_per_s: f64) {
        self.machine.holding.set(if share < 1.0 { share * full_pages_per_s } else { f64::INFINITY });
    }

    fn spent(&self) -> (Duration, Duration) {
        (cpu_time_of(METER), self.machine.holding.spent())
    }
}

/// Something that is done at intervals, until this is dropped.
struct Background {
    over: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Background {
    fn every(name: &str, interval: Duration, mut step: impl FnMut() + Send + 'static) -> Result<Self> {
        let over = Arc::new(AtomicBool::new(false));
        let is_over = Arc::clone(&over);
        let body = move || {
            while !is_over.load(Relaxed) {
                step();
                thread::sleep(interval);
            }
        };
        let thread = thread::Builder::new().name(name.into()).spawn(body).context("cannot start a thread")?;
        Ok(Self { over, thread: Some(thread) })
    }
}

impl Drop for Background {
    fn drop(&mut self) {
        self.over.store(true, Relaxed);
        if self.thread.take().is_some_and(|thread| thread.join().is_err()) {
            eprintln!("a thread panicked");
        }
    }
}
