//! What a source tells of a move while it runs, and when it was heard.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use godwit_control::qmp::{Client, ClientError};
use godwit_core::Phase;
use serde_json::Value;

use crate::clock::monotonic_ns;

/// How long the thread may go without seeing that nobody listens to it any more.
const POLL: Duration = Duration::from_millis(50);

/// Listens to one source. Dropping it hangs up.
pub struct Events {
    heard: Arc<Heard>,
    hang_up: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

#[derive(Default)]
struct Heard {
    story: Mutex<Story>,
    more: Condvar,
}

/// What has been heard.
#[derive(Debug, Clone, Default)]
pub struct Story {
    /// Each phase that was entered, and when that was heard.
    pub phases: Vec<(Phase, u64)>,
    /// How the move ended, and when that was heard.
    pub outcome: Option<(Value, u64)>,
    /// When the move was let go from where a test had held it.
    pub released_ns: Option<u64>,
    /// The source has hung up.
    pub closed: bool,
}

impl Events {
    /// Listens to a source, for one move.
    pub fn listen(client: Client) -> Self {
        let (heard, hang_up) = (Arc::new(Heard::default()), Arc::new(AtomicBool::new(false)));
        let thread = thread::spawn({
            let (heard, hang_up) = (Arc::clone(&heard), Arc::clone(&hang_up));
            move || heard.listen(client, &hang_up)
        });
        Self { heard, hang_up, thread: Some(thread) }
    }

    /// What has been heard so far.
    pub fn story(&self) -> Story {
        self.heard.story().clone()
    }

    /// Waits until `phase` is entered, and gives when that was. `None` if the move ends first, or not within `limit`.
    pub fn wait_for(&self, phase: Phase, limit: Duration) -> Option<u64> {
        self.wait(limit, |story| story.entered_ns(phase), Story::is_over)
    }

    /// The move was let go.
    pub fn released(&self) {
        self.heard.story().released_ns = Some(monotonic_ns());
        self.heard.more.notify_all();
    }

    /// Waits until the move is let go. `None` if it ends first, or not within `limit`.
    pub fn wait_for_release(&self, limit: Duration) -> Option<u64> {
        self.wait(limit, |story| story.released_ns, Story::is_over)
    }

    /// Waits until the move has ended; whether it has, within `limit`.
    pub fn wait_for_end(&self, limit: Duration) -> bool {
        self.wait(limit, |story| story.is_over().then_some(()), |_| false).is_some()
    }

    fn wait<T>(
        &self,
        limit: Duration,
        found: impl Fn(&Story) -> Option<T>,
        never: impl Fn(&Story) -> bool,
    ) -> Option<T> {
        let deadline = Instant::now() + limit;
        let mut story = self.heard.story();
        loop {
            if let Some(found) = found(&story) {
                return Some(found);
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() || never(&story) {
                return None;
            }
            story = self.heard.more.wait_timeout(story, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    }
}

impl Drop for Events {
    fn drop(&mut self) {
        self.hang_up.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            // A panic of the thread has been shown by the panic hook.
            let _ = thread.join();
        }
    }
}

impl Story {
    /// When `phase` was entered.
    pub fn entered_ns(&self, phase: Phase) -> Option<u64> {
        self.phases.iter().find(|(entered, _)| *entered == phase).map(|(_, at_ns)| *at_ns)
    }

    /// What the source said of the end: `moved`, `failed`, …
    pub fn outcome(&self) -> Option<&str> {
        self.outcome.as_ref()?.0["outcome"].as_str()
    }

    /// Why the move did not succeed.
    pub fn reasons(&self) -> String {
        let reasons = self.outcome.as_ref().and_then(|(outcome, _)| outcome["reasons"].as_array());
        reasons.into_iter().flatten().filter_map(Value::as_str).collect::<Vec<_>>().join("; ")
    }

    /// What the audit said.
    pub fn audit(&self) -> Option<&str> {
        self.outcome.as_ref()?.0["audit"].as_str()
    }

    /// Nothing more will be heard of the move.
    pub fn is_over(&self) -> bool {
        self.outcome.is_some() || self.closed
    }

    /// Takes an event in.
    fn heard(&mut self, name: &str, data: Value, at_ns: u64) {
        match name {
            "GODWIT_PHASE" => {
                let phase = data["phase"].as_str().and_then(|phase| phase.parse().ok());
                self.phases.extend(phase.map(|phase| (phase, at_ns)));
            }
            "GODWIT_OUTCOME" => self.outcome = Some((data, at_ns)),
            _ => {}
        }
    }
}

impl Heard {
    fn listen(&self, mut client: Client, hang_up: &AtomicBool) {
        while !hang_up.load(Ordering::Relaxed) {
            let event = client.next_event(POLL);
            let at_ns = monotonic_ns();
            let mut story = self.story();
            match event {
                Ok(Some(event)) => story.heard(&event.name, event.data, at_ns),
                Ok(None) | Err(ClientError::TimedOut { .. }) => continue,
                Err(_) => story.closed = true,
            }
            let over = story.is_over();
            drop(story);
            self.more.notify_all();
            if over {
                // A source whose machine has moved waits for its clients to leave.
                return;
            }
        }
    }

    fn story(&self) -> MutexGuard<'_, Story> {
        self.story.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
