//! A thread that waits for kicks and does what they ask for.

use std::os::fd::AsRawFd;
use std::thread::{self, JoinHandle};

use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::EventFd;

use crate::devices::serial::eventfd;
use crate::error::VmmError;

/// A thread of a device. It ends, and is waited for, when this is dropped.
pub(super) struct Worker {
    stop: EventFd,
    thread: Option<JoinHandle<()>>,
}

impl Worker {
    /// Calls `body` after every signal of one of `kicks`.
    pub(super) fn spawn(
        name: String,
        kicks: Vec<EventFd>,
        mut body: impl FnMut() + Send + 'static,
    ) -> Result<Self, VmmError> {
        let failed = || VmmError::os(format!("cannot start the thread {name}"));
        let stop = eventfd()?;
        let epoll = Epoll::new().map_err(failed())?;
        for event in kicks.iter().chain([&stop]) {
            let fd = event.as_raw_fd();
            epoll.ctl(ControlOperation::Add, fd, EpollEvent::new(EventSet::IN, fd as u64)).map_err(failed())?;
        }
        let stopping = stop.try_clone().map_err(failed())?;
        let thread = thread::Builder::new().name(name.clone()).spawn(move || {
            while stopping.read().is_err() {
                let mut ready = [EpollEvent::default(); 2];
                // Fails only when interrupted.
                let _ = epoll.wait(-1, &mut ready);
                // All of them are read: one call of `body` answers them all.
                if kicks.iter().filter(|kick| kick.read().is_ok()).count() > 0 {
                    body();
                }
            }
        });
        Ok(Self { stop, thread: Some(thread.map_err(failed())?) })
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        // Fails only if the counter is full: then the thread is going to see it anyway.
        let _ = self.stop.write(1);
        if self.thread.take().is_some_and(|thread| thread.join().is_err()) {
            tracing::error!("a device's thread panicked");
        }
    }
}
