//! What is still to be written to each client, and the hub that gives every client every event.
//!
//! Nobody who has something to say ever waits for a client that does not read: each has a bounded queue and a
//! thread that empties it, and who lets it run full is hung up on.

use std::io::Write;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, TrySendError, sync_channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use serde_json::Value;

use super::message;

/// Lines that may wait for one client.
pub const QUEUE_LINES: usize = 4096;

const DRAIN_POLL: Duration = Duration::from_millis(1);

/// The queue of one client. Clones are the same queue.
#[derive(Clone)]
pub struct Outbox {
    lines: SyncSender<Arc<str>>,
    /// Lines not yet written: queued ones, and answers still being made.
    pending: Arc<AtomicUsize>,
    hang_up: Arc<dyn Fn() + Send + Sync>,
}

impl Outbox {
    /// A queue of `capacity` lines for `writer`. `hang_up` is called when the client is given up: because
    /// writing to it failed, or because it did not read.
    pub fn new(
        writer: impl Write + Send + 'static,
        capacity: usize,
        hang_up: impl Fn() + Send + Sync + 'static,
    ) -> std::io::Result<Self> {
        let (lines, queue) = sync_channel(capacity);
        let outbox = Outbox { lines, pending: Arc::default(), hang_up: Arc::new(hang_up) };
        let (pending, hang_up) = (Arc::clone(&outbox.pending), Arc::clone(&outbox.hang_up));
        thread::Builder::new().name("qmp-writer".into()).spawn(move || {
            if write_all(writer, &queue, &pending).is_err() {
                hang_up();
            }
            // Whoever still waits for these lines waits in vain.
            drop(queue);
            pending.store(0, Ordering::Release);
        })?;
        Ok(outbox)
    }

    /// Queues the answer that `make` gives; waits while the queue is full: only the client who asked for it is held up.
    ///
    /// It is pending while it is still being made: a command that ends the process is answered before the process ends.
    pub fn answer(&self, make: impl FnOnce() -> Value) {
        self.pending.fetch_add(1, Ordering::AcqRel);
        if self.lines.send(line(&make())).is_err() {
            self.pending.store(0, Ordering::Release);
        }
    }

    /// Queues an event without waiting; false if the client is to be forgotten.
    fn event(&self, line: &Arc<str>) -> bool {
        self.pending.fetch_add(1, Ordering::AcqRel);
        match self.lines.try_send(Arc::clone(line)) {
            Ok(()) => true,
            Err(reason) => {
                if matches!(reason, TrySendError::Full(_)) {
                    tracing::warn!("a control client does not read its events: hung up on it");
                }
                self.pending.store(0, Ordering::Release);
                (self.hang_up)();
                false
            }
        }
    }
}

/// Gives events to everybody who listens. Clones are the same hub.
#[derive(Clone, Default)]
pub struct Hub {
    listeners: Arc<Mutex<Vec<Outbox>>>,
}

impl Hub {
    /// A hub to which nobody listens yet.
    pub fn new() -> Self {
        Self::default()
    }

    /// From here on `outbox` gets every event.
    pub fn attach(&self, outbox: Outbox) {
        self.listeners().push(outbox);
    }

    /// Whoever gave `outbox` has gone.
    pub fn detach(&self, outbox: &Outbox) {
        self.listeners().retain(|listener| !Arc::ptr_eq(&listener.pending, &outbox.pending));
    }

    /// Tells everybody that something has happened. Never waits for a client.
    pub fn publish(&self, name: &str, data: Value) {
        let mut listeners = self.listeners();
        if listeners.is_empty() {
            return;
        }
        let line = line(&message::event(name, data));
        listeners.retain(|listener| listener.event(&line));
    }

    /// Waits until every listener has been given what is queued for it and what it has asked for, for at most `limit`.
    pub fn drain(&self, limit: Duration) {
        let deadline = Instant::now() + limit;
        while Instant::now() < deadline {
            if self.listeners().iter().all(|listener| listener.pending.load(Ordering::Acquire) == 0) {
                return;
            }
            thread::sleep(DRAIN_POLL);
        }
    }

    fn listeners(&self) -> MutexGuard<'_, Vec<Outbox>> {
        self.listeners.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn line(message: &Value) -> Arc<str> {
    format!("{message}\n").into()
}

fn write_all(mut writer: impl Write, queue: &Receiver<Arc<str>>, pending: &AtomicUsize) -> std::io::Result<()> {
    for line in queue {
        writer.write_all(line.as_bytes())?;
        writer.flush()?;
        pending.fetch_sub(1, Ordering::AcqRel);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::io;
    use std::sync::atomic::AtomicBool;
    use std::sync::mpsc::{Sender, channel};

    use serde_json::json;

    use super::*;

    struct Told(Sender<String>);

    impl Write for Told {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.send(String::from_utf8_lossy(bytes).into_owned()).map_err(io::Error::other)?;
            Ok(bytes.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    /// Accepts nothing until the gate is dropped.
    struct Blocked(Receiver<()>);

    impl Write for Blocked {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            let _ = self.0.recv();
            Ok(bytes.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn every_listener_gets_every_event_and_drain_waits_for_it() {
        let hub = Hub::new();
        let (sender, heard) = channel();
        for _ in 0..2 {
            hub.attach(Outbox::new(Told(sender.clone()), 8, || ()).unwrap());
        }
        hub.publish("STOP", Value::Null);
        hub.drain(Duration::from_secs(5));
        let lines: Vec<String> = heard.try_iter().collect();
        assert_eq!(lines.len(), 2);
        assert!(lines.iter().all(|line| line.contains("STOP") && line.ends_with('\n')));
    }

    #[test]
    fn drain_waits_for_an_answer_that_is_still_being_made() {
        let hub = Hub::new();
        let (sender, heard) = channel();
        let outbox = Outbox::new(Told(sender), 8, || ()).unwrap();
        hub.attach(outbox.clone());
        let (begin, begun) = channel();
        let client = thread::spawn(move || {
            outbox.answer(|| {
                begin.send(()).unwrap();
                thread::sleep(Duration::from_millis(50));
                json!({ "return": {} })
            });
        });
        begun.recv().unwrap();
        hub.drain(Duration::from_secs(5));
        assert_eq!(heard.try_iter().count(), 1);
        client.join().unwrap();
    }

    #[test]
    fn who_does_not_read_is_hung_up_on_and_holds_up_nobody() {
        let hub = Hub::new();
        let (gate, closed) = channel();
        let hung_up = Arc::new(AtomicBool::new(false));
        let flag = Arc::clone(&hung_up);
        hub.attach(Outbox::new(Blocked(closed), 8, move || flag.store(true, Ordering::Release)).unwrap());
        let (sender, heard) = channel();
        hub.attach(Outbox::new(Told(sender), 64, || ()).unwrap());
        for number in 0..20 {
            hub.publish("GODWIT_PROGRESS", json!({ "number": number }));
        }
        assert!(hung_up.load(Ordering::Acquire));
        hub.drain(Duration::from_secs(5));
        assert_eq!(heard.try_iter().count(), 20);
        drop(gate);
    }
}
