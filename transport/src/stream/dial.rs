//! Dialling over TCP and unix sockets.

use std::io::{self, Read};
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use godwit_core::{Channel, Dial, SessionToken};
use socket2::{Domain, SockAddr, Socket, Type};

use super::tcp;
use crate::preamble::{ANSWER_BYTES, Preamble, decode_answer};
use crate::{DialError, Uri};

/// A peer that answers more quickly than this is near: in the same site, as a rule. There the congestion control for long ways costs more
/// than it gains.
const NEAR: Duration = Duration::from_millis(2);

/// Dials over TCP.
pub(crate) struct TcpDial {
    uri: Arc<Uri>,
    addresses: Vec<SocketAddr>,
    /// Which address answered last; the others are tried after it.
    preferred: AtomicUsize,
    /// The peer was seen to be near.
    near: AtomicBool,
    /// Data channels send without a copy.
    zero_copy: bool,
}

impl TcpDial {
    /// `addresses` are the resolved ones of `uri`, at least one.
    pub(crate) fn new(uri: Uri, addresses: Vec<SocketAddr>, zero_copy: bool) -> Self {
        Self { uri: Arc::new(uri), addresses, preferred: AtomicUsize::new(0), near: AtomicBool::new(false), zero_copy }
    }

    fn open(&self, preamble: &Preamble, limit: Duration) -> io::Result<Channel> {
        let attempt = Attempt::new(&self.uri, limit);
        let socket = self.connect(&attempt)?;
        attempt.introduce(&socket, preamble)?;
        let zero_copy = self.zero_copy && matches!(preamble, Preamble::Data { .. });
        Ok(super::channel(socket, self.uri.to_string(), zero_copy))
    }

    fn connect(&self, attempt: &Attempt<'_>) -> Result<Socket, DialError> {
        let count = self.addresses.len();
        let first = self.preferred.load(Ordering::Relaxed);
        let mut last_error = None;
        for tried in 0..count {
            let at = (first + tried) % count;
            // An address that swallows packets must leave time for the others.
            let share = attempt.time_left()? / (count - tried) as u32;
            match self.connect_to(self.addresses[at], share) {
                Ok(socket) => {
                    let near = tcp::round_trip(&socket).is_some_and(|round_trip| round_trip < NEAR);
                    self.near.fetch_or(near, Ordering::Relaxed);
                    self.preferred.store(at, Ordering::Relaxed);
                    return Ok(socket);
                }
                Err(error) => last_error = Some(error),
            }
        }
        Err(attempt.failed(last_error.unwrap_or_else(|| io::ErrorKind::AddrNotAvailable.into())))
    }

    fn connect_to(&self, address: SocketAddr, limit: Duration) -> io::Result<Socket> {
        let socket = Socket::new(Domain::for_address(address), Type::STREAM, None)?;
        super::tune_tcp(&socket)?;
        if self.near.load(Ordering::Relaxed) {
            tcp::leave_bbr(&socket);
        }
        socket.connect_timeout(&address.into(), limit)?;
        Ok(socket)
    }
}

impl Dial for TcpDial {
    fn control(&self, limit: Duration) -> io::Result<Channel> {
        self.open(&Preamble::Control, limit)
    }

    fn control_again(&self, token: SessionToken, limit: Duration) -> io::Result<Channel> {
        self.open(&Preamble::ControlAgain { token }, limit)
    }

    fn data(&self, token: SessionToken, index: u16, limit: Duration) -> io::Result<Channel> {
        self.open(&Preamble::Data { token, index }, limit)
    }

    fn uri(&self) -> String {
        self.uri.to_string()
    }
}

/// Dials over a unix socket.
pub(crate) struct UnixDial {
    uri: Arc<Uri>,
    path: PathBuf,
}

impl UnixDial {
    pub(crate) fn new(uri: Uri, path: PathBuf) -> Self {
        Self { uri: Arc::new(uri), path }
    }

