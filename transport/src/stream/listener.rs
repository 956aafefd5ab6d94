//! The accepting end of TCP and unix sockets: one thread that polls.
//!
//! The listening socket and every connection in the preamble stage are polled together, without a thread each, so a
//! stranger costs one descriptor and 32 bytes until its time is up or a newer one needs its place.

use std::io::{self, Read};
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
use socket2::{SockAddr, Socket};

use crate::gate::{Gate, refusal_of};
use crate::limits::{PREAMBLE_LIMIT, PREAMBLES_AT_ONCE};
use crate::preamble::{PREAMBLE_BYTES, Preamble, PreambleError, encode_answer};

/// After a failed accept (out of descriptors, for example) the listener rests this long.
const ACCEPT_BACKOFF: Duration = Duration::from_millis(100);

/// Connections that the kernel may hold for us.
const BACKLOG: i32 = 128;

/// What differs between TCP and unix.
#[derive(Clone)]
pub(crate) enum Family {
    Tcp,
    /// With the listener's URI: the peers of a unix socket have no address.
    Unix(String),
}

impl Family {
    fn tune(&self, socket: &Socket) -> io::Result<()> {
        match self {
            Self::Tcp => super::tune_tcp(socket),
            Self::Unix(_) => super::tune_unix(socket),
        }
    }

    fn peer(&self, address: &SockAddr) -> String {
        match (self, address.as_socket()) {
            (Self::Unix(uri), _) => uri.clone(),
            (Self::Tcp, Some(address)) => format!("tcp://{address}"),
            (Self::Tcp, None) => "tcp://?".into(),
        }
    }
}

/// A running accept thread; dropping it ends the thread and closes the listening socket.
pub(crate) struct StreamListener {
    wake: Arc<OwnedFd>,
    thread: Option<JoinHandle<()>>,
}

impl StreamListener {
    /// Starts to accept on `socket`, which is bound.
    pub(crate) fn start(socket: Socket, family: Family, gate: Arc<Gate>) -> io::Result<Self> {
        socket.listen(BACKLOG)?;
        socket.set_nonblocking(true)?;
        let wake = Arc::new(eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?);
        let acceptor = Acceptor { socket, family, gate, wake: Arc::clone(&wake), arrivals: Vec::new(), rest: None };
        let thread = thread::Builder::new().name("godwit-accept".into()).spawn(move || acceptor.run())?;
        Ok(Self { wake, thread: Some(thread) })
    }
}

