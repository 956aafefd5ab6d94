//! Who runs the guest, told from its heartbeat at both ends.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use anyhow::{Context, Result, anyhow, ensure};
use godwit_tests::sampler::Target;
use godwit_tests::wait;

use crate::stage::LIMIT;

/// Which end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum End {
    Source,
    Destination,
}

/// Watches the guest's heartbeat at both ends, from a moment at which it stands at both and nothing more is to be sent. Whichever
/// heartbeat changes after that is a guest that runs.
pub(crate) struct Watch {
    stop: Arc<AtomicBool>,
    ran: Arc<[AtomicBool; 2]>,
    thread: Option<JoinHandle<()>>,
}

impl Watch {
    pub(crate) const PERIOD: Duration = Duration::from_millis(1);

    pub(crate) fn start(ends: [Target; 2]) -> Result<Self> {
        let read = |end: &Target| {
            let mut values = Vec::new();
            end.read(&mut values).map(|()| values)
        };
        let first = [read(&ends[0]), read(&ends[1])];
        let first = first.map(|values| values.context("no heartbeat"));
        let [source, destination] = first;
        let first = [source?, destination?];
        ensure!(first[0] == first[1], "the destination has another heartbeat than the source: {first:?}");
        let (stop, ran) =
            (Arc::new(AtomicBool::new(false)), Arc::new([AtomicBool::new(false), AtomicBool::new(false)]));
        let thread = thread::spawn({
            let (stop, ran) = (Arc::clone(&stop), Arc::clone(&ran));
            move || {
                while !stop.load(Ordering::Relaxed) {
                    for end in 0..2 {
                        // A process that has ended runs nothing.
                        if read(&ends[end]).is_some_and(|values| values != first[end]) {
                            ran[end].store(true, Ordering::Relaxed);
                        }
                    }
                    thread::sleep(Self::PERIOD);
                }
            }
        });
        Ok(Self { stop, ran, thread: Some(thread) })
    }

    /// Where the guest has run since.
    pub(crate) fn ran(&self) -> Result<Vec<End>> {
        ensure!(self.thread.as_ref().is_some_and(|thread| !thread.is_finished()), "nobody watches");
        let ends = [End::Source, End::Destination].into_iter().zip(self.ran.iter());
        Ok(ends.filter(|(_, ran)| ran.load(Ordering::Relaxed)).map(|(end, _)| end).collect())
    }

    pub(crate) fn ensure_only(&self, end: End) -> Result<()> {
        // Whoever runs has been seen by others; the watch may be a moment late.
        wait::until_true(&format!("{end:?} is seen to run"), LIMIT, || Ok(self.ran()?.contains(&end)))?;
        let ran = self.ran()?;
        ensure!(ran == [end], "the guest ran at {ran:?}");
        Ok(())
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        let ended = self.thread.take().map(JoinHandle::join);
        if let Some(Err(_)) = ended {
            eprintln!("{}", anyhow!("the thread that watches the heartbeats panicked"));
        }
    }
}
