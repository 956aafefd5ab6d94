//! Running guests are measured and their moves predicted: the figures are those of the guest, and it is as it was afterwards.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use godwit_control::qmp::Client;
use godwit_core::estimate::Measured;
use godwit_tests::godwit::{Ended, Node};
use godwit_tests::harness::{self, Need, Scene};
use godwit_tests::workload::Workload;
use libtest_mimic::Trial;
use serde_json::{Value, json};

const LIMIT: Duration = Duration::from_secs(60);
const MIB: f64 = (1 << 20) as f64;

fn main() {
    harness::main(vec![
        kvm("an_idle_guest", an_idle_guest),
        kvm("a_writer_of_known_rate", a_writer_of_known_rate),
        kvm("contents_are_told_apart", contents_are_told_apart),
        kvm("a_client_that_goes_away_ends_it", a_client_that_goes_away_ends_it),
        kvm("a_move_calls_it_off_and_refuses_it", a_move_calls_it_off_and_refuses_it),
    ])
}

fn kvm(name: &str, run: impl FnOnce(&Scene) -> Result<()> + Send + 'static) -> Trial {
    harness::test(name, &[Need::Kvm], run)
}

fn estimate(node: &Node, more: &[&str]) -> Result<(Value, Measured)> {
    let answer = node.command(&["estimate"], &[&["--json"], more].concat(), LIMIT)?.ensure_code(0)?.last_json()?;
    let measured = serde_json::from_value(answer["measured"].clone()).context("what was measured")?;
    Ok((answer, measured))
}

/// Pages dirtied in a window, as measured.
fn dirtied(measured: &Measured, window_ms: f64) -> Result<f64> {
    let at = measured.windows.iter().find(|count| count.window_ms == window_ms);
    Ok(at.with_context(|| format!("no window of {window_ms} ms: {:?}", measured.windows))?.pages)
}

fn an_idle_guest(scene: &Scene) -> Result<()> {
    let workload = Workload { rate: "0", ..Workload::default() };
    let source = Node::sender(scene, "source", None, &workload, &[])?;
    let (answer, measured) = estimate(&source, &["--time", "1s", "--bandwidth", "1Gbit"])?;
    let touched = measured.touched_bytes as f64 / MIB;
    ensure!((128.0..150.0).contains(&touched), "of 128 MiB filled {touched} MiB are said to be touched");
    // Its heartbeat and its stack.
    ensure!(dirtied(&measured, 500.0)? < 64.0, "{:?}", measured.windows);
    let forecast = &answer["forecast"];
    ensure!(forecast["converges"] == true && forecast["border"] == false, "{forecast}");
    let (bytes, total_s) = (forecast["wire_bytes"]["likely"].as_f64(), forecast["total_s"]["likely"].as_f64());
    ensure!(bytes.is_some_and(|bytes| (125.0..155.0).contains(&(bytes / MIB))), "{forecast}");
    ensure!(total_s.is_some_and(|seconds| (1.0..1.6).contains(&seconds)), "{forecast}");
    source.ensure_guest_unharmed(&workload)
}

fn a_writer_of_known_rate(scene: &Scene) -> Result<()> {
    // From front to back, and not once around: every write is to another page, so windows count writes.
    let workload = Workload { rate: "2000", order: "seq", ..Workload::default() };
    let source = Node::sender(scene, "source", None, &workload, &[])?;
    let writes = || {
        let answer = source.execute("x-godwit-guest", json!({}))?;
        answer["writes"][0].as_u64().with_context(|| format!("no writes of the vCPU: {answer}"))
    };
    let (began, before) = (Instant::now(), writes()?);
    let (answer, measured) = estimate(&source, &["--time", "5s"])?;
    let (written, elapsed) = ((writes()? - before) as f64, began.elapsed().as_secs_f64());
    ensure!(written < workload.working_set_pages() as f64, "it has been around: {written} writes");
    // Its header and stack are pages, too. On a busy machine it writes unevenly.
    let (found, share) = (dirtied(&measured, 4000.0)?, 4.0 / elapsed);
    ensure!(found <= written + 16.0, "{found} pages dirtied by {written} writes");
    ensure!(found > 0.5 * share * written, "{found} pages dirtied in 4 of {elapsed} s, by {written} writes in all");
    ensure!(answer["forecast"].is_null() && answer["table"].as_array().is_some_and(|rows| rows.len() == 6), "{answer}");
    source.ensure_guest_unharmed(&workload)
}

fn contents_are_told_apart(scene: &Scene) -> Result<()> {
    let workload = Workload {
        rate: "20000",
        contents: "compressible",
        working_set: "16M",
        order: "random",
        ..Workload::default()
    };
    let source = Node::sender(scene, "source", None, &workload, &[])?;
    let (_, measured) = estimate(&source, &["--time", "3s"])?;
    ensure!(measured.compressible_share > 0.9, "{}", measured.compressible_share);
    // Words are written one by one, so pages differ little from what they were.
    ensure!(measured.delta_share > 0.5, "{}", measured.delta_share);
    let first = measured.workload.contents.first;
    ensure!(first.slow.wire_bytes < 0.6 * first.plain.wire_bytes, "{first:?}");
    source.ensure_guest_unharmed(&workload)
}

/// Waits until `client` hears that an estimate has begun, or ended.
fn hears(client: &mut Client, running: bool) -> Result<()> {
    let until = Instant::now() + LIMIT;
    while Instant::now() < until {
        let event = client.next_event(LIMIT)?.context("no event came")?;
        if event.name == "GODWIT_ESTIMATE" && event.data["running"] == running {
            return Ok(());
        }
    }
    bail!("the estimate has not {}", if running { "begun" } else { "ended" })
}

fn a_client_that_goes_away_ends_it(scene: &Scene) -> Result<()> {
    let workload = Workload::default();
    let source = Node::sender(scene, "source", None, &workload, &[])?;
    let mut watcher = source.qmp()?;
    let mut client = source.start_command(&["estimate"], &["--time", "300s"])?;
    hears(&mut watcher, true)?;
    let refused = source.command(&["estimate"], &[], LIMIT)?;
    ensure!(refused.code != 0 && refused.stderr.contains("another estimate"), "{refused}");
    client.kill()?;
    hears(&mut watcher, false)?;
    source.ensure_guest_unharmed(&workload)
}

fn a_move_calls_it_off_and_refuses_it(scene: &Scene) -> Result<()> {
    let workload = Workload::default();
    let source = Node::sender(scene, "source", None, &workload, &[])?;
    let destination = Node::receiver(scene, "destination", None, "tcp://127.0.0.1:0", &[])?;
    let mut watcher = source.qmp()?;
    let mut client = source.start_command(&["estimate"], &["--time", "300s"])?;
    hears(&mut watcher, true)?;
    let mut moving = source.start_move(&destination.uri()?, &["--pause-before-switchover"])?;
    source.wait_for_phase("pre-switchover", LIMIT)?;
    let ended = Ended::wait(&mut client, LIMIT)?;
    ensure!(ended.code != 0 && ended.stderr.contains("a move begins"), "{ended}");
    let refused = source.command(&["estimate"], &[], LIMIT)?;
    ensure!(refused.code != 0 && refused.stderr.contains("is being moved to"), "{refused}");
    source.execute("migrate-continue", json!({ "state": "pre-switchover" }))?;
    Ended::wait(&mut moving, LIMIT)?.ensure_moved(&destination, &workload)?;
    Ok(())
}
