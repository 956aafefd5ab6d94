//! Keeps the machine settled while its memory is being sent, so that the pause has little left to do.

use std::sync::Arc;
use std::sync::mpsc::{self, RecvTimeoutError, Sender};
use std::thread;
use std::time::Duration;

use crate::machine::SourceMachine;

/// The time between two calls of [`SourceMachine::settle`]: what is written within it is what a pause may have to flush.
const INTERVAL: Duration = Duration::from_millis(500);

/// A thread that calls [`SourceMachine::settle`] until this is dropped. Nothing waits for it: storage that does not answer
/// hangs only this thread.
pub struct Settler {
    _end: Sender<()>,
}

impl Settler {
    /// Starts the thread. Without it the pause takes longer, and that is all.
    pub fn start(machine: Arc<dyn SourceMachine>) -> Self {
        let (end, ended) = mpsc::channel();
        let settle = move || {
            machine.settle();
            while let Err(RecvTimeoutError::Timeout) = ended.recv_timeout(INTERVAL) {
                machine.settle();
            }
        };
        if let Err(error) = thread::Builder::new().name("settle".into()).spawn(settle) {
            tracing::warn!("the machine is not settled before its pause: no thread could be started: {error}");
        }
        Self { _end: end }
    }
}