    fn open(&self, preamble: &Preamble, limit: Duration) -> io::Result<Channel> {
        let attempt = Attempt::new(&self.uri, limit);
        let socket = self.connect(&attempt)?;
        attempt.introduce(&socket, preamble)?;
        Ok(super::channel(socket, self.uri.to_string(), false))
    }

    fn connect(&self, attempt: &Attempt<'_>) -> Result<Socket, DialError> {
        let connect = |limit| {
            let socket = Socket::new(Domain::UNIX, Type::STREAM, None)?;
            super::tune_unix(&socket)?;
            // Connecting blocks while the listener's backlog is full; the send timeout bounds that.
            socket.set_write_timeout(Some(limit))?;
            socket.connect(&SockAddr::unix(&self.path)?)?;
            socket.set_write_timeout(None)?;
            Ok(socket)
        };
        connect(attempt.time_left()?).map_err(|error| attempt.failed(error))
    }
}

impl Dial for UnixDial {
    fn control(&self, limit: Duration) -> io::Result<Channel> {
        self.open(&Preamble::Control, limit)
    }

    fn control_again(&self, token: SessionToken, limit: Duration) -> io::Result<Channel> {
        self.open(&Preamble::ControlAgain { token }, limit)
    }

    fn data(&self, token: SessionToken, index: u16, limit: Duration) -> io::Result<Channel> {
        self.open(&Preamble::Data { token, index }, limit)
    }

    fn uri(&self) -> String {
        self.uri.to_string()
    }
}

/// One attempt to open a channel: whom it is for and how much time it has.
struct Attempt<'a> {
    uri: &'a Arc<Uri>,
    limit: Duration,
    deadline: Instant,
}

impl<'a> Attempt<'a> {
    fn new(uri: &'a Arc<Uri>, limit: Duration) -> Self {
        Self { uri, limit, deadline: Instant::now() + limit }
    }

    /// What is left of the limit, never zero: sockets take zero for *no limit*.
    fn time_left(&self) -> Result<Duration, DialError> {
        let left = self.deadline.saturating_duration_since(Instant::now());
        if left.is_zero() { Err(self.timed_out()) } else { Ok(left) }
    }

    /// Shows the preamble and waits to be let in.
    fn introduce(&self, socket: &Socket, preamble: &Preamble) -> Result<(), DialError> {
        let exchange = || -> io::Result<Result<(), DialError>> {
            socket.send_with_flags(&preamble.encode(), libc::MSG_NOSIGNAL)?;
            let mut answer = [0; ANSWER_BYTES];
            let mut filled = 0;
            while filled < ANSWER_BYTES {
                socket.set_read_timeout(Some(match self.time_left() {
                    Ok(left) => left,
                    Err(error) => return Ok(Err(error)),
                }))?;
                match (&mut &*socket).read(&mut answer[filled..]) {
                    Ok(0) => return Ok(Err(self.not_godwit("it closed the connection without an answer".into()))),
                    Ok(read) => filled += read,
                    Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                    Err(error) => return Err(error),
                }
            }
            socket.set_read_timeout(None)?;
            Ok(match decode_answer(&answer) {
                Some(answer) => answer.map_err(|reason| DialError::Refused { uri: self.uri.clone(), reason }),
                None => Err(self.not_godwit(format!("it answered {:?}", answer.escape_ascii().to_string()))),
            })
        };
        exchange().map_err(|error| self.failed(error))?
    }

    fn failed(&self, source: io::Error) -> DialError {
        match source.kind() {
            io::ErrorKind::TimedOut | io::ErrorKind::WouldBlock => self.timed_out(),
            _ => DialError::Connect { uri: self.uri.clone(), source },
        }
    }

    fn timed_out(&self) -> DialError {
        DialError::TimedOut { uri: self.uri.clone(), limit: self.limit }
    }

    fn not_godwit(&self, what: String) -> DialError {
        DialError::NotGodwit { uri: self.uri.clone(), what }
    }
}
