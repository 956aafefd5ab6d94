//! Real guests move between real processes while they work, and arrive whole.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use godwit_tests::counters::{CounterSampler, TCP_HEADER_BYTES};
use godwit_tests::godwit::{Ended, Node};
use godwit_tests::harness::{self, Need, Scene};
use godwit_tests::netns::Hosts;
use godwit_tests::workload::Workload;
use godwit_tests::{clock, measure, wait};
use libtest_mimic::Trial;
use serde_json::json;

const LIMIT: Duration = Duration::from_secs(60);

fn main() {
    let mut tests = vec![
        kvm("over_tcp", |scene| over(scene, "tcp://127.0.0.1:0", &Workload::default(), &[])),
        kvm("over_quic", |scene| over(scene, "quic://127.0.0.1:0", &Workload::default(), &[])),
        kvm("over_unix", |scene| {
            let uri = format!("unix:{}", scene.path().join("move.sock").display());
            over(scene, &uri, &Workload::default(), &[])
        }),
        kvm("over_several_channels", |scene| over(scene, TCP, &Workload::default(), &["--channels", "3"])),
        kvm("over_several_quic_channels", |scene| {
            over(scene, "quic://127.0.0.1:0", &Workload::default(), &["--channels", "2"])
        }),
        kvm("compressed", |scene| {
            let workload = Workload { contents: "compressible", ..Workload::default() };
            over(scene, TCP, &workload, &["--compress", "zstd"])
        }),
        kvm("unverified", |scene| over(scene, TCP, &Workload::default(), &["--verify", "off"])),
        kvm("without_copies", without_copies),
        kvm("two_vcpus", |scene| over(scene, TCP, &Workload { vcpus: 2, ..Workload::default() }, &[])),
        kvm("memory_in_a_memfd", memory_in_a_memfd),
        kvm("above_4_gib", above_4_gib),
        kvm("onward_and_back", onward_and_back),
        kvm("both_ends_never_run", both_ends_never_run),
        kvm("a_paused_guest_arrives_paused", a_paused_guest_arrives_paused),
        kvm("held_until_resume", held_until_resume),
        kvm("waits_before_the_switchover", waits_before_the_switchover),
        kvm("detached_and_watched", detached_and_watched),
        kvm("a_dry_run_moves_nothing", a_dry_run_moves_nothing),
        kvm("a_stall_aborts", a_stall_aborts),
        kvm("a_stall_can_be_forced", a_stall_can_be_forced),
        kvm("a_time_budget_ends_the_move", a_time_budget_ends_the_move),
        harness::test("a_cap_is_changed_in_flight", &[Need::Kvm, Need::Root], a_cap_is_changed_in_flight),
    ];
    for order in ["seq", "random", "hot-cold"] {
        for write in ["word", "page"] {
            for contents in ["random", "compressible"] {
                let workload = Workload { order, write, contents, seed: 7, ..Workload::default() };
                tests.push(kvm(format!("writes_{order}_{write}_{contents}"), move |scene| {
                    over(scene, TCP, &workload, &[])
                }));
            }
        }
    }
    harness::main(tests)
}

const TCP: &str = "tcp://127.0.0.1:0";

fn kvm(name: impl Into<String>, run: impl FnOnce(&Scene) -> Result<()> + Send + 'static) -> Trial {
    harness::test(name, &[Need::Kvm], run)
}

/// So slow, as far as the engine can know, that there must be rounds after the first pass.
const SLOW: [&str; 4] = ["--max-bandwidth", "2Gbit", "--switchover-bandwidth", "50Mbit"];

/// One move, and the end of the process that sent.
fn over(scene: &Scene, listen: &str, workload: &Workload, options: &[&str]) -> Result<()> {
    let mut source = Node::sender(scene, "source", None, workload, &[])?;
    let destination = Node::receiver(scene, "destination", None, listen, &[])?;
    let options = [&SLOW[..], options].concat();
    let outcome = source.move_to(&destination.uri()?, &options, LIMIT)?.ensure_moved(&destination, workload)?;
    ensure!(outcome["rounds"].as_u64() >= Some(1), "no round was tested: {outcome}");
    let status = source.process.wait(LIMIT)?;
    ensure!(status.code() == Some(0), "a sender whose machine has moved ended with {status}");
    Ok(())
}

