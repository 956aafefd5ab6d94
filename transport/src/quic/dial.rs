//! Dialling over QUIC.

use std::io;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock, mpsc};
use std::thread;
use std::time::{Duration, Instant};

use godwit_core::{Channel, Dial, SessionToken};
use quinn::crypto::rustls::QuicClientConfig;
use quinn::{ClientConfig, Connection, ConnectionError, Endpoint, RecvStream, SendStream, TokioRuntime};

use super::{channel::channel, close_code, config, tls};
use crate::preamble::{ANSWER_BYTES, Preamble, decode_answer};
use crate::{DialError, Fingerprint, Uri};

/// What a thread that starts and hands over its result may take beyond the limit of the attempt itself.
const HANDOVER_SLACK: Duration = Duration::from_millis(200);

/// Dials over QUIC.
pub(crate) struct QuicDial {
    uri: Arc<Uri>,
    addresses: Vec<SocketAddr>,
    /// Which address answered last; the others are tried after it.
    preferred: AtomicUsize,
    fingerprint: Fingerprint,
}

impl QuicDial {
    /// `addresses` are the resolved ones of `uri`, at least one.
    pub(crate) fn new(uri: Uri, addresses: Vec<SocketAddr>, fingerprint: Fingerprint) -> Self {
        Self { uri: Arc::new(uri), addresses, preferred: AtomicUsize::new(0), fingerprint }
    }

    fn open(&self, preamble: &Preamble, limit: Duration) -> Result<Channel, DialError> {
        let deadline = Instant::now() + limit;
        let count = self.addresses.len();
        let first = self.preferred.load(Ordering::Relaxed);
        let mut last_error = self.timed_out(limit);
        for tried in 0..count {
            let at = (first + tried) % count;
            // An address that swallows packets must leave time for the others.
            let share = deadline.saturating_duration_since(Instant::now()) / (count - tried) as u32;
            match self.open_at(self.addresses[at], preamble, share) {
                Ok(channel) => {
                    self.preferred.store(at, Ordering::Relaxed);
                    return Ok(channel);
                }
                Err(Failure::Unreachable(reason)) => {
                    last_error = reason.map_or_else(|| self.timed_out(limit), |reason| self.handshake(reason));
                }
                // Somebody answered: other addresses of the same name are not asked.
                Err(Failure::Final(error)) => return Err(error),
            }
        }
        Err(last_error)
    }

    /// Connects on a new thread, which goes on to drive the connection.
    fn open_at(&self, address: SocketAddr, preamble: &Preamble, limit: Duration) -> Result<Channel, Failure> {
        let local = |error: io::Error| Failure::Final(DialError::Connect { uri: self.uri.clone(), source: error });
        let (tls, impostor) = tls::client(self.fingerprint).map_err(|error| local(io::Error::other(error)))?;
        let attempt = Attempt { uri: self.uri.clone(), address, preamble: *preamble, limit, impostor };
        let (sender, receiver) = mpsc::sync_channel(1);
        thread::Builder::new().name("godwit-quic".into()).spawn(move || attempt.run(tls, &sender)).map_err(local)?;
        // The thread keeps the limit itself; not hearing from it means that the machine is very busy.
        receiver.recv_timeout(limit + HANDOVER_SLACK).unwrap_or(Err(Failure::Unreachable(None)))
    }

    fn timed_out(&self, limit: Duration) -> DialError {
        DialError::TimedOut { uri: self.uri.clone(), limit }
    }

    fn handshake(&self, reason: String) -> DialError {
        DialError::Handshake { uri: self.uri.clone(), reason }
    }
}

impl Dial for QuicDial {
    fn control(&self, limit: Duration) -> io::Result<Channel> {
        Ok(self.open(&Preamble::Control, limit)?)
    }

    fn control_again(&self, token: SessionToken, limit: Duration) -> io::Result<Channel> {
        Ok(self.open(&Preamble::ControlAgain { token }, limit)?)
    }

    fn data(&self, token: SessionToken, index: u16, limit: Duration) -> io::Result<Channel> {
        Ok(self.open(&Preamble::Data { token, index }, limit)?)
    }

    fn uri(&self) -> String {
        self.uri.to_string()
    }
}

