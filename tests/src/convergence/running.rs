//! One point: boot, estimate, write the prediction down, move, and see from outside what became of it.

use std::fs::File;
use std::io::Write;
use std::path::Path;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result, ensure};
use godwit_control::outcome::{Outcome, OutcomeKind};
use godwit_control::report::MoveReport;
use godwit_core::estimate::Measured as Estimated;
use godwit_core::predict::Forecast;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use sha2::{Digest, Sha256};

use super::point::Point;
use super::rate::RateSampler;
use super::score::Case;
use crate::clock::monotonic_ns;
use crate::godwit::Node;
use crate::harness::Scene;
use crate::measure::{NotCompleted, measure};
use crate::netns::Hosts;
use crate::sampler::Target;
use crate::{wait, workload};

/// How long each guest is measured before its move is predicted.
const ESTIMATE_TIME: &str = "5s";
/// How long a command may take beside what it is there for.
const COMMAND_LIMIT: Duration = Duration::from_secs(60);
/// A guest that writes slowly is not waited for until it has been everywhere.
const SETTLE_LIMIT: Duration = Duration::from_secs(20);
/// A round that leaves no more than this of what was dirty before has got somewhere.
const SHRUNK: f64 = 0.95;

/// What was predicted, and when.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Prediction {
    /// When it was written down, milliseconds since 1970.
    pub at_unix_ms: u64,
    /// What it says.
    pub forecast: Forecast,
    /// What it follows from.
    pub estimated: Estimated,
}

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

/// A point with all that is known of it.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Record {
    /// The guest and the link.
    pub point: Point,
    /// Said beforehand.
    pub prediction: Prediction,
    /// SHA-256 of the line in which it was written down before the move.
    pub prediction_sha256: String,
    /// What happened.
    pub moved: Moved,
}

/// Where predictions are written down: a line of JSON for each, on the disk before its move begins.
pub struct Ledger(File);

impl Ledger {
    /// An empty one.
    pub fn create(path: &Path) -> Result<Self> {
        Ok(Self(File::create(path).with_context(|| format!("cannot create {}", path.display()))?))
    }

    /// Writes a line and gives its SHA-256.
    fn write(&mut self, point: &Point, prediction: &Prediction) -> Result<String> {
        let line = serde_json::json!({ "point": point, "prediction": prediction }).to_string();
        writeln!(self.0, "{line}").and_then(|()| self.0.sync_data()).context("cannot write the prediction down")?;
        Ok(Sha256::digest(line.as_bytes()).iter().map(|byte| format!("{byte:02x}")).collect())
    }
}

/// Predicts and makes the move of a point between the first two of `hosts`.
pub fn run(point: &Point, hosts: &Hosts, ledger: &mut Ledger) -> Result<Record> {
    let scene = Scene::new()?;
    run_in(&scene, point, hosts, ledger).with_context(|| scene.logs())
}

fn run_in(scene: &Scene, point: &Point, hosts: &Hosts, ledger: &mut Ledger) -> Result<Record> {
    hosts.shape(0, 1, point.link_mbit)?;
    hosts.shape(1, 0, point.link_mbit)?;
    let guest = point.workload();
    let source = Node::sender(scene, "source", Some(hosts.host(0)), &guest, &[])?;
    let listen = format!("tcp://{}:0", hosts.address(1, 0));
    let destination = Node::receiver(scene, "destination", Some(hosts.host(1)), &listen, &["--insecure"])?;
    let heartbeats = source.heartbeats(guest.vcpus)?;
    settle(point, heartbeats)?;

    let prediction = predict(point, &source)?;
    let prediction_sha256 = ledger.write(point, &prediction)?;
    let moved = make(point, &source, &destination, heartbeats, hosts)?;
    Ok(Record { point: point.clone(), prediction, prediction_sha256, moved })
}

/// Waits until the guest has been through its working set once, or for as long as a slow one deserves.
fn settle(point: &Point, heartbeats: Target) -> Result<()> {
    let writes = workload::writes(heartbeats);
    let pages = point.working_set_mib << 8;
    let once = Duration::from_secs_f64(pages as f64 / point.pages_per_s().max(1) as f64);
    let mut values = Vec::new();
    wait::until_true("the guest has written its working set", 4 * once.min(SETTLE_LIMIT) + COMMAND_LIMIT, || {
        writes.read(&mut values).context("cannot read the guest's counters")?;
        Ok(values.iter().sum::<u64>() >= pages)
    })
}

fn predict(point: &Point, source: &Node) -> Result<Prediction> {
    let bandwidth = [
        ("--bandwidth", format!("{}Mbit", point.bandwidth_mbit)),
        ("--switchover-bandwidth", format!("{}Mbit", point.switchover_mbit())),
        ("--time", ESTIMATE_TIME.to_owned()),
    ];
    let mut options = point.limits();
    options.extend(bandwidth.into_iter().flat_map(|(name, value)| [name.to_owned(), value]));
    let options: Vec<&str> = ["--json"].into_iter().chain(options.iter().map(String::as_str)).collect();
    let answer = source.command(&["estimate"], &options, COMMAND_LIMIT)?.ensure_code(0)?.last_json()?;
    let field = |name: &str| answer[name].clone();
    Ok(Prediction {
        at_unix_ms: unix_ms(),
        forecast: serde_json::from_value(field("forecast")).context("no forecast")?,
        estimated: serde_json::from_value(field("measured")).context("nothing measured")?,
    })
}

