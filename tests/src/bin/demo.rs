//! `cargo xtask demo`: a guest that works hard moves over TCP and onward over QUIC, between hosts that are network
//! namespaces. Every figure is measured from outside; one that could not be measured is an error.

use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use clap::Parser;
use godwit_tests::counters::{TCP_HEADER_BYTES, UDP_HEADER_BYTES};
use godwit_tests::godwit::Node;
use godwit_tests::harness::Scene;
use godwit_tests::interrupt;
use godwit_tests::measure::{Link, LinkUse, Measured, measure};
use godwit_tests::netns::Hosts;
use godwit_tests::workload::Workload;
use serde_json::{Value, json};

/// Moves a working guest over TCP and onward over QUIC, and shows what it cost.
#[derive(Parser)]
struct Arguments {
    /// One JSON object as the last line of stdout
    #[arg(long)]
    json: bool,
}

const WORKLOAD: Workload = Workload {
    memory: "1G",
    vcpus: 1,
    fill: "512M",
    working_set: "256M",
    rate: "20000",
    order: "random",
    write: "word",
    contents: "random",
    seed: 1,
};
const MEMORY_PAGES: u64 = (1 << 30) / 4096;

const CAP: &str = "1Gbit";
const CAP_BYTES_PER_S: f64 = 125e6;

/// Together so little that the working set must shrink over several rounds before it fits into the pause.
const DOWNTIME_LIMIT: &str = "50ms";
const SWITCHOVER_BANDWIDTH: &str = "4Gbit";

/// Fewer would not show that the rounds converge.
const MIN_ROUNDS: u64 = 3;

const MOVE_LIMIT: Duration = Duration::from_secs(120);

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    match run(arguments.json) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("{error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(json: bool) -> Result<()> {
    interrupt::listen()?;
    let scene = Scene::new()?;
    let runs = demo(&scene).with_context(|| format!("{}the demo failed", scene.logs()))?;
    eprintln!("\n{}", table(&runs));
    if json {
        println!("{}", json!({ "runs": runs.iter().map(Run::json).collect::<Vec<_>>() }));
    }
    Ok(())
}

fn demo(scene: &Scene) -> Result<Vec<Run>> {
    let hosts = Hosts::new(3)?;
    eprintln!(
        "a guest of {}: {} of random contents, {} of it rewritten at {} pages/s; cap {CAP}/s",
        WORKLOAD.memory, WORKLOAD.fill, WORKLOAD.working_set, WORKLOAD.rate
    );
    let first = Node::sender(scene, "first", Some(hosts.host(0)), &WORKLOAD, &[])?;
    let second = receiver(scene, &hosts, 1, "second", "tcp")?;
    let third = receiver(scene, &hosts, 2, "third", "quic")?;
    Ok(vec![
        Run::new("tcp", TCP_HEADER_BYTES, (&first, 0), (&second, 1), &hosts)?,
        Run::new("quic", UDP_HEADER_BYTES, (&second, 1), (&third, 2), &hosts)?,
    ])
}

/// A receiver on host `host` that listens towards the host before it.
fn receiver(scene: &Scene, hosts: &Hosts, host: usize, name: &str, scheme: &str) -> Result<Node> {
    let listen = format!("{scheme}://{}:0", hosts.address(host, host - 1));
    Node::receiver(scene, name, Some(hosts.host(host)), &listen, &["--insecure"])
}

/// One move.
struct Run {
    transport: &'static str,
    measured: Measured,
    link: LinkUse,
    rounds: u64,
    pages_checked: u64,
}

