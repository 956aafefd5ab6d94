//! What the kernel knows of a TCP connection.

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
    fn nothing_is_known_of_unix_sockets() {
        assert_eq!(receive_window_limited(&Socket::new(Domain::UNIX, Type::STREAM, None).unwrap()), None);
    }
}
