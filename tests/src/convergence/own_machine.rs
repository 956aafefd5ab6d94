//! The same with a machine that somebody already runs: what its move would cost, and, if it is to be made, what it did cost.

use std::path::Path;
use std::process::{Command, Stdio};

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use crate::harness::binary;

/// Options of `migrate` that `estimate` has too, by another name or the same.
const SHARED: [(&str, &str); 7] = [
    ("--max-bandwidth", "--bandwidth"),
    ("--switchover-bandwidth", "--switchover-bandwidth"),
    ("--downtime-limit", "--downtime-limit"),
    ("--timeout", "--timeout"),
    ("--max-rounds", "--max-rounds"),
    ("--compress", "--compress"),
    ("--delta-cache", "--delta-cache"),
];

/// Measures the machine behind a control socket and predicts its move with these options of `migrate`.
pub fn estimate(control: &Path, options: &[String]) -> Result<Value> {
    let shared = options.chunks(2).filter_map(|pair| match pair {
        [name, value] => SHARED.iter().find(|(theirs, _)| theirs == name).map(|(_, ours)| [*ours, value.as_str()]),
        _ => None,
    });
    let arguments: Vec<&str> = shared.flatten().collect();
    client("estimate", control, &arguments)
}

/// Moves it to `uri` and gives how that ended, as the mover tells it.
pub fn migrate(control: &Path, uri: &str, options: &[String]) -> Result<Value> {
    let arguments: Vec<&str> = ["--to", uri].into_iter().chain(options.iter().map(String::as_str)).collect();
    client("migrate", control, &arguments)
}

/// Runs a verb of the sender; what it says to people goes where ours goes.
fn client(verb: &str, control: &Path, arguments: &[&str]) -> Result<Value> {
    let mut command = Command::new(binary("godwit-sender")?);
    command.arg(verb).arg("--control").arg(control).args(arguments).arg("--json").stderr(Stdio::inherit());
    let output = command.output().context("cannot run godwit-sender")?;
    let stdout = String::from_utf8_lossy(&output.stdout);
    let last = stdout.lines().last();
    ensure!(last.is_some(), "godwit-sender {verb} ended with {} and said nothing", output.status);
    serde_json::from_str(last.unwrap_or_default()).with_context(|| format!("godwit-sender {verb}: not JSON"))
}
