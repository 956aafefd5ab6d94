//! The threads of a block device in use: one for each queue that takes requests out, and a pool that carries them out.
//!
//! ```text
//! kick ──► queue thread ──jobs──► workers ──► file
//!             │ gate                 │
//!             └─ closed: takes none  └─► used ring, interrupt
//! ```
//!
//! Requests are in flight from before they are taken out of a queue until they have been put back: so when the gate is closed and
//! nothing is in flight, nobody touches queues, guest memory or the file.

use std::collections::VecDeque;
use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use godwit_core::GuestMemory;
use virtio_queue::{Queue, QueueOwnedT, QueueState, QueueT};
use vm_memory::Bytes;
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::EventFd;

use super::image::Image;
use super::log::RateLimit;
use super::request::{Geometry, Parsed, Request, Status};
use crate::devices::virtio::{Activation, ActiveQueue, Interrupt};
use crate::error::VmmError;
use crate::sync::lock;

/// Requests of one disk that are carried out at the same time.
const WORKERS: usize = 16;

/// How many bytes a disk's name can have.
const NAME_BYTES: usize = virtio_bindings::virtio_blk::VIRTIO_BLK_ID_BYTES as usize;

/// A block device whose driver is ready.
pub(super) struct Pool {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
}

struct Shared {
    name: String,
    image: Arc<Image>,
    geometry: Geometry,
    /// The driver has not accepted FLUSH: every write must last when it is answered.
    write_through: bool,
    memory: GuestMemory,
    interrupt: Arc<Interrupt>,
    queues: Vec<Option<InUse>>,
    flow: Mutex<Flow>,
    /// A job has come, or the end.
    work: Condvar,
    /// Nothing is in flight.
    idle: Condvar,
    complaints: RateLimit,
}

struct InUse {
    queue: Mutex<Queue>,
    kick: EventFd,
    /// The driver has put something into it that cannot be understood: nothing more is taken out.
    broken: AtomicBool,
}

/// What is on its way.
#[derive(Default)]
struct Flow {
    open: bool,
    ended: bool,
    in_flight: usize,
    jobs: VecDeque<Job>,
}

struct Job {
    queue: usize,
    request: Parsed,
}

/// Why nothing more can be taken out of a queue.
#[derive(Debug, thiserror::Error)]
enum TakeError {
    #[error("{0}")]
    Ring(#[from] virtio_queue::Error),
    #[error("a request without a place for its answer")]
    NoAnswer,
    #[error("what it says is available cannot be read")]
    Unreadable,
}

impl Pool {
    /// Starts the threads; the gate is closed.
    pub(super) fn start(
        name: &str,
        image: Arc<Image>,
        geometry: Geometry,
        write_through: bool,
        activation: Activation,
    ) -> Result<Self, VmmError> {
        let Activation { memory, queues, interrupt, .. } = activation;
        let in_use = |active: ActiveQueue| InUse {
            queue: Mutex::new(active.queue),
            kick: active.kick,
            broken: AtomicBool::new(false),
        };
        let shared = Arc::new(Shared {
            name: name.to_owned(),
            image,
            geometry,
            write_through,
            memory,
            interrupt,
            queues: queues.into_iter().map(|active| active.map(in_use)).collect(),
            flow: Mutex::default(),
            work: Condvar::new(),
            idle: Condvar::new(),
            complaints: RateLimit::default(),
        });
        let mut pool = Self { shared: Arc::clone(&shared), threads: Vec::new() };
        for index in 0..shared.queues.len() {
            if shared.queues[index].is_some() {
                let kicks = shared.watch(index)?;
                let shared = Arc::clone(&shared);
                pool.spawn(format!("{name}-q{index}"), move || shared.take_out(index, &kicks))?;
            }
        }
        for index in 0..WORKERS {
            let shared = Arc::clone(&shared);
            pool.spawn(format!("{name}-io{index}"), move || shared.work())?;
        }
        Ok(pool)
    }

    fn spawn(&mut self, name: String, body: impl FnOnce() + Send + 'static) -> Result<(), VmmError> {
        let thread = thread::Builder::new().name(name).spawn(body);
        self.threads.push(thread.map_err(VmmError::os(format!("cannot start a thread of disk {}", self.shared.name)))?);
        Ok(())
    }

    /// Opens the gate: every queue is looked at as if it had been kicked.
    pub(super) fn open(&self) {
        lock(&self.shared.flow).open = true;
        self.shared.kick_all();
    }

