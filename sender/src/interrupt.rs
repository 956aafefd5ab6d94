//! Ctrl-C and SIGTERM, counted.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;

use signal_hook::consts::{SIGINT, SIGTERM};
use signal_hook::iterator::Signals;

/// How often the user has asked for an end.
#[derive(Clone, Default)]
pub(crate) struct Interrupts(Arc<AtomicUsize>);

impl Interrupts {
    /// From here on Ctrl-C does not end the process: it is counted.
    pub(crate) fn count() -> io::Result<Self> {
        let interrupts = Self::default();
        let counter = Arc::clone(&interrupts.0);
        let mut signals = Signals::new([SIGINT, SIGTERM])?;
        thread::Builder::new().name("signals".into()).spawn(move || {
            for _ in signals.forever() {
                counter.fetch_add(1, Ordering::AcqRel);
            }
        })?;
        Ok(interrupts)
    }

    /// How often so far.
    pub(crate) fn number(&self) -> usize {
        self.0.load(Ordering::Acquire)
    }
}
