//! From a URI's host and port to socket addresses, and the rule for clear text.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, ToSocketAddrs, UdpSocket};
use std::sync::Arc;
use std::sync::mpsc;
use std::thread;

use crate::limits::RESOLVE_LIMIT;
use crate::{HostPort, Options, TransportError, Uri};

/// The addresses of `at`, of which there is at least one. They are resolved once: what was checked is what is used.
pub(crate) fn resolve(at: &HostPort) -> Result<Vec<SocketAddr>, TransportError> {
    let failed = |source| TransportError::Resolve { host: at.host.clone(), source };
    // getaddrinfo has no time limit of its own, so it runs where it can be left behind.
    let (sender, receiver) = mpsc::sync_channel(1);
    let name = (at.host.clone(), at.port);
    thread::Builder::new()
        .name("godwit-resolve".into())
        .spawn(move || sender.send(name.to_socket_addrs().map(Iterator::collect::<Vec<_>>)))
        .map_err(failed)?;
    let addresses = receiver
        .recv_timeout(RESOLVE_LIMIT)
        .unwrap_or_else(|_| Err(io::Error::new(io::ErrorKind::TimedOut, "the resolver does not answer")))
        .map_err(failed)?;
    if addresses.is_empty() {
        return Err(failed(io::Error::new(io::ErrorKind::NotFound, "the name has no address")));
    }
    Ok(addresses)
}

/// Like [`resolve`], for a transport that neither encrypts nor authenticates: every address must be this host's
/// loopback, or the user must have allowed it.
pub(crate) fn resolve_for_clear_text(
    uri: &Uri,
    at: &HostPort,
    options: Options,
) -> Result<Vec<SocketAddr>, TransportError> {
    let addresses = resolve(at)?;
    match addresses.iter().find(|address| !is_loopback(address.ip())) {
        Some(&address) if !options.insecure => Err(TransportError::ClearText { uri: Arc::new(uri.clone()), address }),
        _ => Ok(addresses),
    }
}

/// The address that a peer elsewhere can most likely reach us at, if we listen at `bound`: where that is the wildcard
/// address, the address of the interface that the default route leaves by.
pub(crate) fn reachable(bound: SocketAddr) -> SocketAddr {
    // Connecting a UDP socket sends nothing, it only chooses a route. The targets are reserved for documentation.
    let (wildcard, far_away): (IpAddr, SocketAddr) = match bound.ip() {
        ip if !ip.is_unspecified() => return bound,
        IpAddr::V4(_) => (Ipv4Addr::UNSPECIFIED.into(), (Ipv4Addr::new(192, 0, 2, 1), 9).into()),
        IpAddr::V6(_) => (Ipv6Addr::UNSPECIFIED.into(), (Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 1), 9).into()),
    };
    let outward = || -> io::Result<IpAddr> {
        let socket = UdpSocket::bind((wildcard, 0))?;
        socket.connect(far_away)?;
        Ok(socket.local_addr()?.ip())
    };
    // Without a default route the caller has to know.
    outward().map_or(bound, |ip| SocketAddr::new(ip, bound.port()))
}

fn is_loopback(ip: IpAddr) -> bool {
    // `::ffff:127.0.0.1` is IPv4's loopback.
    ip.to_canonical().is_loopback()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(host: &str, insecure: bool) -> Result<Vec<SocketAddr>, TransportError> {
        let at = HostPort { host: host.into(), port: 7000 };
        resolve_for_clear_text(&Uri::Tcp(at.clone()), &at, Options { insecure, ..Options::default() })
    }

    #[test]
    fn loopback_is_free() {
        for host in ["127.0.0.1", "127.8.9.1", "::1", "::ffff:127.0.0.1", "localhost"] {
            assert!(check(host, false).is_ok(), "{host}");
        }
    }

    #[test]
    fn clear_text_off_loopback_needs_leave() {
        for host in ["10.0.0.2", "0.0.0.0", "::", "fd00::2", "::ffff:10.0.0.2", "255.255.255.255"] {
            let message = check(host, false).unwrap_err().to_string();
            assert!(message.contains("--insecure") && message.contains("quic://"), "{message}");
            assert!(check(host, true).is_ok(), "{host}");
        }
    }

    #[test]
    fn only_the_wildcard_address_is_replaced() {
        for fixed in ["127.0.0.1:7000", "[::1]:7000", "192.0.2.7:1"] {
            let address = fixed.parse().unwrap();
            assert_eq!(reachable(address), address);
        }
        for wildcard in ["0.0.0.0:7000", "[::]:7000"] {
            let address: SocketAddr = wildcard.parse().unwrap();
            let reachable = reachable(address);
            assert_eq!((reachable.port(), reachable.is_ipv4()), (7000, address.is_ipv4()));
        }
    }

    #[test]
    fn a_name_that_does_not_resolve_is_named() {
        let message = check("no-such-host.invalid", true).unwrap_err().to_string();
        assert!(message.contains("no-such-host.invalid"), "{message}");
    }
}
