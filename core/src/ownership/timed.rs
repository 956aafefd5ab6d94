//! Calls to a store that may hang, with a time limit.
//!
//! A hard NFS mount holds a call for as long as its server is away, and the thread with it. So the calls are made by a
//! thread of their own. Whoever has waited long enough is told that the outcome is unknown; the call goes on and may still take
//! effect. While it hangs, further calls are not made at all.

use std::io;
use std::sync::mpsc::{self, RecvTimeoutError, SyncSender};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use super::claim::{Claim, Epoch, Marker};
use super::store::{ClaimAnswer, ClaimStore, MarkAnswer, Reading};

/// A store that answers in time.
#[derive(Clone)]
pub struct Timed {
    jobs: mpsc::Sender<Job>,
    idle: Arc<Idle>,
}

/// Does something with storage that may hang: on a thread of its own, and not waited for longer than `limit`. What is done may still
/// come to its end later.
///
/// # Errors
/// That there was no answer in time, or no thread.
pub fn within<T: Send + 'static>(limit: Duration, work: impl FnOnce() -> T + Send + 'static) -> Result<T, String> {
    let (tell, told) = mpsc::sync_channel(1);
    let work = move || {
        // Whoever has waited in vain is gone.
        let _ = tell.send(work());
    };
    thread::Builder::new()
        .name("storage".into())
        .spawn(work)
        .map_err(|error| format!("no thread could be started: {error}"))?;
    told.recv_timeout(limit).map_err(|_| format!("the storage did not answer within {limit:.1?}"))
}

type Job = Box<dyn FnOnce(&dyn ClaimStore) + Send>;

impl Timed {
    /// Starts the thread. It ends when nobody can ask any more, or never if the store never answers.
    pub fn start(store: impl ClaimStore + 'static) -> io::Result<Self> {
        let (jobs, queue) = mpsc::channel::<Job>();
        thread::Builder::new().name("claims".into()).spawn(move || {
            for job in queue {
                job(&store);
            }
        })?;
        Ok(Self { jobs, idle: Arc::default() })
    }

    /// [`ClaimStore::claim`] within a time limit.
    pub fn claim(&self, claim: &Claim, limit: Duration) -> ClaimAnswer {
        let claim = claim.clone();
        self.ask(limit, move |store| store.claim(&claim)).unwrap_or_else(ClaimAnswer::Unknown)
    }

    /// [`ClaimStore::newest`] within a time limit.
    pub fn newest(&self, limit: Duration) -> Reading {
        self.ask(limit, |store| store.newest()).unwrap_or_else(Reading::Unknown)
    }

    /// [`ClaimStore::mark`] within a time limit.
    pub fn mark(&self, epoch: Epoch, marker: Marker, limit: Duration) -> MarkAnswer {
        self.ask(limit, move |store| store.mark(epoch, marker)).unwrap_or_else(MarkAnswer::Unknown)
    }

    fn ask<T: Send + 'static>(
        &self,
        limit: Duration,
        call: impl FnOnce(&dyn ClaimStore) -> T + Send + 'static,
    ) -> Result<T, String> {
        let deadline = Instant::now() + limit;
        if !self.idle.take(deadline) {
            return Err(format!("an earlier call to the claim store has hung for {limit:.1?} and more"));
        }
        let (answer, answers): (SyncSender<T>, _) = mpsc::sync_channel(1);
        let idle = GiveBack(Arc::clone(&self.idle));
        let job: Job = Box::new(move |store| {
            // If nobody waits any more, the outcome has been called unknown.
            let _ = answer.send(call(store));
            drop(idle);
        });
        if self.jobs.send(job).is_err() {
            return Err("the thread that asks the claim store has died".into());
        }
        answers.recv_timeout(deadline.saturating_duration_since(Instant::now())).map_err(|error| match error {
            RecvTimeoutError::Timeout => format!("the claim store did not answer within {limit:.1?}"),
            RecvTimeoutError::Disconnected => "the thread that asks the claim store has died".into(),
        })
    }
}

/// Whether the thread is free to make a call.
#[derive(Default)]
struct Idle {
    busy: Mutex<bool>,
    freed: Condvar,
}

impl Idle {
    /// Waits for it until the deadline, and takes it.
    fn take(&self, deadline: Instant) -> bool {
        let busy = self.busy.lock().unwrap_or_else(PoisonError::into_inner);
        let wait = deadline.saturating_duration_since(Instant::now());
        let (mut busy, waited) =
            self.freed.wait_timeout_while(busy, wait, |busy| *busy).unwrap_or_else(PoisonError::into_inner);
        if waited.timed_out() && *busy {
            return false;
        }
        *busy = true;
        true
    }
}

/// Says that the thread is free again, however its job ended.
struct GiveBack(Arc<Idle>);

impl Drop for GiveBack {
    fn drop(&mut self) {
        *self.0.busy.lock().unwrap_or_else(PoisonError::into_inner) = false;
        self.0.freed.notify_one();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ownership::claim::{Claimant, Nonce};
    use std::sync::mpsc::Receiver;

    /// Answers once it is let go.
    struct Hanging(Mutex<Receiver<()>>);

    impl ClaimStore for Hanging {
        fn claim(&self, _: &Claim) -> ClaimAnswer {
            let _ = self.0.lock().unwrap().recv();
            ClaimAnswer::Created
        }

        fn newest(&self) -> Reading {
            Reading::Newest(None)
        }

        fn mark(&self, _: Epoch, _: Marker) -> MarkAnswer {
            panic!("a broken store");
        }
    }

    const SHORT: Duration = Duration::from_millis(50);
    const LONG: Duration = Duration::from_secs(20);

    fn claim() -> Claim {
        let name = |text: &str| text.parse().unwrap();
        Claimant { machine: name("m"), host: name("h"), boot_id: name("b"), instance: name("i") }
            .claim(Epoch::FIRST, Nonce(1))
    }

    #[test]
    fn a_call_that_hangs_is_unknown_and_holds_up_no_one() {
        let (release, hold) = mpsc::channel();
        let store = Timed::start(Hanging(Mutex::new(hold))).unwrap();
        let began = Instant::now();
        assert!(matches!(store.claim(&claim(), SHORT), ClaimAnswer::Unknown(_)));
        // Not even made: nothing can be said of it.
        assert!(matches!(store.newest(SHORT), Reading::Unknown(_)));
        assert!(began.elapsed() < LONG / 2);
        release.send(()).unwrap();
        assert_eq!(store.newest(LONG), Reading::Newest(None));
    }

    #[test]
    fn storage_that_hangs_is_not_waited_for() {
        let (release, hold) = mpsc::channel::<()>();
        assert_eq!(within(LONG, || 7), Ok(7));
        assert!(within(SHORT, move || hold.recv()).unwrap_err().contains("did not answer"));
        drop(release);
    }

    #[test]
    fn a_store_that_dies_leaves_outcomes_unknown() {
        let store = Timed::start(Hanging(Mutex::new(mpsc::channel().1))).unwrap();
        assert!(matches!(store.mark(Epoch::FIRST, Marker::Free, LONG), MarkAnswer::Unknown(_)));
        assert!(matches!(store.newest(LONG), Reading::Unknown(_)));
    }
}
