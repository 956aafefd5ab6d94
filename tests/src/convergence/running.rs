//! One point: boot, estimate, write the prediction down, move, and see from outside what became of it.

use std::fs::File;
use std::io::Write;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result};
use godwit_control::report::MoveReport;
use godwit_core::estimate::Measured as Estimated;
use godwit_core::predict::Forecast;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use super::moving::{COMMAND_LIMIT, Moved, Stage, unix_ms};
use super::point::Point;
use super::policy::{Policy, PolicyMove};
use super::score::Case;
use crate::godwit::Node;
use crate::harness::Scene;
use crate::netns::Hosts;
use crate::sampler::Target;
use crate::{wait, workload};

/// How long each guest is measured before its move is predicted.
const ESTIMATE_TIME: &str = "5s";
/// A guest that writes slowly is not waited for until it has been everywhere.
const SETTLE_LIMIT: Duration = Duration::from_secs(20);

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
    /// If it did not converge: once more, by a policy.
    pub policy: Option<PolicyMove>,
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

/// Predicts and makes the move of a point between the first two of `hosts`. If it does not converge it is made once more, by `policy`.
pub fn run(point: &Point, policy: Policy, hosts: &Hosts, ledger: &mut Ledger) -> Result<Record> {
    let scene = Scene::new()?;
    run_in(&scene, point, policy, hosts, ledger).with_context(|| scene.logs())
}

fn run_in(scene: &Scene, point: &Point, policy: Policy, hosts: &Hosts, ledger: &mut Ledger) -> Result<Record> {
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
    let stage = Stage { point, source: &source, destination: &destination, hosts, heartbeats };
    let moved = stage.move_as_far_as_it_gets()?;
    let policy = match moved.arrived() {
        true => None,
        false => {
            wait::until_true("the receiver listens again", COMMAND_LIMIT, || Ok(destination.times_listening() > 1))?;
            let named = prediction.forecast.throttle.map(|throttle| throttle.share);
            Some(policy.play(&stage, named)?)
        }
    };
    Ok(Record { point: point.clone(), prediction, prediction_sha256, moved, policy })
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
        self.moved.arrived()
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

    /// For a report: each of its moves, and a word on it.
    pub fn reports<'a>(&'a self, title: &'a str) -> Vec<(MoveReport<'a>, &'a str)> {
        let report = |title: &'a str, moved: &'a Moved, forecast| MoveReport {
            title,
            outcome: &moved.outcome,
            forecast,
            bandwidth_bytes_per_s: Some(self.point.bandwidth_bytes_per_s()),
            downtime_limit_ms: Some(self.point.downtime_limit_ms as f64),
            gap_ms: moved.gap_ms,
            writes: &moved.writes,
        };
        let first = (report(title, &self.moved, Some(&self.prediction.forecast)), self.verdict());
        let again = self.policy.as_ref().map(|again| (report(&again.found, &again.moved, None), again.policy.name()));
        [Some(first), again].into_iter().flatten().collect()
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
                "{verdict}: nowhere after {:.2} s and {} rounds ({} predicted), margin {margin}",
                case.total_ms.1 / 1e3,
                self.moved.outcome.rounds,
                if case.predicted { "to converge" } else { "likewise" },
            ),
        }
    }
}
