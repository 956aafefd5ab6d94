//! What is to happen, and when: virtual time.

use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::time::Duration;

/// Things to happen in order of time, and of being put down where times are equal.
pub struct Agenda<T> {
    now: Duration,
    entries: BinaryHeap<Reverse<Entry<T>>>,
    count: u64,
}

struct Entry<T> {
    at: Duration,
    number: u64,
    what: T,
}

impl<T> Default for Agenda<T> {
    fn default() -> Self {
        Self { now: Duration::ZERO, entries: BinaryHeap::new(), count: 0 }
    }
}

impl<T> Agenda<T> {
    /// The time.
    pub fn now(&self) -> Duration {
        self.now
    }

    /// Puts something down, for now at the earliest.
    pub fn at(&mut self, at: Duration, what: T) {
        self.count += 1;
        self.entries.push(Reverse(Entry { at: at.max(self.now), number: self.count, what }));
    }

    /// Puts something down for later.
    pub fn after(&mut self, delay: Duration, what: T) {
        self.at(self.now + delay, what);
    }

    /// Whether nothing is to happen.
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// The next thing to happen; it is then that time.
    pub fn take_next(&mut self) -> Option<T> {
        let Reverse(entry) = self.entries.pop()?;
        self.now = entry.at;
        Some(entry.what)
    }
}

impl<T> Entry<T> {
    fn key(&self) -> (Duration, u64) {
        (self.at, self.number)
    }
}

impl<T> PartialEq for Entry<T> {
    fn eq(&self, other: &Self) -> bool {
        self.key() == other.key()
    }
}

impl<T> Eq for Entry<T> {}

impl<T> PartialOrd for Entry<T> {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}

impl<T> Ord for Entry<T> {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        self.key().cmp(&other.key())
    }
}
