//! `cargo xtask compare-qemu`: the same guest moved by QEMU and by Godwit in turn, uncapped over TCP on loopback, with
//! the gap seen by the same sampler. A first plain comparison.

use std::net::TcpListener;
use std::path::Path;
use std::process::{Command, ExitCode};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use clap::Parser;
use godwit_tests::godwit::Node;
use godwit_tests::harness::{Scene, binary};
use godwit_tests::measure::{Measured, measure, measure_qemu};
use godwit_tests::qemu::Qemu;
use godwit_tests::sampler::Target;
use godwit_tests::workload::Workload;
use godwit_tests::{wait, workload};
use serde_json::{Value, json};

/// Moves the same guest with QEMU and with Godwit in turn.
#[derive(Parser)]
struct Arguments {
    /// Pairs of moves
    #[arg(long, default_value_t = 2)]
    pairs: u32,
    /// One JSON object as the last line of stdout
    #[arg(long)]
    json: bool,
}

const MEMORY: &str = "1G";
const DOWNTIME_LIMIT_MS: u64 = 5;
const LIMIT: Duration = Duration::from_secs(60);

const WORKLOAD: Workload = Workload {
    memory: MEMORY,
    vcpus: 1,
    fill: "0",
    working_set: "240M",
    rate: "30000",
    order: "seq",
    write: "word",
    contents: "random",
    seed: 1,
};

fn main() -> ExitCode {
    match run(&Arguments::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("{error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(arguments: &Arguments) -> Result<()> {
    let mut rows = Vec::new();
    eprintln!(
        "{MEMORY}, {} rewritten at {} pages/s, no cap, TCP on loopback, downtime limit {DOWNTIME_LIMIT_MS} ms",
        WORKLOAD.working_set, WORKLOAD.rate
    );
    eprintln!("{:<8} {:>10} {:>14} {:>18}", "program", "total", "own downtime", "gap");
    for _ in 0..arguments.pairs {
        for (program, run) in [("qemu", by_qemu as fn(&Scene) -> Result<Measured>), ("godwit", by_godwit)] {
            let scene = Scene::new()?;
            let measured = run(&scene).map_err(|error| error.context(format!("{}{program}", scene.logs())))?;
            eprintln!(
                "{program:<8} {:>7.0} ms {:>11.1} ms {:>9.1} ±{:<4.1} ms",
                measured.total_ms, measured.downtime_ms, measured.gap.gap_ms, measured.gap.uncertainty_ms
            );
            rows.push(row(program, &measured));
        }
    }
    if arguments.json {
        println!("{}", json!({ "runs": rows }));
    }
    Ok(())
}

fn by_godwit(scene: &Scene) -> Result<Measured> {
    let source = Node::sender(scene, "source", None, &WORKLOAD, &[])?;
    let destination = Node::receiver(scene, "destination", None, "tcp://127.0.0.1:0", &[])?;
    let options = ["--downtime-limit", &format!("{DOWNTIME_LIMIT_MS}ms")];
    let target = source.heartbeats(WORKLOAD.vcpus)?;
    settle(&target)?;
    let measured = measure(&source, &destination, target, None, &options, LIMIT, |_| ())?;
    destination.check_guest()?;
    Ok(measured)
}

fn by_qemu(scene: &Scene) -> Result<Measured> {
    let image = scene.path().join("workload.elf");
    export(&image)?;
    let uri = format!("tcp:127.0.0.1:{}", free_port()?);
    let source = Qemu::start("source", scene.path(), &image, MEMORY, None)?;
    let destination = Qemu::start("destination", scene.path(), &image, MEMORY, Some(&uri))?;
    let pid = source.process.pid();
    let header = wait::until("QEMU's guest", LIMIT, || Ok(workload::find_header(pid)))?;
    let target = workload::heartbeats(pid, header, WORKLOAD.vcpus);
    settle(&target)?;
    source.set_unlimited(DOWNTIME_LIMIT_MS)?;
    measure_qemu(&source, &destination, target, &uri, LIMIT)
}

/// Waits until the guest has been through its working set, so that each move finds the same memory.
fn settle(heartbeat: &Target) -> Result<()> {
    const WORKING_SET_PAGES: u64 = (240 << 20) / 4096;
    let writes = workload::writes(*heartbeat);
    let mut values = Vec::new();
    wait::until_true("the guest has written its working set", LIMIT, || {
        writes.read(&mut values).context("cannot read the guest's counters")?;
        Ok(values.iter().sum::<u64>() >= WORKING_SET_PAGES)
    })
}

/// The same guest as a file for QEMU.
fn export(image: &Path) -> Result<()> {
    let mut command = Command::new(binary("godwit-sender")?);
    command.arg("run").args(WORKLOAD.arguments()).arg("--export-elf").arg(image);
    let output = command.output().context("cannot run godwit-sender")?;
    ensure!(output.status.success(), "the guest was not exported: {}", String::from_utf8_lossy(&output.stderr));
    Ok(())
}

/// A port that nobody listens at now.
fn free_port() -> Result<u16> {
    Ok(TcpListener::bind("127.0.0.1:0")?.local_addr()?.port())
}

fn row(program: &str, measured: &Measured) -> Value {
    json!({
        "program": program,
        "total_ms": measured.total_ms,
        "downtime_ms": measured.downtime_ms,
        "gap_ms": measured.gap.gap_ms,
        "gap_uncertainty_ms": measured.gap.uncertainty_ms,
    })
}
