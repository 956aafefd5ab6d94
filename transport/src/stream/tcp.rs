//! What the kernel knows of a TCP connection, and when it is to wake up who reads.

use std::io;
use std::os::fd::AsRawFd;
use std::time::Duration;

use socket2::Socket;

/// Offset of `tcpi_rwnd_limited` (u64, microseconds) in the kernel's `struct tcp_info` (include/uapi/linux/tcp.h, since Linux
/// 4.10); that of the libc crate ends before it. The struct only ever grows at its end.
const RWND_LIMITED_AT: usize = 176;
const LENGTH: usize = RWND_LIMITED_AT + size_of::<u64>();

/// How long the peer's receive window, and nothing else, has kept bytes from being sent. `None`: no TCP, or a kernel that does not say.
pub(super) fn receive_window_limited(socket: &Socket) -> Option<Duration> {
    let mut info = [0u8; LENGTH];
    let mut length = LENGTH as libc::socklen_t;
    // SAFETY: the descriptor is open as long as `socket` is borrowed, and the kernel writes at most `length` bytes to `info`.
    let result = unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            libc::IPPROTO_TCP,
            libc::TCP_INFO,
            info.as_mut_ptr().cast(),
            &raw mut length,
        )
    };
    if result != 0 || (length as usize) < LENGTH {
        return None;
    }
    let microseconds = info[RWND_LIMITED_AT..].first_chunk().copied().map(u64::from_ne_bytes)?;
    Some(Duration::from_micros(microseconds))
}

/// Whoever reads from the socket is woken up once so many bytes are there (`SO_RCVLOWAT`, socket(7)), or no more can come: the peer has
/// ended, the connection is broken, or the window is full. Reads of fewer bytes are not woken up before either.
pub(super) fn wake_for(socket: &Socket, bytes: usize) -> io::Result<()> {
    let bytes = bytes.clamp(1, i32::MAX as usize) as libc::c_int;
    // SAFETY: the descriptor is open as long as `socket` is borrowed, and the kernel reads the length given of `bytes`.
    let result = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_RCVLOWAT,
            (&raw const bytes).cast(),
            size_of_val(&bytes) as libc::socklen_t,
        )
    };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Keeps a connection from taking time off while the guest stands still. About once in ten seconds BBR sends next to nothing for 200 ms to
/// measure the round trip (PROBE_RTT: draft-cardwell-iccrg-bbr-congestion-control-00, 4.3.5); CUBIC and Reno never do. Where neither is
/// allowed (`net.ipv4.tcp_allowed_congestion_control`), the connection stays as it is.
pub(super) fn do_not_probe(socket: &Socket) {
    if socket.tcp_congestion().is_ok_and(|name| name.starts_with(b"bbr")) {
        let _ = socket.set_tcp_congestion(b"cubic").or_else(|_| socket.set_tcp_congestion(b"reno"));
    }
}

#[cfg(test)]
mod tests {
    use std::io::Read;
    use std::net::{TcpListener, TcpStream};
    use std::thread;

    use socket2::{Domain, Type};

    use super::*;

    #[test]
    fn a_peer_that_does_not_read_is_seen_to_hold_up() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let socket = Socket::from(TcpStream::connect(listener.local_addr().unwrap()).unwrap());
        let (mut peer, _) = listener.accept().unwrap();
        let before = receive_window_limited(&socket).unwrap();
        let reading = thread::spawn(move || {
            thread::sleep(Duration::from_millis(300));
            std::io::copy(&mut Read::by_ref(&mut peer), &mut std::io::sink()).unwrap()
        });
        let bytes = vec![1; 1 << 20];
        // More than any buffers hold.
        (0..32).for_each(|_| std::io::Write::write_all(&mut &socket, &bytes).unwrap());
        let held_up = receive_window_limited(&socket).unwrap() - before;
        drop(socket);
        assert_eq!(reading.join().unwrap(), 32 << 20);
        assert!(held_up >= Duration::from_millis(100), "{held_up:?}");
    }

    #[test]
    fn who_waits_for_much_is_not_woken_up_for_little_and_hears_of_the_end() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let mut peer = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let socket = Socket::from(listener.accept().unwrap().0);
        wake_for(&socket, 64 << 10).unwrap();
        let writing = thread::spawn(move || {
            for _ in 0..32 {
                std::io::Write::write_all(&mut peer, &[1; 2 << 10]).unwrap();
                thread::sleep(Duration::from_millis(2));
            }
            // Less than is waited for, and then the end.
            std::io::Write::write_all(&mut peer, &[1; 100]).unwrap();
        });
        let mut bytes = vec![0; 64 << 10];
        assert_eq!((&socket).read(&mut bytes).unwrap(), 64 << 10, "in one go");
        assert_eq!((&socket).read(&mut bytes).unwrap(), 100);
        assert_eq!((&socket).read(&mut bytes).unwrap(), 0);
        writing.join().unwrap();
    }

    #[test]
    fn a_connection_that_would_probe_does_not_and_others_stay_as_they_are() {
        let name = |socket: &Socket| {
            let name = socket.tcp_congestion().unwrap();
            String::from_utf8(name).unwrap().trim_end_matches('\0').to_owned()
        };
        let after = |set: &[u8]| {
            let socket = Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
            socket.set_tcp_congestion(set).unwrap();
            do_not_probe(&socket);
            name(&socket)
        };
        assert_eq!(after(b"reno"), "reno");
        // A kernel without BBR has nothing to change.
        if Socket::new(Domain::IPV4, Type::STREAM, None).unwrap().set_tcp_congestion(b"bbr").is_ok() {
            assert!(["cubic", "reno"].contains(&after(b"bbr").as_str()));
        }
        do_not_probe(&Socket::new(Domain::UNIX, Type::STREAM, None).unwrap());
    }

    #[test]
    fn nothing_is_known_of_unix_sockets() {
        assert_eq!(receive_window_limited(&Socket::new(Domain::UNIX, Type::STREAM, None).unwrap()), None);
    }
}
