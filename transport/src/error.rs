//! What can go wrong before a channel exists.

use std::io;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use crate::preamble::Refusal;
use crate::uri::{Fingerprint, Uri};

/// Why a dialler or a listener could not be made.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TransportError {
    /// Guest memory would cross a network in clear text.
    #[error(
        "{uri} means clear text to or from {address}, which is not this host's loopback: anybody on the way could \
         read and change the guest's memory. Use quic://, which encrypts, or allow it with --insecure"
    )]
    ClearText {
        /// What was asked for.
        uri: Arc<Uri>,
        /// The first resolved address that is not loopback.
        address: SocketAddr,
    },
    /// A QUIC listener is known by its certificate's fingerprint, and the URI has none.
    #[error(
        "{uri} has no certificate fingerprint, so the listener could not be told from an impostor. Use the whole \
         URI that the receiver printed: quic://host:port?fp=sha256:HEX"
    )]
    NoFingerprint {
        /// What was asked for.
        uri: Arc<Uri>,
    },
    /// Port 0 is for listening.
    #[error("{uri} has port 0: use the URI that the receiver printed, it has the port that was chosen")]
    NoPort {
        /// What was asked for.
        uri: Arc<Uri>,
    },
    /// Only TCP can send without copying.
    #[error(
        "{uri} cannot send pages without copying them: that is for tcp:// alone. Leave --zero-copy (the capability zero-copy-send) out"
    )]
    NoZeroCopy {
        /// What was asked for.
        uri: Arc<Uri>,
    },
    /// The host name did not resolve.
    #[error("cannot find the address of {host:?}: {source}")]
    Resolve {
        /// The name.
        host: String,
        /// Why.
        source: io::Error,
    },
    /// The address could not be listened on.
    #[error("cannot listen on {uri}: {source}")]
    Listen {
        /// What was asked for.
        uri: Arc<Uri>,
        /// Why.
        source: io::Error,
    },
    /// Another process listens on the unix socket.
    #[error("cannot listen on unix:{}: another process listens there", path.display())]
    SocketInUse {
        /// The socket's path.
        path: PathBuf,
    },
    /// The unix socket's path leads to something else.
    #[error("cannot listen on unix:{}: the path exists and is not a socket; it is left alone", path.display())]
    NotASocket {
        /// The path.
        path: PathBuf,
    },
    /// TLS could not be set up.
    #[error("cannot set up TLS for {uri}: {source}")]
    Tls {
        /// What was asked for.
        uri: Arc<Uri>,
        /// Why.
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// The listener has been closed.
    #[error("the listener on {uri} is closed")]
    Closed {
        /// Where it listened.
        uri: Arc<Uri>,
    },
}

/// Why a channel could not be opened. Diallers return it inside an [`io::Error`].
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DialError {
    /// No connection.
    #[error("cannot connect to {uri}: {source}")]
    Connect {
        /// The listener.
        uri: Arc<Uri>,
        /// Why.
        source: io::Error,
    },
    /// Nobody, or not the right one, answered in time.
    #[error("cannot connect to {uri}: no answer within {} ms", limit.as_millis())]
    TimedOut {
        /// The listener.
        uri: Arc<Uri>,
        /// The limit that the caller set.
        limit: Duration,
    },
    /// The QUIC handshake failed.
    #[error("cannot connect to {uri}: {reason}")]
    Handshake {
        /// The listener.
        uri: Arc<Uri>,
        /// What QUIC said.
        reason: String,
    },
    /// The listener's certificate is not the one that the URI names.
    #[error(
        "{uri} shows another certificate ({presented}) than its URI names: either the receiver was restarted and \
         printed a new URI, or somebody else answers at this address. Nothing was sent"
    )]
    WrongFingerprint {
        /// The listener, with the fingerprint that was expected.
        uri: Arc<Uri>,
        /// The fingerprint that it showed.
        presented: Fingerprint,
    },
    /// What answers there is not a Godwit listener.
    #[error("{uri} is not a Godwit receiver: {what}")]
    NotGodwit {
        /// The listener.
        uri: Arc<Uri>,
        /// What it did instead of answering.
        what: String,
    },
    /// The listener turned the channel away and said why.
    #[error("{uri} turned the connection away: {reason}")]
    Refused {
        /// The listener.
        uri: Arc<Uri>,
        /// Why.
        reason: Refusal,
    },
}

impl From<DialError> for io::Error {
    fn from(error: DialError) -> Self {
        let kind = match &error {
            DialError::Connect { source, .. } => source.kind(),
            DialError::TimedOut { .. } => io::ErrorKind::TimedOut,
            DialError::Handshake { .. } => io::ErrorKind::ConnectionAborted,
            DialError::WrongFingerprint { .. } => io::ErrorKind::PermissionDenied,
            DialError::NotGodwit { .. } => io::ErrorKind::InvalidData,
            DialError::Refused { reason: Refusal::Busy, .. } => io::ErrorKind::ResourceBusy,
            DialError::Refused { .. } => io::ErrorKind::ConnectionRefused,
        };
        io::Error::new(kind, error)
    }
}
