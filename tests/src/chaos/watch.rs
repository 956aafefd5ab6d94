//! Watches the heartbeat in every process of the machine at once, from outside and from a thread of its own.

use std::io::IoSliceMut;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use godwit_vmm::workload::layout::{self, field, line};
use nix::sys::uio::{RemoteIoVec, process_vm_readv};
use nix::unistd::Pid;

use super::ledger::{Id, Ledger, Overlap, Sample};
use crate::clock::monotonic_ns;
use crate::priority::wake_on_time;
use crate::workload;

/// Sleep between two rounds of looks.
const PERIOD: Duration = Duration::from_micros(150);

/// Between two searches for guest memory: each reads the list of a process's mappings.
const SEARCH_PERIOD_NS: u64 = 4_000_000;

/// The thread that watches. Dropping it ends it.
pub struct Watch {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

struct Shared {
    state: Mutex<State>,
    stop: AtomicBool,
}

#[derive(Default)]
struct State {
    ledger: Ledger,
    probes: Vec<Probe>,
}

/// Where one process keeps the guest's heartbeat, once that is known.
struct Probe {
    id: Id,
    pid: Pid,
    header: Option<u64>,
    searched_ns: u64,
}

impl Watch {
    /// Begins.
    pub fn start() -> Self {
        let shared = Arc::new(Shared { state: Mutex::default(), stop: AtomicBool::new(false) });
        let thread = thread::spawn({
            let shared = Arc::clone(&shared);
            move || shared.run()
        });
        Self { shared, thread: Some(thread) }
    }

    /// Watches a further process. `origin` is the one whose machine it may take in.
    pub fn add(&self, name: &str, pid: Pid, origin: Option<Id>) -> Id {
        let mut state = self.shared.state();
        let id = state.ledger.add(name, origin);
        state.probes.push(Probe { id, pid, header: None, searched_ns: 0 });
        id
    }

    /// A receiver waits for another process's machine from now on.
    pub fn set_origin(&self, id: Id, origin: Id) {
        self.shared.state().ledger.set_origin(id, origin);
    }

    /// Looks at a process no more.
    pub fn remove(&self, id: Id) {
        let mut state = self.shared.state();
        state.probes.retain(|probe| probe.id != id);
        state.ledger.remove(id);
    }

    /// When `id` was first proven to run.
    pub fn proven_ns(&self, id: Id) -> Option<u64> {
        self.shared.state().ledger.proven_ns(id)
    }

    /// Whether `id` has been seen to run after `since_ns`.
    pub fn runs_since(&self, id: Id, since_ns: u64) -> bool {
        self.shared.state().ledger.advanced_ns(id).is_some_and(|at_ns| at_ns > since_ns)
    }

    /// Gives the overlaps that were found since the last call.
    pub fn take_overlaps(&self) -> Vec<Overlap> {
        self.shared.state().ledger.take_overlaps()
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            // A panic of the thread has been shown by the panic hook.
            let _ = thread.join();
        }
    }
}

impl Shared {
    fn run(&self) {
        wake_on_time();
        while !self.stop.load(Ordering::Relaxed) {
            {
                let State { ledger, probes } = &mut *self.state();
                probes.iter_mut().for_each(|probe| probe.look(ledger));
            }
            thread::sleep(PERIOD);
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Probe {
    fn look(&mut self, ledger: &mut Ledger) {
        let from_ns = monotonic_ns();
        let Some(header) = self.header else {
            if from_ns - self.searched_ns >= SEARCH_PERIOD_NS {
                self.header = workload::find_header(self.pid);
                self.searched_ns = monotonic_ns();
            }
            return;
        };
        match heartbeat(self.pid, header) {
            Some(value) => ledger.sample(self.id, Sample { from_ns, to_ns: monotonic_ns(), value }),
            None => {
                self.header = None;
                ledger.memory_gone(self.id);
            }
        }
    }
}

/// The heartbeat of vCPU 0, if the guest's header page is still there.
fn heartbeat(pid: Pid, header: u64) -> Option<u64> {
    let (mut magic, mut value) = ([0; 8], [0; 8]);
    let counter = header + field::VCPU_LINES + line::HEARTBEAT;
    let remote = [header, counter].map(|address| RemoteIoVec { base: address as usize, len: 8 });
    let read = process_vm_readv(pid, &mut [IoSliceMut::new(&mut magic), IoSliceMut::new(&mut value)], &remote);
    (read == Ok(16) && u64::from_le_bytes(magic) == layout::MAGIC).then(|| u64::from_le_bytes(value))
}
