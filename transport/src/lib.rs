//! Godwit's transports: one interface over TCP, QUIC and unix sockets.
//!
//! The engine (godwit-core) asks for byte streams: one control channel and any number of data channels.
//! This crate makes them and knows nothing of what they carry.
//!
//! | module | what |
//! |---|---|
//! | [`uri`] | where a peer is: `tcp://host:port`, `quic://host:port?fp=sha256:HEX`, `unix:/path` |
//! | [`connect`] | the dialling end: a [`godwit_core::Dial`] |
//! | [`listen`], [`Listener`] | the listening end: control channels, and data channels by session token |
//! | [`preamble`] | the first bytes of every connection, by which strangers are turned away |
//!
//! ```no_run
//! use std::time::Duration;
//! use godwit_core::{Dial, SessionToken};
//! use godwit_transport::{Options, connect, listen};
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let listener = listen(&"quic://127.0.0.1:0".parse()?, Options::default())?;
//! println!("LISTENING {}", listener.uri());
//!
//! let dial = connect(listener.uri(), Options::default())?;
//! let control = dial.control(Duration::from_secs(5))?;
//! let incoming = listener.next_control(Duration::from_secs(5))?;
//! # Ok(()) }
//! ```
//!
//! # What the halves of a channel promise
//!
//! - Dropping a writer finishes it: what was written is still delivered, as after
//!   [`finish`](godwit_core::ChannelWriter::finish). Dropping both halves closes the connection; a
//!   [`HangUp`](godwit_core::HangUp) that is kept does not hold it open.
//! - After a hang-up, reads and writes on this side fail with [`std::io::ErrorKind::ConnectionAborted`]; the
//!   peer's reads end or fail and its writes fail.
//! - A peer that silently vanishes is found out after [`limits::DEAD_PEER_LIMIT`] at the latest; the engine, which
//!   knows when to expect a word, has shorter limits and hangs up.

mod address;
mod error;
mod gate;
pub mod limits;
mod listener;
pub mod preamble;
mod queue;
mod quic;
mod sessions;
mod stream;
mod unix_path;
pub mod uri;

use std::sync::Arc;

pub use error::{DialError, TransportError};
pub use listener::Listener;
pub use sessions::DataChannels;
pub use uri::{Fingerprint, HostPort, Uri, UriError};

/// What holds for every connection of a dialler or a listener.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Options {
    /// Allow transports that neither encrypt nor authenticate (`tcp://`) on addresses other than loopback.
    pub insecure: bool,
    /// Send pages without copying them where the kernel can (`tcp://`). Where it cannot, the channels say so, and copy.
    pub zero_copy: bool,
}

/// Prepares to reach the listener at `uri`: resolves its name and refuses what can never work. Nothing is sent
/// until a channel is opened.
///
/// # Errors
/// If the name does not resolve, if clear text would leave this host without [`Options::insecure`], if a `quic` URI carries no
/// fingerprint, or if [`Options::zero_copy`] is asked of anything but TCP.
pub fn connect(uri: &Uri, options: Options) -> Result<Box<dyn godwit_core::Dial>, TransportError> {
    if let Uri::Tcp(at) | Uri::Quic { at, .. } = uri
        && at.port == 0
    {
        return Err(TransportError::NoPort { uri: Arc::new(uri.clone()) });
    }
    if options.zero_copy && !matches!(uri, Uri::Tcp(_)) {
        return Err(TransportError::NoZeroCopy { uri: Arc::new(uri.clone()) });
    }
    Ok(match uri {
        Uri::Tcp(at) => Box::new(stream::TcpDial::new(
            uri.clone(),
            address::resolve_for_clear_text(uri, at, options)?,
            options.zero_copy,
        )),
        Uri::Unix(path) => Box::new(stream::UnixDial::new(uri.clone(), path.clone())),
        Uri::Quic { at, fingerprint } => {
            let fingerprint =
                fingerprint.ok_or_else(|| TransportError::NoFingerprint { uri: Arc::new(uri.clone()) })?;
            Box::new(quic::QuicDial::new(uri.clone(), address::resolve(at)?, fingerprint))
        }
    })
}

/// Starts to listen at `uri`; port 0 lets the system choose one.
///
/// # Errors
/// If the address cannot be bound, if it is a unix socket that somebody listens on, or if clear text would be
/// taken from other hosts without [`Options::insecure`].
pub fn listen(uri: &Uri, options: Options) -> Result<Listener, TransportError> {
    Listener::open(uri, options)
}
