//! The longest interval between replies, and how many replies never came: pure arithmetic over what a client saw.

/// A stretch of the client's monotonic clock.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Window {
    /// Its begin.
    pub from_ns: u64,
    /// Its end.
    pub to_ns: u64,
}

impl Window {
    /// How long it is.
    pub fn length_ns(&self) -> u64 {
        self.to_ns.saturating_sub(self.from_ns)
    }

    /// Whether it holds a moment.
    pub fn holds(&self, at_ns: u64) -> bool {
        (self.from_ns..=self.to_ns).contains(&at_ns)
    }
}

/// One request and when its first reply came.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Request {
    /// When it was sent.
    pub sent_ns: u64,
    /// When its reply came.
    pub replied_ns: Option<u64>,
}

/// All requests, in the order in which they were sent.
#[derive(Debug, Clone, Default)]
pub struct Exchange {
    requests: Vec<Request>,
}

impl Exchange {
    /// Notes that the next request is sent now and gives its number.
    pub fn sent(&mut self, at_ns: u64) -> usize {
        self.requests.push(Request { sent_ns: at_ns, replied_ns: None });
        self.requests.len() - 1
    }

    /// Notes a reply. One to a request that was never sent, or answered before, does not count.
    pub fn replied(&mut self, number: usize, at_ns: u64) {
        if let Some(request) = self.requests.get_mut(number) {
            request.replied_ns.get_or_insert(at_ns);
        }
    }

    /// The longest time without a reply that lies at least partly in `window`, or `None` if it holds no request.
    ///
    /// Silence that begins before the window, or lasts beyond it, counts in full. Silence that has not ended counts up
    /// to the window's end.
    pub fn longest_gap_ns(&self, window: Window) -> Option<u64> {
        self.requests.iter().find(|request| window.holds(request.sent_ns))?;
        let mut replies: Vec<u64> = self.requests.iter().filter_map(|request| request.replied_ns).collect();
        replies.sort_unstable();
        // Before the first reply there is silence since the first request.
        let start = self.requests.first()?.sent_ns;
        let ends = replies.iter().copied().chain([window.to_ns]);
        let begins = [start].into_iter().chain(replies.iter().copied());
        begins
            .zip(ends)
            .filter(|(begin, end)| *begin < window.to_ns && *end > window.from_ns)
            .map(|(begin, end)| end.saturating_sub(begin))
            .max()
    }

    /// How many requests of `window` have no reply.
    pub fn lost(&self, window: Window) -> usize {
        self.requests.iter().filter(|request| window.holds(request.sent_ns) && request.replied_ns.is_none()).count()
    }

    /// How many replies there are.
    pub fn replies(&self) -> usize {
        self.requests.iter().filter(|request| request.replied_ns.is_some()).count()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const MS: u64 = 1_000_000;

    /// A request every 10 ms for a second, each answered after 1 ms but those from `silent`.
    fn exchange(silent: std::ops::Range<u64>) -> Exchange {
        let mut exchange = Exchange::default();
        for at_ms in (0..1000).step_by(10) {
            let number = exchange.sent(at_ms * MS);
            if !silent.contains(&at_ms) {
                exchange.replied(number, (at_ms + 1) * MS);
            }
        }
        exchange
    }

    fn window(from_ms: u64, to_ms: u64) -> Window {
        Window { from_ns: from_ms * MS, to_ns: to_ms * MS }
    }

    #[test]
    fn an_outage_is_seen_in_full_from_any_window_that_touches_it() {
        let exchange = exchange(200..500);
        for window in [window(0, 1000), window(300, 400), window(100, 300), window(400, 900)] {
            // The last reply before came at 191 ms, the first after at 501 ms.
            assert_eq!(exchange.longest_gap_ns(window), Some(310 * MS), "{window:?}");
        }
        assert_eq!(exchange.longest_gap_ns(window(600, 900)), Some(10 * MS));
        assert_eq!((exchange.lost(window(0, 1000)), exchange.lost(window(600, 900))), (30, 0));
    }

    #[test]
    fn silence_that_has_not_ended_counts_to_the_end_of_the_window() {
        let exchange = exchange(500..1000);
        assert_eq!(exchange.longest_gap_ns(window(0, 990)), Some((990 - 491) * MS));
        assert_eq!(exchange.lost(window(0, 999)), 50);
    }

    #[test]
    fn a_window_without_requests_gives_no_figure() {
        assert_eq!(exchange(0..0).longest_gap_ns(window(2000, 3000)), None);
        assert_eq!(Exchange::default().longest_gap_ns(window(0, 1)), None);
    }

    #[test]
    fn never_a_reply_is_silence_since_the_first_request() {
        assert_eq!(exchange(0..1000).longest_gap_ns(window(300, 900)), Some(900 * MS));
    }

    #[test]
    fn a_second_reply_and_one_to_nothing_do_not_count() {
        let mut exchange = exchange(500..1000);
        exchange.replied(0, 600 * MS);
        exchange.replied(4711, 700 * MS);
        assert_eq!(exchange.longest_gap_ns(window(0, 990)), Some((990 - 491) * MS));
    }

    proptest! {
        #[test]
        fn an_outage_is_never_measured_too_short(from in 10u64..400, length in 0u64..400) {
            let gap = exchange(from..from + length).longest_gap_ns(window(0, 1000)).unwrap();
            prop_assert!(gap + 10 * MS >= length * MS && gap <= (length + 20) * MS);
        }
    }
}
