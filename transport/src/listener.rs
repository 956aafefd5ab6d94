//! The listening end, whatever the transport.

use std::fmt;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use godwit_core::Channel;
use socket2::{Domain, Socket, Type};

use crate::gate::Gate;
use crate::queue::Empty;
use crate::quic::QuicListener;
use crate::sessions::DataChannels;
use crate::stream::{Family, StreamListener};
use crate::unix_path::SocketFile;
use crate::{HostPort, Options, TransportError, Uri, address};

/// Accepts connections in the background and sorts them by their preamble.
///
/// Strangers (see [`preamble`](crate::preamble)) are turned away and logged; they never reach the caller. All
/// methods may be called from several threads, so while one session is served another thread can take the next
/// control channel and refuse it.
///
/// Dropping it stops accepting. Channels that were accepted live on; those of a QUIC listener share its UDP port,
/// which is free again when the last of them is closed.
pub struct Listener {
    uri: Arc<Uri>,
    gate: Arc<Gate>,
    _backend: Backend,
}

/// What accepts; each ends its accepting when dropped.
enum Backend {
    Tcp { _listener: StreamListener },
    // The file goes first, so that nobody connects to a listener that is about to go.
    Unix { _file: SocketFile, _listener: StreamListener },
    Quic { _listener: QuicListener },
}

impl Listener {
    pub(crate) fn open(uri: &Uri, options: Options) -> Result<Self, TransportError> {
        let gate = Arc::new(Gate::new());
        let failed = |source| TransportError::Listen { uri: Arc::new(uri.clone()), source };
        let (uri, backend) = match uri {
            Uri::Tcp(at) => {
                let address = address::resolve_for_clear_text(uri, at, options)?[0];
                let socket = bind_tcp(address).map_err(failed)?;
                let bound = socket.local_addr().map_err(failed)?.as_socket().unwrap_or(address);
                let listener = StreamListener::start(socket, Family::Tcp, gate.clone()).map_err(failed)?;
                (Uri::Tcp(HostPort::from(address::reachable(bound))), Backend::Tcp { _listener: listener })
            }
            Uri::Unix(path) => {
                let (socket, file) = SocketFile::bind(uri, path)?;
                let family = Family::Unix(uri.to_string());
                let listener = StreamListener::start(socket, family, gate.clone()).map_err(failed)?;
                (uri.clone(), Backend::Unix { _file: file, _listener: listener })
            }
            Uri::Quic { at, .. } => {
                let address = address::resolve(at)?[0];
                let listener = QuicListener::start(uri, address, gate.clone())?;
                let at = HostPort::from(address::reachable(listener.address()));
                let uri = Uri::Quic { at, fingerprint: Some(listener.fingerprint()) };
                (uri, Backend::Quic { _listener: listener })
            }
        };
        Ok(Self { uri: Arc::new(uri), gate, _backend: backend })
    }

    /// Where it listens, as a dialler needs it: with the real port and, for QUIC, the fingerprint of its certificate.
    /// If it listens on every address, with that of the interface that leads to the default route.
    #[must_use]
    pub fn uri(&self) -> &Uri {
        &self.uri
    }

    /// The next control channel, or `None` if none came within `limit`.
    ///
    /// # Errors
    /// If the listener is closed.
    pub fn next_control(&self, limit: Duration) -> Result<Option<Channel>, TransportError> {
        match self.gate.controls.pop(limit) {
            Ok(channel) => Ok(Some(channel)),
            Err(Empty::TimedOut) => Ok(None),
            Err(Empty::Closed) => Err(TransportError::Closed { uri: self.uri.clone() }),
        }
    }

    /// A new session's end for data channels.
    #[must_use]
    pub fn incoming_data(&self) -> DataChannels {
        DataChannels::new(&self.gate)
    }

    /// How many connections were turned away since it listens.
    #[must_use]
    pub fn turned_away(&self) -> u64 {
        self.gate.turned_away()
    }

    /// Stops letting connections in and ends waits in [`next_control`](Self::next_control). The rest (threads, the
    /// unix socket's file) goes when the listener is dropped.
    pub fn close(&self) {
        self.gate.close();
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        self.gate.close();
    }
}

impl fmt::Debug for Listener {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Listener").field("uri", &self.uri).field("turned_away", &self.turned_away()).finish()
    }
}

fn bind_tcp(address: SocketAddr) -> std::io::Result<Socket> {
    let socket = Socket::new(Domain::for_address(address), Type::STREAM, None)?;
    // A receiver that is started again must not wait for its predecessor's connections to leave TIME_WAIT.
    socket.set_reuse_address(true)?;
    socket.bind(&address.into())?;
    Ok(socket)
}
