//! Links that break while memory is being sent, with real threads and sockets.

use std::io;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

use godwit_core::{Channel, ChannelWriter, Dial, HangUp, SessionToken};

use super::*;

/// Breaks all that was opened, again and again: each time after so many bytes were written to data channels.
pub struct Breaking {
    inner: Box<dyn Dial>,
    /// Data channels of smaller numbers are not counted.
    first: u16,
    pub shared: Arc<Shared>,
}

pub struct Shared {
    /// Bytes until the next break; none: no more breaks.
    breaks: Mutex<Vec<u64>>,
    left: AtomicU64,
    open: Mutex<Vec<Arc<dyn HangUp>>>,
    pub broken: AtomicUsize,
    /// How often a data channel was told that the guest stands still for what comes.
    hastened: AtomicUsize,
}

impl Breaking {
    pub fn new(inner: Box<dyn Dial>, first: u16, mut breaks: Vec<u64>) -> Self {
        let left = breaks.pop().unwrap_or(u64::MAX);
        let shared = Shared {
            breaks: Mutex::new(breaks),
            left: AtomicU64::new(left),
            open: Mutex::default(),
            broken: AtomicUsize::new(0),
            hastened: AtomicUsize::new(0),
        };
        Self { inner, first, shared: Arc::new(shared) }
    }

    fn note(&self, channel: Channel) -> Channel {
        self.shared.open.lock().unwrap().push(Arc::clone(&channel.hang_up));
        channel
    }
}

impl Dial for Breaking {
    fn control(&self, limit: Duration) -> io::Result<Channel> {
        self.inner.control(limit).map(|channel| self.note(channel))
    }

    fn control_again(&self, token: SessionToken, limit: Duration) -> io::Result<Channel> {
        self.inner.control_again(token, limit).map(|channel| self.note(channel))
    }

    fn data(&self, token: SessionToken, index: u16, limit: Duration) -> io::Result<Channel> {
        let channel = self.note(self.inner.data(token, index, limit)?);
        if index < self.first {
            return Ok(channel);
        }
        let writer = Box::new(BreakingWriter { inner: channel.writer, shared: Arc::clone(&self.shared) });
        Ok(Channel { writer, ..channel })
    }

    fn uri(&self) -> String {
        self.inner.uri()
    }
}

struct BreakingWriter {
    inner: Box<dyn ChannelWriter>,
    shared: Arc<Shared>,
}

impl ChannelWriter for BreakingWriter {
    fn write_all(&mut self, buffer: &[u8]) -> io::Result<()> {
        let left = self.shared.left.load(Ordering::SeqCst);
        if left >= buffer.len() as u64 {
            self.shared.left.fetch_sub(buffer.len() as u64, Ordering::SeqCst);
            return self.inner.write_all(buffer);
        }
        // Some of it still goes out: a break respects no boundaries.
        self.inner.write_all(&buffer[..left as usize])?;
        self.shared.left.store(self.shared.breaks.lock().unwrap().pop().unwrap_or(u64::MAX), Ordering::SeqCst);
        self.shared.broken.fetch_add(1, Ordering::SeqCst);
        self.shared.open.lock().unwrap().drain(..).for_each(|open| open.hang_up());
        Err(io::ErrorKind::ConnectionReset.into())
    }

    fn bytes_on_wire(&self) -> u64 {
        self.inner.bytes_on_wire()
    }

    fn hasten(&mut self) {
        self.shared.hastened.fetch_add(1, Ordering::SeqCst);
        self.inner.hasten();
    }

    fn finish(&mut self) -> io::Result<()> {
        self.inner.finish()
    }
}

pub fn assert_whole(destination: Destination) {
    let (moved, _) = destination.owned();
    moved.pause(LIMIT).unwrap();
    assert!(moved.is_whole().unwrap(), "the guest's memory is whole at the destination");
}

