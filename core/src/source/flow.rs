//! What the source's threads share while pages flow: the cap, the counters, and the order to stop.

use std::io;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use super::compressing::is_slow;
use super::sending::Pace;
use crate::memory::PAGE_SIZE;
use crate::pacer::Pacer;
use crate::policy::DATA_PATH_BYTES_PER_S;
use crate::postcopy::PageChannel;
use crate::progress::{PageCounts, PostCopyCounts};
use crate::sync::lock;

/// Shared by the coordinator, the workers and whoever holds the migration's handle.
pub struct Flow {
    started: Instant,
    pacer: Mutex<Pacer>,
    pacer_changed: Condvar,
    stopped: AtomicBool,
    cut: AtomicBool,
    /// Data channels, and behind them those for pages in post-copy.
    channels: Vec<ChannelFlow>,
    /// Pages that were missing at the destination when the guest went on there.
    missing_pages: AtomicU64,
    /// How far a channel may get ahead.
    most_queued_pages: AtomicU64,
}

/// One data channel's counters.
#[derive(Default)]
struct ChannelFlow {
    /// Bytes given to the socket.
    wire_bytes: AtomicU64,
    /// Bytes encoded and written.
    written_bytes: AtomicU64,
    raw: AtomicU64,
    zero: AtomicU64,
    zstd: AtomicU64,
    untouched: AtomicU64,
    delta: AtomicU64,
    same: AtomicU64,
    /// Its link is seen to be slow.
    slow: AtomicBool,
    /// Pages under way to the destination, or there and not written yet.
    queued_pages: AtomicU64,
}

/// A channel does not get further ahead of the destination, but for what is on its way: pages that are hardly any bytes would all be in
/// buffers before the destination has written many of them, and the guest would have to wait for that in the pause.
const MOST_QUEUED_PAGES: u64 = 1024;

impl Flow {
    /// No bytes yet.
    pub fn new(started: Instant, channels: u16, bytes_per_s: Option<u64>) -> Self {
        Self {
            started,
            pacer: Mutex::new(Pacer::new(bytes_per_s)),
            pacer_changed: Condvar::new(),
            stopped: AtomicBool::new(false),
            cut: AtomicBool::new(false),
            channels: (0..channels + PageChannel::COUNT).map(|_| ChannelFlow::default()).collect(),
            missing_pages: AtomicU64::new(0),
            most_queued_pages: AtomicU64::new(MOST_QUEUED_PAGES),
        }
    }

    /// Since the move was asked for.
    pub fn now(&self) -> Duration {
        self.started.elapsed()
    }

    /// The cap in force.
    pub fn bytes_per_s(&self) -> Option<u64> {
        self.pacer().bytes_per_s()
    }

    /// Changes the cap; workers that wait for their turn hear of it at once.
    pub fn set_bytes_per_s(&self, bytes_per_s: Option<u64>) {
        self.pacer().set_bytes_per_s(self.now(), bytes_per_s);
        self.pacer_changed.notify_all();
    }

    /// What rules a channel at this moment.
    pub fn pace(&self) -> Pace {
        let pacer = self.pacer();
        Pace {
            quantum_bytes: pacer.quantum_bytes(),
            bytes_per_s: pacer.bytes_per_s(),
            cut: self.cut.load(Ordering::Acquire),
        }
    }

    /// Waits until the cap lets `bytes` go, and charges them.
    pub fn wait_for_turn(&self, bytes: u64) -> io::Result<()> {
        let mut pacer = self.pacer();
        loop {
            self.check_stopped()?;
            let delay = pacer.delay(self.now());
            if delay.is_zero() {
                pacer.charge(self.now(), bytes);
                return Ok(());
            }
            pacer = match self.pacer_changed.wait_timeout(pacer, delay) {
                Ok((pacer, _)) => pacer,
                Err(poisoned) => poisoned.into_inner().0,
            };
        }
    }

    /// Charges what a transport added to the bytes it was given.
    pub fn charge_extra(&self, bytes: u64) {
        self.pacer().charge(self.now(), bytes);
    }

    /// Tells the workers to end, whatever they do.
    pub fn stop(&self) {
        self.stopped.store(true, Ordering::Release);
        // Under the lock, so that nobody is between looking and waiting.
        let _pacer = self.pacer();
        self.pacer_changed.notify_all();
    }

    /// Ends [`Flow::stop`]: other workers are about to start.
    pub fn go_on(&self) {
        self.stopped.store(false, Ordering::Release);
    }

    /// An error once [`Flow::stop`] was called.
    pub fn check_stopped(&self) -> io::Result<()> {
        match self.stopped.load(Ordering::Acquire) {
            true => Err(io::Error::new(io::ErrorKind::Interrupted, "the move was ended")),
            false => Ok(()),
        }
    }

