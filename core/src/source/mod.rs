//! The sending end of a move.

mod applying;
mod compressing;
pub mod control;
mod data;
mod driver;
mod flow;
pub mod jobs;
pub mod sending;
pub mod serving;
mod settler;
mod state;
pub mod tally;
mod unacknowledged;
mod worker;

use std::sync::{Arc, mpsc};
use std::thread;
use std::time::{Duration, Instant};

pub(crate) use self::compressing::{AUTO_LEVEL, is_slow};
use self::control::{Beginning, Input};
use self::driver::{Driver, Event};
use self::flow::Flow;
pub use self::sending::{SendingChannel, SourcePages};
use self::state::Shared;
pub use self::unacknowledged::{BadAcknowledgement, Batch, Sent, Unacknowledged};
use crate::channel::Dial;
use crate::machine::{Refusal, SourceMachine};
use crate::ownership::Holding;
use crate::phase::Phase;
use crate::priority::run_promptly;
use crate::progress::{Observer, Progress, Report};
use crate::random;

/// What to do when the stop rule is not met in time.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum OnStall {
    /// Give up; the guest runs on at the source.
    #[default]
    Abort,
    /// Stop the guest all the same and accept the longer pause.
    Force,
    /// Hold its vCPUs to the highest rate of writing that meets the limits.
    Throttle,
    /// Let the guest go on at the destination, and send what is left of its memory after it ([`crate::postcopy`]).
    PostCopy,
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

/// Whether memory is handed over instead of being sent, where both ends are on one host and share a unix socket.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum MemoryHandover {
    /// Where it is possible.
    #[default]
    Auto,
    /// Or the move is refused.
    Require,
    /// Never: it is sent.
    Off,
}

/// The most data channels a move can have.
pub const MAX_CHANNELS: u16 = 64;

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
    /// How long a connection that breaks before the last state is loaded is made anew for; zero: a break ends the move.
    pub reconnect_timeout: Duration,
    /// Time budget for the whole move before the pause.
    pub timeout: Option<Duration>,
    /// Rounds after the first pass before the move counts as stalled.
    pub max_rounds: u32,
    /// What to do when it has stalled.
    pub on_stall: OnStall,
    /// A move has stalled as soon as it shows that the limits are not going to be met. Otherwise only when its time or its rounds are used up.
    pub stall_detection: bool,
    /// Wait for [`SourceMigration::proceed`] once converged.
    pub pause_before_switchover: bool,
    /// Number of data channels.
    pub channels: u16,
    /// Compression of pages.
    pub compression: Compression,
    /// Hand memory over instead of sending it.
    pub memory_handover: MemoryHandover,
    /// Memory for what was last sent of pages, taken as it is needed, so that over a slow link only
    /// differences need be sent; 0: none.
    pub delta_cache_bytes: u64,
    /// Compare a table of page hashes before state is loaded.
    pub verify: bool,
    /// Hash the stopped source's memory against the table after the handover.
    pub audit: bool,
    /// Stop after preflight.
    pub dry_run: bool,
    /// Name and version of the program, for the peer's messages.
    pub program: String,
    /// This host's name, for the peer's messages.
    pub host_name: String,
    /// The claims by which ownership passes; `None`: it passes by *commit* alone.
    pub ownership: Option<Arc<Holding>>,
    /// For tests: stop on entering this phase until [`SourceMigration::release_hold`].
    pub hold_at: Option<Phase>,
}

/// In which ways the pages of a move may be sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Encodings {
    /// Compression of pages.
    pub compression: Compression,
    /// Memory of all channels for what was last sent of pages.
    pub delta_cache_bytes: u64,
    /// Pages that are zeros but for a few words may be sent as those.
    pub sparse: bool,
    /// The destination is told which pages come next.
    pub coming: bool,
}

impl Encodings {
    /// Of each of so many channels.
    pub fn of_each(self, channels: u16) -> Self {
        Self { delta_cache_bytes: self.delta_cache_bytes / u64::from(channels.max(1)), ..self }
    }
}

/// More than this many data channels are a choice, not a default.
const MOST_DEFAULT_CHANNELS: usize = 4;

/// One more than there are cores, within reason: where there are few, guests want them too, and with one more a move of 1 GiB takes a fifth less
/// time (docs/performance.md).
fn default_channels() -> u16 {
    thread::available_parallelism().map_or(2, |cores| (cores.get() + 1).min(MOST_DEFAULT_CHANNELS) as u16)
}