    /// Closes the gate and waits until nothing is in flight. If that is not so by `until`, the gate stays closed and the answer is how
    /// many requests are still under way.
    pub(super) fn close(&self, until: Instant) -> Result<(), usize> {
        let mut flow = lock(&self.shared.flow);
        flow.open = false;
        loop {
            if flow.in_flight == 0 {
                return Ok(());
            }
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(flow.in_flight);
            }
            (flow, _) = self.shared.idle.wait_timeout(flow, left).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// The queues as they stand. The gate is closed and nothing in flight.
    pub(super) fn queues(&self) -> Vec<QueueState> {
        let state = |queue: &Option<InUse>| match queue {
            Some(queue) => lock(&queue.queue).state(),
            None => QueueState { max_size: super::QUEUE_SIZE, size: super::QUEUE_SIZE, ..QueueState::default() },
        };
        self.shared.queues.iter().map(state).collect()
    }

    /// Ends the threads. Those that are not idle within `limit` end when their storage answers; true if there are none.
    pub(super) fn end(mut self, limit: Duration) -> bool {
        let drained = self.close(Instant::now() + limit).is_ok();
        self.shared.finish();
        if drained {
            for thread in self.threads.drain(..) {
                if thread.join().is_err() {
                    tracing::error!("a thread of disk {} panicked", self.shared.name);
                }
            }
        }
        drained
    }
}

impl Drop for Pool {
    /// Without waiting: what is in flight holds on to all that it needs.
    fn drop(&mut self) {
        self.shared.finish();
    }
}

impl Shared {
    fn finish(&self) {
        {
            let mut flow = lock(&self.flow);
            flow.open = false;
            flow.ended = true;
        }
        self.work.notify_all();
        self.kick_all();
    }

    fn kick_all(&self) {
        for queue in self.queues.iter().flatten() {
            // Fails only if the counter is full: then the thread is going to see a kick anyway.
            let _ = queue.kick.write(1);
        }
    }

    /// What a queue's thread waits on.
    fn watch(&self, index: usize) -> Result<Epoll, VmmError> {
        let failed = |what| VmmError::os(format!("cannot {what} the kicks of disk {}", self.name));
        let epoll = Epoll::new().map_err(failed("wait for"))?;
        if let Some(queue) = &self.queues[index] {
            let event = EpollEvent::new(EventSet::IN, 0);
            epoll.ctl(ControlOperation::Add, queue.kick.as_raw_fd(), event).map_err(failed("watch"))?;
        }
        Ok(epoll)
    }

    /// A queue's thread.
    fn take_out(&self, index: usize, kicks: &Epoll) {
        let Some(in_use) = &self.queues[index] else { return };
        loop {
            if lock(&self.flow).ended {
                return;
            }
            if let Err(why) = self.take_all(index, in_use) {
                self.give_up(in_use, &why);
            }
            let mut events = [EpollEvent::default()];
            match kicks.wait(-1, &mut events) {
                // What the guest puts in from here on comes with a kick of its own.
                Ok(_) => drop(in_use.kick.read()),
                Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
                Err(error) => return self.give_up(in_use, &format!("kicks cannot be waited for: {error}")),
            }
        }
    }

    /// Takes requests out until the queue is empty or the gate closed. Counts as in flight itself, since it writes to the ring.
    fn take_all(&self, index: usize, in_use: &InUse) -> Result<(), String> {
        if in_use.broken.load(Ordering::Acquire) || !self.begin() {
            return Ok(());
        }
        let result = self.take_while_open(index, &in_use.queue).map_err(|error| error.to_string());
        self.done();
        result
    }

    fn take_while_open(&self, index: usize, queue: &Mutex<Queue>) -> Result<(), TakeError> {
        let mut promised = false;
        loop {
            lock(queue).disable_notification(&self.memory)?;
            let mut taken = false;
            while let Some(request) = self.next(&mut lock(queue))? {
                taken = true;
                if !self.push(Job { queue: index, request }) {
                    return Ok(());
                }
            }
            if promised && !taken {
                return Err(TakeError::Unreadable);
            }
            promised = lock(queue).enable_notification(&self.memory)?;
            if !promised {
                return Ok(());
            }
        }
    }

    fn next(&self, queue: &mut Queue) -> Result<Option<Parsed>, TakeError> {
        let chain = queue.iter(&self.memory)?.next();
        chain.map(|chain| Parsed::read(chain, self.geometry).ok_or(TakeError::NoAnswer)).transpose()
    }

