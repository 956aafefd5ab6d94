//! The workload guest's image boots in another VMM, and the tests' sampler sees it work there.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use godwit_tests::harness::{self, Need, Scene};
use godwit_tests::qemu::{Place, Qemu};
use godwit_tests::sampler::Sampler;
use godwit_tests::versus::settings;
use godwit_tests::{wait, workload};
use godwit_vmm::workload::{WriterConfig, elf};
use serde_json::json;

fn main() {
    harness::main(vec![
        harness::test("the_image_works_in_qemu", &[Need::Kvm, Need::Qemu], the_image_works_in_qemu),
        harness::test("the_gap_of_a_move_by_qemu", &[Need::Kvm, Need::Qemu], the_gap_of_a_move_by_qemu),
    ])
}

const LIMIT: Duration = Duration::from_secs(30);

fn image(scene: &Scene) -> Result<std::path::PathBuf> {
    let path = scene.path().join("workload.elf");
    let config = WriterConfig { working_set_bytes: 16 << 20, fill_bytes: 16 << 20, ..WriterConfig::default() };
    std::fs::write(&path, elf(&config))?;
    Ok(path)
}

fn place(scene: &Scene) -> Place<'_> {
    Place { directory: scene.path(), namespace: None }
}

fn the_image_works_in_qemu(scene: &Scene) -> Result<()> {
    let qemu = Qemu::start("qemu", place(scene), &image(scene)?, "128M", false)?;
    let pid = qemu.process.pid();
    let header = wait::until("header page", LIMIT, || Ok(workload::find_header(pid)))?;
    let heartbeat = workload::heartbeats(pid, header, 1);
    let mut values = Vec::new();
    let beat = || heartbeat.read(&mut values).map(|()| values[0]).context("cannot read the heartbeat");
    let mut beat = beat;
    let first = beat()?;
    wait::until_true("heartbeat", LIMIT, || Ok(beat()? > first + 100))?;
    qemu.qmp()?.execute("stop", json!({}))?;
    let stopped = beat()?;
    ensure!(beat()? == stopped, "the heartbeat goes on although the machine was stopped");
    Ok(())
}

/// QEMU's own move is a check of the sampler on machinery that is not ours.
fn the_gap_of_a_move_by_qemu(scene: &Scene) -> Result<()> {
    let image = image(scene)?;
    let source = Qemu::start("source", place(scene), &image, "128M", false)?;
    let uri = format!("unix:{}", scene.path().join("move.sock").display());
    let destination = Qemu::start("destination", place(scene), &image, "128M", true)?;
    destination.listen(&uri)?;
    let (from, to) = (source.process.pid(), destination.process.pid());
    let header = wait::until("header page", LIMIT, || Ok(workload::find_header(from)))?;
    let sampler = Sampler::start(workload::heartbeats(from, header, 1));
    source.qmp()?.execute("migrate-set-parameters", settings::ALL[0].parameters(None, 20))?;
    source.qmp()?.execute("migrate", json!({ "uri": uri }))?;
    let header = wait::until("the destination's header page", LIMIT, || Ok(workload::find_header(to)))?;
    sampler.watch_destination(workload::heartbeats(to, header, 1));
    let gap = wait::until("gap", LIMIT, || Ok(sampler.gap().ok()))?;
    ensure!(gap.gap_ms > 0.1 && gap.gap_ms < 1000.0, "{gap:?}");
    println!("{gap:?}");
    Ok(())
}
