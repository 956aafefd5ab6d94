//! Taking time away from the vCPUs, so that they write less memory.

use std::sync::mpsc::{self, RecvTimeoutError, Sender};
use std::sync::{Arc, Mutex};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use crate::sync::lock;
use crate::vcpu::Vcpu;

/// One run and one rest of a throttled vCPU.
const PERIOD: Duration = Duration::from_millis(10);

/// The least share of time that vCPUs keep: a guest at a standstill would look dead.
const MIN_SHARE: f64 = 0.01;

/// Makes vCPUs rest for part of every period.
pub(super) struct Throttle {
    vcpus: Arc<[Vcpu]>,
    worker: Mutex<Option<Worker>>,
}

struct Worker {
    shares: Sender<f64>,
    thread: JoinHandle<()>,
}

impl Throttle {
    /// No throttle yet.
    pub(super) fn new(vcpus: Arc<[Vcpu]>) -> Self {
        Self { vcpus, worker: Mutex::new(None) }
    }

    /// Leaves the vCPUs this share of their time.
    pub(super) fn set(&self, share: f64) {
        let mut worker = lock(&self.worker);
        if share.is_nan() || share >= 1.0 {
            if let Some(Worker { shares, thread }) = worker.take() {
                drop(shares);
                if thread.join().is_err() {
                    tracing::error!("the throttle's thread panicked");
                }
            }
            return;
        }
        let share = share.max(MIN_SHARE);
        if worker.is_none() {
            *worker = self.start();
        }
        if let Some(Worker { shares, .. }) = &*worker {
            // The thread only ends when the sender is dropped.
            let _ = shares.send(share);
        }
    }

    fn start(&self) -> Option<Worker> {
        let (shares, wanted) = mpsc::channel();
        let vcpus = Arc::clone(&self.vcpus);
        let thread = thread::Builder::new().name("throttle".into()).spawn(move || {
            let Ok(mut share) = wanted.recv() else { return };
            loop {
                for vcpu in vcpus.iter() {
                    vcpu.rest(rest(share));
                }
                match wanted.recv_timeout(PERIOD) {
                    Ok(changed) => share = changed,
                    Err(RecvTimeoutError::Timeout) => {}
                    Err(RecvTimeoutError::Disconnected) => return,
                }
            }
        });
        match thread {
            Ok(thread) => Some(Worker { shares, thread }),
            Err(error) => {
                tracing::warn!("cannot throttle the guest: {error}");
                None
            }
        }
    }
}

/// How much of a period is rest.
fn rest(share: f64) -> Duration {
    PERIOD.mul_f64(1.0 - share.clamp(MIN_SHARE, 1.0))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_rest_is_what_the_share_leaves() {
        assert_eq!(rest(1.0), Duration::ZERO);
        assert_eq!(rest(0.25), PERIOD.mul_f64(0.75));
        assert_eq!(rest(-1.0), PERIOD.mul_f64(1.0 - MIN_SHARE));
    }
}
