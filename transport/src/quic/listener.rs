//! The accepting end of QUIC.

use std::io;
use std::net::SocketAddr;
use std::sync::{Arc, mpsc};
use std::thread;

use quinn::{Connection, Endpoint, Incoming, RecvStream, SendStream, ServerConfig};
use tokio::sync::{Semaphore, oneshot};
use tokio::time::timeout;

use super::runtime::Drivers;
use super::{channel::channel, close_code, config, tls};
use crate::gate::{Gate, refusal_of};
use crate::limits::{PREAMBLE_LIMIT, PREAMBLES_AT_ONCE};
use crate::preamble::{PREAMBLE_BYTES, Preamble, encode_answer};
use crate::{Fingerprint, TransportError, Uri};

/// While fewer than this many places are free, a dialler must prove that it receives at the address it sends from.
const PLACES_FOR_THE_PROVEN: usize = PREAMBLES_AT_ONCE / 2;

/// A running endpoint. Dropping it stops accepting; the endpoint's thread, which receives for the accepted channels
/// too, ends with the last of them.
pub(crate) struct QuicListener {
    address: SocketAddr,
    fingerprint: Fingerprint,
    /// Dropped to stop accepting.
    _accepting: oneshot::Sender<()>,
}

impl QuicListener {
    pub(crate) fn start(uri: &Uri, address: SocketAddr, gate: Arc<Gate>) -> Result<Self, TransportError> {
        Self::start_with(Drivers::for_this_host(), uri, address, gate)
    }

    fn start_with(drivers: Drivers, uri: &Uri, address: SocketAddr, gate: Arc<Gate>) -> Result<Self, TransportError> {
        let failed = |source| TransportError::Listen { uri: Arc::new(uri.clone()), source };
        let (tls, fingerprint) =
            tls::server().map_err(|error| TransportError::Tls { uri: Arc::new(uri.clone()), source: error })?;
        let mut server = ServerConfig::with_crypto(Arc::new(tls));
        server.transport_config(config::acceptor()).max_incoming(PREAMBLES_AT_ONCE);

        let socket = config::bind(address).map_err(failed)?;
        let address = socket.local_addr().map_err(failed)?;
        let (accepting, stopped) = oneshot::channel();
        let (sender, started) = mpsc::sync_channel(1);
        let run = move || {
            let runtime = match tokio::runtime::Builder::new_current_thread().enable_all().build() {
                Ok(runtime) => runtime,
                Err(error) => return drop(sender.send(Err(error))),
            };
            runtime.block_on(async {
                match Endpoint::new(config::endpoint(), Some(server), socket, Arc::new(drivers)) {
                    Ok(endpoint) => {
                        let _ = sender.send(Ok(()));
                        serve(endpoint, gate, stopped).await;
                    }
                    Err(error) => drop(sender.send(Err(error))),
                }
            });
        };
        thread::Builder::new().name("godwit-quic-rx".into()).spawn(run).map_err(failed)?;
        started.recv().unwrap_or_else(|_| Err(io::Error::other("its thread ended"))).map_err(failed)?;
        Ok(Self { address, fingerprint, _accepting: accepting })
    }

    /// The bound address, with the real port.
    pub(crate) fn address(&self) -> SocketAddr {
        self.address
    }

    /// The fingerprint of the certificate that this listener made.
    pub(crate) fn fingerprint(&self) -> Fingerprint {
        self.fingerprint
    }
}

/// Accepts until `stopped`, then goes on receiving until the last connection is gone.
async fn serve(endpoint: Endpoint, gate: Arc<Gate>, stopped: oneshot::Receiver<()>) {
    let accepting = tokio::spawn(accept(endpoint.clone(), gate));
    let _ = stopped.await;
    accepting.abort();
    endpoint.set_server_config(None);
    endpoint.wait_idle().await;
}

async fn accept(endpoint: Endpoint, gate: Arc<Gate>) {
    let places = Arc::new(Semaphore::new(PREAMBLES_AT_ONCE));
    while let Some(incoming) = endpoint.accept().await {
        if places.available_permits() < PLACES_FOR_THE_PROVEN && incoming.may_retry() {
            // Fails only if it may not retry.
            let _ = incoming.retry();
            continue;
        }
        let peer = format!("quic://{}", incoming.remote_address());
        match Arc::clone(&places).try_acquire_owned() {
            Ok(place) => {
                let gate = Arc::clone(&gate);
                tokio::spawn(async move {
                    welcome(incoming, &peer, &gate).await;
                    drop(place);
                });
            }
            Err(_) => {
                incoming.refuse();
                gate.turn_away(&peer, "too many connections wait");
            }
        }
    }
}

/// A connection whose preamble has come.
struct Arrival {
    connection: Connection,
    send: SendStream,
    receive: RecvStream,
    bytes: [u8; PREAMBLE_BYTES],
}

/// Takes a connection through its preamble, or turns it away.
async fn welcome(incoming: Incoming, peer: &str, gate: &Gate) {
    match timeout(PREAMBLE_LIMIT, hear(incoming)).await {
        Ok(Ok(arrival)) => {
            // The last words of a refusal may take a while to arrive, but no longer than the first.
            if timeout(PREAMBLE_LIMIT, decide(arrival, peer, gate)).await.is_err() {
                gate.turn_away(peer, "it does not acknowledge our answer");
            }
        }
        Ok(Err(error)) => gate.turn_away(peer, error),
        Err(_) => gate.turn_away(peer, format_args!("no preamble came within {PREAMBLE_LIMIT:?}")),
    }
}

