//! Channels over QUIC: one connection with one bidirectional stream each.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use godwit_core::{Channel, Dial, SessionToken};

use crate::gate::Gate;
use crate::{Fingerprint, TransportError, Uri};

/// Dials over QUIC.
pub(crate) struct QuicDial {
    uri: Arc<Uri>,
}

impl QuicDial {
    pub(crate) fn new(uri: Uri, _addresses: Vec<SocketAddr>, _fp: Fingerprint) -> Result<Self, TransportError> {
        Ok(Self { uri: Arc::new(uri) })
    }
}

impl Dial for QuicDial {
    fn control(&self, _limit: Duration) -> io::Result<Channel> {
        Err(io::ErrorKind::Unsupported.into())
    }

    fn data(&self, _token: SessionToken, _index: u16, _limit: Duration) -> io::Result<Channel> {
        Err(io::ErrorKind::Unsupported.into())
    }

    fn uri(&self) -> String {
        self.uri.to_string()
    }
}

pub(crate) struct QuicListener(());

impl QuicListener {
    pub(crate) fn start(uri: &Uri, _address: SocketAddr, _gate: Arc<Gate>) -> Result<Self, TransportError> {
        Err(TransportError::Listen { uri: Arc::new(uri.clone()), source: io::ErrorKind::Unsupported.into() })
    }
    pub(crate) fn address(&self) -> SocketAddr {
        SocketAddr::from(([0; 4], 0))
    }
    pub(crate) fn fingerprint(&self) -> Fingerprint {
        Fingerprint([0; 32])
    }
}