    /// Lets the workers leave their round.
    pub fn cut_round(&self) {
        self.cut.store(true, Ordering::Release);
        let _pacer = self.pacer();
        self.pacer_changed.notify_all();
    }

    /// Lets a channel get ahead by what the data path gets through in a round trip, too: over a long way nothing else would keep it busy.
    pub fn allow_for(&self, round_trip: Duration) {
        let channels = self.channels.len() - usize::from(PageChannel::COUNT);
        let bytes = round_trip.as_secs_f64() * DATA_PATH_BYTES_PER_S / channels.max(1) as f64;
        let pages = MOST_QUEUED_PAGES + (bytes / PAGE_SIZE as f64) as u64;
        self.most_queued_pages.store(pages, Ordering::Relaxed);
    }

    /// Notes pages that a channel is about to have under way.
    pub fn queued(&self, channel: usize, pages: u64) {
        self.channels[channel].queued_pages.fetch_add(pages, Ordering::Relaxed);
    }

    /// Notes pages of a channel that the destination has written.
    pub fn applied(&self, channel: usize, pages: u64) {
        let pacer = self.pacer();
        self.channels[channel].queued_pages.fetch_sub(pages, Ordering::Relaxed);
        drop(pacer);
        self.pacer_changed.notify_all();
    }

    /// Nothing is under way any more.
    pub fn forget_queued(&self) {
        self.channels.iter().for_each(|flow| flow.queued_pages.store(0, Ordering::Relaxed));
    }

    /// Waits until the destination has caught up with a channel far enough, or the round is to be left.
    pub fn wait_for_destination(&self, channel: usize) -> io::Result<()> {
        let queued = &self.channels[channel].queued_pages;
        let most = self.most_queued_pages.load(Ordering::Relaxed);
        if queued.load(Ordering::Relaxed) < most {
            return Ok(());
        }
        let mut pacer = self.pacer();
        while queued.load(Ordering::Relaxed) >= most && !self.cut.load(Ordering::Acquire) {
            self.check_stopped()?;
            pacer = self.pacer_changed.wait(pacer).unwrap_or_else(PoisonError::into_inner);
        }
        Ok(())
    }

    /// Lets rounds be finished again.
    pub fn uncut_rounds(&self) {
        self.cut.store(false, Ordering::Release);
    }

    /// The number of a channel for pages.
    pub fn page_channel(&self, channel: PageChannel) -> usize {
        usize::from(channel.index((self.channels.len() as u16).saturating_sub(PageChannel::COUNT)))
    }

    /// Notes how many pages are missing at the destination.
    pub fn missing(&self, pages: u64) {
        self.missing_pages.store(pages, Ordering::Relaxed);
    }

    /// Pages that followed the guest.
    pub fn postcopy(&self) -> PostCopyCounts {
        let of = |channel| &self.channels[self.page_channel(channel)];
        let (fault, push) = (of(PageChannel::Fault), of(PageChannel::Push));
        let pages = |flow: &ChannelFlow| flow.raw.load(Ordering::Relaxed) + flow.zero.load(Ordering::Relaxed);
        PostCopyCounts {
            missing_pages: self.missing_pages.load(Ordering::Relaxed),
            by_fault: pages(fault),
            by_push: pages(push),
            wire_bytes: fault.wire_bytes.load(Ordering::Relaxed) + push.wire_bytes.load(Ordering::Relaxed),
        }
    }

    /// Notes what a channel has written, and how much its socket was given meanwhile.
    pub fn wrote(&self, channel: usize, bytes: u64, wire_bytes: u64) {
        let flow = &self.channels[channel];
        flow.written_bytes.fetch_add(bytes, Ordering::Relaxed);
        flow.wire_bytes.fetch_add(wire_bytes, Ordering::Relaxed);
    }

    /// Notes whether a channel's link is seen to be slow.
    pub fn link_is_slow(&self, channel: usize, slow: bool) {
        self.channels[channel].slow.store(slow, Ordering::Relaxed);
    }

    /// Whether bytes are what a round's time goes into: under a low cap, or over a link that is seen to be slow.
    pub fn is_slow(&self) -> bool {
        is_slow(self.bytes_per_s()) || self.channels.iter().any(|flow| flow.slow.load(Ordering::Relaxed))
    }

    /// Notes the pages a channel has encoded.
    pub fn encoded(&self, channel: usize, counts: PageCounts) {
        let flow = &self.channels[channel];
        flow.raw.store(counts.raw, Ordering::Relaxed);
        flow.zero.store(counts.zero, Ordering::Relaxed);
        flow.zstd.store(counts.zstd, Ordering::Relaxed);
        flow.untouched.store(counts.untouched, Ordering::Relaxed);
        flow.delta.store(counts.delta, Ordering::Relaxed);
        flow.same.store(counts.same, Ordering::Relaxed);
    }

