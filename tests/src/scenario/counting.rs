//! A TCP connection over which both ends count: each sends 1, 2, 3, … at a steady pace, and checks what the other sends.

use std::io::{self, ErrorKind, Read, Write};
use std::net::{Ipv4Addr, Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, ensure};

use crate::netns::Namespace;
use crate::scenario::place;
use crate::wait;

/// Between two numbers. In each direction a number and its acknowledgement pass the guest's NICs four times: every 10 ms, that alone would keep an
/// emulated processor busy.
const PERIOD: Duration = Duration::from_millis(50);

/// How long a connection may be silent before it counts as broken: more than any pause, with what TCP waits before it
/// tries again.
const SILENCE_LIMIT: Duration = Duration::from_secs(60);

/// How long the last numbers may take to arrive.
const FINISH_LIMIT: Duration = Duration::from_secs(30);

/// Why what arrived is not what was sent.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum CountError {
    /// A number is missing, or came twice, or out of order.
    #[error("{found} followed {after}")]
    NotConsecutive {
        /// The last good number.
        after: u64,
        /// What came instead of the next one.
        found: u64,
    },
    /// Bytes at the end that are no whole number.
    #[error("the stream ended inside a number, after {after}")]
    Torn {
        /// The last whole number.
        after: u64,
    },
}

/// Checks numbers that arrive as a stream of bytes in pieces of any size.
#[derive(Debug, Default)]
pub struct Checker {
    last: u64,
    pending: Vec<u8>,
}

impl Checker {
    /// Takes in the next piece and gives the last good number.
    pub fn take(&mut self, bytes: &[u8]) -> Result<u64, CountError> {
        self.pending.extend_from_slice(bytes);
        let (numbers, rest) = self.pending.as_chunks::<8>();
        for number in numbers {
            let found = u64::from_be_bytes(*number);
            if found != self.last + 1 {
                return Err(CountError::NotConsecutive { after: self.last, found });
            }
            self.last = found;
        }
        self.pending = rest.to_vec();
        Ok(self.last)
    }

    /// The stream has ended.
    pub fn end(&self) -> Result<u64, CountError> {
        if self.pending.is_empty() { Ok(self.last) } else { Err(CountError::Torn { after: self.last }) }
    }
}

/// The two ends of one connection.
pub struct CountingConnection {
    client: End,
    server: End,
}

/// How a connection stands.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Standing {
    /// The last number that the client has received.
    pub client_received: u64,
    /// The last number that the server has received.
    pub server_received: u64,
    /// Why the connection is broken, if it is.
    pub broken: Option<String>,
    /// What was wrong with the numbers, if something was.
    pub wrong: Option<String>,
}

impl CountingConnection {
    /// Connects from `client` to `address` in `server` and begins to count.
    pub fn start(client: &Namespace, server: &Namespace, address: Ipv4Addr) -> Result<Self> {
        let listen = || TcpListener::bind((address, 0)).with_context(|| format!("cannot listen at {address}"));
        let listener = place::inside(server, listen)?;
        let address: SocketAddr = listener.local_addr()?;
        let connected = place::connect(client, address, SILENCE_LIMIT)?;
        listener.set_nonblocking(true)?;
        let own = connected.local_addr()?;
        let accepted = wait::until("the connection arrives", place::CONNECT_LIMIT, || match listener.accept() {
            Ok((stream, peer)) => Ok((peer == own).then_some(stream)),
            Err(error) if error.kind() == ErrorKind::WouldBlock => Ok(None),
            Err(error) => Err(error.into()),
        })?;
        accepted.set_nonblocking(false)?;
        accepted.set_nodelay(true)?;
        accepted.set_read_timeout(Some(SILENCE_LIMIT))?;
        accepted.set_write_timeout(Some(SILENCE_LIMIT))?;
        Ok(Self { client: End::start(connected)?, server: End::start(accepted)? })
    }

    /// How the connection stands now.
    pub fn standing(&self) -> Standing {
        let either = |look: fn(&Counts) -> Option<String>| {
            let named = |name: &str, end: &End| look(&end.counts).map(|what| format!("at the {name}: {what}"));
            named("client", &self.client).or_else(|| named("server", &self.server))
        };
        Standing {
            client_received: self.client.counts.received.load(Ordering::Relaxed),
            server_received: self.server.counts.received.load(Ordering::Relaxed),
            broken: either(|counts| get(&counts.broken)),
            wrong: either(|counts| get(&counts.wrong)),
        }
    }

    /// Waits until numbers have arrived at both ends that were sent after this call began.
    pub fn wait_for_progress(&self, limit: Duration) -> Result<()> {
        let (to_server, to_client) = (self.client.counts.sent(), self.server.counts.sent());
        wait::until_true("numbers arrive at both ends", limit, || {
            let now = self.standing();
            ensure!(now.broken.is_none() && now.wrong.is_none(), "{now:?}");
            Ok(now.server_received > to_server && now.client_received > to_client)
        })
    }

    /// Has both ends stop and say what they sent last, and fails unless exactly that has arrived.
    pub fn finish(mut self) -> Result<Standing> {
        let deadline = Instant::now() + FINISH_LIMIT;
        self.client.counts.stop.store(true, Ordering::Relaxed);
        self.server.counts.stop.store(true, Ordering::Relaxed);
        self.client.join(deadline)?;
        self.server.join(deadline)?;
        let standing = self.standing();
        let sent = (self.server.counts.sent(), self.client.counts.sent());
        ensure!(standing.broken.is_none() && standing.wrong.is_none(), "{standing:?}");
        ensure!(
            (standing.client_received, standing.server_received) == sent,
            "not all that was sent has arrived: {sent:?} sent, {standing:?}"
        );
        Ok(standing)
    }