fn make(point: &Point, source: &Node, destination: &Node, heartbeats: Target, hosts: &Hosts) -> Result<Moved> {
    let mut options = point.limits();
    options.extend(["--max-bandwidth".to_owned(), format!("{}Mbit", point.bandwidth_mbit)]);
    let options: Vec<&str> = options.iter().map(String::as_str).collect();
    let limit = Duration::from_millis(point.timeout_ms) + COMMAND_LIMIT;

    let interface = hosts.counters(0, 1)?;
    let bytes = || interface.traffic().map(|traffic| traffic.received_bytes + traffic.sent_bytes);
    let writes = RateSampler::start(heartbeats, destination.process.pid());
    let (bytes_before, at_unix_ms, began_ns) = (bytes()?, unix_ms(), monotonic_ns());
    let measured = measure(source, destination, heartbeats, None, &options, limit, |_| ());
    let ended_ns = monotonic_ns();
    let (wire_bytes, samples) = (bytes()? - bytes_before, writes.finish()?);

    let (total_ms, gap_ms, outcome) = match measured {
        Ok(measured) => (measured.total_ms, Some(measured.gap.gap_ms), measured.outcome),
        Err(error) => match error.downcast_ref::<NotCompleted>() {
            Some(NotCompleted::Ended(_)) => {
                ((ended_ns - began_ns) as f64 / 1e6, None, source.migration()?["outcome"].clone())
            }
            _ => return Err(error),
        },
    };
    let outcome = outcome_of(point, outcome)?;
    let before = samples.iter().rev().find(|sample| sample.at_ns <= began_ns).or(samples.first());
    let pages_before = before.map_or(0, |sample| sample.pages);
    let writes = samples
        .iter()
        .map(|sample| ((sample.at_ns as f64 - began_ns as f64) / 1e6, sample.pages.saturating_sub(pages_before)))
        .collect();
    Ok(Moved { at_unix_ms, total_ms, gap_ms, wire_bytes, writes, outcome })
}

/// A move either went through or has shown that it does not converge: anything else is no measurement.
fn outcome_of(point: &Point, outcome: Value) -> Result<Outcome> {
    let outcome: Outcome = serde_json::from_value(outcome).context("how the move ended is not told")?;
    if outcome.outcome == OutcomeKind::Moved {
        return Ok(outcome);
    }
    let why = outcome.reasons.join("; ");
    let given_up = outcome.outcome == OutcomeKind::Failed && why.contains("does not converge");
    ensure!(given_up, "the move failed: {why}");
    ensure!(has_not_converged(point, &outcome), "given up before it had shown that it does not converge: {why}");
    Ok(outcome)
}

/// By what the rounds did, whatever anybody predicted of further ones: the budget was used up, or the last round left about as much
/// dirty as the one before, and none left little enough.
fn has_not_converged(point: &Point, outcome: &Outcome) -> bool {
    let spent = outcome.total_ms >= point.timeout_ms as f64;
    let stands_still = match outcome.round_reports.as_slice() {
        [.., before, last] => last.dirty_pages as f64 > SHRUNK * before.dirty_pages as f64,
        _ => false,
    };
    let limit_ms = point.downtime_limit_ms as f64;
    let never_met = outcome.round_reports.iter().all(|round| round.predicted_pause_ms > limit_ms);
    spent || (stands_still && never_met)
}

impl Record {
    /// For the score.
    pub fn case(&self) -> Case {
        let Forecast { border, converges, total_s, pause_ms, .. } = &self.prediction.forecast;
        let pause_measured_ms = self.moved.gap_ms.unwrap_or(0.0);
        Case {
            border: *border,
            predicted: *converges,
            converged: self.converged(),
            total_ms: (total_s.likely * 1e3, self.moved.total_ms),
            pause_ms: (pause_ms.likely, pause_measured_ms),
        }
    }

    /// It moved within the limits.
    pub fn converged(&self) -> bool {
        self.moved.outcome.outcome == OutcomeKind::Moved
    }

    /// Whether the prediction said so, in a word.
    pub fn verdict(&self) -> &'static str {
        let case = self.case();
        match (case.border, case.right()) {
            (true, _) => "border",
            (false, true) => "right",
            (false, false) => "WRONG",
        }
    }

    /// For a report.
    pub fn report<'a>(&'a self, title: &'a str) -> MoveReport<'a> {
        MoveReport {
            title,
            outcome: &self.moved.outcome,
            forecast: Some(&self.prediction.forecast),
            bandwidth_bytes_per_s: Some(self.point.bandwidth_bytes_per_s()),
            downtime_limit_ms: Some(self.point.downtime_limit_ms as f64),
            gap_ms: self.moved.gap_ms,
            writes: &self.moved.writes,
        }
    }

    /// Predicted and measured side by side, in one line.
    pub fn line(&self) -> String {
        let (case, forecast, verdict) = (self.case(), &self.prediction.forecast, self.verdict());
        let percent = |error: Option<f64>| error.map_or("-".to_owned(), |error| format!("{error:+.0} %"));
        let margin = forecast.margin.map_or("-".to_owned(), |margin| format!("{margin:.2}"));
        match case.converged {
            true => format!(
                "{verdict}: moved in {:.2} s ({:.2} predicted, {}), gap {:.0} ms ({:.0}, {}), {} rounds ({}), margin {margin}",
                case.total_ms.1 / 1e3,
                case.total_ms.0 / 1e3,
                percent(case.total_error_pct()),
                case.pause_ms.1,
                case.pause_ms.0,
                percent(case.downtime_error_pct()),
                self.moved.outcome.rounds,
                forecast.rounds.len() - 1,
            ),
            false => format!(
                "{verdict}: given up after {:.2} s and {} rounds ({} predicted), margin {margin}",
                case.total_ms.1 / 1e3,
                self.moved.outcome.rounds,
                if case.predicted { "to converge" } else { "likewise" },
            ),
        }
    }
}

fn unix_ms() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_millis() as u64)
}
