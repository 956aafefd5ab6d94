//! The bare libraries that the transports are built on, tuned alike: what nobody can be faster than.

use std::io::{self, Write};
use std::net::{SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::sync::Arc;
use std::thread;

use quinn::crypto::rustls::{QuicClientConfig, QuicServerConfig};
use vm_memory::bitmap::BitmapSlice;
use vm_memory::{ReadVolatile, VolatileSlice};

/// How much is written and read at once.
pub const BLOCK_BYTES: usize = 256 << 10;

/// Largest UDP payload, as the QUIC transport has it.
const PAYLOAD_BYTES: u16 = 6500;

/// Two connected sockets of the standard library on loopback, as they come.
pub struct RawTcp {
    dialled: TcpStream,
    accepted: TcpStream,
}

impl RawTcp {
    /// Connects them.
    pub fn new() -> io::Result<Self> {
        let listener = TcpListener::bind("127.0.0.1:0")?;
        let dialled = TcpStream::connect(listener.local_addr()?)?;
        let (accepted, _) = listener.accept()?;
        Ok(Self { dialled, accepted })
    }

    /// Moves `source` into `memory` and returns once all of it is there.
    pub fn transfer<B: BitmapSlice>(&mut self, source: &[u8], memory: &VolatileSlice<'_, B>) -> io::Result<()> {
        let Self { dialled, accepted } = self;
        thread::scope(|scope| {
            let writer = scope.spawn(|| source.chunks(BLOCK_BYTES).try_for_each(|block| dialled.write_all(block)));
            for start in (0..source.len()).step_by(BLOCK_BYTES) {
                let length = BLOCK_BYTES.min(source.len() - start);
                let mut block = memory.subslice(start, length).map_err(io::Error::other)?;
                accepted.read_exact_volatile(&mut block).map_err(io::Error::other)?;
            }
            writer.join().unwrap_or_else(|_| Err(io::Error::other("the writer panicked")))
        })
    }
}

/// One stream between two quinn endpoints on one two-threaded runtime, with all the tuning that our transport has.
pub struct RawQuinn {
    runtime: tokio::runtime::Runtime,
    send: quinn::SendStream,
    receive: quinn::RecvStream,
    _ends: Ends,
}

impl RawQuinn {
    /// Connects them.
    pub fn new() -> io::Result<Self> {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
        let (send, receive, ends) = runtime.block_on(connect())?;
        Ok(Self { runtime, send, receive, _ends: ends })
    }

    /// Moves `source` into `memory` and returns once all of it is there.
    pub fn transfer<B: BitmapSlice>(&mut self, source: &[u8], memory: &VolatileSlice<'_, B>) -> io::Result<()> {
        let Self { runtime, send, receive, .. } = self;
        let handle = runtime.handle();
        thread::scope(|scope| {
            let writer = scope.spawn(|| {
                handle.block_on(async {
                    for block in source.chunks(BLOCK_BYTES) {
                        send.write_all(block).await?;
                    }
                    Ok(())
                })
            });
            handle.block_on(async {
                let mut chunks = [const { bytes::Bytes::new() }; 64];
                let mut done = 0;
                while done < source.len() {
                    let count = receive.read_chunks(&mut chunks).await?.ok_or(io::ErrorKind::UnexpectedEof)?;
                    for chunk in &chunks[..count] {
                        memory.subslice(done, chunk.len()).map_err(io::Error::other)?.copy_from(&chunk[..]);
                        done += chunk.len();
                    }
                }
                Ok::<_, io::Error>(())
            })?;
            writer.join().unwrap_or_else(|_| Err(io::Error::other("the writer panicked")))
        })
    }
}

/// What has to live as long as the streams.
type Ends = (quinn::Endpoint, quinn::Endpoint, quinn::RecvStream, quinn::SendStream);

async fn connect() -> io::Result<(quinn::SendStream, quinn::RecvStream, Ends)> {
    let certified = rcgen::generate_simple_self_signed(["bench".to_owned()]).map_err(io::Error::other)?;
    let certificate = certified.cert.der().clone();
    let key = rustls::pki_types::PrivatePkcs8KeyDer::from(certified.signing_key.serialize_der());
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let mut roots = rustls::RootCertStore::empty();
    roots.add(certificate.clone()).map_err(io::Error::other)?;
    let server_tls = rustls::ServerConfig::builder_with_provider(Arc::clone(&provider))
        .with_protocol_versions(&[&rustls::version::TLS13])
        .map_err(io::Error::other)?
        .with_no_client_auth()
        .with_single_cert(vec![certificate], key.into())
        .map_err(io::Error::other)?;
    let client_tls = rustls::ClientConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])
        .map_err(io::Error::other)?
        .with_root_certificates(roots)
        .with_no_client_auth();

    let mut mtu_discovery = quinn::MtuDiscoveryConfig::default();
    mtu_discovery.upper_bound(PAYLOAD_BYTES);
    let mut transport = quinn::TransportConfig::default();
    transport
        .stream_receive_window((64_u32 << 20).into())
        .receive_window((64_u32 << 20).into())
        .send_window(8 << 20)
        .mtu_discovery_config(Some(mtu_discovery));
    let transport = Arc::new(transport);
    let server_crypto = QuicServerConfig::try_from(server_tls).map_err(io::Error::other)?;
    let mut server_config = quinn::ServerConfig::with_crypto(Arc::new(server_crypto));
    server_config.transport_config(Arc::clone(&transport));
    let client_crypto = QuicClientConfig::try_from(client_tls).map_err(io::Error::other)?;
    let mut client_config = quinn::ClientConfig::new(Arc::new(client_crypto));
    client_config.transport_config(transport);

    let mut endpoint = quinn::EndpointConfig::default();
    endpoint.max_udp_payload_size(PAYLOAD_BYTES).map_err(io::Error::other)?;
    let runtime = || Arc::new(quinn::TokioRuntime);
    let server = quinn::Endpoint::new(endpoint.clone(), Some(server_config), udp_socket()?, runtime())?;
    let client = quinn::Endpoint::new(endpoint, None, udp_socket()?, runtime())?;

    let accepting = {
        let server = server.clone();
        tokio::spawn(async move {
            let incoming = server.accept().await.ok_or(io::ErrorKind::NotConnected)?;
            let (send, mut receive) = incoming.await?.accept_bi().await?;
            receive.read_exact(&mut [0]).await.map_err(io::Error::other)?;
            Ok::<_, io::Error>((send, receive))
        })
    };
    let connecting = client.connect_with(client_config, server.local_addr()?, "bench").map_err(io::Error::other)?;
    let (mut send, receive) = connecting.await?.open_bi().await?;
    send.write_all(&[0]).await?;
    let (server_send, server_receive) = accepting.await.map_err(io::Error::other)??;
    Ok((send, server_receive, (server, client, receive, server_send)))
}

fn udp_socket() -> io::Result<UdpSocket> {
    let socket = socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::DGRAM, None)?;
    socket.set_send_buffer_size(4 << 20)?;
    socket.set_recv_buffer_size(4 << 20)?;
    socket.bind(&SocketAddr::from(([127, 0, 0, 1], 0)).into())?;
    Ok(socket.into())
}
