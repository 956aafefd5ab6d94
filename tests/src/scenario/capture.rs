//! Capturing frames in a network namespace.

use std::io::{ErrorKind, Read};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use anyhow::{Context, Result};
use socket2::{Domain, Protocol, Socket, Type};

use crate::clock::monotonic_ns;
use crate::netns::Namespace;
use crate::scenario::place;

/// ETH_P_ALL, in network byte order as the kernel wants it: frames of every protocol.
const ALL_PROTOCOLS: i32 = (libc::ETH_P_ALL as u16).to_be() as i32;

/// How often the capturing thread looks whether it is to end.
const LOOK_PERIOD: Duration = Duration::from_millis(100);

/// Captures frames on every interface of a namespace until it is dropped. The kernel takes VLAN tags off frames before it shows them.
pub struct Capture<T> {
    shared: Arc<Shared<T>>,
    thread: Option<JoinHandle<()>>,
}

/// What was made of a frame.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Seen<T> {
    /// When it arrived, by the monotonic clock.
    pub at_ns: u64,
    /// What it is.
    pub what: T,
}

struct Shared<T> {
    seen: Mutex<Vec<Seen<T>>>,
    stop: AtomicBool,
}

impl<T: Clone + Send + 'static> Capture<T> {
    /// Begins to capture. What `judge` makes of a frame is kept.
    pub fn start(namespace: &Namespace, judge: impl Fn(&[u8]) -> Option<T> + Send + 'static) -> Result<Self> {
        let open = || {
            Socket::new(Domain::PACKET, Type::RAW, Some(Protocol::from(ALL_PROTOCOLS)))
                .context("cannot open a packet socket")
        };
        let socket = place::inside(namespace, open)?;
        socket.set_read_timeout(Some(LOOK_PERIOD))?;
        let shared = Arc::new(Shared { seen: Mutex::default(), stop: AtomicBool::new(false) });
        let capturing = shared.clone();
        Ok(Self { shared, thread: Some(thread::spawn(move || capturing.capture(&socket, judge))) })
    }

    /// What was captured so far.
    pub fn seen(&self) -> Vec<Seen<T>> {
        self.shared.seen().clone()
    }
}

impl<T> Drop for Capture<T> {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

impl<T> Shared<T> {
    fn seen(&self) -> MutexGuard<'_, Vec<Seen<T>>> {
        self.seen.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn capture(&self, mut socket: &Socket, judge: impl Fn(&[u8]) -> Option<T>) {
        let mut buffer = [0; 2048];
        while !self.stop.load(Ordering::Relaxed) {
            match socket.read(&mut buffer) {
                Ok(length) => {
                    let at_ns = monotonic_ns();
                    self.seen().extend(judge(&buffer[..length]).map(|what| Seen { at_ns, what }));
                }
                Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) => {}
                // An interface that goes down is reported once.
                Err(_) => thread::sleep(Duration::from_millis(1)),
            }
        }
    }
}