/// Why one address did not do.
enum Failure {
    /// Nobody there, or nobody who speaks QUIC (with a reason) or answers in time (without one).
    Unreachable(Option<String>),
    /// Trying another address is of no use.
    Final(DialError),
}

/// One attempt at one address, on its thread.
struct Attempt {
    uri: Arc<Uri>,
    address: SocketAddr,
    preamble: Preamble,
    limit: Duration,
    impostor: Arc<OnceLock<Fingerprint>>,
}

impl Attempt {
    /// Opens the channel, hands it over, and drives it until it is closed and the peer knows.
    fn run(self, tls: QuicClientConfig, result: &mpsc::SyncSender<Result<Channel, Failure>>) {
        let runtime = match tokio::runtime::Builder::new_current_thread().enable_all().build() {
            Ok(runtime) => runtime,
            Err(error) => {
                let _ = result.send(Err(self.local(error)));
                return;
            }
        };
        runtime.block_on(async {
            let endpoint = match self.endpoint() {
                Ok(endpoint) => endpoint,
                Err(error) => {
                    let _ = result.send(Err(self.local(error)));
                    return;
                }
            };
            let opened = match tokio::time::timeout(self.limit, self.open(&endpoint, tls)).await {
                Ok(opened) => opened,
                Err(_) => Err(Failure::Unreachable(None)),
            };
            let opened = opened.map(|(connection, send, receive)| {
                channel(connection, send, receive, format!("quic://{}", self.address))
            });
            if let Err(mpsc::SendError(Ok(channel))) = result.send(opened) {
                // The caller has given up. Dropping alone would wait for acknowledgements that this thread handles.
                channel.hang_up.hang_up();
            }
            endpoint.wait_idle().await;
        });
    }

    fn endpoint(&self) -> io::Result<Endpoint> {
        let any: SocketAddr = match self.address {
            SocketAddr::V4(_) => (Ipv4Addr::UNSPECIFIED, 0).into(),
            SocketAddr::V6(_) => (Ipv6Addr::UNSPECIFIED, 0).into(),
        };
        Endpoint::new(config::endpoint(), None, config::bind(any)?, Arc::new(TokioRuntime))
    }

    async fn open(
        &self,
        endpoint: &Endpoint,
        tls: QuicClientConfig,
    ) -> Result<(Connection, SendStream, RecvStream), Failure> {
        let mut client = ClientConfig::new(Arc::new(tls));
        client.transport_config(config::dialler());
        let connecting = endpoint
            .connect_with(client, self.address, tls::SERVER_NAME)
            .map_err(|error| Failure::Unreachable(Some(error.to_string())))?;
        let connection = connecting.await.map_err(|error| self.handshake_failed(error))?;

        let exchange = async {
            let (mut send, mut receive) = connection.open_bi().await?;
            send.write_all(&self.preamble.encode()).await?;
            let mut answer = [0; ANSWER_BYTES];
            receive.read_exact(&mut answer).await.map_err(io::Error::other)?;
            io::Result::Ok((send, receive, answer))
        };
        let (send, receive, answer) = exchange
            .await
            .map_err(|error| self.not_godwit(format!("it closed the connection without an answer ({error})")))?;
        match decode_answer(&answer) {
            Some(Ok(())) => Ok((connection, send, receive)),
            Some(Err(reason)) => {
                connection.close(close_code::TURNED_AWAY, b"");
                Err(Failure::Final(DialError::Refused { uri: self.uri.clone(), reason }))
            }
            None => Err(self.not_godwit(format!("it answered {:?}", answer.escape_ascii().to_string()))),
        }
    }

    fn handshake_failed(&self, error: ConnectionError) -> Failure {
        match (self.impostor.get(), error) {
            (Some(&presented), _) => Failure::Final(DialError::WrongFingerprint { uri: self.uri.clone(), presented }),
            (None, ConnectionError::TimedOut) => Failure::Unreachable(None),
            (None, error) => Failure::Unreachable(Some(error.to_string())),
        }
    }

    fn not_godwit(&self, what: String) -> Failure {
        Failure::Final(DialError::NotGodwit { uri: self.uri.clone(), what })
    }

    fn local(&self, source: io::Error) -> Failure {
        Failure::Final(DialError::Connect { uri: self.uri.clone(), source })
    }
}
