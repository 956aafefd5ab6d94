//! What a migration's handle and its coordinator share.

use std::sync::mpsc::Sender;
use std::sync::{Arc, Condvar, Mutex, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use super::SourceOutcome;
use super::control::{RoundSent, SourceControl};
use super::driver::Event;
use super::flow::Flow;
use super::worker;
use crate::link::ControlLink;
use crate::phase::Phase;
use crate::progress::{Progress, Reconnecting};
use crate::sync::lock;

/// The rate shown is averaged over this long.
const RATE_WINDOW: Duration = Duration::from_secs(1);

/// Shared by all clones of a handle and the coordinator.
pub struct Shared {
    /// Cap, counters and the order to stop.
    pub flow: Arc<Flow>,
    /// The longest pause before the source resumes.
    pub pause_timeout: Duration,
    /// To the coordinator.
    pub events: Mutex<Sender<Event>>,
    /// The control link, and the bytes that went over those before it.
    link: Mutex<(Option<ControlLink>, u64)>,
    data: OnceLock<Arc<worker::Shared>>,
    noted: Mutex<Noted>,
    outcome: Mutex<Option<Arc<SourceOutcome>>>,
    ended: Condvar,
}

/// What the coordinator notes for [`Shared::progress`].
#[derive(Default)]
struct Noted {
    phase: Option<Phase>,
    round: u32,
    setup: Option<Duration>,
    finished: Option<Duration>,
    predicted_pause: Option<Duration>,
    downtime: Option<Duration>,
    reconnecting: Option<Reconnecting>,
    after_this_round: Option<Duration>,
    dirty_pages_per_s: f64,
    wire_bytes_per_page: f64,
    downtime_limit: Duration,
    /// For the rate: when, and wire bytes by then.
    samples: Vec<(Instant, u64)>,
}

impl Shared {
    /// Nothing has happened yet.
    pub fn new(flow: Arc<Flow>, pause_timeout: Duration, downtime_limit: Duration, events: Sender<Event>) -> Self {
        Self {
            flow,
            pause_timeout,
            events: Mutex::new(events),
            link: Mutex::default(),
            data: OnceLock::new(),
            noted: Mutex::new(Noted { downtime_limit, wire_bytes_per_page: 4096.0, ..Noted::default() }),
            outcome: Mutex::new(None),
            ended: Condvar::new(),
        }
    }

    /// Tells the coordinator; what comes after its end is nobody's concern.
    pub fn tell(&self, event: impl Into<Event>) -> bool {
        lock(&self.events).send(event.into()).is_ok()
    }

    /// The control link, once open.
    pub fn link(&self) -> Option<ControlLink> {
        lock(&self.link).0.clone()
    }

    /// Notes the control link.
    pub fn set_link(&self, link: ControlLink) {
        let mut now = lock(&self.link);
        if let Some(before) = now.0.replace(link) {
            now.1 += before.wire_bytes();
        }
    }

    /// Notes what the workers share.
    pub fn set_data(&self, data: Arc<worker::Shared>) {
        let _ = self.data.set(data);
    }

    /// Both directions, all channels.
    pub fn wire_bytes(&self) -> u64 {
        let link = lock(&self.link);
        self.flow.wire_bytes() + link.1 + link.0.as_ref().map_or(0, ControlLink::wire_bytes)
    }

    /// Notes a new downtime limit.
    pub fn set_downtime_limit(&self, limit: Duration) {
        lock(&self.noted).downtime_limit = limit;
    }

    /// Notes where the control plane stands.
    pub fn note(&self, control: &SourceControl) {
        let mut noted = lock(&self.noted);
        let now = self.flow.now();
        noted.phase = Some(control.phase());
        noted.round = control.round();
        noted.predicted_pause = control.predicted_pause();
        noted.downtime = control.downtime();
        noted.reconnecting = control.reconnecting();
        noted.after_this_round = control.after_this_round();
        if control.phase() >= Phase::FirstPass {
            noted.setup.get_or_insert(now);
        }
        if control.phase() == Phase::Completed {
            noted.finished.get_or_insert(now);
        }
        let sample = (Instant::now(), self.wire_bytes());
        let due = noted.samples.last().is_none_or(|(at, _)| sample.0 - *at >= RATE_WINDOW / 20);
        if due {
            noted.samples.retain(|(at, _)| sample.0 - *at <= RATE_WINDOW);
            noted.samples.push(sample);
        }
    }

    /// Notes what a round has shown.
    pub fn round_ended(&self, sent: &RoundSent) {
        let mut noted = lock(&self.noted);
        noted.dirty_pages_per_s = sent.dirty_pages as f64 / sent.duration.as_secs_f64().max(1e-6);
        if sent.pages > 0 {
            noted.wire_bytes_per_page = sent.wire_bytes as f64 / sent.pages as f64;
        }
    }

    /// A snapshot.
    pub fn progress(&self) -> Progress {
        let remaining_pages = self.data.get().map_or(0, |data| data.pages.pending.count());
        let total_bytes = self.data.get().map_or(0, |data| data.pages.view.layout().pages() * 4096);
        let noted = lock(&self.noted);
        let elapsed = noted.finished.unwrap_or_else(|| self.flow.now());
        let rate = match (noted.samples.first(), noted.samples.last()) {
            (Some((from, first)), Some((to, last))) if to > from => (last - first) as f64 / (*to - *from).as_secs_f64(),
            _ => 0.0,
        };
        let moving = matches!(noted.phase, Some(Phase::FirstPass | Phase::Rounds));
        // The rest of this round at what leaves now; what follows it as the fit has it.
        let this_round = remaining_pages as f64 * noted.wire_bytes_per_page / rate.max(1.0);
        let time_left = noted.after_this_round.map(|then| then + Duration::from_secs_f64(this_round.min(1e9)));
        Progress {
            phase: noted.phase,
            round: noted.round,
            elapsed_ms: milliseconds(elapsed),
            setup_ms: milliseconds(noted.setup.unwrap_or(elapsed)),
            total_bytes,
            remaining_bytes: remaining_pages * 4096,
            wire_bytes: self.wire_bytes(),
            rate_bytes_per_s: rate,
            dirty_pages_per_s: noted.dirty_pages_per_s,
            predicted_pause_ms: noted.predicted_pause.map(milliseconds),
            downtime_ms: noted.downtime.map(milliseconds),
            time_left_ms: time_left.filter(|_| moving).map(milliseconds),
            reconnecting: noted.reconnecting.clone(),
            max_bandwidth_bytes_per_s: self.flow.bytes_per_s(),
            downtime_limit_ms: milliseconds(noted.downtime_limit),
            pages: self.flow.pages(),
            postcopy: self.flow.postcopy(),
        }
    }

    /// Where the coordinator stands.
    pub fn phase(&self) -> Option<Phase> {
        lock(&self.noted).phase
    }

    /// Notes the end and wakes whoever waits for it.
    pub fn ended(&self, outcome: SourceOutcome) {
        *lock(&self.outcome) = Some(Arc::new(outcome));
        self.ended.notify_all();
    }

    /// The outcome, if it has ended.
    pub fn outcome(&self) -> Option<Arc<SourceOutcome>> {
        lock(&self.outcome).clone()
    }

    /// Waits for the end.
    pub fn wait(&self) -> Arc<SourceOutcome> {
        let mut outcome = lock(&self.outcome);
        loop {
            if let Some(outcome) = &*outcome {
                return Arc::clone(outcome);
            }
            outcome = self.ended.wait(outcome).unwrap_or_else(PoisonError::into_inner);
        }
    }
}

fn milliseconds(duration: Duration) -> f64 {
    duration.as_secs_f64() * 1e3
}
