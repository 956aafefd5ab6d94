//! What a move says of itself: while it runs ([`Progress`], [`Event`]) and when it has ended ([`Report`]).

use serde::{Deserialize, Serialize};

use crate::phase::Phase;

/// Hears of everything worth telling while it happens. Called from the engine's threads: return quickly.
pub trait Observer: Send + Sync {
    /// Something happened.
    fn event(&self, event: Event);
}

/// An observer that listens to nothing.
pub struct Silent;

impl Observer for Silent {
    fn event(&self, _: Event) {}
}

/// Something that happened in a move.
#[derive(Debug, Clone, Serialize)]
#[serde(tag = "event", rename_all = "kebab-case")]
pub enum Event {
    /// The move entered a phase.
    Phase {
        /// Which one.
        phase: Phase,
    },
    /// A round has ended.
    Round(RoundReport),
    /// A decision, and its reason, for a person to read.
    Decision {
        /// One sentence.
        text: String,
    },
}

/// A snapshot of a running move.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", default)]
pub struct Progress {
    /// Where it stands.
    pub phase: Option<Phase>,
    /// Current round; 0 is the first pass.
    pub round: u32,
    /// Since the move was asked for.
    pub elapsed_ms: f64,
    /// From the start until the first page was sent.
    pub setup_ms: f64,
    /// All of guest RAM.
    pub total_bytes: u64,
    /// Guest bytes still to be sent in this round, as far as known.
    pub remaining_bytes: u64,
    /// Both directions, all channels.
    pub wire_bytes: u64,
    /// What leaves now, averaged over about a second.
    pub rate_bytes_per_s: f64,
    /// Pages that the guest dirtied per second in the last round.
    pub dirty_pages_per_s: f64,
    /// The pause, if it began now.
    pub predicted_pause_ms: Option<f64>,
    /// Once the destination runs the guest: from the request to pause the vCPUs until then.
    pub downtime_ms: Option<f64>,
    /// Until the move has ended, if it can be told.
    pub time_left_ms: Option<f64>,
    /// While the connection is broken and being made anew.
    pub reconnecting: Option<Reconnecting>,
    /// The cap now in force, bytes per second.
    pub max_bandwidth_bytes_per_s: Option<u64>,
    /// The downtime limit now in force.
    pub downtime_limit_ms: f64,
    /// Pages sent, by encoding.
    pub pages: PageCounts,
    /// Pages that followed the guest, in post-copy.
    pub postcopy: PostCopyCounts,
}

/// A connection that is being made anew.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Reconnecting {
    /// How often it has been tried.
    pub attempts: u32,
    /// Until the move is given up.
    pub time_left_ms: f64,
    /// Why it is not connected yet.
    pub why: String,
}

/// Pages by the way they were sent.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PageCounts {
    /// As they are.
    pub raw: u64,
    /// As a note that they are all zeros.
    pub zero: u64,
    /// Compressed.
    pub zstd: u64,
    /// As differences from what had been sent before, or as the few words in which they are not zeros.
    pub delta: u64,
    /// Dirtied, and found to be what had been sent before: not sent again.
    pub same: u64,
    /// Left out because nothing ever touched them, or the guest had given them back, before they were sent. Counted each time.
    pub untouched: u64,
}

impl PageCounts {
    /// Pages that were looked at to be sent.
    pub fn visited(&self) -> u64 {
        self.raw + self.zero + self.zstd + self.delta + self.same
    }
}

/// One round, looked back upon.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct RoundReport {
    /// 0 is the first pass.
    pub round: u32,
    /// How long it took.
    pub duration_ms: f64,
    /// Pages sent in it.
    pub pages_sent: u64,
    /// Bytes given to sockets in it.
    pub wire_bytes: u64,
    /// Pages found dirty when it ended.
    pub dirty_pages: u64,
    /// The pause that was predicted when it ended.
    pub predicted_pause_ms: f64,
}

/// One step of the pause, at either end.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Step {
    /// `source` or `destination`.
    pub end: &'static str,
    /// What was done.
    pub name: String,
    /// How long it took.
    pub duration_ms: f64,
}

/// A connection that broke and was made anew, or not. Bytes are those of guest pages.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Reconnection {
    /// Where the move stood.
    pub phase: Option<Phase>,
    /// What was noticed last.
    pub why: String,
    /// When the break was noticed, since the request.
    pub at_ms: f64,
    /// From then until pages could be sent again. Absent if that was never so.
    pub outage_ms: Option<f64>,
    /// How often it was tried.
    pub attempts: u32,
    /// How long the guest had been paused, if it was.
    pub paused_ms: Option<f64>,
    /// Sent, and not acknowledged when the connection broke.
    pub unacknowledged_bytes: u64,
    /// Of the rest, written by the guest since it had been sent.
    pub dirtied_bytes: u64,
    /// Sent again because of the break.
    pub resent_bytes: u64,
}

/// Post-copy, looked back upon.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct PostCopyReport {
    /// Why it was chosen.
    pub why: String,
    /// Pages that were missing when the guest went on at the destination.
    pub missing_pages: u64,
    /// From then until none was.
    pub duration_ms: f64,
    /// Pages that something at the destination waited for.
    pub faults: u64,
    /// How long half of those took at most, as the destination saw it.
    pub fault_p50_us: u64,
    /// How long 99 % of them took at most.
    pub fault_p99_us: u64,
    /// How long the slowest took.
    pub fault_max_us: u64,
    /// Pages that were sent because they were needed.
    pub pages_by_fault: u64,
    /// Pages that were sent before anybody needed them.
    pub pages_by_push: u64,
    /// Given to sockets for both.
    pub wire_bytes: u64,
}

/// Pages that have followed so far, in post-copy.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PostCopyCounts {
    /// Pages that were missing when the guest went on at the destination.
    pub missing_pages: u64,
    /// Pages that were sent because they were needed.
    pub by_fault: u64,
    /// Pages that were sent before anybody needed them.
    pub by_push: u64,
    /// Given to sockets for both.
    pub wire_bytes: u64,
}

/// A move that has ended, looked back upon.
#[derive(Debug, Clone, Default, PartialEq, Serialize)]
pub struct Report {
    /// From the request to the end.
    pub total_ms: f64,
    /// From the request to pause the vCPUs until *running* was heard. Absent if the guest was never paused.
    pub downtime_ms: Option<f64>,
    /// Both directions, all channels.
    pub wire_bytes: u64,
    /// Every round.
    pub rounds: Vec<RoundReport>,
    /// The pause, step by step.
    pub steps: Vec<Step>,
    /// Every break of the connection.
    pub reconnections: Vec<Reconnection>,
    /// Sent again because of them, in bytes of guest pages.
    pub resent_bytes: u64,
    /// Pages sent, by encoding.
    pub pages: PageCounts,
    /// Memory that was handed over to a destination on the same host, instead of being sent.
    pub handed_over_bytes: Option<u64>,
    /// How pages followed after the guest had gone on at the destination. Absent without post-copy.
    pub postcopy: Option<PostCopyReport>,
    /// With `--audit`: what the stopped source's memory said against the table.
    pub audit: Option<String>,
}
