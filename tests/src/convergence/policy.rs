//! What `--on-stall` makes of a guest that has been seen not to converge: each policy has promised something.

use anyhow::{Result, ensure};
use godwit_control::outcome::OutcomeKind;
use serde::{Deserialize, Serialize};

use super::moving::{Moved, Stage};

/// A forced pause is said beforehand, within this share of what it takes.
const SAID_SHARE: f64 = 0.15;
/// The guest's rate is at least this share of the one that `estimate` names.
const RATE_SHARE: f64 = 0.8;

/// What is done about a move that has stalled.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum Policy {
    /// The guest is held to a rate at which both limits are met.
    Throttle,
    /// It goes on at the destination, and its memory follows.
    Postcopy,
    /// It is stopped, and the pause is said before.
    Force,
    /// The move is given up soon.
    Abort,
}

/// A guest that did not converge, moved once more by a policy.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct PolicyMove {
    /// Which.
    pub policy: Policy,
    /// What was seen.
    pub moved: Moved,
    /// What came of it, in words.
    pub found: String,
    /// What it had promised and did not keep.
    pub broken: Vec<String>,
}

impl Policy {
    /// One after the other.
    pub const ALL: [Policy; 4] = [Policy::Throttle, Policy::Postcopy, Policy::Force, Policy::Abort];

    /// As `--on-stall` has it.
    pub fn name(self) -> &'static str {
        match self {
            Policy::Throttle => "throttle",
            Policy::Postcopy => "postcopy",
            Policy::Force => "force",
            Policy::Abort => "abort",
        }
    }

    /// Moves the guest; `share`: of its speed, as `estimate` names it for both limits, if there is one.
    pub(super) fn play(self, stage: &Stage<'_>, share: Option<f64>) -> Result<PolicyMove> {
        let moved = stage.make(&["--on-stall", self.name()], || Ok(()))?;
        let (limit_ms, budget_ms) = (stage.point.downtime_limit_ms as f64, stage.point.timeout_ms as f64);
        let mut broken = Vec::new();
        let mut promise = |kept: bool, what: String| {
            if !kept {
                broken.push(what);
            }
        };
        let (total_s, gap_ms) = (moved.total_ms / 1e3, moved.gap_ms.unwrap_or(0.0));
        let may_stay = self == Policy::Abort || (self == Policy::Throttle && share.is_none());
        if !may_stay {
            promise(moved.arrived(), format!("it did not move: {}", moved.why()));
        }
        let found = match self {
            Policy::Abort => {
                let given_up =
                    moved.outcome.outcome == OutcomeKind::Failed && moved.why().contains("does not converge");
                promise(given_up || moved.arrived(), format!("it failed: {}", moved.why()));
                promise(moved.total_ms <= budget_ms, format!("not before its budget of {:.1} s", budget_ms / 1e3));
                format!("given up after {total_s:.2} s and {} rounds", moved.outcome.rounds)
            }
            Policy::Throttle => {
                let rate = moved.pages_per_s() / stage.point.pages_per_s().max(1) as f64;
                // It may say that no throttle helps.
                let named = share.unwrap_or(0.0);
                promise(moved.total_ms <= budget_ms, format!("budget {:.2} s", budget_ms / 1e3));
                promise(gap_ms <= limit_ms, format!("limit {limit_ms:.0} ms"));
                promise(rate >= RATE_SHARE * named, format!("rate at least {RATE_SHARE} of what was named"));
                format!(
                    "moved in {total_s:.2} s (budget {:.2}), gap {gap_ms:.0} ms (limit {limit_ms:.0}), guest at {:.0} % of its rate \
                     ({:.0} % named)",
                    budget_ms / 1e3,
                    100.0 * rate,
                    100.0 * named
                )
            }
            Policy::Force => {
                let said = moved.outcome.round_reports.last().map_or(0.0, |round| round.predicted_pause_ms);
                let error = said / gap_ms.max(1e-3) - 1.0;
                promise(error.abs() <= SAID_SHARE, format!("said within {:.0} %", 100.0 * SAID_SHARE));
                format!("moved in {total_s:.2} s, gap {gap_ms:.0} ms ({said:.0} said before, {:+.0} %)", 100.0 * error)
            }
            Policy::Postcopy => match &moved.outcome.postcopy {
                Some(postcopy) => format!(
                    "moved in {total_s:.2} s, gap {gap_ms:.0} ms, {} faults, p50 {:.2} ms, p99 {:.2} ms",
                    postcopy.faults,
                    postcopy.fault_p50_us as f64 / 1e3,
                    postcopy.fault_p99_us as f64 / 1e3
                ),
                None => format!("moved in {total_s:.2} s, gap {gap_ms:.0} ms, by rounds"),
            },
        };
        ensure!(moved.arrived() || moved.outcome.outcome == OutcomeKind::Failed, "{found}: {}", moved.why());
        Ok(PolicyMove { policy: self, moved, found, broken })
    }
}

impl PolicyMove {
    /// In one line.
    pub fn line(&self) -> String {
        match self.broken.as_slice() {
            [] => format!("{}: {}", self.policy.name(), self.found),
            broken => format!("{}: {}; NOT KEPT: {}", self.policy.name(), self.found, broken.join("; ")),
        }
    }
}