impl Default for SourceOptions {
    fn default() -> Self {
        Self {
            max_bandwidth_bytes_per_s: None,
            switchover_bandwidth_bytes_per_s: None,
            downtime_limit: Duration::from_millis(300),
            pause_timeout: Duration::from_secs(5),
            handover_timeout: Duration::from_secs(30),
            reconnect_timeout: Duration::from_secs(60),
            timeout: None,
            max_rounds: 30,
            on_stall: OnStall::Abort,
            stall_detection: true,
            pause_before_switchover: false,
            channels: default_channels(),
            compression: Compression::Auto,
            memory_handover: MemoryHandover::Auto,
            delta_cache_bytes: 512 << 20,
            verify: true,
            audit: false,
            dry_run: false,
            program: concat!("godwit ", env!("CARGO_PKG_VERSION")).into(),
            host_name: "source".into(),
            ownership: None,
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
    /// It failed, before *commit* or before the destination had claimed the machine; the guest is at the source as it was. Why, and what had been done.
    Failed(String, Report),
    /// It was cancelled; the guest is at the source as it was.
    Cancelled(Report),
    /// *commit* was sent and *running* not heard. The guest stays paused here until the claims or a person decide
    /// ([`Holding::settle`]).
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

/// Why a move does not go over to post-copy.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("the move cannot go over to post-copy: {0}")]
pub struct PostCopyError(String);

/// A move under way, seen from the source. Cheap to clone; dropping it does not end the move.
#[derive(Clone)]
pub struct SourceMigration {
    shared: Arc<Shared>,
}

impl SourceMigration {
    /// Starts to move `machine` to where `dial` reaches, on threads of its own.
    pub fn start(
        machine: Arc<dyn SourceMachine>,
        dial: Box<dyn Dial>,
        mut options: SourceOptions,
        observer: Arc<dyn Observer>,
    ) -> Self {
        options.channels = options.channels.clamp(1, MAX_CHANNELS);
        let (sender, events) = mpsc::channel();
        let flow = Arc::new(Flow::new(Instant::now(), options.channels, options.max_bandwidth_bytes_per_s));
        let (pause_timeout, downtime_limit) = (options.pause_timeout, options.downtime_limit);
        let shared = Arc::new(Shared::new(flow, pause_timeout, downtime_limit, sender.clone()));
        let beginning = Beginning {
            program: options.program.clone(),
            host: options.host_name.clone(),
            running: machine.is_running(),
            table_seed: random::number(),
            nonce: random::number(),
            options,
        };
        let handle = Arc::clone(&shared);
        let spawned = thread::Builder::new().name("migration".into()).spawn(move || {
            let _prompt = run_promptly();
            Driver::new(machine, dial, observer, handle, beginning, (sender, events)).run();
        });
        if let Err(error) = spawned {
            let why = format!("no thread could be started for the move: {error}");
            shared.ended(SourceOutcome::Failed(why, Report::default()));
        }
        Self { shared }
    }

    /// Waits for the end. May be called by several threads; each gets the outcome.
    pub fn wait(&self) -> Arc<SourceOutcome> {
        self.shared.wait()
    }

    /// The outcome, if it has ended.
    pub fn outcome(&self) -> Option<Arc<SourceOutcome>> {
        self.shared.outcome()
    }

    /// A snapshot.
    pub fn progress(&self) -> Progress {
        self.shared.progress()
    }

    /// Calls the move off. Returns as soon as it is clear whether that is still possible; [`SourceMigration::wait`] tells
    /// the end.
    pub fn cancel(&self) -> Result<(), CancelError> {
        let (answer, answered) = mpsc::channel();
        self.shared.tell(Event::Cancel(answer));
        // The coordinator never blocks for long; if it is gone, the move has ended.
        answered.recv().unwrap_or(Err(CancelError::Ended))
    }

    /// Changes the cap in flight (`None`: no cap).
    pub fn set_max_bandwidth(&self, bytes_per_s: Option<u64>) {
        self.shared.flow.set_bytes_per_s(bytes_per_s);
    }

    /// Changes the downtime limit in flight.
    pub fn set_downtime_limit(&self, limit: Duration) {
        self.shared.set_downtime_limit(limit);
        self.shared.tell(Input::DowntimeLimit(limit));
    }

    /// Goes on from [`Phase::PreSwitchover`]; false if the move is not there.
    pub fn proceed(&self) -> bool {
        self.shared.phase() == Some(Phase::PreSwitchover) && self.shared.tell(Input::Proceed)
    }

    /// Lets the guest go on at the destination before all of its memory is there ([`crate::postcopy`]), as soon as the round under way has
    /// been left.
    pub fn go_over_to_postcopy(&self) -> Result<(), PostCopyError> {
        let (answer, answered) = mpsc::channel();
        self.shared.tell(Event::PostCopy(answer));
        answered.recv().unwrap_or(Err("it has ended".into())).map_err(PostCopyError)
    }

    /// A person says that the destination, which runs the guest without all of its memory, is not to be waited for any more: the outcome is
    /// [`SourceOutcome::Unknown`]. False unless the move is in [`Phase::PostCopyPaused`].
    pub fn abandon(&self) -> bool {
        self.shared.phase() == Some(Phase::PostCopyPaused) && self.shared.tell(Input::Abandon)
    }

    /// Goes on from [`SourceOptions::hold_at`].
    pub fn release_hold(&self) {
        self.shared.tell(Input::Release);
    }
}
