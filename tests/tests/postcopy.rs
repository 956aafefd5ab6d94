//! Post-copy: guests that go on at the destination before all of their memory is there, and arrive whole all the same.

use std::fs;
use std::thread;
use std::time::Duration;

use anyhow::{Result, ensure};
use godwit_tests::godwit::{Ended, Node};
use godwit_tests::harness::{self, Need, Scene};
use godwit_tests::netns::Hosts;
use godwit_tests::process::Process;
use godwit_tests::wait;
use godwit_tests::workload::Workload;
use serde_json::{Value, json};

const LIMIT: Duration = Duration::from_secs(120);

const TCP: &str = "tcp://127.0.0.1:0";

/// Longer than a silence is taken for slowness.
const NOTICED: Duration = Duration::from_secs(12);

/// Fresh random contents, flat out, over most of memory: no link carries that in rounds.
const FLAT_OUT: Workload = Workload {
    memory: "512M",
    vcpus: 1,
    fill: "256M",
    working_set: "240M",
    rate: "max",
    order: "random",
    write: "page",
    contents: "random",
    seed: 3,
};

const BUSY: Workload = Workload { memory: "256M", fill: "128M", working_set: "96M", vcpus: 2, ..FLAT_OUT };

/// Goes over as soon as the first pass has shown that the limit is not met.
const AT_ONCE: [&str; 6] = ["--on-stall", "postcopy", "--max-rounds", "0", "--downtime-limit", "20ms"];

fn main() {
    let (kvm, kvm_and_root) = (&[Need::Kvm], &[Need::Kvm, Need::Root]);
    let mut tests = vec![
        harness::test("a_writer_flat_out_over_1_gbit", kvm_and_root, a_writer_flat_out_over_1_gbit),
        harness::test("asked_for_in_the_first_pass", kvm, |scene| asked_for(scene, TCP)),
        harness::test("asked_for_in_the_first_pass_quic", kvm, |scene| asked_for(scene, "quic://127.0.0.1:0")),
        harness::test("memory_in_a_memfd", kvm, memory_in_a_memfd),
        harness::test("onward_once_all_is_there", kvm, onward_once_all_is_there),
        harness::test("the_claims_say_when_memory_is_complete", kvm, the_claims_say_when_memory_is_complete),
        harness::test("a_receiver_killed_on_the_way", kvm, a_receiver_killed_on_the_way),
        harness::test("refused_where_nothing_would_follow", kvm, refused_where_nothing_would_follow),
    ];
    for scheme in ["tcp", "quic"] {
        for (name, cut) in [("3_seconds", Duration::from_secs(3)), ("until_it_is_noticed", NOTICED)] {
            tests.push(harness::test(format!("link_cut_for_{name}_{scheme}"), kvm_and_root, move |scene| {
                link_cut(scene, scheme, cut)
            }));
        }
    }
    harness::main(tests)
}

fn ensure_followed(outcome: &Value) -> Result<()> {
    let postcopy = &outcome["postcopy"];
    let number = |name: &str| postcopy[name].as_u64().unwrap_or(0);
    println!("post-copy: {postcopy}, downtime {} ms, total {} ms", outcome["downtime_ms"], outcome["total_ms"]);
    ensure!(number("missing_pages") > 0 && number("faults") > 0, "{outcome}");
    ensure!(number("fault_p50_us") <= number("fault_p99_us"), "{outcome}");
    ensure!(number("fault_p99_us") <= number("fault_max_us"), "{outcome}");
    ensure!(number("pages_by_fault") + number("pages_by_push") >= number("missing_pages"), "{outcome}");
    Ok(())
}

fn a_writer_flat_out_over_1_gbit(scene: &Scene) -> Result<()> {
    let hosts = Hosts::new(2)?;
    hosts.shape(0, 1, 1000)?;
    let source = Node::sender(scene, "source", Some(hosts.host(0)), &FLAT_OUT, &[])?;
    let listen = format!("tcp://{}:0", hosts.address(1, 0));
    let destination = Node::receiver(scene, "destination", Some(hosts.host(1)), &listen, &["--insecure"])?;
    let options = ["--max-bandwidth", "1Gbit", "--on-stall", "postcopy", "--max-rounds", "3"];
    let outcome = source.move_to(&destination.uri()?, &options, LIMIT)?.ensure_moved(&destination, &FLAT_OUT)?;
    ensure_followed(&outcome)
}

