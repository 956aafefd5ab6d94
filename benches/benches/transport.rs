//! Setting up channels, and moving memory through them, beside what the bare libraries do in the same run.
//!
//! `throughput` moves 256 MiB into populated memory and waits until all of it is there. Compare `tcp` with `raw-tcp`
//! and `quic` with `raw-quinn`, which has the same windows, packet sizes and buffers.

// criterion's macros make undocumented public items.
#![allow(missing_docs, clippy::unwrap_used)]

use std::hint::black_box;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use criterion::{Criterion, SamplingMode, Throughput, criterion_group, criterion_main};
use godwit_core::{Channel, IncomingData, SessionToken};
use godwit_transport::{Listener, Options, Uri, connect, listen};
use quinn::crypto::rustls::{QuicClientConfig, QuicServerConfig};
use vm_memory::{MmapRegion, VolatileMemory};

const MOVED_BYTES: usize = 256 << 20;
const BLOCK_BYTES: usize = 256 << 10;
const LIMIT: Duration = Duration::from_secs(30);
const TOKEN: SessionToken = SessionToken([1; 16]);

fn uris(directory: &tempfile::TempDir) -> [(&'static str, Uri); 3] {
    let unix = Uri::Unix(directory.path().join("bench.sock"));
    [("tcp", "tcp://127.0.0.1:0".parse().unwrap()), ("unix", unix), ("quic", "quic://127.0.0.1:0".parse().unwrap())]
}

fn data_channel(uri: &Uri) -> (Listener, Channel, Channel) {
    let listener = listen(uri, Options::default()).unwrap();
    let mut incoming = listener.incoming_data();
    incoming.expect(TOKEN);
    let dialled = connect(listener.uri(), Options::default()).unwrap().data(TOKEN, 0, LIMIT).unwrap();
    let (_, accepted) = incoming.accept(LIMIT).unwrap();
    (listener, dialled, accepted)
}

fn set_up(criterion: &mut Criterion) {
    let directory = tempfile::tempdir().unwrap();
    let mut group = criterion.benchmark_group("set-up");
    for (name, uri) in uris(&directory) {
        let listener = listen(&uri, Options::default()).unwrap();
        let dial = connect(listener.uri(), Options::default()).unwrap();
        // What is measured ends when both ends have the channel; hanging up spares the close its good manners.
        group.bench_function(name, |bencher| {
            bencher.iter(|| {
                let dialled = dial.control(LIMIT).unwrap();
                let accepted = listener.next_control(LIMIT).unwrap().unwrap();
                dialled.hang_up.hang_up();
                accepted.hang_up.hang_up();
            });
        });
    }
    group.finish();
}

fn throughput(criterion: &mut Criterion) {
    let directory = tempfile::tempdir().unwrap();
    let source = vec![0x5a_u8; MOVED_BYTES];
    let memory = MmapRegion::<()>::new(MOVED_BYTES).unwrap();
    memory.get_slice(0, MOVED_BYTES).unwrap().copy_from(&vec![1_u8; MOVED_BYTES][..]);

    let mut group = criterion.benchmark_group("throughput");
    group.throughput(Throughput::Bytes(MOVED_BYTES as u64)).sampling_mode(SamplingMode::Flat).sample_size(15);
    let mut raw_tcp = RawTcp::new();
    group.bench_function("raw-tcp", |bencher| bencher.iter(|| raw_tcp.transfer(&source, &memory)));
    let mut raw_quinn = RawQuinn::new();
    group.bench_function("raw-quinn", |bencher| bencher.iter(|| raw_quinn.transfer(&source, &memory)));
    for (name, uri) in uris(&directory) {
        let (_listener, mut dialled, mut accepted) = data_channel(&uri);
        group.bench_function(name, |bencher| {
            bencher.iter(|| transfer(&mut dialled, &mut accepted, &source, &memory));
        });
    }
    group.finish();
}

fn transfer(dialled: &mut Channel, accepted: &mut Channel, source: &[u8], memory: &MmapRegion<()>) {
    thread::scope(|scope| {
        scope.spawn(|| source.chunks(BLOCK_BYTES).for_each(|block| dialled.writer.write_all(block).unwrap()));
        let mut done = 0;
        while done < source.len() {
            let mut block = memory.get_slice(done, BLOCK_BYTES.min(source.len() - done)).unwrap();
            done += accepted.reader.read_volatile(&mut block).unwrap();
        }
    });
    black_box(memory);
}

/// Two connected sockets of the standard library, as they come.
struct RawTcp {
    dialled: TcpStream,
    accepted: TcpStream,
    buffer: Vec<u8>,
}

impl RawTcp {
    fn new() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let dialled = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let (accepted, _) = listener.accept().unwrap();
        Self { dialled, accepted, buffer: vec![1; MOVED_BYTES] }
    }

    fn transfer(&mut self, source: &[u8], _memory: &MmapRegion<()>) {
        let Self { dialled, accepted, buffer } = self;
        thread::scope(|scope| {
            scope.spawn(|| source.chunks(BLOCK_BYTES).for_each(|block| dialled.write_all(block).unwrap()));
            for block in buffer.chunks_mut(BLOCK_BYTES) {
                accepted.read_exact(block).unwrap();
            }
        });
        black_box(buffer);
    }
}

