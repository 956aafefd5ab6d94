//! A bounded queue between the threads that accept connections and those that take them.

use std::collections::VecDeque;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// A first-in first-out queue: pushing never blocks, popping does so up to a limit.
pub(crate) struct Queue<T> {
    state: Mutex<State<T>>,
    changed: Condvar,
    capacity: usize,
}

struct State<T> {
    items: VecDeque<T>,
    closed: bool,
}

/// Why nothing was popped.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Empty {
    /// Nothing came within the limit.
    TimedOut,
    /// Nothing will come any more.
    Closed,
}

impl<T> Queue<T> {
    pub(crate) fn new(capacity: usize) -> Self {
        let state = State { items: VecDeque::new(), closed: false };
        Self { state: Mutex::new(state), changed: Condvar::new(), capacity }
    }

    /// Whether a push would fail now.
    pub(crate) fn is_full(&self) -> bool {
        self.lock().items.len() >= self.capacity
    }

    /// Appends `item`, or gives it back if the queue is full or closed.
    pub(crate) fn push(&self, item: T) -> Result<(), T> {
        let mut state = self.lock();
        if state.closed || state.items.len() >= self.capacity {
            return Err(item);
        }
        state.items.push_back(item);
        self.changed.notify_one();
        Ok(())
    }

    /// Takes the oldest item, waiting for one up to `limit`.
    pub(crate) fn pop(&self, limit: Duration) -> Result<T, Empty> {
        let deadline = Instant::now() + limit;
        let mut state = self.lock();
        loop {
            if let Some(item) = state.items.pop_front() {
                return Ok(item);
            }
            if state.closed {
                return Err(Empty::Closed);
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(Empty::TimedOut);
            }
            state = self.changed.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// Drops what is queued, ends every wait and fails later pushes.
    pub(crate) fn close(&self) {
        let items = {
            let mut state = self.lock();
            state.closed = true;
            self.changed.notify_all();
            std::mem::take(&mut state.items)
        };
        // Dropping a channel can take a while: not under the lock.
        drop(items);
    }

    fn lock(&self) -> MutexGuard<'_, State<T>> {
        // No code that can panic runs under the lock, so what it guards is whole.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::thread;

    use super::*;

    #[test]
    fn keeps_order_and_bound() {
        let queue = Queue::new(2);
        assert_eq!(queue.push(1), Ok(()));
        assert_eq!(queue.push(2), Ok(()));
        assert_eq!(queue.push(3), Err(3));
        assert_eq!(queue.pop(Duration::ZERO), Ok(1));
        assert_eq!(queue.pop(Duration::ZERO), Ok(2));
        assert_eq!(queue.pop(Duration::from_millis(1)), Err(Empty::TimedOut));
    }

    #[test]
    fn close_ends_a_wait() {
        let queue = Arc::new(Queue::<u8>::new(1));
        let waiting = thread::spawn({
            let queue = queue.clone();
            move || queue.pop(Duration::from_secs(60))
        });
        queue.close();
        assert_eq!(waiting.join().unwrap(), Err(Empty::Closed));
        assert_eq!(queue.push(1), Err(1));
    }
}
