//! A quinn runtime that decides which thread drives a connection.

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Instant;

use quinn::{AsyncTimer, AsyncUdpSocket, Runtime, TokioRuntime};

/// With fewer cores than this, threads of their own for accepted connections bring nothing: on two cores, one
/// connection moved as many bytes per second either way, for a quarter more processor time.
const SPREAD_FROM_CORES: usize = 4;

/// Drives an endpoint on the tokio runtime that made it, and its connections there or on threads of their own.
#[derive(Debug)]
pub(super) struct Drivers {
    spread: bool,
    endpoint_is_spawned: AtomicBool,
}

impl Drivers {
    /// As suits this host.
    pub(super) fn for_this_host() -> Self {
        Self::new(thread::available_parallelism().is_ok_and(|cores| cores.get() >= SPREAD_FROM_CORES))
    }

    /// `spread`: every connection gets a thread of its own.
    pub(super) fn new(spread: bool) -> Self {
        Self { spread, endpoint_is_spawned: AtomicBool::new(false) }
    }
}

impl Runtime for Drivers {
    fn new_timer(&self, at: Instant) -> Pin<Box<dyn AsyncTimer>> {
        TokioRuntime.new_timer(at)
    }

    /// The first future that quinn spawns is the endpoint's driver, which owns the socket. Every other one drives a
    /// connection: it sends on the shared socket by itself and is handed what was received for it, so its thread
    /// needs a runtime that only keeps time.
    fn spawn(&self, future: Pin<Box<dyn Future<Output = ()> + Send>>) {
        if !self.spread || !self.endpoint_is_spawned.swap(true, Ordering::Relaxed) {
            return TokioRuntime.spawn(future);
        }
        let drive = move || match tokio::runtime::Builder::new_current_thread().enable_time().build() {
            Ok(runtime) => runtime.block_on(future),
            Err(error) => tracing::error!("cannot make a runtime for a QUIC connection: {error}"),
        };
        // Without a driver the connection makes no progress, and its handshake's time limit ends it.
        if let Err(error) = thread::Builder::new().name("godwit-quic".into()).spawn(drive) {
            tracing::error!("cannot start a thread for a QUIC connection: {error}");
        }
    }

    fn wrap_udp_socket(&self, socket: std::net::UdpSocket) -> io::Result<Arc<dyn AsyncUdpSocket>> {
        TokioRuntime.wrap_udp_socket(socket)
    }

    fn now(&self) -> Instant {
        TokioRuntime.now()
    }
}