    /// Breaks the connection at the client, for tests.
    pub fn reset(&self) {
        let _ = self.client.stream.shutdown(Shutdown::Both);
    }
}

/// One end: a thread that sends and one that receives.
struct End {
    stream: TcpStream,
    counts: Arc<Counts>,
    threads: Vec<JoinHandle<()>>,
}

#[derive(Default)]
struct Counts {
    stop: AtomicBool,
    sent: AtomicU64,
    received: AtomicU64,
    broken: Mutex<Option<String>>,
    wrong: Mutex<Option<String>>,
}

impl End {
    fn start(stream: TcpStream) -> Result<Self> {
        let counts = Arc::new(Counts::default());
        let (sending, receiving) = (counts.clone(), counts.clone());
        let (out, inward) = (stream.try_clone()?, stream.try_clone()?);
        let threads = vec![
            thread::spawn(move || sending.note(sending.send(out))),
            thread::spawn(move || receiving.note(receiving.receive(inward))),
        ];
        Ok(Self { stream, counts, threads })
    }

    /// Waits for both threads, which end by themselves once both ends have been told to stop.
    fn join(&mut self, deadline: Instant) -> Result<()> {
        while self.threads.iter().any(|thread| !thread.is_finished()) {
            ensure!(Instant::now() < deadline, "the last numbers have not arrived within {FINISH_LIMIT:?}");
            thread::sleep(PERIOD);
        }
        self.threads.drain(..).try_for_each(|thread| thread.join().map_err(|_| anyhow!("a counting thread panicked")))
    }
}

impl Drop for End {
    fn drop(&mut self) {
        self.counts.stop.store(true, Ordering::Relaxed);
        let _ = self.stream.shutdown(Shutdown::Both);
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
    }
}

impl Counts {
    fn sent(&self) -> u64 {
        self.sent.load(Ordering::Relaxed)
    }

    fn note(&self, ended: io::Result<()>) {
        if let Err(error) = ended {
            set(&self.broken, error.to_string());
        }
    }

    fn send(&self, mut stream: TcpStream) -> io::Result<()> {
        while !self.stop.load(Ordering::Relaxed) {
            let number = self.sent() + 1;
            stream.write_all(&number.to_be_bytes())?;
            self.sent.store(number, Ordering::Relaxed);
            thread::sleep(PERIOD);
        }
        stream.shutdown(Shutdown::Write)
    }

    fn receive(&self, mut stream: TcpStream) -> io::Result<()> {
        let mut checker = Checker::default();
        let mut buffer = [0; 4096];
        loop {
            let length = match stream.read(&mut buffer) {
                Err(error) if error.kind() == ErrorKind::WouldBlock => {
                    return Err(io::Error::other(format!("silent for {SILENCE_LIMIT:?}")));
                }
                read => read?,
            };
            let checked = if length == 0 { checker.end() } else { checker.take(&buffer[..length]) };
            match checked {
                Ok(number) => self.received.store(number, Ordering::Relaxed),
                Err(error) => {
                    set(&self.wrong, error.to_string());
                    return Ok(());
                }
            }
            if length == 0 {
                return if self.stop.load(Ordering::Relaxed) { Ok(()) } else { Err(ErrorKind::UnexpectedEof.into()) };
            }
        }
    }
}

fn set(slot: &Mutex<Option<String>>, what: String) {
    slot.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(what);
}

fn get(slot: &Mutex<Option<String>>) -> Option<String> {
    slot.lock().unwrap_or_else(PoisonError::into_inner).clone()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn stream(numbers: impl IntoIterator<Item = u64>) -> Vec<u8> {
        numbers.into_iter().flat_map(u64::to_be_bytes).collect()
    }

    #[test]
    fn a_lost_a_repeated_and_a_swapped_number_are_noticed() {
        for (numbers, after, found) in [([1, 2, 4], 2, 4), ([1, 1, 2], 1, 1), ([1, 3, 2], 1, 3), ([0, 1, 2], 0, 0)] {
            assert_eq!(Checker::default().take(&stream(numbers)), Err(CountError::NotConsecutive { after, found }));
        }
    }

    #[test]
    fn half_a_number_at_the_end_is_noticed() {
        let mut checker = Checker::default();
        assert_eq!(checker.take(&stream([1, 2])[..12]), Ok(1));
        assert_eq!(checker.end(), Err(CountError::Torn { after: 1 }));
    }

    proptest! {
        #[test]
        fn pieces_of_any_size_add_up(count in 1u64..200, cuts in prop::collection::vec(1usize..40, 1..50)) {
            let bytes = stream(1..=count);
            let (mut checker, mut rest) = (Checker::default(), &bytes[..]);
            for cut in cuts.iter().cycle() {
                let (piece, next) = rest.split_at((*cut).min(rest.len()));
                checker.take(piece).unwrap();
                rest = next;
                if rest.is_empty() {
                    break;
                }
            }
            prop_assert_eq!(checker.end(), Ok(count));
        }
    }
}
