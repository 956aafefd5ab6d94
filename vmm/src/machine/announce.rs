//! Telling networks where a machine is: when one that came in runs here for the first time, and when somebody asks for it.
//!
//! Several rounds with growing gaps: a frame may be lost, and a switch or a neighbour may not have been listening yet.

use std::mem;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, Sender};
use std::sync::{Arc, Mutex};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use super::{Inner, MachineStatus};
use crate::devices::virtio::net::Net;
use crate::error::{VmmError, chain};
use crate::sync::lock;

/// When the rounds begin, counted from the first.
const ROUNDS: [Duration; 5] = [
    Duration::ZERO,
    Duration::from_millis(50),
    Duration::from_millis(200),
    Duration::from_millis(450),
    Duration::from_millis(800),
];

/// How long somebody who asks for it waits for the first round.
const FIRST_ROUND_LIMIT: Duration = Duration::from_secs(5);

/// What a round has sent on one network interface.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Announced {
    /// The interface.
    pub id: String,
    /// Frames that its tap has taken.
    pub frames: usize,
}

/// Announces a machine while it runs, a thread at a time. Nothing is announced after [`Announcer::cancel`].
#[derive(Default)]
pub(super) struct Announcer {
    /// The machine came in and has not run here yet.
    at_first_resume: AtomicBool,
    rounds: Mutex<Option<Rounds>>,
}

/// Rounds under way.
struct Rounds {
    cancel: Sender<()>,
    thread: JoinHandle<()>,
}

impl Announcer {
    /// The machine is to be announced when it runs for the first time.
    pub(super) fn expect(&self) {
        self.at_first_resume.store(true, Ordering::SeqCst);
    }

    /// The machine runs.
    pub(super) fn resumed(&self, nets: &[Arc<Net>]) {
        if !self.at_first_resume.swap(false, Ordering::SeqCst) {
            return;
        }
        if let Err(error) = self.begin(nets) {
            tracing::error!("the machine is not announced on its networks: {}", chain(&error));
        }
    }

    /// Begins with the first round, of which is told.
    fn begin(&self, nets: &[Arc<Net>]) -> Result<Receiver<Vec<Announced>>, VmmError> {
        self.cancel();
        let (told, first_round) = mpsc::channel();
        if nets.is_empty() {
            // Somebody may be waiting, or not.
            let _ = told.send(Vec::new());
            return Ok(first_round);
        }
        let nets = nets.to_vec();
        let (cancel, cancelled) = mpsc::channel();
        let thread = thread::Builder::new()
            .name("announce".into())
            .spawn(move || run(&nets, &cancelled, &told))
            .map_err(VmmError::os("cannot start the thread that announces the machine"))?;
        *lock(&self.rounds) = Some(Rounds { cancel, thread });
        Ok(first_round)
    }

    /// Ends rounds that are under way, and waits until nothing more is sent.
    pub(super) fn cancel(&self) {
        let Some(Rounds { cancel, thread }) = mem::take(&mut *lock(&self.rounds)) else { return };
        drop(cancel);
        if thread.join().is_err() {
            tracing::error!("the thread that announces the machine panicked");
        }
    }
}

impl Inner {
    /// Announces the machine now.
    pub(super) fn announce(&self) -> Result<Vec<Announced>, VmmError> {
        let first_round = {
            let _whole = lock(&self.whole);
            if lock(&self.life).status() != MachineStatus::Running {
                return Err(VmmError::Status("only a machine that runs here can be announced".into()));
            }
            self.announcer.begin(self.devices.nets())?
        };
        let ended = |_| VmmError::Status("the machine was stopped before it could be announced".into());
        first_round.recv_timeout(FIRST_ROUND_LIMIT).map_err(ended)
    }
}

/// All rounds, until cancelled.
fn run(nets: &[Arc<Net>], cancelled: &Receiver<()>, told: &Sender<Vec<Announced>>) {
    let start = Instant::now();
    for (number, offset) in (1..).zip(ROUNDS) {
        let wait = (start + offset).saturating_duration_since(Instant::now());
        if cancelled.recv_timeout(wait) != Err(RecvTimeoutError::Timeout) {
            return;
        }
        let announced: Vec<_> = nets.iter().map(|net| round(net, number)).collect();
        if number == 1 {
            // The guest announces what only it knows, once.
            nets.iter().for_each(|net| net.ask_guest_to_announce());
            // Somebody may be waiting, or not.
            let _ = told.send(announced);
        }
    }
}

fn round(net: &Net, number: u32) -> Announced {
    let id = net.id().to_owned();
    let frames = net.announce().unwrap_or_else(|error| {
        tracing::warn!("network interface {id}: the machine could not be announced: {error}");
        0
    });
    tracing::info!("network interface {id}: {frames} frames announce the machine (round {number} of {})", ROUNDS.len());
    Announced { id, frames }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::devices::virtio::net::tests::network::{bridge, enter, open_soon};

    /// RARP: all that an interface without a driver says.
    const RARP: [u8; 2] = [0x80, 0x35];

    #[test]
    fn a_machine_that_came_in_is_announced_once_in_five_rounds() {
        if !enter() {
            return;
        }
        let outside = bridge(&["tap0", "tap1"]);
        let nets = ["tap0", "tap1"].map(|tap| open_soon(tap, 0));
        let announcer = Announcer::default();
        // One that was booted here.
        announcer.resumed(&nets);
        assert_eq!(outside.receive(Duration::from_millis(50)), None);

        announcer.expect();
        let start = Instant::now();
        announcer.resumed(&nets);
        for round in ROUNDS {
            for _ in &nets {
                let frame = outside.receive(Duration::from_secs(5)).expect("a frame of each interface");
                assert_eq!(frame[12..14], RARP);
                assert!(start.elapsed() >= round, "not before its time");
            }
        }
        assert_eq!(outside.receive(Duration::from_millis(200)), None);
        // Paused, and resumed.
        announcer.cancel();
        announcer.resumed(&nets);
        assert_eq!(outside.receive(Duration::from_millis(50)), None);
    }

    #[test]
    fn nothing_is_announced_after_a_pause() {
        if !enter() {
            return;
        }
        let outside = bridge(&["tap0"]);
        let nets = [open_soon("tap0", 0)];
        let announcer = Announcer::default();
        let first_round = announcer.begin(&nets).unwrap();
        assert_eq!(first_round.recv(), Ok(vec![Announced { id: "net0".into(), frames: 1 }]));
        announcer.cancel();
        let seen = std::iter::from_fn(|| outside.receive(Duration::ZERO)).count();
        assert!(seen < ROUNDS.len(), "{seen}");
        assert_eq!(outside.receive(Duration::from_secs(1)), None);
    }
}
