//! Waits for a future by parking the thread.

use std::pin::pin;
use std::sync::Arc;
use std::task::{Context, Poll, Wake, Waker};
use std::thread::{self, Thread};
use std::time::Instant;

struct Unpark(Thread);

impl Wake for Unpark {
    fn wake(self: Arc<Self>) {
        self.0.unpark();
    }

    fn wake_by_ref(self: &Arc<Self>) {
        self.0.unpark();
    }
}

thread_local! {
    static WAKER: Waker = Waker::from(Arc::new(Unpark(thread::current())));
}

/// Runs `future` to its end.
pub(super) fn block_on<F: Future>(future: F) -> F::Output {
    WAKER.with(|waker| {
        let mut context = Context::from_waker(waker);
        let mut future = pin!(future);
        loop {
            match future.as_mut().poll(&mut context) {
                Poll::Ready(output) => return output,
                // Returns at once if the waker was called since the poll.
                Poll::Pending => thread::park(),
            }
        }
    })
}

/// Runs `future` to its end, or until `deadline`.
pub(super) fn block_until<F: Future>(future: F, deadline: Instant) -> Option<F::Output> {
    WAKER.with(|waker| {
        let mut context = Context::from_waker(waker);
        let mut future = pin!(future);
        loop {
            if let Poll::Ready(output) = future.as_mut().poll(&mut context) {
                return Some(output);
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return None;
            }
            thread::park_timeout(left);
        }
    })
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn a_wake_from_another_thread_ends_the_wait() {
        let (sender, receiver) = tokio::sync::oneshot::channel();
        let thread = thread::spawn(move || {
            thread::sleep(Duration::from_millis(20));
            sender.send(7).unwrap();
        });
        assert_eq!(block_on(receiver), Ok(7));
        thread.join().unwrap();
    }

    #[test]
    fn the_deadline_ends_the_wait() {
        let since = Instant::now();
        assert_eq!(block_until(std::future::pending::<()>(), since + Duration::from_millis(20)), None);
        assert!(since.elapsed() >= Duration::from_millis(20));
        assert_eq!(block_until(async { 1 }, since), Some(1));
    }
}