/// The kernel copies over loopback all the same: that is told of, once, and the move goes on.
fn without_copies(scene: &Scene) -> Result<()> {
    let workload = Workload::default();
    let source = Node::sender(scene, "source", None, &workload, &[])?;
    let destination = Node::receiver(scene, "destination", None, TCP, &[])?;
    let options = [&SLOW[..], &["--zero-copy"]].concat();
    let ended = source.move_to(&destination.uri()?, &options, LIMIT)?;
    let ended = ended.ensure_says(&["pages are copied to be sent: the kernel copies them over this link"])?;
    ended.ensure_moved(&destination, &workload).map(drop)
}

fn memory_in_a_memfd(scene: &Scene) -> Result<()> {
    let workload = Workload::default();
    let source = Node::sender(scene, "source", None, &workload, &["--memory-backing", "memfd"])?;
    let destination = Node::receiver(scene, "destination", None, TCP, &[])?;
    source.move_to(&destination.uri()?, &SLOW, LIMIT)?.ensure_moved(&destination, &workload).map(drop)
}

/// The working set lies on both sides of 4 GiB.
fn above_4_gib(scene: &Scene) -> Result<()> {
    let workload = Workload { memory: "6G", fill: "0", working_set: "3300M", rate: "max", ..Workload::default() };
    let mut source = Node::sender(scene, "source", None, &workload, &[])?;
    let memory = source.memory()?;
    ensure!(memory.regions().len() == 2, "{:?}", memory.regions());
    let first_high = 1 << 32;
    wait::until_true("the guest writes above 4 GiB", LIMIT, || {
        Ok(memory.page(first_high)?.iter().any(|&byte| byte != 0))
    })?;
    source.command(&["guest", "rate"], &["20000"], LIMIT)?.ensure_code(0)?;
    let destination = Node::receiver(scene, "destination", None, TCP, &[])?;
    source.move_to(&destination.uri()?, &[], LIMIT)?.ensure_moved(&destination, &workload)?;
    source.process.wait(LIMIT).map(drop)
}

/// A → B → C → A': each receiver sends the machine onward, and the first host takes it back.
fn onward_and_back(scene: &Scene) -> Result<()> {
    let workload = Workload { vcpus: 2, ..Workload::default() };
    let mut at = Node::sender(scene, "a", None, &workload, &[])?;
    for (name, listen) in [("b", TCP), ("c", "quic://127.0.0.1:0"), ("a-again", TCP)] {
        let next = Node::receiver(scene, name, None, listen, &[])?;
        at.move_to(&next.uri()?, &[], LIMIT)?.ensure_moved(&next, &workload).with_context(|| format!("to {name}"))?;
        let status = at.process.wait(LIMIT)?;
        ensure!(status.code() == Some(0), "the process that sent to {name} ended with {status}");
        at = next;
    }
    Ok(())
}

/// Never do both ends run the guest: the destination's first own heartbeat comes after the source's last. How long after, benches say.
fn both_ends_never_run(scene: &Scene) -> Result<()> {
    let workload = Workload { vcpus: 2, ..Workload::default() };
    let source = Node::sender(scene, "source", None, &workload, &[])?;
    let destination = Node::receiver(scene, "destination", None, TCP, &[])?;
    let target = source.heartbeats(workload.vcpus)?;
    let measured = measure::measure(&source, &destination, target, None, &["--audit"], LIMIT, |_| ())?;
    let gap = measured.gap;
    println!("gap {gap:?}, own downtime {} ms", measured.downtime_ms);
    ensure!(gap.gap_ms > 0.0 && measured.downtime_ms > 0.0, "{gap:?}, own downtime {} ms", measured.downtime_ms);
    destination.ensure_guest_unharmed(&workload)
}

