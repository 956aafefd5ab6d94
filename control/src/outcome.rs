//! How a move ended, for programs (one JSON object) and for people (its last line, a table).

use std::process::ExitCode;

use godwit_core::progress::{PageCounts, PostCopyReport, Reconnection, Report, RoundReport, Step};
use godwit_core::source::SourceOutcome;
use serde::{Deserialize, Serialize};

/// The kinds of end that a move can have.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum OutcomeKind {
    /// The destination has the machine.
    Moved,
    /// A dry run found nothing in the way.
    WouldMove,
    /// Preflight refused.
    Refused,
    /// It failed; the machine is at the source.
    Failed,
    /// It was called off; the machine is at the source.
    Cancelled,
    /// Nobody can tell who has the machine.
    Unknown,
}

impl OutcomeKind {
    /// The exit code of the command that asked for the move.
    pub fn exit_code(self) -> ExitCode {
        ExitCode::from(match self {
            OutcomeKind::Moved | OutcomeKind::WouldMove => 0,
            OutcomeKind::Refused => 3,
            OutcomeKind::Failed => 4,
            OutcomeKind::Cancelled => 5,
            OutcomeKind::Unknown => 6,
        })
    }
}

/// A move that has ended.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Outcome {
    /// Which of this machine's moves.
    #[serde(rename = "move")]
    pub number: u64,
    /// How it ended.
    pub outcome: OutcomeKind,
    /// Where to.
    pub uri: String,
    /// What state the guest is in now, and where: one sentence.
    pub state: String,
    /// Why it did not succeed: one entry for each reason.
    pub reasons: Vec<String>,
    /// From the request to the end.
    pub total_ms: f64,
    /// From the request to pause the vCPUs until *running* was heard.
    pub downtime_ms: Option<f64>,
    /// Both directions, all channels.
    pub wire_bytes: u64,
    /// Rounds after the first pass.
    pub rounds: u32,
    /// Pages sent, by encoding.
    pub pages: PageCounts,
    /// The pause, step by step.
    pub steps: Vec<StepTime>,
    /// What passing ownership cost in the pause; null without claims, or if the machine did not move.
    pub handover: Option<HandoverCost>,
    /// Every round, the first pass included.
    pub round_reports: Vec<RoundReport>,
    /// Every break of the connection.
    pub reconnections: Vec<Reconnection>,
    /// Sent again because of them, in bytes of guest pages.
    pub resent_bytes: u64,
    /// Memory that was handed over to a receiver on the same host, in bytes, instead of being sent; null if it was sent.
    pub handed_over_bytes: Option<u64>,
    /// How pages followed after the guest had gone on at the destination; null without post-copy.
    pub postcopy: Option<PostCopyReport>,
    /// What the audit said.
    pub audit: Option<String>,
}

/// One step of the pause.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct StepTime {
    /// `source` or `destination`.
    pub end: String,
    /// What was done.
    pub name: String,
    /// How long it took.
    pub duration_ms: f64,
}

impl From<&Step> for StepTime {
    fn from(step: &Step) -> Self {
        StepTime { end: step.end.to_owned(), name: step.name.clone(), duration_ms: step.duration_ms }
    }
}

/// What passing ownership cost in the pause.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct HandoverCost {
    /// The destination's claim.
    pub claim_ms: f64,
    /// The marker that the guest has run. Nobody waits for it.
    pub marker_ms: f64,
    /// The images' locks. The destination takes them before the pause, the source drops them after it.
    pub locks_ms: f64,
    /// All of it.
    pub total_ms: f64,
}

impl HandoverCost {
    /// From the steps of a pause; `None` if nothing was claimed in it.
    fn of(steps: &[StepTime]) -> Option<Self> {
        let sum = |name: &str| {
            let steps = steps.iter().filter(|step| step.name == name);
            steps.map(|step| step.duration_ms).reduce(|sum, ms| sum + ms)
        };
        let claim_ms = sum("claim")?;
        let (marker_ms, locks_ms) = (sum("marker").unwrap_or(0.0), sum("locks").unwrap_or(0.0));
        Some(HandoverCost { claim_ms, marker_ms, locks_ms, total_ms: claim_ms + marker_ms + locks_ms })
    }
}

