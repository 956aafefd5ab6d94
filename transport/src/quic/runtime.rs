//! A quinn runtime that gives every connection of an endpoint a thread of its own.

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Instant;

use quinn::{AsyncTimer, AsyncUdpSocket, Runtime, TokioRuntime};

/// The first future that quinn spawns is the endpoint's driver: it stays on the runtime that made the endpoint and
/// owns the socket. Every other one drives a connection and gets a thread with a runtime that only keeps time; it
/// sends on the shared socket by itself and is handed what was received for it.
#[derive(Debug, Default)]
pub(super) struct ThreadPerConnection {
    endpoint_is_spawned: AtomicBool,
}

impl Runtime for ThreadPerConnection {
    fn new_timer(&self, at: Instant) -> Pin<Box<dyn AsyncTimer>> {
        TokioRuntime.new_timer(at)
    }

    fn spawn(&self, future: Pin<Box<dyn Future<Output = ()> + Send>>) {
        if !self.endpoint_is_spawned.swap(true, Ordering::Relaxed) {
            return TokioRuntime.spawn(future);
        }
        let driver = move || match tokio::runtime::Builder::new_current_thread().enable_time().build() {
            Ok(runtime) => runtime.block_on(future),
            Err(error) => tracing::error!("cannot make a runtime for a QUIC connection: {error}"),
        };
        // Without a driver the connection makes no progress, and its handshake's time limit ends it.
        if let Err(error) = thread::Builder::new().name("godwit-quic".into()).spawn(driver) {
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