fn a_paused_guest_arrives_paused(scene: &Scene) -> Result<()> {
    let workload = Workload::default();
    let source = Node::sender(scene, "source", None, &workload, &[])?;
    let destination = Node::receiver(scene, "destination", None, TCP, &[])?;
    source.command(&["pause"], &[], LIMIT)?.ensure_code(0)?;
    source.ensure_guest_stands(workload.vcpus)?;
    source.move_to(&destination.uri()?, &[], LIMIT)?.ensure_audited()?;
    destination.ensure_guest_stands(workload.vcpus)?;
    destination.ensure_guest_whole(&workload)?;
    destination.command(&["resume"], &[], LIMIT)?.ensure_code(0)?;
    destination.ensure_guest_unharmed(&workload)
}

fn held_until_resume(scene: &Scene) -> Result<()> {
    let workload = Workload::default();
    let source = Node::sender(scene, "source", None, &workload, &[])?;
    let destination = Node::receiver(scene, "destination", None, TCP, &["--hold"])?;
    source.move_to(&destination.uri()?, &[], LIMIT)?.ensure_audited()?;
    destination.ensure_guest_stands(workload.vcpus)?;
    destination.ensure_guest_whole(&workload)?;
    destination.command(&["resume"], &[], LIMIT)?.ensure_code(0)?;
    destination.ensure_guest_unharmed(&workload)
}

fn waits_before_the_switchover(scene: &Scene) -> Result<()> {
    let workload = Workload::default();
    let source = Node::sender(scene, "source", None, &workload, &[])?;
    let destination = Node::receiver(scene, "destination", None, TCP, &[])?;
    let mut command = source.start_move(&destination.uri()?, &["--pause-before-switchover"])?;
    source.wait_for_phase("pre-switchover", LIMIT)?;
    ensure!(source.execute("query-migrate", json!({}))?["status"] == "pre-switchover");
    source.ensure_guest_runs(workload.vcpus)?;
    source.command(&["continue"], &[], LIMIT)?.ensure_code(0)?;
    Ended::wait(&mut command, LIMIT)?.ensure_moved(&destination, &workload).map(drop)
}

fn detached_and_watched(scene: &Scene) -> Result<()> {
    let workload = Workload::default();
    let source = Node::sender(scene, "source", None, &workload, &[])?;
    let destination = Node::receiver(scene, "destination", None, TCP, &[])?;
    let uri = destination.uri()?;
    source.move_to(&uri, &["--detach", "--pause-before-switchover"], LIMIT)?.ensure_code(0)?;
    source.wait_for_phase("pre-switchover", LIMIT)?;
    let mut watch = source.start_command(&["status"], &["--watch", "--json"])?;
    source.command(&["continue"], &[], LIMIT)?.ensure_code(0)?;
    Ended::wait(&mut watch, LIMIT)?.ensure_moved(&destination, &workload).map(drop)
}

fn a_dry_run_moves_nothing(scene: &Scene) -> Result<()> {
    let workload = Workload::default();
    let source = Node::sender(scene, "source", None, &workload, &[])?;
    let destination = Node::receiver(scene, "destination", None, TCP, &[])?;
    let uri = destination.uri()?;
    source.move_to(&uri, &["--dry-run"], LIMIT)?.ensure_code(0)?.ensure_says(&["nothing is in the way"])?;
    source.ensure_guest_unharmed(&workload)?;
    // The receiver is as free as before.
    source.move_to(&uri, &[], LIMIT)?.ensure_moved(&destination, &workload).map(drop)
}

/// A guest that dirties memory faster than the cap lets it go.
const RESTLESS: Workload = Workload {
    memory: "256M",
    vcpus: 1,
    fill: "64M",
    working_set: "64M",
    rate: "40000",
    order: "seq",
    write: "page",
    contents: "random",
    seed: 3,
};
/// More than a pause takes with nothing to send, on a busy host too.
const TIGHT: [&str; 4] = ["--max-bandwidth", "500Mbit", "--downtime-limit", "10ms"];

fn a_stall_aborts(scene: &Scene) -> Result<()> {
    let source = Node::sender(scene, "source", None, &RESTLESS, &[])?;
    let destination = Node::receiver(scene, "destination", None, TCP, &[])?;
    let uri = destination.uri()?;
    let options = [&TIGHT[..], &["--max-rounds", "2"]].concat();
    source.move_to(&uri, &options, LIMIT)?.ensure_code(4)?;
    source.ensure_guest_unharmed(&RESTLESS)?;
    source.move_to(&uri, &[], LIMIT)?.ensure_moved(&destination, &RESTLESS).map(drop)
}