#[test]
fn a_move_survives_breaks_at_any_byte() {
    // Odd numbers, so that breaks fall into headers and pages alike.
    for (channels, compression, delta_cache_bytes, breaks) in [
        (1, Compression::None, 0, vec![1]),
        (1, Compression::None, 0, vec![1_000_003, 77, 2_000_011]),
        (3, Compression::None, 0, vec![500_009, 1_234_567]),
        (2, Compression::Zstd(1), 0, vec![307, 2_003, 1_009]),
        (2, Compression::None, 1 << 20, vec![307, 2_003, 1_009]),
    ] {
        let machine = running_machine();
        let destination = Destination::start(DestinationOptions::default());
        let dial = Breaking::new(destination.dial(), 0, breaks);
        let shared = Arc::clone(&dial.shared);
        let options = SourceOptions {
            channels,
            compression,
            delta_cache_bytes,
            max_bandwidth_bytes_per_s: Some(50_000_000),
            switchover_bandwidth_bytes_per_s: Some(100_000_000),
            downtime_limit: Duration::from_millis(500),
            ..options()
        };
        let outcome = SourceMigration::start(machine as _, Box::new(dial), options, Arc::new(Silent)).wait();
        let SourceOutcome::Moved(report) = &*outcome else { panic!("{outcome:?}") };
        let broken = shared.broken.load(Ordering::SeqCst);
        assert!(broken > 0 && !report.reconnections.is_empty(), "{broken} breaks, {report:?}");
        let hastened = shared.hastened.load(Ordering::SeqCst);
        assert!(hastened >= usize::from(channels), "{hastened} of {channels} channels knew that the guest stood still");
        assert!(report.audit.as_deref().is_some_and(|audit| audit.starts_with("ok: ")), "{:?}", report.audit);
        let sum = |bytes: fn(&Reconnection) -> u64| report.reconnections.iter().map(bytes).sum::<u64>();
        let allowed = sum(|broken| broken.unacknowledged_bytes) + sum(|broken| broken.dirtied_bytes);
        assert!(report.resent_bytes <= allowed, "{report:?}");
        assert_eq!(report.resent_bytes, sum(|broken| broken.resent_bytes));
        assert_whole(destination);
    }
}

#[test]
fn a_link_that_breaks_in_any_phase_in_which_memory_is_sent_is_made_anew() {
    for phase in [Phase::FirstPass, Phase::Rounds, Phase::PreSwitchover, Phase::Pause, Phase::FinalPages, Phase::State]
    {
        let machine = running_machine();
        let destination = Destination::start(DestinationOptions::default());
        let options = SourceOptions {
            hold_at: Some(phase),
            pause_before_switchover: phase == Phase::PreSwitchover,
            switchover_bandwidth_bytes_per_s: stop_late(phase),
            on_stall: OnStall::Force,
            max_rounds: 3,
            ..options()
        };
        let migration = start(&machine, &destination, options);
        wait_for_phase(&migration, phase);
        destination.hang_up.recv_timeout(LIMIT).unwrap().hang_up();
        migration.release_hold();
        if phase == Phase::PreSwitchover {
            wait_until("it has converged again", || migration.proceed());
        }
        let outcome = migration.wait();
        let SourceOutcome::Moved(report) = &*outcome else { panic!("{phase}: {outcome:?}") };
        assert_eq!(report.reconnections.len(), 1, "{phase}: {report:?}");
        assert!(report.audit.as_deref().is_some_and(|audit| audit.starts_with("ok: ")), "{phase}: {:?}", report.audit);
        assert_whole(destination);
    }
}

#[test]
fn a_destination_keeps_nothing_for_longer_than_it_was_told() {
    let machine = running_machine();
    let destination = Destination::start(DestinationOptions::default());
    let timeout = Duration::from_millis(300);
    let options = SourceOptions {
        hold_at: Some(Phase::Rounds),
        switchover_bandwidth_bytes_per_s: stop_late(Phase::Rounds),
        reconnect_timeout: timeout,
        ..options()
    };
    let migration = start(&machine, &destination, options);
    wait_for_phase(&migration, Phase::Rounds);
    destination.hang_up.recv_timeout(LIMIT).unwrap().hang_up();
    // The source is held: it does not come back.
    assert!(destination.ended().contains("did not come back in time"));
    migration.release_hold();
    let outcome = migration.wait();
    assert!(matches!(&*outcome, SourceOutcome::Failed(why, _) if why.contains("is gone")), "{outcome:?}");
    assert_runs_on(&machine);
    assert_moves(&machine, super::options());
}

#[test]
fn a_receiver_that_is_being_ended_says_so_instead_of_waiting() {
    let machine = running_machine();
    let stop = DestinationOptions::default();
    let flag = Arc::clone(&stop.stop);
    let destination = Destination::start(stop);
    let migration = start(
        &machine,
        &destination,
        SourceOptions {
            hold_at: Some(Phase::Rounds),
            switchover_bandwidth_bytes_per_s: stop_late(Phase::Rounds),
            ..options()
        },
    );
    wait_for_phase(&migration, Phase::Rounds);
    flag.store(true, Ordering::SeqCst);
    destination.ended();
    migration.release_hold();
    let outcome = migration.wait();
    assert!(matches!(&*outcome, SourceOutcome::Failed(why, _) if why.contains("being ended")), "{outcome:?}");
    assert_runs_on(&machine);
}
