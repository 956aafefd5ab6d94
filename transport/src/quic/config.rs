//! QUIC's knobs: windows, packet sizes, timers, socket buffers.

use std::io;
use std::net::{SocketAddr, UdpSocket};
use std::sync::Arc;

use quinn::{EndpointConfig, IdleTimeout, MtuDiscoveryConfig, TransportConfig, VarInt};
use rustix::net::sockopt;
use socket2::{Domain, Socket, Type};

use super::window::{LARGEST_BYTES, LEAST_AHEAD_BYTES, LEAST_UNACKNOWLEDGED_BYTES};
use crate::limits::{DEAD_PEER_LIMIT, KEEP_ALIVE_INTERVAL};

/// What a dialler may have in flight before its preamble was taken: strangers cost no more.
const STRANGER_WINDOW_BYTES: u32 = 16 << 10;

/// The largest UDP payload. Up to this size ten packets go to the kernel in one call; at larger ones such a batch
/// would exceed the 64 KiB of a UDP send and fail.
const LARGEST_DATAGRAM_BYTES: u16 = 6500;

/// The UDP receive buffer asked for. The default limit of the kernel (net.core.rmem_max, 208 KiB) holds a burst of a few
/// milliseconds: a receiver that is held up for longer loses packets, and the sender takes that for a crowded network.
const RECEIVE_BUFFER_BYTES: usize = 4 << 20;

/// The UDP send buffer asked for. It bounds what waits in this host's own queues, where a full one holds the sender
/// back without loss.
const SEND_BUFFER_BYTES: usize = 512 << 10;

/// What a peer whose preamble was taken may send ahead, until its channel's reader knows better.
pub(super) const FIRST_WINDOW: VarInt = VarInt::from_u32(LEAST_AHEAD_BYTES as u32);

/// For connections that we dial.
pub(super) fn dialler() -> Arc<TransportConfig> {
    let mut config = common();
    config.receive_window(FIRST_WINDOW).max_concurrent_bidi_streams(VarInt::from_u32(0));
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
        .stream_receive_window(VarInt::from_u32(LARGEST_BYTES as u32))
        .send_window(LEAST_UNACKNOWLEDGED_BYTES)
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
    // Whoever administers networks may exceed the kernel's limits; for others it silently grants what they allow.
    if sockopt::set_socket_send_buffer_size_force(&socket, SEND_BUFFER_BYTES).is_err() {
        socket.set_send_buffer_size(SEND_BUFFER_BYTES)?;
    }
    if sockopt::set_socket_recv_buffer_size_force(&socket, RECEIVE_BUFFER_BYTES).is_err() {
        socket.set_recv_buffer_size(RECEIVE_BUFFER_BYTES)?;
    }
    socket.bind(&address.into())?;
    Ok(socket.into())
}

#[cfg(test)]
mod tests {
    use socket2::SockRef;

    use super::*;

    #[test]
    fn a_socket_has_the_receive_buffer_asked_for_where_that_is_allowed() {
        let socket = bind("127.0.0.1:0".parse().unwrap()).unwrap();
        let granted = SockRef::from(&socket).recv_buffer_size().unwrap();
        let free = sockopt::set_socket_recv_buffer_size_force(&socket, RECEIVE_BUFFER_BYTES).is_ok();
        // The kernel tells twice what was asked for: its own bookkeeping counts, too.
        assert!(!free || granted >= 2 * RECEIVE_BUFFER_BYTES, "{granted}");
    }
}