impl Run {
    fn new(
        transport: &'static str,
        header_bytes: u64,
        (from, from_host): (&Node, usize),
        (to, to_host): (&Node, usize),
        hosts: &Hosts,
    ) -> Result<Self> {
        eprintln!("\nover {transport}:");
        let link = Link {
            interface: hosts.counters(from_host, to_host)?,
            sampled: hosts.counters(from_host, to_host)?,
            header_bytes,
            cap_bytes_per_s: CAP_BYTES_PER_S,
        };
        let switchover = ["--downtime-limit", DOWNTIME_LIMIT, "--switchover-bandwidth", SWITCHOVER_BANDWIDTH];
        // The audit comes after the handover: it is in none of the figures.
        let options = [&["--max-bandwidth", CAP, "--audit"], &switchover[..]].concat();
        let mut ticker = Ticker::default();
        let target = from.heartbeats(WORKLOAD.vcpus)?;
        let measured = measure(from, to, target, Some(link), &options, MOVE_LIMIT, |answer| ticker.show(answer))?;
        let link = measured.link.context("the link was not measured")?;
        let rounds = measured.outcome["rounds"].as_u64().context("the outcome does not say how many rounds it took")?;
        ensure!(rounds >= MIN_ROUNDS, "the move over {transport} took {rounds} rounds; the demo wants {MIN_ROUNDS}");

        to.ensure_guest_runs(WORKLOAD.vcpus)?;
        let pages_checked = to.check_guest()?;
        ensure!(pages_checked == MEMORY_PAGES, "{pages_checked} of {MEMORY_PAGES} pages were checked");
        eprintln!("  moved; {pages_checked} pages checked, all as the guest left them");
        Ok(Self { transport, measured, link, rounds, pages_checked })
    }

    fn json(&self) -> Value {
        json!({
            "transport": self.transport,
            "total_ms": rounded(self.measured.total_ms),
            "downtime_ms": rounded(self.measured.downtime_ms),
            "gap_ms": rounded(self.measured.gap.gap_ms),
            "wire_bytes": self.link.wire_bytes,
            "rounds": self.rounds,
            "guest_check": "ok",
            "pages_checked": self.pages_checked,
            "cap_error_max_pct": rounded(self.link.cap_error_max_pct),
        })
    }
}

/// Shows how a move stands, a few times a second and whenever a round begins.
#[derive(Default)]
struct Ticker {
    last: Option<(u64, u64)>,
}

impl Ticker {
    fn show(&mut self, answer: &Value) {
        const PERIOD_MS: f64 = 500.0;
        let progress = &answer["progress"];
        let number = |key: &str| progress[key].as_f64().unwrap_or(0.0);
        let moment = (number("round") as u64, (number("elapsed_ms") / PERIOD_MS) as u64);
        if answer["active"] != true || self.last.replace(moment) == Some(moment) {
            return;
        }
        eprintln!(
            "  {:>6.1} s  {:<14} round {:<2}  left {:>6.1} MiB  {:>5.2} Gbit/s  dirtied {:>6.0} pages/s  pause now {}",
            number("elapsed_ms") / 1000.0,
            progress["phase"].as_str().unwrap_or("setup"),
            moment.0,
            number("remaining_bytes") / f64::from(1 << 20),
            number("rate_bytes_per_s") * 8.0 / 1e9,
            number("dirty_pages_per_s"),
            progress["predicted_pause_ms"].as_f64().map_or("?".into(), |ms| format!("{ms:.0} ms")),
        );
    }
}

fn table(runs: &[Run]) -> String {
    let mut table = format!(
        "{:<10} {:>9} {:>12} {:>16} {:>10} {:>7} {:>14} {:>10}\n",
        "transport", "total", "downtime", "gap", "wire", "rounds", "guest", "over cap"
    );
    for run in runs {
        let gap = run.measured.gap;
        table += &format!(
            "{:<10} {:>7.2} s {:>9.1} ms {:>9.1} ±{:<3.1} ms {:>7.0} MB {:>7} {:>14} {:>8.2} %\n",
            run.transport,
            run.measured.total_ms / 1000.0,
            run.measured.downtime_ms,
            gap.gap_ms,
            gap.uncertainty_ms,
            run.link.wire_bytes as f64 / 1e6,
            run.rounds,
            "every page ok",
            run.link.cap_error_max_pct,
        );
    }
    table
}

/// To the microsecond, and to the thousandth of a percent.
fn rounded(value: f64) -> f64 {
    (value * 1000.0).round() / 1000.0
}
