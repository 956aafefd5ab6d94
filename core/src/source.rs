//! The sending end of a move.

use std::sync::Arc;
use std::time::Duration;

use crate::channel::Dial;
use crate::machine::{Refusal, SourceMachine};
use crate::phase::Phase;
use crate::progress::{Observer, Progress, Report};

/// What to do when the stop rule is not met in time.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum OnStall {
    /// Give up; the guest runs on at the source.
    #[default]
    Abort,
    /// Stop the guest all the same and accept the longer pause.
    Force,
}

/// How pages may be compressed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Compression {
    /// Where it pays.
    #[default]
    Auto,
    /// Never.
    None,
    /// Always, at this level, unless a page does not shrink.
    Zstd(i32),
}

/// The knobs of a move.
#[derive(Debug, Clone)]
pub struct SourceOptions {
    /// Cap during the rounds; `None`: no cap. Changeable in flight.
    pub max_bandwidth_bytes_per_s: Option<u64>,
    /// Bandwidth to reckon with in the pause; `None`: measured.
    pub switchover_bandwidth_bytes_per_s: Option<u64>,
    /// The longest pause to aim for. Changeable in flight.
    pub downtime_limit: Duration,
    /// The longest that pausing, draining and sending the rest may take before the source resumes.
    pub pause_timeout: Duration,
    /// How long to wait for *running* after *commit*.
    pub handover_timeout: Duration,
    /// Time budget for the whole move before the pause.
    pub timeout: Option<Duration>,
    /// Rounds after the first pass before the move counts as stalled.
    pub max_rounds: u32,
    /// What to do when it has stalled.
    pub on_stall: OnStall,
    /// Wait for [`SourceMigration::proceed`] once converged.
    pub pause_before_switchover: bool,
    /// Number of data channels.
    pub channels: u16,
    /// Compression of pages.
    pub compression: Compression,
    /// Compare a table of page hashes before state is loaded.
    pub verify: bool,
    /// Hash the stopped source's memory against the table after the handover.
    pub audit: bool,
    /// Stop after preflight.
    pub dry_run: bool,
    /// For tests: stop on entering this phase until [`SourceMigration::release_hold`].
    pub hold_at: Option<Phase>,
}

impl Default for SourceOptions {
    fn default() -> Self {
        Self {
            max_bandwidth_bytes_per_s: None,
            switchover_bandwidth_bytes_per_s: None,
            downtime_limit: Duration::from_millis(300),
            pause_timeout: Duration::from_secs(5),
            handover_timeout: Duration::from_secs(30),
            timeout: None,
            max_rounds: 30,
            on_stall: OnStall::Abort,
            pause_before_switchover: false,
            channels: 1,
            compression: Compression::Auto,
            verify: true,
            audit: false,
            dry_run: false,
            hold_at: None,
        }
    }
}

/// How a move ended.
#[derive(Debug)]
pub enum SourceOutcome {
    /// The destination runs the guest. The source's copy is stopped for good.
    Moved(Report),
    /// A dry run found nothing in the way.
    WouldMove(Report),
    /// The destination cannot take the machine in: every reason. The guest is as it was.
    Refused(Vec<Refusal>),
    /// It failed before *commit*; the guest is at the source as it was. Why, and what had been done.
    Failed(String, Report),
    /// It was cancelled; the guest is at the source as it was.
    Cancelled(Report),
    /// *commit* was sent and *running* not heard. The guest stays paused here until a person decides.
    Unknown(String, Report),
}

/// Why a move cannot be cancelled any more.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum CancelError {
    /// *commit* has been sent.
    #[error("too late to cancel: the guest has been handed over to {0}")]
    Committed(String),
    /// It has already ended.
    #[error("the move has already ended")]
    Ended,
}

/// A move under way, seen from the source. Cheap to clone; dropping it does not end the move.
#[derive(Clone)]
pub struct SourceMigration {
    _private: Arc<()>,
}

impl SourceMigration {
    /// Starts to move `machine` to where `dial` reaches, on threads of its own.
    pub fn start(
        _machine: Arc<dyn SourceMachine>,
        _dial: Box<dyn Dial>,
        _options: SourceOptions,
        _observer: Arc<dyn Observer>,
    ) -> Self {
        Self { _private: Arc::new(()) }
    }

    /// Waits for the end. May be called by several threads; each gets the outcome.
    pub fn wait(&self) -> Arc<SourceOutcome> {
        unimplemented!()
    }

    /// The outcome, if it has ended.
    pub fn outcome(&self) -> Option<Arc<SourceOutcome>> {
        unimplemented!()
    }

    /// A snapshot.
    pub fn progress(&self) -> Progress {
        unimplemented!()
    }

    /// Calls the move off: returns at once, [`SourceMigration::wait`] tells the end.
    pub fn cancel(&self) -> Result<(), CancelError> {
        unimplemented!()
    }

    /// Changes the cap in flight (`None`: no cap).
    pub fn set_max_bandwidth(&self, _bytes_per_s: Option<u64>) {}

    /// Changes the downtime limit in flight.
    pub fn set_downtime_limit(&self, _limit: Duration) {}

    /// Goes on from [`Phase::PreSwitchover`]; false if the move is not there.
    pub fn proceed(&self) -> bool {
        unimplemented!()
    }

    /// Goes on from [`SourceOptions::hold_at`].
    pub fn release_hold(&self) {}
}