async fn hear(incoming: Incoming) -> io::Result<Arrival> {
    let connection = incoming.await?;
    let (send, mut receive) = connection.accept_bi().await?;
    let mut bytes = [0; PREAMBLE_BYTES];
    if let Err(error) = receive.read_exact(&mut bytes).await {
        connection.close(close_code::TURNED_AWAY, b"a preamble of 32 bytes was expected");
        return Err(io::Error::other(error));
    }
    Ok(Arrival { connection, send, receive, bytes })
}

async fn decide(mut arrival: Arrival, peer: &str, gate: &Gate) {
    let decoded = Preamble::decode(&arrival.bytes);
    let admitted = match &decoded {
        Ok(preamble) => gate.admit(preamble).map_err(|refusal| {
            gate.turn_away(peer, format_args!("told it: {refusal}"));
            Some(refusal)
        }),
        Err(error) => {
            gate.turn_away(peer, error);
            Err(refusal_of(error))
        }
    };
    match admitted {
        Ok(place) => {
            arrival.connection.set_receive_window(config::FIRST_WINDOW);
            if let Err(error) = arrival.send.write_all(&encode_answer(Ok(()))).await {
                return gate.turn_away(peer, format_args!("it left before it was answered: {error}"));
            }
            gate.deliver(place, channel(arrival.connection, arrival.send, arrival.receive, peer.into()));
        }
        Err(refusal) => {
            if let Some(refusal) = refusal {
                let _ = arrival.send.write_all(&encode_answer(Err(refusal))).await;
                let _ = arrival.send.finish();
                let _ = arrival.send.stopped().await;
            }
            arrival.connection.close(close_code::TURNED_AWAY, b"");
        }
    }
}

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;
    use std::time::Duration;

    use godwit_core::Dial;

    use super::super::QuicDial;
    use super::*;

    const LIMIT: Duration = Duration::from_secs(20);
    const BYTES: usize = 8 << 20;

    /// Peers that speak QUIC, and our application protocol, but then something else.
    #[test]
    fn strangers_are_turned_away() {
        let uri: Uri = "quic://127.0.0.1:0".parse().unwrap();
        let gate = Arc::new(Gate::new());
        let listener = QuicListener::start(&uri, (Ipv4Addr::LOCALHOST, 0).into(), gate.clone()).unwrap();
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let strangers: [&[u8]; 4] =
            [b"GET / HTTP/1.1\r\nHost: example\r\n\r\n", &[0; 32], &[0xff; 5_000_000], b"\x89GODW"];
        runtime.block_on(async {
            let socket = config::bind((Ipv4Addr::LOCALHOST, 0).into()).unwrap();
            let endpoint = Endpoint::new(config::endpoint(), None, socket, Arc::new(quinn::TokioRuntime)).unwrap();
            for stranger in strangers {
                let (tls, _) = tls::client(listener.fingerprint()).unwrap();
                let mut client = quinn::ClientConfig::new(Arc::new(tls));
                client.transport_config(config::dialler());
                let connecting = endpoint.connect_with(client, listener.address(), tls::SERVER_NAME).unwrap();
                let connection = connecting.await.unwrap();
                let (mut send, mut receive) = connection.open_bi().await.unwrap();
                // Its window is too small for the largest: the listener does not take in what it did not ask for.
                let _ = send.write_all(stranger).await;
                let _ = send.finish();
                assert!(receive.read_to_end(100).await.is_err(), "the connection is closed without an answer");
            }
        });
        assert_eq!(gate.turned_away(), strangers.len() as u64);

        let dial = QuicDial::new(uri, vec![listener.address()], listener.fingerprint());
        let _dialled = dial.control(LIMIT).unwrap();
        assert!(gate.controls.pop(LIMIT).is_ok());
    }

    /// Whatever the number of this host's cores, both ways of driving connections work.
    #[test]
    fn connections_are_driven_together_or_apart() {
        for spread in [false, true] {
            let uri: Uri = "quic://127.0.0.1:0".parse().unwrap();
            let gate = Arc::new(Gate::new());
            let any = (Ipv4Addr::LOCALHOST, 0).into();
            let listener = QuicListener::start_with(Drivers::new(spread), &uri, any, gate.clone()).unwrap();
            let dial = QuicDial::new(uri, vec![listener.address()], listener.fingerprint());

            let channels: Vec<_> =
                (0..3).map(|_| (dial.control(LIMIT).unwrap(), gate.controls.pop(LIMIT).unwrap())).collect();
            thread::scope(|scope| {
                for (mut dialled, mut accepted) in channels {
                    scope.spawn(move || dialled.writer.write_all(&vec![3; BYTES]).unwrap());
                    scope.spawn(move || {
                        let mut buffer = vec![0; 100_000];
                        let mut sum = 0;
                        while let read @ 1.. = accepted.reader.read(&mut buffer).unwrap() {
                            sum += buffer[..read].iter().map(|byte| *byte as usize).sum::<usize>();
                        }
                        assert_eq!(sum, 3 * BYTES);
                    });
                }
            });
        }
    }
}
