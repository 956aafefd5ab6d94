//! The thread that moves frames, and the gate that stops it.

use std::os::fd::{AsFd, AsRawFd, RawFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::{self, JoinHandle};

use godwit_core::GuestMemory;
use virtio_queue::QueueState;
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::EventFd;

use super::Shared;
use super::chain::QueueError;
use super::control::Control;
use super::receive::{Halt, Receiver};
use super::transmit::Transmitter;
use crate::devices::serial::eventfd;
use crate::devices::virtio::Interrupt;
use crate::error::VmmError;
use crate::sync::lock;

/// What is known of an event's origin.
const WAKE: u64 = 0;
const TAP: u64 = 1;
const RECEIVE: u64 = 2;
const TRANSMIT: u64 = 3;
const CONTROL: u64 = 4;

/// Moves frames between the tap and the queues of an active device while its gate is open. Ends, and is waited for, when this is
/// dropped.
pub(super) struct Pump {
    common: Arc<Common>,
    thread: Option<JoinHandle<()>>,
}

/// What the thread shares with those who steer it.
struct Common {
    open: AtomicBool,
    ended: AtomicBool,
    wake: EventFd,
    engine: Mutex<Engine>,
}

/// The queues of a device, and what they are connected to.
pub(super) struct Engine {
    pub(super) shared: Arc<Shared>,
    pub(super) memory: GuestMemory,
    pub(super) interrupt: Arc<Interrupt>,
    pub(super) receiver: Option<Receiver>,
    pub(super) transmitter: Option<Transmitter>,
    pub(super) control: Option<Control>,
    /// The driver has done something that no driver may do: nothing more until it resets the device.
    pub(super) broken: bool,
}

impl Pump {
    /// Starts the thread, with the gate closed.
    pub(super) fn start(engine: Engine) -> Result<Self, VmmError> {
        let id = engine.shared.id.clone();
        let failed = || VmmError::os(format!("cannot start the thread of network interface {id}"));
        let wake = eventfd()?;
        let wait = Wait::new(&wake, &engine).map_err(failed())?;
        let common = Arc::new(Common {
            open: AtomicBool::new(false),
            ended: AtomicBool::new(false),
            wake,
            engine: Mutex::new(engine),
        });
        let shared = Arc::clone(&common);
        let thread =
            thread::Builder::new().name(format!("net-{id}")).spawn(move || shared.run(wait)).map_err(failed())?;
        Ok(Self { common, thread: Some(thread) })
    }

    /// Every queue is processed, and what arrives is received.
    pub(super) fn open(&self) {
        self.common.open.store(true, Ordering::SeqCst);
        self.common.wake();
    }

    /// Afterwards, nothing is taken from the tap or from a queue.
    pub(super) fn close(&self) {
        // Before the lock: the thread does not take it again once it knows.
        self.common.open.store(false, Ordering::SeqCst);
        self.common.wake();
        drop(lock(&self.common.engine));
    }

    /// Whether frames are moved.
    pub(super) fn is_open(&self) -> bool {
        self.common.open.load(Ordering::SeqCst)
    }

    /// The queues as they stand, by number.
    pub(super) fn queues(&self) -> Vec<QueueState> {
        let engine = lock(&self.common.engine);
        let states = [
            engine.receiver.as_ref().map(Receiver::state),
            engine.transmitter.as_ref().map(Transmitter::state),
            engine.control.as_ref().map(Control::state),
        ];
        states.into_iter().map(Option::unwrap_or_default).collect()
    }
}

impl Drop for Pump {
    fn drop(&mut self) {
        self.common.ended.store(true, Ordering::SeqCst);
        self.common.wake();
        if self.thread.take().is_some_and(|thread| thread.join().is_err()) {
            tracing::error!("the thread of a network interface panicked");
        }
    }
}

impl Common {
    fn wake(&self) {
        // Fails only if the counter is full: then the thread is going to see it anyway.
        let _ = self.wake.write(1);
    }

    fn run(&self, mut wait: Wait) {
        let mut next = Next { again: false, read_tap: false, broken: false };
        loop {
            let open = self.open.load(Ordering::SeqCst) && !next.broken;
            let ready = if open { wait.open(next.read_tap, next.again) } else { wait.closed() };
            if ready.wake {
                // Fails only if there is nothing to read.
                let _ = self.wake.read();
            }
            if self.ended.load(Ordering::SeqCst) {
                return;
            }
            // The last look at the gate is under the lock: whoever closes it waits for the lock.
            if self.open.load(Ordering::SeqCst) {
                let mut engine = lock(&self.engine);
                if self.open.load(Ordering::SeqCst) {
                    next = engine.turn(&ready, &next);
                }
            }
        }
    }
}

/// What has happened.
#[derive(Debug, Default)]
struct Ready {
    wake: bool,
    tap: bool,
    receive: bool,
    transmit: bool,
    control: bool,
}

/// What is to happen next.
#[derive(Debug)]
struct Next {
    /// There is more to do at once.
    again: bool,
    /// There is room for what arrives.
    read_tap: bool,
    broken: bool,
}

impl Engine {
    fn turn(&mut self, ready: &Ready, last: &Next) -> Next {
        if self.broken {
            return Next { again: false, read_tap: false, broken: true };
        }
        self.try_turn(ready, last).unwrap_or_else(|error| {
            tracing::warn!("network interface {}: the guest's driver has broken it: {error}", self.shared.id);
            self.broken = true;
            self.interrupt.device_broken();
            Next { again: false, read_tap: false, broken: true }
        })
    }

    fn try_turn(&mut self, ready: &Ready, last: &Next) -> Result<Next, QueueError> {
        let all = ready.wake || last.again;
        let mut next = Next { again: false, read_tap: last.read_tap, broken: false };
        if let Some(receiver) = self.receiver.as_mut().filter(|_| all || ready.tap || ready.receive) {
            if ready.receive {
                let _ = receiver.kick().read();
            }
            let mut book = lock(&self.shared.book);
            let halt = receiver.run(&self.memory, &self.shared.tap, &mut book, &self.interrupt)?;
            next.again |= matches!(halt, Halt::Turn);
            next.read_tap = matches!(halt, Halt::Empty | Halt::Turn);
            if let Halt::Tap(error) = halt {
                let (id, tap) = (&self.shared.id, self.shared.tap.name());
                tracing::warn!("network interface {id}: nothing can be received from tap {tap}: {error}");
            }
        }
        if let Some(transmitter) = self.transmitter.as_mut().filter(|_| all || ready.transmit) {
            if ready.transmit {
                let _ = transmitter.kick().read();
            }
            let mut book = lock(&self.shared.book);
            next.again |= transmitter.run(&self.memory, &self.shared.tap, &mut book, &self.interrupt)?;
        }
        if let Some(control) = self.control.as_mut().filter(|_| all || ready.control) {
            if ready.control {
                let _ = control.kick().read();
            }
            next.again |= control.run(&self.memory, &self.interrupt, |command| self.shared.obey(command))?;
        }
        Ok(next)
    }
}

/// What the thread waits for.
struct Wait {
    /// While the gate is closed.
    wake: Epoll,
    /// While it is open.
    all: Epoll,
    tap: RawFd,
    tap_added: bool,
}

impl Wait {
    fn new(wake: &EventFd, engine: &Engine) -> std::io::Result<Self> {
        let wait = Self {
            wake: Epoll::new()?,
            all: Epoll::new()?,
            tap: engine.shared.tap.as_fd().as_raw_fd(),
            tap_added: false,
        };
        let add = |epoll: &Epoll, event: &EventFd, token| {
            epoll.ctl(ControlOperation::Add, event.as_raw_fd(), EpollEvent::new(EventSet::IN, token))
        };
        add(&wait.wake, wake, WAKE)?;
        add(&wait.all, wake, WAKE)?;
        let kicks = [
            (RECEIVE, engine.receiver.as_ref().map(Receiver::kick)),
            (TRANSMIT, engine.transmitter.as_ref().map(Transmitter::kick)),
            (CONTROL, engine.control.as_ref().map(Control::kick)),
        ];
        for (token, kick) in kicks {
            kick.map(|kick| add(&wait.all, kick, token)).transpose()?;
        }
        Ok(wait)
    }

    fn closed(&self) -> Ready {
        wait(&self.wake, -1)
    }

    fn open(&mut self, read_tap: bool, again: bool) -> Ready {
        if read_tap != self.tap_added {
            let operation = if read_tap { ControlOperation::Add } else { ControlOperation::Delete };
            if let Err(error) = self.all.ctl(operation, self.tap, EpollEvent::new(EventSet::IN, TAP)) {
                tracing::error!("cannot wait for a tap: {error}");
            }
            self.tap_added = read_tap;
        }
        wait(&self.all, if again { 0 } else { -1 })
    }
}

fn wait(epoll: &Epoll, timeout_ms: i32) -> Ready {
    let mut events = [EpollEvent::default(); 5];
    // Fails only when interrupted.
    let count = epoll.wait(timeout_ms, &mut events).unwrap_or(0);
    let mut ready = Ready::default();
    for event in &events[..count] {
        match event.data() {
            WAKE => ready.wake = true,
            TAP => ready.tap = true,
            RECEIVE => ready.receive = true,
            TRANSMIT => ready.transmit = true,
            CONTROL => ready.control = true,
            _ => {}
        }
    }
    ready
}
