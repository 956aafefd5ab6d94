//! Holding vCPUs to a rate of writing by what their dirty rings show.

use std::sync::atomic::AtomicBool;
use std::sync::atomic::Ordering::Relaxed;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use godwit_benches::dirty_ring::{self, DirtyRing};
use kvm_ioctls::VmFd;

use super::watching::thread_cpu_time;

/// A vCPU that rests looks this often whether it has to end.
const NAP: Duration = Duration::from_millis(50);

/// Who is to rest until when.
pub struct Holding {
    vm: Arc<VmFd>,
    /// Whether a vCPU is held when its ring is full. If not, somebody looks at the rings at intervals.
    pub at_full: bool,
    vcpus: Vec<Mutex<Held>>,
    /// What threads of vCPUs spent on rings.
    spent: Mutex<Duration>,
}

struct Held {
    ring: DirtyRing,
    /// Pages per second; infinite if it is not held.
    rate: f64,
    /// When what it has written so far is allowed to have been written.
    due: Instant,
}

impl Holding {
    pub fn new(vm: Arc<VmFd>, rings: Vec<DirtyRing>, at_full: bool) -> Self {
        let held = |ring| Mutex::new(Held { ring, rate: f64::INFINITY, due: Instant::now() });
        Self { vm, at_full, vcpus: rings.into_iter().map(held).collect(), spent: Mutex::default() }
    }

    /// Holds every vCPU to this many pages per second, from now on.
    pub fn set(&self, rate: f64) {
        for vcpu in &self.vcpus {
            let mut held = lock(vcpu);
            (held.rate, held.due) = (rate, Instant::now());
        }
    }

    /// What threads of vCPUs have spent on rings so far.
    pub fn spent(&self) -> Duration {
        *lock(&self.spent)
    }

    /// What a vCPU does when its ring is full.
    pub fn ring_is_full(&self, vcpu: usize) {
        let before = thread_cpu_time();
        lock(&self.vcpus[vcpu]).harvest();
        self.reset();
        *lock(&self.spent) += thread_cpu_time().saturating_sub(before);
    }

    /// A vCPU is not in KVM_RUN: it rests for as long as it has to.
    pub fn rest(&self, vcpu: usize, stop: &AtomicBool) {
        while !stop.load(Relaxed) {
            let left = lock(&self.vcpus[vcpu]).due.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return;
            }
            thread::sleep(left.min(NAP));
        }
    }

    /// Looks at all rings: which vCPUs have just written more than they may by now. None where they are held by full rings.
    pub fn look(&self) -> impl Iterator<Item = usize> + '_ {
        let over = |vcpu: &Mutex<Held>| {
            let mut held = lock(vcpu);
            held.harvest() > 0 && held.due > Instant::now()
        };
        let looked_at = if self.at_full { &[] } else { self.vcpus.as_slice() };
        looked_at.iter().enumerate().filter(move |(_, vcpu)| over(vcpu)).map(|(id, _)| id)
    }

    /// Protects again what was harvested.
    pub fn reset(&self) {
        if let Err(error) = dirty_ring::reset(&self.vm) {
            eprintln!("cannot reset the dirty rings: {error}");
        }
    }
}

impl Held {
    fn harvest(&mut self) -> usize {
        let pages = self.ring.harvest(|_| ());
        let allowed = Duration::from_secs_f64(pages as f64 / self.rate);
        // What it did not use is not kept for later, beyond what it takes to fill the ring once.
        self.due = self.due.max(Instant::now().checked_sub(allowed).unwrap_or(self.due)) + allowed;
        pages
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