    /// Counts one more in flight, unless the gate is closed.
    fn begin(&self) -> bool {
        let mut flow = lock(&self.flow);
        flow.in_flight += usize::from(flow.open);
        flow.open
    }

    /// Hands a request to the workers; whether the gate is still open.
    fn push(&self, job: Job) -> bool {
        let mut flow = lock(&self.flow);
        flow.in_flight += 1;
        flow.jobs.push_back(job);
        self.work.notify_one();
        flow.open
    }

    fn done(&self) {
        let mut flow = lock(&self.flow);
        flow.in_flight -= 1;
        if flow.in_flight == 0 {
            self.idle.notify_all();
        }
    }

    /// A worker.
    fn work(&self) {
        loop {
            let job = {
                let mut flow = lock(&self.flow);
                loop {
                    match flow.jobs.pop_front() {
                        Some(job) => break job,
                        None if flow.ended => return,
                        None => flow = self.work.wait(flow).unwrap_or_else(PoisonError::into_inner),
                    }
                }
            };
            let (status, data_bytes) = self.carry_out(&job.request.request);
            if let Some(in_use) = &self.queues[job.queue]
                && let Err(error) = self.answer(in_use, &job.request, status, data_bytes)
            {
                self.give_up(in_use, &error.to_string());
            }
            self.done();
        }
    }

    /// Does what a request asks for; how it ended, and how many bytes were written into the driver's buffers.
    fn carry_out(&self, request: &Request) -> (Status, u64) {
        let write_through = || if self.write_through { self.image.flush() } else { Ok(()) };
        let (what, result) = match request {
            Request::Answer(status, why) => {
                self.complain(|| format!("the guest has sent {why}"));
                return (*status, 0);
            }
            Request::Identify(buffers) => {
                let mut name = [0; NAME_BYTES];
                let length = self.name.len().min(NAME_BYTES);
                name[..length].copy_from_slice(&self.name.as_bytes()[..length]);
                return (Status::Ok, buffers.fill(&self.memory, &name));
            }
            Request::Read { offset, buffers } => {
                let result = self.image.read(&buffers.slices(&self.memory), *offset);
                ("read", result.map(|()| buffers.total()))
            }
            Request::Write { offset, buffers } => {
                let written = self.image.write(&buffers.slices(&self.memory), *offset).and_then(|()| write_through());
                ("write", written.map(|()| 0))
            }
            Request::Flush => ("flush", self.image.flush().map(|()| 0)),
            Request::Discard(ranges) => {
                let mut ranges = ranges.iter();
                let result = ranges.try_for_each(|range| self.image.discard(range.offset, range.length));
                ("discard", result.and_then(|()| write_through()).map(|()| 0))
            }
            Request::WriteZeroes(ranges) => {
                let mut ranges = ranges.iter();
                let result =
                    ranges.try_for_each(|range| self.image.write_zeroes(range.offset, range.length, range.unmap));
                ("write zeroes", result.and_then(|()| write_through()).map(|()| 0))
            }
        };
        match result {
            Ok(data_bytes) => (Status::Ok, data_bytes),
            Err(error) => {
                self.complain(|| format!("cannot {what}: {error}; the guest gets an I/O error"));
                (Status::IoError, 0)
            }
        }
    }

    fn answer(&self, in_use: &InUse, request: &Parsed, status: Status, data_bytes: u64) -> Result<(), TakeError> {
        self.memory.write_obj(status as u8, request.status).map_err(virtio_queue::Error::GuestMemory)?;
        let mut queue = lock(&in_use.queue);
        queue.add_used(&self.memory, request.head, request.used_length(data_bytes))?;
        if queue.needs_notification(&self.memory)? {
            self.interrupt.used_buffers();
        }
        Ok(())
    }

    /// Nothing more is taken out of a queue.
    fn give_up(&self, in_use: &InUse, why: &str) {
        if !in_use.broken.swap(true, Ordering::AcqRel) {
            tracing::warn!(
                "disk {}: the guest's driver has lost its way: {why}; it has to reset the device",
                self.name
            );
            self.interrupt.device_broken();
        }
    }

    fn complain(&self, what: impl FnOnce() -> String) {
        if let Some(others) = self.complaints.admit(Instant::now()) {
            let others = if others > 0 { format!(" (and {others} more such lines left out)") } else { String::new() };
            tracing::warn!("disk {}: {}{others}", self.name, what());
        }
    }
}
