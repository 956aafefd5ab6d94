//! What the kernel knows of a TCP connection, and when it is to wake up who reads.

use std::io;
use std::mem::{MaybeUninit, offset_of};
use std::os::fd::AsRawFd;
use std::time::Duration;

use godwit_core::Delivery;
use rustix::event::{PollFd, PollFlags, poll};
use rustix::net::RecvFlags;
use socket2::Socket;
use vm_memory::VolatileSlice;

/// How what is written gets to the peer. `None`: no TCP, or a kernel that does not say (Linux before 4.10).
pub(super) fn delivery(socket: &Socket) -> Option<Delivery> {
    let (info, length) = info(socket)?;
    (length >= offset_of!(libc::tcp_info, tcpi_sndbuf_limited)).then(|| Delivery {
        held_up_by_peer: Duration::from_micros(info.tcpi_rwnd_limited),
        bytes_per_s: info.tcpi_delivery_rate,
    })
}

/// How long the peer takes to answer, smoothed. `None`: as above.
pub(super) fn round_trip(socket: &Socket) -> Option<Duration> {
    Some(Duration::from_micros(info(socket)?.0.tcpi_rtt.into()))
}

/// What the kernel tells (tcp(7)), and how many bytes it has filled: older ones know less.
fn info(socket: &Socket) -> Option<(libc::tcp_info, usize)> {
    let mut info = MaybeUninit::<libc::tcp_info>::zeroed();
    let mut length = size_of::<libc::tcp_info>() as libc::socklen_t;
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
    // SAFETY: all of its fields are numbers, for which zero is a value.
    (result == 0).then(|| (unsafe { info.assume_init() }, length as usize))
}

/// Sets an option of the socket layer that is a number (socket(7)).
pub(super) fn set_option(socket: &Socket, option: libc::c_int, value: libc::c_int) -> io::Result<()> {
    // SAFETY: the descriptor is open as long as `socket` is borrowed, and the kernel reads the length given of `value`.
    let result = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            option,
            (&raw const value).cast(),
            size_of_val(&value) as libc::socklen_t,
        )
    };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// The reading side of a connection. Whoever waits is woken up once what is awaited is there, or no more can come: the peer has ended, the
/// connection is broken, or the window is full.
pub(super) struct Incoming {
    /// What the socket has been told (`SO_RCVLOWAT`, socket(7)).
    low_water_bytes: usize,
}

impl Incoming {
    /// That of a new connection.
    pub(super) fn new() -> Self {
        Self { low_water_bytes: 1 }
    }

    /// Reads some bytes. If there are none yet, waits for `awaited_bytes`.
    pub(super) fn read(&mut self, socket: &Socket, buffer: &mut [u8], awaited_bytes: usize) -> io::Result<usize> {
        self.read_by(socket, awaited_bytes, || Ok(rustix::net::recv(socket, &mut *buffer, RecvFlags::DONTWAIT)?.0))
    }

    /// The same, straight into guest memory.
    pub(super) fn read_volatile(
        &mut self,
        socket: &Socket,
        buffer: &mut VolatileSlice<'_, ()>,
        awaited_bytes: usize,
    ) -> io::Result<usize> {
        self.read_by(socket, awaited_bytes, || {
            let memory = buffer.ptr_guard_mut();
            // SAFETY: the descriptor is open as long as `socket` is borrowed, and the kernel writes at most `len` bytes to memory that
            // the slice stands for and the guard keeps mapped.
            let read =
                unsafe { libc::recv(socket.as_raw_fd(), memory.as_ptr().cast(), memory.len(), libc::MSG_DONTWAIT) };
            usize::try_from(read).map_err(|_| io::Error::last_os_error())
        })
    }

    /// `read` does not wait. One that did would take in what there is, and then be woken up only once as much as was awaited has come
    /// *again*, which may be more than the peer has left to send.
    fn read_by(
        &mut self,
        socket: &Socket,
        awaited_bytes: usize,
        mut read: impl FnMut() -> io::Result<usize>,
    ) -> io::Result<usize> {
        loop {
            match read() {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                result => return result,
            }
            self.wake_for(socket, awaited_bytes)?;
            poll(&mut [PollFd::new(socket, PollFlags::IN)], None)?;
        }
    }

    fn wake_for(&mut self, socket: &Socket, bytes: usize) -> io::Result<()> {
        if bytes == self.low_water_bytes {
            return Ok(());
        }
        set_option(socket, libc::SO_RCVLOWAT, bytes.clamp(1, i32::MAX as usize) as libc::c_int)?;
        self.low_water_bytes = bytes;
        Ok(())
    }
}