impl Drop for StreamListener {
    /// The gate must be closed before.
    fn drop(&mut self) {
        // Fails only if the counter is full, and then the thread is awake.
        let _ = rustix::io::write(&*self.wake, &1u64.to_ne_bytes());
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// A connection in the preamble stage.
struct Arrival {
    socket: Socket,
    peer: String,
    bytes: [u8; PREAMBLE_BYTES],
    filled: usize,
    deadline: Instant,
}

struct Acceptor {
    socket: Socket,
    family: Family,
    gate: Arc<Gate>,
    wake: Arc<OwnedFd>,
    /// Oldest first.
    arrivals: Vec<Arrival>,
    /// Accept nothing before this time.
    rest: Option<Instant>,
}

impl Acceptor {
    fn run(mut self) {
        loop {
            let ready = match self.wait() {
                Ok(ready) => ready,
                Err(error) => {
                    tracing::warn!("the listener cannot poll: {error}");
                    thread::sleep(ACCEPT_BACKOFF);
                    continue;
                }
            };
            if self.gate.is_closed() {
                return;
            }
            self.hear(&ready.arrivals);
            self.expire();
            if ready.listener {
                self.accept();
            }
        }
    }

    /// Sleeps until something can be done.
    fn wait(&mut self) -> io::Result<Ready> {
        let now = Instant::now();
        self.rest = self.rest.filter(|until| *until > now);
        let until = self.rest.into_iter().chain(self.arrivals.iter().map(|arrival| arrival.deadline)).min();
        // Rounded up: waking too early would spin.
        let timeout = until.map(|until| until.saturating_duration_since(now) + Duration::from_millis(1));
        let timeout = timeout.and_then(|timeout| Timespec::try_from(timeout).ok());

        let mut polled = Vec::with_capacity(2 + self.arrivals.len());
        polled.push(PollFd::new(&*self.wake, PollFlags::IN));
        let accepting = if self.rest.is_none() { PollFlags::IN } else { PollFlags::empty() };
        polled.push(PollFd::from_borrowed_fd(self.socket.as_fd(), accepting));
        polled.extend(self.arrivals.iter().map(|a| PollFd::from_borrowed_fd(a.socket.as_fd(), PollFlags::IN)));
        match poll(&mut polled, timeout.as_ref()) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
        let ready = |polled: &PollFd<'_>| !polled.revents().is_empty();
        Ok(Ready { listener: ready(&polled[1]), arrivals: polled[2..].iter().map(ready).collect() })
    }

    /// Takes every connection that waits in the kernel.
    fn accept(&mut self) {
        loop {
            match self.socket.accept() {
                Ok((socket, address)) => self.welcome(socket, &address),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                // The peer left again before it was accepted.
                Err(error) if error.kind() == io::ErrorKind::ConnectionAborted => {}
                Err(error) => {
                    tracing::warn!("cannot accept connections for now: {error}");
                    self.rest = Some(Instant::now() + ACCEPT_BACKOFF);
                    return;
                }
            }
        }
    }

    fn welcome(&mut self, socket: Socket, address: &SockAddr) {
        let peer = self.family.peer(address);
        if let Err(error) = self.family.tune(&socket).and_then(|()| socket.set_nonblocking(true)) {
            return self.gate.turn_away(&peer, error);
        }
        if self.arrivals.len() >= PREAMBLES_AT_ONCE {
            let oldest = self.arrivals.remove(0);
            self.gate.turn_away(&oldest.peer, "too many connections wait and it is the oldest");
        }
        let deadline = Instant::now() + PREAMBLE_LIMIT;
        self.arrivals.push(Arrival { socket, peer, bytes: [0; PREAMBLE_BYTES], filled: 0, deadline });
    }

    /// Reads from the arrivals that have something to say.
    fn hear(&mut self, ready: &[bool]) {
        let mut ready = ready.iter().copied();
        let arrivals = std::mem::take(&mut self.arrivals);
        for mut arrival in arrivals {
            if !ready.next().unwrap_or(false) {
                self.arrivals.push(arrival);
                continue;
            }
            match arrival.read() {
                Heard::Part => self.arrivals.push(arrival),
                Heard::Preamble(preamble) => self.decide(arrival, &preamble),
                Heard::Nonsense(error) => {
                    self.gate.turn_away(&arrival.peer, &error);
                    if let Some(refusal) = refusal_of(&error) {
                        arrival.answer(Err(refusal));
                    }
                }
                Heard::Broken(error) => self.gate.turn_away(&arrival.peer, error),
            }
        }
    }

    fn decide(&self, arrival: Arrival, preamble: &Preamble) {
        match self.gate.admit(preamble) {
            Ok(place) => {
                if !arrival.answer(Ok(())) {
                    return self.gate.turn_away(&arrival.peer, "it left before it was answered");
                }
                match arrival.socket.set_nonblocking(false) {
                    Ok(()) => self.gate.deliver(place, super::channel(arrival.socket, arrival.peer, false)),
                    Err(error) => self.gate.turn_away(&arrival.peer, error),
                }
            }
            Err(refusal) => {
                self.gate.turn_away(&arrival.peer, format_args!("told it: {refusal}"));
                arrival.answer(Err(refusal));
            }
        }
    }

    /// Turns away whoever had its time.
    fn expire(&mut self) {
        let now = Instant::now();
        self.arrivals.retain(|arrival| {
            let in_time = arrival.deadline > now;
            if !in_time {
                let reason = format!("{} bytes of its preamble came within {PREAMBLE_LIMIT:?}", arrival.filled);
                self.gate.turn_away(&arrival.peer, reason);
            }
            in_time
        });
    }
}

struct Ready {
    listener: bool,
    arrivals: Vec<bool>,
}

enum Heard {
    Part,
    Preamble(Preamble),
    Nonsense(PreambleError),
    Broken(io::Error),
}

impl Arrival {
    /// Reads what is there, never more than a preamble.
    fn read(&mut self) -> Heard {
        loop {
            match (&self.socket).read(&mut self.bytes[self.filled..]) {
                Ok(0) => return Heard::Nonsense(PreambleError::Truncated { got: self.filled }),
                Ok(read) => {
                    self.filled += read;
                    match Preamble::decode(&self.bytes[..self.filled]) {
                        Ok(preamble) => return Heard::Preamble(preamble),
                        Err(PreambleError::Truncated { .. }) => {}
                        Err(error) => return Heard::Nonsense(error),
                    }
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Heard::Part,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Heard::Broken(error),
            }
        }
    }

    /// Answers; the 16 bytes fit into the buffer of a socket on which nothing was sent. Says whether they did.
    fn answer(&self, answer: crate::preamble::Answer) -> bool {
        let bytes = encode_answer(answer);
        matches!(self.socket.send_with_flags(&bytes, libc::MSG_NOSIGNAL), Ok(sent) if sent == bytes.len())
    }
}