fn a_stall_can_be_forced(scene: &Scene) -> Result<()> {
    let source = Node::sender(scene, "source", None, &RESTLESS, &[])?;
    let destination = Node::receiver(scene, "destination", None, TCP, &[])?;
    let options = [&TIGHT[..], &["--max-rounds", "2", "--on-stall", "force"]].concat();
    let outcome = source.move_to(&destination.uri()?, &options, LIMIT)?.ensure_moved(&destination, &RESTLESS)?;
    ensure!(outcome["rounds"].as_u64().is_some_and(|rounds| rounds <= 2), "{outcome}");
    Ok(())
}

fn a_time_budget_ends_the_move(scene: &Scene) -> Result<()> {
    let source = Node::sender(scene, "source", None, &RESTLESS, &[])?;
    let destination = Node::receiver(scene, "destination", None, TCP, &[])?;
    let options = [&TIGHT[..], &["--max-rounds", "1000", "--timeout", "2s", "--stall-detection", "off"]].concat();
    let start_ns = clock::monotonic_ns();
    source.move_to(&destination.uri()?, &options, LIMIT)?.ensure_code(4)?;
    let taken_ms = clock::ms(clock::monotonic_ns() - start_ns);
    ensure!((1800.0..6000.0).contains(&taken_ms), "ended after {taken_ms} ms");
    source.ensure_guest_unharmed(&RESTLESS)
}

/// The interface's own counters show each cap while it is in force.
fn a_cap_is_changed_in_flight(scene: &Scene) -> Result<()> {
    const TOLERANCE: f64 = 0.08;
    let hosts = Hosts::new(2)?;
    // All of it happens in the first pass.
    let quiet = Workload { rate: "0", fill: "240M", ..RESTLESS };
    let source = Node::sender(scene, "source", Some(hosts.host(0)), &quiet, &[])?;
    let listen = format!("tcp://{}:0", hosts.address(1, 0));
    let destination = Node::receiver(scene, "destination", Some(hosts.host(1)), &listen, &["--insecure"])?;
    let sampler = CounterSampler::start(hosts.counters(0, 1)?, TCP_HEADER_BYTES);
    let mut command = source.start_move(&destination.uri()?, &["--max-bandwidth", "200Mbit"])?;
    source.wait_for_phase("first-pass", LIMIT)?;
    rate_settles_at(&sampler, 25e6, TOLERANCE)?;
    for (cap, bytes_per_s) in [("400Mbit", 50e6), ("100Mbit", 12.5e6)] {
        source.command(&["set"], &["--max-bandwidth", cap], LIMIT)?.ensure_code(0)?;
        rate_settles_at(&sampler, bytes_per_s, TOLERANCE)
            .with_context(|| format!("after changing the cap to {cap}"))?;
    }
    source.command(&["set"], &["--max-bandwidth", "none"], LIMIT)?.ensure_code(0)?;
    Ended::wait(&mut command, LIMIT)?.ensure_moved(&destination, &quiet).map(drop)
}

/// Waits until half a second went by at this rate, as counted at the interface.
fn rate_settles_at(sampler: &CounterSampler, bytes_per_s: f64, tolerance: f64) -> Result<()> {
    const WINDOW_NS: u64 = 500_000_000;
    let mut rate = 0.0;
    let settled = wait::until_true("the rate follows the cap", Duration::from_secs(5), || {
        let samples = sampler.samples();
        let Some(last) = samples.last() else { return Ok(false) };
        let first = samples.iter().rev().find(|sample| last.at_ns - sample.at_ns >= WINDOW_NS);
        let Some(first) = first else { return Ok(false) };
        rate = (last.payload_bytes - first.payload_bytes) / ((last.at_ns - first.at_ns) as f64 / 1e9);
        Ok((rate / bytes_per_s - 1.0).abs() <= tolerance)
    });
    settled.with_context(|| format!("counted {rate:.0} bytes/s, expected {bytes_per_s:.0}"))
}
