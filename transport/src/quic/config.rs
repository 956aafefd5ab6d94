//! QUIC's knobs: windows, packet sizes, timers, socket buffers.

use std::io;
use std::net::{SocketAddr, UdpSocket};
use std::sync::Arc;

use quinn::{EndpointConfig, IdleTimeout, MtuDiscoveryConfig, TransportConfig, VarInt};
use socket2::{Domain, Socket, Type};

use crate::limits::{DEAD_PEER_LIMIT, KEEP_ALIVE_INTERVAL};
use crate::preamble::Preamble;

/// What a peer may have in flight to us on a data channel: 10 Gbit/s over 50 ms. It is memory only while packets are
/// missing or the reader is slow.
const DATA_WINDOW_BYTES: u32 = 64 << 20;

/// The same for a control channel, which carries messages and device state.
const CONTROL_WINDOW_BYTES: u32 = 8 << 20;

/// What a dialler may have in flight before its preamble was taken: strangers cost no more.
const STRANGER_WINDOW_BYTES: u32 = 16 << 10;

/// The largest UDP payload. Up to this size ten packets go to the kernel in one call; at larger ones such a batch
/// would exceed the 64 KiB of a UDP send and fail.
const LARGEST_DATAGRAM_BYTES: u16 = 6500;

/// The UDP socket buffers asked for. The kernel silently grants less if its limits are lower.
const SOCKET_BUFFER_BYTES: usize = 4 << 20;

/// How much a dialler of this role takes in; see [`transport`].
pub(super) fn window_bytes(preamble: &Preamble) -> u32 {
    match preamble {
        Preamble::Control => CONTROL_WINDOW_BYTES,
        Preamble::Data { .. } => DATA_WINDOW_BYTES,
    }
}

/// For connections that we dial.
pub(super) fn dialler(preamble: &Preamble) -> Arc<TransportConfig> {
    let mut config = common();
    config.receive_window(VarInt::from_u32(window_bytes(preamble))).max_concurrent_bidi_streams(VarInt::from_u32(0));
    Arc::new(config)
}

/// For connections that we accept. The receive window is opened once the preamble was taken.
pub(super) fn acceptor() -> Arc<TransportConfig> {
    let mut config = common();
    config.receive_window(VarInt::from_u32(STRANGER_WINDOW_BYTES)).max_concurrent_bidi_streams(VarInt::from_u32(1));
    Arc::new(config)
}

fn common() -> TransportConfig {
    let mut mtu_discovery = MtuDiscoveryConfig::default();
    mtu_discovery.upper_bound(LARGEST_DATAGRAM_BYTES);

    let mut config = TransportConfig::default();
    config
        .max_concurrent_uni_streams(VarInt::from_u32(0))
        .datagram_receive_buffer_size(None)
        .stream_receive_window(VarInt::from_u32(DATA_WINDOW_BYTES))
        .send_window(super::channel::FIRST_SEND_WINDOW_BYTES)
        .mtu_discovery_config(Some(mtu_discovery))
        .max_idle_timeout(IdleTimeout::try_from(DEAD_PEER_LIMIT).ok())
        .keep_alive_interval(Some(KEEP_ALIVE_INTERVAL));
    config
}

/// For both kinds of endpoint.
pub(super) fn endpoint() -> EndpointConfig {
    let mut config = EndpointConfig::default();
    // Fails only below 1200.
    let _ = config.max_udp_payload_size(LARGEST_DATAGRAM_BYTES);
    config
}

/// A UDP socket with large buffers.
pub(super) fn bind(address: SocketAddr) -> io::Result<UdpSocket> {
    let socket = Socket::new(Domain::for_address(address), Type::DGRAM, None)?;
    socket.set_send_buffer_size(SOCKET_BUFFER_BYTES)?;
    socket.set_recv_buffer_size(SOCKET_BUFFER_BYTES)?;
    socket.bind(&address.into())?;
    Ok(socket.into())
}