/// One stream between two quinn endpoints on one two-threaded runtime, with all the tuning that our transport has.
struct RawQuinn {
    runtime: tokio::runtime::Runtime,
    send: quinn::SendStream,
    receive: quinn::RecvStream,
    _ends: (quinn::Endpoint, quinn::Endpoint, quinn::RecvStream, quinn::SendStream),
}

impl RawQuinn {
    fn new() -> Self {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
        let (runtime, (send, receive, ends)) = {
            let connected = runtime.block_on(connect_raw_quinn());
            (runtime, connected)
        };
        Self { runtime, send, receive, _ends: ends }
    }

    fn transfer(&mut self, source: &[u8], memory: &MmapRegion<()>) {
        let Self { runtime, send, receive, .. } = self;
        let handle = runtime.handle();
        thread::scope(|scope| {
            scope.spawn(|| {
                handle.block_on(async {
                    for block in source.chunks(BLOCK_BYTES) {
                        send.write_all(block).await.unwrap();
                    }
                });
            });
            handle.block_on(async {
                let mut chunks = [const { bytes::Bytes::new() }; 64];
                let mut done = 0;
                while done < source.len() {
                    let count = receive.read_chunks(&mut chunks).await.unwrap().unwrap();
                    for chunk in &chunks[..count] {
                        memory.get_slice(done, chunk.len()).unwrap().copy_from(&chunk[..]);
                        done += chunk.len();
                    }
                }
            });
        });
        black_box(memory);
    }
}

type Ends = (quinn::Endpoint, quinn::Endpoint, quinn::RecvStream, quinn::SendStream);

async fn connect_raw_quinn() -> (quinn::SendStream, quinn::RecvStream, Ends) {
    let certified = rcgen::generate_simple_self_signed(["bench".to_owned()]).unwrap();
    let certificate = certified.cert.der().clone();
    let key = rustls::pki_types::PrivatePkcs8KeyDer::from(certified.signing_key.serialize_der());
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let mut roots = rustls::RootCertStore::empty();
    roots.add(certificate.clone()).unwrap();
    let server_tls = rustls::ServerConfig::builder_with_provider(Arc::clone(&provider))
        .with_protocol_versions(&[&rustls::version::TLS13])
        .unwrap()
        .with_no_client_auth()
        .with_single_cert(vec![certificate], key.into())
        .unwrap();
    let client_tls = rustls::ClientConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])
        .unwrap()
        .with_root_certificates(roots)
        .with_no_client_auth();

    let mut mtu_discovery = quinn::MtuDiscoveryConfig::default();
    mtu_discovery.upper_bound(6500);
    let mut transport = quinn::TransportConfig::default();
    transport
        .stream_receive_window((64_u32 << 20).into())
        .receive_window((64_u32 << 20).into())
        .send_window(8 << 20)
        .mtu_discovery_config(Some(mtu_discovery));
    let transport = Arc::new(transport);
    let mut server_config = quinn::ServerConfig::with_crypto(Arc::new(QuicServerConfig::try_from(server_tls).unwrap()));
    server_config.transport_config(Arc::clone(&transport));
    let mut client_config = quinn::ClientConfig::new(Arc::new(QuicClientConfig::try_from(client_tls).unwrap()));
    client_config.transport_config(transport);

    let mut endpoint = quinn::EndpointConfig::default();
    endpoint.max_udp_payload_size(6500).unwrap();
    let runtime = || Arc::new(quinn::TokioRuntime);
    let server = quinn::Endpoint::new(endpoint.clone(), Some(server_config), udp_socket(), runtime()).unwrap();
    let client = quinn::Endpoint::new(endpoint, None, udp_socket(), runtime()).unwrap();

    let accepting = {
        let server = server.clone();
        tokio::spawn(async move {
            let connection = server.accept().await.unwrap().await.unwrap();
            let (send, mut receive) = connection.accept_bi().await.unwrap();
            receive.read_exact(&mut [0]).await.unwrap();
            (send, receive)
        })
    };
    let connecting = client.connect_with(client_config, server.local_addr().unwrap(), "bench").unwrap();
    let (mut send, receive) = connecting.await.unwrap().open_bi().await.unwrap();
    send.write_all(&[0]).await.unwrap();
    let (server_send, server_receive) = accepting.await.unwrap();
    (send, server_receive, (server, client, receive, server_send))
}

fn udp_socket() -> UdpSocket {
    let socket = socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::DGRAM, None).unwrap();
    socket.set_send_buffer_size(4 << 20).unwrap();
    socket.set_recv_buffer_size(4 << 20).unwrap();
    socket.bind(&SocketAddr::from(([127, 0, 0, 1], 0)).into()).unwrap();
    socket.into()
}

criterion_group!(benches, set_up, throughput);
criterion_main!(benches);