/// Keeps a connection from being paced by BBR, which costs more than it gains between hosts that are near each other, and while the guest
/// stands still:
/// - each packet waits for a timer of its own: with both ends on two cores a fifth of the sender's time;
/// - about once in ten seconds next to nothing is sent for 200 ms to measure the round trip (PROBE_RTT:
///   draft-cardwell-iccrg-bbr-congestion-control-00, 4.3.5). CUBIC and Reno never do.
///
/// The first is for connections that are not open yet: later the kernel keeps the timer. Where neither CUBIC nor Reno is allowed
/// (`net.ipv4.tcp_allowed_congestion_control`), the connection stays as it is.
pub(super) fn leave_bbr(socket: &Socket) {
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
        let before = delivery(&socket).unwrap().held_up_by_peer;
        let reading = thread::spawn(move || {
            thread::sleep(Duration::from_millis(300));
            std::io::copy(&mut Read::by_ref(&mut peer), &mut std::io::sink()).unwrap()
        });
        let bytes = vec![1; 1 << 20];
        // More than any buffers hold.
        (0..32).for_each(|_| std::io::Write::write_all(&mut &socket, &bytes).unwrap());
        let held_up = delivery(&socket).unwrap().held_up_by_peer - before;
        drop(socket);
        assert_eq!(reading.join().unwrap(), 32 << 20);
        assert!(held_up >= Duration::from_millis(100), "{held_up:?}");
    }

    fn connected() -> (TcpStream, Socket) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let peer = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        peer.set_nodelay(true).unwrap();
        (peer, Socket::from(listener.accept().unwrap().0))
    }

    #[test]
    fn who_waits_for_much_is_not_woken_up_for_little_and_hears_of_the_end() {
        let (mut peer, socket) = connected();
        let (mut bytes, mut incoming) = (vec![0; 64 << 10], Incoming::new());
        let woken_up = |limit_ms: i64| {
            let limit = rustix::event::Timespec { tv_sec: 0, tv_nsec: limit_ms * 1_000_000 };
            poll(&mut [PollFd::new(&socket, PollFlags::IN)], Some(&limit)).unwrap() == 1
        };
        incoming.wake_for(&socket, 64 << 10).unwrap();
        std::io::Write::write_all(&mut peer, &[1; 2 << 10]).unwrap();
        assert!(!woken_up(50), "little is there");
        std::io::Write::write_all(&mut peer, &[1; 62 << 10]).unwrap();
        poll(&mut [PollFd::new(&socket, PollFlags::IN)], None).unwrap();
        assert_eq!(incoming.read(&socket, &mut bytes, 64 << 10).unwrap(), 64 << 10, "in one go");
        // Less than is waited for, and then the end.
        std::io::Write::write_all(&mut peer, &[1; 100]).unwrap();
        drop(peer);
        assert_eq!(incoming.read(&socket, &mut bytes, 64 << 10).unwrap(), 100);
        assert_eq!(incoming.read(&socket, &mut bytes, 64 << 10).unwrap(), 0);
    }

    #[test]
    fn who_has_read_a_part_is_woken_up_for_the_rest_though_nothing_follows() {
        const FIRST: usize = 60 << 10;
        const SECOND: usize = 1 << 10;
        let (mut peer, socket) = connected();
        std::io::Write::write_all(&mut peer, &[1; FIRST]).unwrap();
        let (sender, read) = std::sync::mpsc::channel();
        let reading = thread::spawn(move || {
            let mut bytes = vec![0; FIRST + SECOND];
            let (mut incoming, mut done) = (Incoming::new(), 0);
            while done < FIRST + SECOND {
                let mut rest = VolatileSlice::from(&mut bytes[done..]);
                let awaited = rest.len();
                done += incoming.read_volatile(&socket, &mut rest, awaited).unwrap();
            }
            sender.send(done).unwrap();
        });
        // Long enough for the reader to be waiting.
        thread::sleep(Duration::from_millis(50));
        std::io::Write::write_all(&mut peer, &[2; SECOND]).unwrap();
        let done = read.recv_timeout(Duration::from_secs(10));
        // Ends the reader, also one that would wait for ever.
        drop(peer);
        let _ = reading.join();
        assert_eq!(done, Ok(FIRST + SECOND));
    }

    #[test]
    fn a_connection_leaves_bbr_and_others_stay_as_they_are() {
        let name = |socket: &Socket| {
            let name = socket.tcp_congestion().unwrap();
            String::from_utf8(name).unwrap().trim_end_matches('\0').to_owned()
        };
        let after = |set: &[u8]| {
            let socket = Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
            socket.set_tcp_congestion(set).unwrap();
            leave_bbr(&socket);
            name(&socket)
        };
        assert_eq!(after(b"reno"), "reno");
        // A kernel without BBR has nothing to change.
        if Socket::new(Domain::IPV4, Type::STREAM, None).unwrap().set_tcp_congestion(b"bbr").is_ok() {
            assert!(["cubic", "reno"].contains(&after(b"bbr").as_str()));
        }
        leave_bbr(&Socket::new(Domain::UNIX, Type::STREAM, None).unwrap());
    }

    #[test]
    fn a_round_trip_on_one_host_is_short() {
        let (_peer, socket) = connected();
        assert!(round_trip(&socket).unwrap() < Duration::from_secs(1));
    }

    #[test]
    fn nothing_is_known_of_unix_sockets() {
        let socket = Socket::new(Domain::UNIX, Type::STREAM, None).unwrap();
        assert_eq!((delivery(&socket), round_trip(&socket)), (None, None));
    }
}
