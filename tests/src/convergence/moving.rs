//! One move of the suite, seen from outside.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result, ensure};
use godwit_control::outcome::{Outcome, OutcomeKind};
use godwit_control::qmp::Client;
use godwit_core::progress::RoundReport;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::point::Point;
use super::rate::RateSampler;
use crate::clock::monotonic_ns;
use crate::godwit::Node;
use crate::measure::{NotCompleted, measure};
use crate::netns::Hosts;
use crate::sampler::Target;

/// How long a command may take beside what it is there for.
pub(super) const COMMAND_LIMIT: Duration = Duration::from_secs(60);
/// A round that leaves no more than this of what was dirty before has got somewhere.
const SHRUNK: f64 = 0.95;
/// So many rounds in a row that got nowhere show that none will.
const STANDING_ROUNDS: u32 = 2;

/// For so long an event is waited for at each look.
const LOOK: Duration = Duration::from_millis(1);

/// A move, seen from outside.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Moved {
    /// When the move was asked for, milliseconds since 1970.
    pub at_unix_ms: u64,
    /// From the command until a poller saw its end.
    pub total_ms: f64,
    /// By the guest's heartbeat; none if it stayed.
    pub gap_ms: Option<f64>,
    /// Both directions, on the link.
    pub wire_bytes: u64,
    /// The guest's writes: milliseconds since the command, and pages written since then.
    pub writes: Vec<(f64, u64)>,
    /// What the mover itself tells.
    pub outcome: Outcome,
}

impl Moved {
    /// The guest is at the destination.
    pub fn arrived(&self) -> bool {
        self.outcome.outcome == OutcomeKind::Moved
    }

    /// Why not.
    pub fn why(&self) -> String {
        self.outcome.reasons.join("; ")
    }

    /// Pages that the guest wrote per second, from the command until the move's end.
    pub fn pages_per_s(&self) -> f64 {
        let written = self.writes.iter().take_while(|(at_ms, _)| *at_ms <= self.total_ms).last();
        written.map_or(0.0, |(at_ms, pages)| *pages as f64 * 1e3 / at_ms.max(1.0))
    }
}

/// Both ends of the moves of a point.
pub(super) struct Stage<'a> {
    pub(super) point: &'a Point,
    pub(super) source: &'a Node,
    pub(super) destination: &'a Node,
    pub(super) hosts: &'a Hosts,
    pub(super) heartbeats: Target,
}

impl Stage<'_> {
    /// Moves the guest with nothing in the way but its limits, and calls the move off once its rounds have shown that they get nowhere.
    pub(super) fn move_as_far_as_it_gets(&self) -> Result<Moved> {
        let mut watch = Watch { client: self.source.qmp()?, rounds: Rounds::default(), called_off: false };
        let moved = self.make(&["--stall-detection", "off"], || watch.look())?;
        let shown = watch.called_off && moved.outcome.outcome == OutcomeKind::Cancelled;
        // The limits themselves end a move too.
        let spent = moved.outcome.outcome == OutcomeKind::Failed && moved.why().contains("does not converge");
        ensure!(moved.arrived() || shown || spent, "the move failed: {}", moved.why());
        Ok(moved)
    }

    /// Moves the guest within the point's limits and by `options`; `look` is called every few milliseconds.
    pub(super) fn make(&self, options: &[&str], mut look: impl FnMut() -> Result<()>) -> Result<Moved> {
        let mut all = self.point.limits();
        all.extend(["--max-bandwidth".to_owned(), format!("{}Mbit", self.point.bandwidth_mbit)]);
        let all: Vec<&str> = all.iter().map(String::as_str).chain(options.iter().copied()).collect();
        let limit = Duration::from_millis(self.point.timeout_ms) + COMMAND_LIMIT;

        let interface = self.hosts.counters(0, 1)?;
        let bytes = || interface.traffic().map(|traffic| traffic.received_bytes + traffic.sent_bytes);
        let writes = RateSampler::start(self.heartbeats, self.destination.process.pid());
        let (bytes_before, at_unix_ms, began_ns) = (bytes()?, unix_ms(), monotonic_ns());
        let mut looked = Ok(());
        let show = |_: &Value| looked = std::mem::replace(&mut looked, Ok(())).and_then(|()| look());
        let measured = measure(self.source, self.destination, self.heartbeats, None, &all, limit, show);
        let ended_ns = monotonic_ns();
        let (wire_bytes, samples) = (bytes()? - bytes_before, writes.finish()?);
        looked?;

        let (total_ms, gap_ms, outcome) = match measured {
            Ok(measured) => (measured.total_ms, Some(measured.gap.gap_ms), measured.outcome),
            Err(error) => match error.downcast_ref::<NotCompleted>() {
                Some(NotCompleted::Ended(_)) => {
                    ((ended_ns - began_ns) as f64 / 1e6, None, self.source.migration()?["outcome"].clone())
                }
                _ => return Err(error),
            },
        };
        let outcome: Outcome = serde_json::from_value(outcome).context("how the move ended is not told")?;
        let before = samples.iter().rev().find(|sample| sample.at_ns <= began_ns).or(samples.first());
        let pages_before = before.map_or(0, |sample| sample.pages);
        let writes = samples
            .iter()
            .map(|sample| ((sample.at_ns as f64 - began_ns as f64) / 1e6, sample.pages.saturating_sub(pages_before)))
            .collect();
        Ok(Moved { at_unix_ms, total_ms, gap_ms, wire_bytes, writes, outcome })
    }
}

/// Watches the rounds of a move.
struct Watch {
    client: Client,
    rounds: Rounds,
    called_off: bool,
}

impl Watch {
    /// Calls the move off once it has shown that it gets nowhere.
    fn look(&mut self) -> Result<()> {
        while let Ok(Some(event)) = self.client.next_event(LOOK) {
            if event.name == "GODWIT_ROUND" {
                let round: RoundReport = serde_json::from_value(event.data).context("GODWIT_ROUND")?;
                self.rounds.ended(round.dirty_pages);
            }
        }
        if self.rounds.stand_still() && !self.called_off {
            self.called_off = true;
            // It may have ended this very moment: how is told by its outcome.
            let _ = self.client.execute("migrate_cancel", json!({}));
        }
        Ok(())
    }
}

/// What the rounds of a move have shown, whatever anybody predicts of further ones.
#[derive(Debug, Default)]
struct Rounds {
    dirty_pages: Option<u64>,
    standing: u32,
}

impl Rounds {
    /// A round has ended, and the guest was not stopped: what is dirty is too much.
    fn ended(&mut self, dirty_pages: u64) {
        let before = self.dirty_pages.replace(dirty_pages);
        let stands = before.is_some_and(|before| dirty_pages as f64 > SHRUNK * before as f64);
        self.standing = if stands { self.standing + 1 } else { 0 };
    }

    /// The last ones left about as much dirty as those before them.
    fn stand_still(&self) -> bool {
        self.standing >= STANDING_ROUNDS
    }
}

pub(super) fn unix_ms() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_millis() as u64)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn two_rounds_in_a_row_that_leave_as_much_as_there_was_show_that_none_gets_anywhere() {
        let mut rounds = Rounds::default();
        for (dirty_pages, shown) in [(900, false), (1000, false), (800, false), (790, false), (800, true), (400, false)]
        {
            rounds.ended(dirty_pages);
            assert_eq!(rounds.stand_still(), shown, "{dirty_pages}");
        }
    }
}