impl Outcome {
    /// The outcome of move `number` to `uri`. `here` says how the guest is if it is still at the source.
    pub fn new(number: u64, uri: &str, outcome: &SourceOutcome, here: &str) -> Self {
        let none = Report::default();
        let (kind, reasons, report) = match outcome {
            SourceOutcome::Moved(report) => (OutcomeKind::Moved, Vec::new(), report),
            SourceOutcome::WouldMove(report) => (OutcomeKind::WouldMove, Vec::new(), report),
            SourceOutcome::Refused(refusals) => {
                (OutcomeKind::Refused, refusals.iter().map(ToString::to_string).collect(), &none)
            }
            SourceOutcome::Failed(why, report) => (OutcomeKind::Failed, vec![why.clone()], report),
            SourceOutcome::Cancelled(report) => (OutcomeKind::Cancelled, Vec::new(), report),
            SourceOutcome::Unknown(why, report) => (OutcomeKind::Unknown, vec![why.clone()], report),
        };
        let state = match kind {
            OutcomeKind::Moved => format!("the machine is now at {uri}; here it has been stopped for good"),
            OutcomeKind::Unknown => format!(
                "the guest is paused here, and {uri} may be running it: find out which, then either `abandon` it here or, \
                 only if it does not run there and never will, `resume --force`"
            ),
            _ => format!("the guest is still here, {here}"),
        };
        let steps: Vec<StepTime> = report.steps.iter().map(StepTime::from).collect();
        Outcome {
            number,
            outcome: kind,
            uri: uri.to_owned(),
            state,
            reasons,
            total_ms: report.total_ms,
            downtime_ms: report.downtime_ms,
            wire_bytes: report.wire_bytes,
            rounds: report.rounds.iter().map(|round| round.round).max().unwrap_or(0),
            pages: report.pages,
            handover: HandoverCost::of(&steps).filter(|_| kind == OutcomeKind::Moved),
            steps,
            round_reports: report.rounds.clone(),
            reconnections: report.reconnections.clone(),
            resent_bytes: report.resent_bytes,
            handed_over_bytes: report.handed_over_bytes,
            postcopy: report.postcopy.clone(),
            audit: report.audit.clone(),
        }
    }

    /// What it came to, in one line.
    pub fn headline(&self) -> String {
        let what = match self.outcome {
            OutcomeKind::Moved => "moved",
            OutcomeKind::WouldMove => "nothing is in the way of this move; none was made (--dry-run)",
            OutcomeKind::Refused => "refused before anything was sent",
            OutcomeKind::Failed => "the move failed",
            OutcomeKind::Cancelled => "the move was cancelled",
            OutcomeKind::Unknown => "UNKNOWN: this needs a person",
        };
        format!("{what}: {}", self.state)
    }
}

#[cfg(test)]
mod tests {
    use godwit_core::Refusal;

    use super::*;

    fn outcome(outcome: SourceOutcome) -> Outcome {
        Outcome::new(1, "tcp://127.0.0.1:7000", &outcome, "running")
    }

    #[test]
    fn every_end_says_where_the_guest_is() {
        let moved = outcome(SourceOutcome::Moved(Report::default()));
        assert!(moved.headline().contains("now at tcp://127.0.0.1:7000"));
        let cancelled = outcome(SourceOutcome::Cancelled(Report::default()));
        assert!(cancelled.headline().contains("still here, running"));
        let unknown = outcome(SourceOutcome::Unknown("silence".into(), Report::default()));
        assert!(unknown.headline().contains("paused here"));
        assert_eq!(unknown.reasons, ["silence"]);
    }

    #[test]
    fn every_reason_of_a_refusal_is_kept() {
        let refusals = vec![Refusal::new("cpu", "no avx2"), Refusal::new("memory", "too little")];
        assert_eq!(outcome(SourceOutcome::Refused(refusals)).reasons, ["cpu: no avx2", "memory: too little"]);
    }

    #[test]
    fn the_handover_has_its_cost_summed_up() {
        let step = |end, name: &str, duration_ms| Step { end, name: name.into(), duration_ms };
        let twice = vec![
            step("source", "pause vCPUs and devices", 3.0),
            step("destination", "claim", 0.25),
            step("destination", "claim", 0.5),
            step("destination", "start vCPUs", 1.0),
        ];
        let moved = outcome(SourceOutcome::Moved(Report { steps: twice, ..Report::default() }));
        let cost = HandoverCost { claim_ms: 0.75, marker_ms: 0.0, locks_ms: 0.0, total_ms: 0.75 };
        assert_eq!(moved.handover, Some(cost));
        assert_eq!(outcome(SourceOutcome::Moved(Report::default())).handover, None, "no claims");
    }

    #[test]
    fn json_is_read_back() {
        let rounds = vec![RoundReport::default(), RoundReport { round: 1, ..RoundReport::default() }];
        let moved = outcome(SourceOutcome::Moved(Report { rounds, downtime_ms: Some(1.5), ..Report::default() }));
        assert_eq!(moved.rounds, 1);
        let text = serde_json::to_string(&moved).unwrap();
        assert!(text.contains(r#""outcome":"moved""#));
        assert_eq!(serde_json::from_str::<Outcome>(&text).unwrap(), moved);
    }
}