/// The first pass would take many seconds.
fn asked_for(scene: &Scene, listen: &str) -> Result<()> {
    let source = Node::sender(scene, "source", None, &BUSY, &[])?;
    let destination = Node::receiver(scene, "destination", None, listen, &[])?;
    let early = source.command(&["postcopy"], &[], LIMIT)?;
    ensure!(early.code != 0 && early.stderr.contains("no move is running"), "{early}");
    let mut command = source.start_move(&destination.uri()?, &["--max-bandwidth", "100Mbit"])?;
    source.wait_for_phase("first-pass", LIMIT)?;
    source.command(&["postcopy"], &[], LIMIT)?.ensure_code(0)?;
    source.wait_for_phase("postcopy", LIMIT)?;
    let told = source.execute("query-migrate", json!({}))?;
    ensure!(told["status"] == "postcopy-active", "{told}");
    let told = destination.execute("query-migrate", json!({}))?;
    ensure!(told["status"] == "postcopy-active", "{told}");
    destination.ensure_guest_runs(BUSY.vcpus)?;
    source.ensure_guest_stands(BUSY.vcpus)?;
    let late = source.qmp()?.execute("migrate_cancel", json!({})).err().map(|error| error.to_string());
    ensure!(late.as_deref().is_some_and(|error| error.contains("too late")), "cancelled: {late:?}");
    source.command(&["set"], &["--max-bandwidth", "none"], LIMIT)?.ensure_code(0)?;
    let outcome = Ended::wait(&mut command, LIMIT)?.ensure_moved(&destination, &BUSY)?;
    ensure_followed(&outcome)?;
    ensure!(destination.execute("query-migrate", json!({}))?["status"] == "completed");
    Ok(())
}

fn memory_in_a_memfd(scene: &Scene) -> Result<()> {
    let source = Node::sender(scene, "source", None, &BUSY, &["--memory-backing", "memfd"])?;
    let destination = Node::receiver(scene, "destination", None, TCP, &[])?;
    let outcome = source.move_to(&destination.uri()?, &AT_ONCE, LIMIT)?.ensure_moved(&destination, &BUSY)?;
    ensure_followed(&outcome)
}

/// While memory is still to come the machine cannot be sent onward; then it can.
fn onward_once_all_is_there(scene: &Scene) -> Result<()> {
    let (mut command, source, destination) = slowly(scene, TCP, None)?;
    let next = Node::receiver(scene, "next", None, TCP, &[])?;
    let early = destination.move_to(&next.uri()?, &[], LIMIT)?.ensure_code(3)?;
    ensure!(early.stderr.contains("still to come"), "{early}");
    source.command(&["set"], &["--max-bandwidth", "none"], LIMIT)?.ensure_code(0)?;
    Ended::wait(&mut command, LIMIT)?.ensure_moved(&destination, &BUSY)?;
    destination.move_to(&next.uri()?, &AT_ONCE, LIMIT)?.ensure_moved(&next, &BUSY).map(drop)
}

/// A move that is in post-copy, and would be for a while.
fn slowly(scene: &Scene, listen: &str, hosts: Option<&Hosts>) -> Result<(Process, Node, Node)> {
    let source = Node::sender(scene, "source", hosts.map(|hosts| hosts.host(0)), &BUSY, &[])?;
    let destination = Node::receiver(scene, "destination", hosts.map(|hosts| hosts.host(1)), listen, &["--insecure"])?;
    let command = source.start_move(&destination.uri()?, &["--max-bandwidth", "60Mbit"])?;
    source.wait_for_phase("first-pass", LIMIT)?;
    source.command(&["postcopy"], &[], LIMIT)?.ensure_code(0)?;
    source.wait_for_phase("postcopy", LIMIT)?;
    Ok((command, source, destination))
}