    /// Pages that a channel has encoded, over all its links, if they have contents or are zeros.
    pub fn plain_pages(&self, channel: usize) -> PageCounts {
        let flow = &self.channels[channel];
        let (raw, zero) = (flow.raw.load(Ordering::Relaxed), flow.zero.load(Ordering::Relaxed));
        PageCounts { raw, zero, ..PageCounts::default() }
    }

    /// Bytes that a channel has encoded and written.
    pub fn written_bytes(&self, channel: usize) -> u64 {
        self.channels[channel].written_bytes.load(Ordering::Relaxed)
    }

    /// Bytes given to the data channels' sockets.
    pub fn wire_bytes(&self) -> u64 {
        self.channels.iter().map(|flow| flow.wire_bytes.load(Ordering::Relaxed)).sum()
    }

    /// Bytes encoded and written, over all data channels.
    pub fn all_written_bytes(&self) -> u64 {
        self.channels.iter().map(|flow| flow.written_bytes.load(Ordering::Relaxed)).sum()
    }

    /// What so many written bytes take on the wire, by what all have taken so far. A transport that sends in its own time counts them later
    /// than they are written: in a short round it may count mostly what the rounds before have left it.
    pub fn on_wire(&self, written_bytes: u64) -> u64 {
        let (all_written, all_on_wire) = (self.all_written_bytes(), self.wire_bytes());
        let extra_bytes = u128::from(all_on_wire.saturating_sub(all_written));
        written_bytes + (extra_bytes * u128::from(written_bytes) / u128::from(all_written.max(1))) as u64
    }

    /// Pages encoded, over all channels.
    pub fn pages(&self) -> PageCounts {
        let sum = |field: fn(&ChannelFlow) -> &AtomicU64| {
            self.channels.iter().map(|flow| field(flow).load(Ordering::Relaxed)).sum()
        };
        PageCounts {
            raw: sum(|flow| &flow.raw),
            zero: sum(|flow| &flow.zero),
            zstd: sum(|flow| &flow.zstd),
            untouched: sum(|flow| &flow.untouched),
            delta: sum(|flow| &flow.delta),
            same: sum(|flow| &flow.same),
        }
    }

    fn pacer(&self) -> MutexGuard<'_, Pacer> {
        lock(&self.pacer)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::thread;

    #[test]
    fn a_channel_waits_for_the_destination_until_it_has_caught_up_or_the_round_is_cut() {
        let flow = Flow::new(Instant::now(), 2, None);
        flow.queued(0, MOST_QUEUED_PAGES - 1);
        flow.wait_for_destination(0).unwrap();
        flow.queued(0, 1);
        flow.wait_for_destination(1).unwrap();
        let waits_until = |happens: &dyn Fn()| {
            thread::scope(|scope| {
                let waiting = scope.spawn(|| flow.wait_for_destination(0));
                thread::sleep(Duration::from_millis(20));
                assert!(!waiting.is_finished());
                happens();
                waiting.join().unwrap()
            })
        };
        waits_until(&|| flow.applied(0, 1)).unwrap();
        flow.queued(0, 1);
        waits_until(&|| flow.cut_round()).unwrap();
        flow.uncut_rounds();
        waits_until(&|| flow.stop()).unwrap_err();
        flow.forget_queued();
        flow.wait_for_destination(0).unwrap();
        flow.go_on();
        // Two channels at 1.5 GB/s in all.
        flow.allow_for(Duration::from_millis(100));
        flow.queued(0, MOST_QUEUED_PAGES + 18_300);
        flow.wait_for_destination(0).unwrap();
        flow.queued(0, 11);
        waits_until(&|| flow.applied(0, 11)).unwrap();
    }

    #[test]
    fn what_is_written_takes_on_the_wire_what_all_has_taken() {
        let flow = Flow::new(Instant::now(), 2, None);
        assert_eq!(flow.on_wire(0), 0);
        flow.wrote(0, 1_000_000, 0);
        assert_eq!(flow.on_wire(1000), 1000, "nothing has been sent yet");
        flow.wrote(0, 1_000_000, 1_500_000);
        assert_eq!(flow.on_wire(1000), 1000, "some of it is still to be sent");
        flow.wrote(1, 0, 600_000);
        assert_eq!(flow.on_wire(1000), 1050, "with headers and what was sent twice");
        assert_eq!(flow.on_wire(0), 0, "whatever was sent meanwhile");
    }
}
