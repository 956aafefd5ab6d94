//! The client that has `fw1` write records and remembers the highest one confirmed.

use std::io::BufRead;
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use anyhow::{Context, Result, ensure};

use crate::clock::monotonic_ns;
use crate::netns::Namespace;
use crate::scenario::gap::Window;
use crate::scenario::guest::{GuestClient, request};
use crate::wait;

/// Has records written until it is dropped.
pub struct RecordsClient {
    stream: TcpStream,
    confirmed: Arc<Mutex<Confirmed>>,
    thread: Option<JoinHandle<()>>,
}

/// What was confirmed.
#[derive(Debug, Clone, Default)]
pub struct Confirmed {
    /// The first number confirmed to this client; all up to the last one follow.
    first: u64,
    /// When each was.
    at_ns: Vec<u64>,
    /// Why there will be no more, if that is so.
    broken: Option<String>,
}

impl Confirmed {
    /// The highest number, 0 if there is none.
    pub fn last(&self) -> u64 {
        (self.first + self.at_ns.len() as u64).saturating_sub(1)
    }

    /// The highest number that was confirmed up to a moment.
    pub fn last_at(&self, at_ns: u64) -> u64 {
        match self.at_ns.partition_point(|&confirmed_ns| confirmed_ns <= at_ns) {
            0 => 0,
            count => self.first + count as u64 - 1,
        }
    }

    /// How many were confirmed in `window`.
    pub fn within(&self, window: Window) -> u64 {
        self.at_ns.iter().filter(|&&at_ns| window.holds(at_ns)).count() as u64
    }

    /// Why no more will be confirmed, if that is so.
    pub fn broken(&self) -> Option<&str> {
        self.broken.as_deref()
    }

    fn take(&mut self, line: &str, at_ns: u64) -> Result<()> {
        let number: u64 = line.parse().with_context(|| format!("`{line}` was answered instead of a number"))?;
        if self.at_ns.is_empty() {
            self.first = number;
        } else {
            ensure!(number == self.last() + 1, "record {number} was confirmed after {}", self.last());
        }
        self.at_ns.push(at_ns);
        Ok(())
    }
}

impl RecordsClient {
    /// Connects from `namespace`; records are written from now on.
    pub fn start(namespace: &Namespace, address: SocketAddr) -> Result<Self> {
        let reader = GuestClient::connect(namespace, address)?.into_stream_of(request::RECORDS)?;
        let stream = reader.get_ref().try_clone()?;
        let confirmed = Arc::new(Mutex::new(Confirmed::default()));
        let noting = confirmed.clone();
        let thread = thread::spawn(move || {
            let mut lines = reader.lines();
            let broken = loop {
                match lines.next() {
                    None => break "the connection has ended".to_owned(),
                    Some(Err(error)) => break error.to_string(),
                    Some(Ok(line)) => {
                        if let Err(error) = lock(&noting).take(&line, monotonic_ns()) {
                            break format!("{error:#}");
                        }
                    }
                }
            };
            lock(&noting).broken = Some(broken);
        });
        Ok(Self { stream, confirmed, thread: Some(thread) })
    }

    /// What was confirmed so far.
    pub fn confirmed(&self) -> Confirmed {
        lock(&self.confirmed).clone()
    }

    /// Waits until two more records were confirmed: the second was certainly written after this call began.
    pub fn wait_for_progress(&self, limit: Duration) -> Result<()> {
        let before = lock(&self.confirmed).at_ns.len();
        wait::until_true("records are written and confirmed", limit, || {
            let confirmed = lock(&self.confirmed);
            ensure!(confirmed.broken.is_none(), "no more records: {}", confirmed.broken().unwrap_or_default());
            Ok(confirmed.at_ns.len() >= before + 2)
        })
    }
}

impl Drop for RecordsClient {
    fn drop(&mut self) {
        let _ = self.stream.shutdown(Shutdown::Both);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

fn lock(confirmed: &Mutex<Confirmed>) -> MutexGuard<'_, Confirmed> {
    confirmed.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn confirmations_come_in_order_or_are_an_error() {
        let mut confirmed = Confirmed::default();
        assert_eq!(confirmed.last(), 0);
        for (line, at_ns) in [("41", 10), ("42", 20), ("43", 30)] {
            confirmed.take(line, at_ns).unwrap();
        }
        assert_eq!((confirmed.last(), confirmed.last_at(5), confirmed.last_at(20)), (43, 0, 42));
        assert_eq!(confirmed.within(Window { from_ns: 15, to_ns: 30 }), 2);
        assert!(confirmed.take("45", 40).unwrap_err().to_string().contains("45 was confirmed after 43"));
        assert!(confirmed.take("43", 40).is_err() && confirmed.take("error: disk full", 40).is_err());
    }
}
