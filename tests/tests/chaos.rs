//! A short run of chaos, and that it can find what it looks for.

use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use godwit_tests::chaos::kind::Kind;
use godwit_tests::godwit::Ended;
use godwit_tests::harness::{self, Need, Scene, binary};
use godwit_tests::process::Process;
use serde_json::Value;

/// Longer than the time that the runs are given, by what one episode may take.
const LIMIT: Duration = Duration::from_secs(300);

fn main() {
    let needs = &[Need::Kvm, Need::Root, Need::Fuse];
    harness::main(vec![
        harness::test("chaos_finds_nothing", needs, chaos_finds_nothing),
        harness::test("kinds_are_listed", &[], kinds_are_listed),
    ])
}

fn chaos(scene: &Scene, arguments: &[&str]) -> Result<Ended> {
    let mut command = Command::new(binary("chaos")?);
    command.args(arguments);
    Ended::wait(&mut Process::start("chaos", scene.path(), command, None)?, LIMIT)
}

fn chaos_finds_nothing(scene: &Scene) -> Result<()> {
    let ended = chaos(scene, &["--seed", "1", "--moves", "12", "--minutes", "3", "--json"])?.ensure_code(0)?;
    let totals = ended.last_json()?;
    let number = |name: &str| totals[name].as_u64().with_context(|| format!("no number `{name}` in {totals}"));
    for crime in ["two_running", "none_running", "guest_check_failed", "audit_failed", "contradiction"] {
        ensure!(number(crime)? == 0, "{totals}");
    }
    ensure!(number("faults")? > 0 && number("moves")? > 0, "{totals}");
    let outcomes = totals["outcomes"].as_object().context("no outcomes")?;
    let ends = outcomes.values().filter_map(Value::as_u64).sum::<u64>();
    ensure!(ends == number("moves")?, "every move has one outcome: {totals}");
    Ok(())
}

fn kinds_are_listed(scene: &Scene) -> Result<()> {
    let ended = chaos(scene, &["--list"])?.ensure_code(0)?;
    let names: Vec<&str> = ended.stdout.lines().filter_map(|line| line.split_whitespace().next()).collect();
    ensure!(names == Kind::all().iter().map(ToString::to_string).collect::<Vec<_>>(), "{names:?}");
    Ok(())
}
