//! Echo requests at a steady pace, and when their replies came.

use std::io::{ErrorKind, Read};
use std::net::{Ipv4Addr, SocketAddr, SocketAddrV4};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use anyhow::{Context, Result};
use etherparse::{IcmpEchoHeader, Icmpv4Header, Icmpv4Slice, Icmpv4Type, Ipv4Slice};
use socket2::{Domain, Protocol, Socket, Type};

use crate::clock::monotonic_ns;
use crate::netns::Namespace;
use crate::priority::wake_on_time;
use crate::scenario::gap::Exchange;
use crate::scenario::place;

/// Between two requests.
pub const PERIOD: Duration = Duration::from_millis(10);

/// How often the receiving thread looks whether it is to end.
const LOOK_PERIOD: Duration = Duration::from_millis(100);

/// What all our requests carry, beside their number.
const MARK: [u8; 8] = *b"godwit\0\0";

/// Pings an address until it is dropped.
pub struct Pinger {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
}

struct Shared {
    socket: Socket,
    target: SocketAddr,
    identifier: u16,
    exchange: Mutex<Exchange>,
    stop: AtomicBool,
}

impl Pinger {
    /// Begins to ping `target` from `namespace`.
    pub fn start(namespace: &Namespace, target: Ipv4Addr) -> Result<Self> {
        let open =
            || Socket::new(Domain::IPV4, Type::RAW, Some(Protocol::ICMPV4)).context("cannot open an ICMP socket");
        let socket = place::inside(namespace, open)?;
        socket.set_read_timeout(Some(LOOK_PERIOD))?;
        let shared = Arc::new(Shared {
            socket,
            target: SocketAddrV4::new(target, 0).into(),
            identifier: std::process::id() as u16,
            exchange: Mutex::default(),
            stop: AtomicBool::new(false),
        });
        let (sending, receiving) = (shared.clone(), shared.clone());
        let threads = vec![thread::spawn(move || sending.send()), thread::spawn(move || receiving.receive())];
        Ok(Self { shared, threads })
    }

    /// What was sent and what came back so far.
    pub fn exchange(&self) -> Exchange {
        self.shared.exchange().clone()
    }
}

impl Drop for Pinger {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::Relaxed);
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
    }
}

impl Shared {
    fn exchange(&self) -> MutexGuard<'_, Exchange> {
        self.exchange.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn send(&self) {
        wake_on_time();
        let mut next_ns = monotonic_ns();
        while !self.stop.load(Ordering::Relaxed) {
            let number = self.exchange().sent(monotonic_ns());
            // Where there is no way to the target the request is lost, like any other.
            let _ = self.socket.send_to(&request(self.identifier, number as u64), &self.target.into());
            next_ns += PERIOD.as_nanos() as u64;
            thread::sleep(Duration::from_nanos(next_ns.saturating_sub(monotonic_ns())));
        }
    }

    fn receive(&self) {
        wake_on_time();
        let mut packet = [0; 2048];
        while !self.stop.load(Ordering::Relaxed) {
            match (&self.socket).read(&mut packet) {
                Ok(length) => {
                    if let Some(number) = reply(&packet[..length], self.identifier) {
                        self.exchange().replied(number as usize, monotonic_ns());
                    }
                }
                Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) => {}
                // A socket reports what routers on the way say of earlier requests.
                Err(_) => thread::sleep(Duration::from_millis(1)),
            }
        }
    }
}

/// An echo request as an ICMP message. The whole number is in the payload: the header's sequence number wraps.
fn request(identifier: u16, number: u64) -> Vec<u8> {
    let payload = [MARK, number.to_be_bytes()].concat();
    let echo = IcmpEchoHeader { id: identifier, seq: number as u16 };
    let mut message = Icmpv4Header::with_checksum(Icmpv4Type::EchoRequest(echo), &payload).to_bytes().to_vec();
    message.extend(payload);
    message
}

/// The number in an IPv4 packet, if that is a reply to one of our requests.
fn reply(packet: &[u8], identifier: u16) -> Option<u64> {
    let packet = Ipv4Slice::from_slice(packet).ok()?;
    let message = Icmpv4Slice::from_slice(packet.payload().payload).ok()?;
    match message.icmp_type() {
        Icmpv4Type::EchoReply(echo) if echo.id == identifier => {}
        _ => return None,
    }
    let (mark, number) = message.payload().split_first_chunk::<8>()?;
    (*mark == MARK).then_some(())?;
    Some(u64::from_be_bytes(number.try_into().ok()?))
}

#[cfg(test)]
mod tests {
    use etherparse::PacketBuilder;

    use super::*;

    fn packet(icmp: Icmpv4Type, payload: &[u8]) -> Vec<u8> {
        let builder = PacketBuilder::ipv4([10, 0, 0, 1], [10, 0, 0, 2], 64).icmpv4(icmp);
        let mut packet = Vec::new();
        builder.write(&mut packet, payload).unwrap();
        packet
    }

    #[test]
    fn only_replies_to_our_requests_count() {
        let payload = [MARK, 70_000u64.to_be_bytes()].concat();
        let echo = |id| IcmpEchoHeader { id, seq: 4464 };
        assert_eq!(reply(&packet(Icmpv4Type::EchoReply(echo(7)), &payload), 7), Some(70_000));
        assert_eq!(reply(&packet(Icmpv4Type::EchoReply(echo(8)), &payload), 7), None);
        assert_eq!(reply(&packet(Icmpv4Type::EchoRequest(echo(7)), &payload), 7), None);
        assert_eq!(reply(&packet(Icmpv4Type::EchoReply(echo(7)), &[0; 16]), 7), None);
        assert_eq!(reply(&packet(Icmpv4Type::EchoReply(echo(7)), &payload[..15]), 7), None);
        assert_eq!(reply(&[], 7), None);
    }

    #[test]
    fn a_request_is_an_echo_request_with_a_good_checksum() {
        let message = request(7, 70_000);
        let parsed = Icmpv4Slice::from_slice(&message).unwrap();
        assert_eq!(parsed.icmp_type(), Icmpv4Type::EchoRequest(IcmpEchoHeader { id: 7, seq: 4464 }));
        assert_eq!(parsed.header(), Icmpv4Header::with_checksum(parsed.icmp_type(), parsed.payload()));
    }
}