/// Both ends keep what they have; the guest goes on, whole.
fn link_cut(scene: &Scene, scheme: &str, length: Duration) -> Result<()> {
    let hosts = Hosts::new(2)?;
    let listen = format!("{scheme}://{}:0", hosts.address(1, 0));
    let (mut command, source, destination) = slowly(scene, &listen, Some(&hosts))?;
    thread::sleep(Duration::from_secs(1));
    hosts.cut(0, 1)?;
    thread::sleep(length);
    if length >= NOTICED {
        let told = source.execute("query-migrate", json!({}))?;
        ensure!(told["status"] == "postcopy-paused", "{told}");
    }
    source.ensure_guest_stands(BUSY.vcpus)?;
    hosts.mend(0, 1)?;
    destination.ensure_guest_runs(BUSY.vcpus)?;
    source.command(&["set"], &["--max-bandwidth", "none"], LIMIT)?.ensure_code(0)?;
    let outcome = Ended::wait(&mut command, LIMIT)?.ensure_moved(&destination, &BUSY)?;
    ensure_followed(&outcome)?;
    let breaks = outcome["reconnections"].as_array().map_or(0, Vec::len);
    ensure!(length < NOTICED || breaks >= 1, "{outcome}");
    Ok(())
}

fn the_claims_say_when_memory_is_complete(scene: &Scene) -> Result<()> {
    let claims = scene.path().join("machine.godwit");
    let (here, folder) = (claims.display().to_string(), scene.path().display().to_string());
    let source = Node::sender(scene, "kvm1", None, &BUSY, &["--ownership", &here, "--host-id", "kvm1"])?;
    let destination = Node::receiver(scene, "kvm2", None, TCP, &["--ownership", &folder, "--host-id", "kvm2"])?;
    let mut command = source.start_move(&destination.uri()?, &["--max-bandwidth", "60Mbit"])?;
    source.wait_for_phase("first-pass", LIMIT)?;
    source.command(&["postcopy"], &[], LIMIT)?.ensure_code(0)?;
    source.wait_for_phase("postcopy", LIMIT)?;
    let epoch = source.execute("x-godwit-query-ownership", json!({}))?["epoch"].as_u64().unwrap_or(0) + 1;
    let claim = fs::read_link(claims.join(epoch.to_string()))?.display().to_string();
    ensure!(claim.contains("host=kvm2") && claim.ends_with(" incomplete"), "{claim}");
    let marked = |marker: &str| fs::symlink_metadata(claims.join(format!("{epoch}.{marker}"))).is_ok();
    wait::until_true("the claims show that it runs", LIMIT, || Ok(marked("running")))?;
    ensure!(!marked("complete"));
    source.command(&["set"], &["--max-bandwidth", "none"], LIMIT)?.ensure_code(0)?;
    Ended::wait(&mut command, LIMIT)?.ensure_moved(&destination, &BUSY)?;
    wait::until_true("the claims show that all is there", LIMIT, || Ok(marked("complete")))?;
    // There and back: the claim that was incomplete is followed as any other.
    let back = Node::receiver(scene, "kvm1-again", None, TCP, &["--ownership", &folder, "--host-id", "kvm1"])?;
    destination.move_to(&back.uri()?, &AT_ONCE, LIMIT)?.ensure_moved(&back, &BUSY).map(drop)
}

/// The guest is lost, and nobody pretends otherwise: the source never lets its old copy run, and waits until a person has decided.
fn a_receiver_killed_on_the_way(scene: &Scene) -> Result<()> {
    let (mut command, source, mut destination) = slowly(scene, TCP, None)?;
    destination.process.kill()?;
    source.wait_for_phase("postcopy-paused", LIMIT)?;
    source.ensure_guest_stands(BUSY.vcpus)?;
    let refused = source.command(&["resume"], &[], LIMIT)?;
    ensure!(refused.code != 0, "a guest that has gone on elsewhere ran on: {refused}");
    let said = source.command(&["abandon"], &["--yes"], LIMIT)?.ensure_code(0)?;
    ensure!(said.stderr.contains("The guest is lost"), "{said}");
    let ended = Ended::wait(&mut command, LIMIT)?.ensure_code(6)?;
    ensure!(ended.stdout.contains("without all of its memory"), "{ended}");
    source.ensure_guest_stands(BUSY.vcpus)
}

fn refused_where_nothing_would_follow(scene: &Scene) -> Result<()> {
    let source = Node::sender(scene, "source", None, &Workload::SMALL, &[])?;
    let destination = Node::receiver(scene, "destination", None, TCP, &[])?;
    for more in [["--memory-handover", "require"], ["--reconnect-timeout", "0s"]] {
        let options = [&AT_ONCE[..], &more].concat();
        let refused = source.move_to(&destination.uri()?, &options, LIMIT)?.ensure_code(3)?;
        ensure!(refused.stdout.contains("post-copy"), "{refused}");
    }
    source.ensure_guest_unharmed(&Workload::SMALL)
}
