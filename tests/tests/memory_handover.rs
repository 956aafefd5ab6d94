//! Moves on one host in which memory is handed over instead of being copied: how short the pause is, what is refused and why, and
//! that the memory which two processes then share is written by one of them at a time.

use std::fs;
use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use godwit_core::Phase;
use godwit_tests::godwit::{Ended, Node};
use godwit_tests::harness::{self, Need, Scene};
use godwit_tests::measure;
use godwit_tests::process::Process;
use godwit_tests::workload::Workload;
use serde_json::{Value, json};

const LIMIT: Duration = Duration::from_secs(60);

const WORKLOAD: Workload = Workload {
    memory: "256M",
    vcpus: 2,
    fill: "96M",
    working_set: "48M",
    rate: "20000",
    order: "random",
    write: "word",
    contents: "random",
    seed: 31,
};

const MEMFD: [&str; 2] = ["--memory-backing", "memfd"];
const REQUIRE: [&str; 2] = ["--memory-handover", "require"];

fn main() {
    let mut tests = vec![
        kvm("the_gap_of_4_gib_is_short_and_nothing_is_copied", the_gap_of_4_gib),
        kvm("onward_and_back", onward_and_back),
        kvm("a_paused_guest_arrives_paused", a_paused_guest_arrives_paused),
        kvm("held_until_resume", held_until_resume),
        kvm("waits_before_the_switchover", waits_before_the_switchover),
        kvm("a_dry_run_moves_nothing", a_dry_run_moves_nothing),
        kvm("off_copies", off_copies),
        kvm("private_memory_is_copied_or_refused", private_memory),
        kvm("another_transport_is_refused", another_transport_is_refused),
        kvm("a_forwarded_socket_is_copied_over_or_refused", a_forwarded_socket),
        kvm("a_destination_lost_after_commit_leaves_memory_as_it_was", lost_after_commit),
        kvm("with_claims_the_source_takes_memory_back", claimed_back),
    ];
    for phase in [Phase::Prepare, Phase::PreSwitchover, Phase::Pause, Phase::State] {
        tests.push(kvm(format!("receiver_killed_in_{phase}"), move |scene| killed(scene, phase)));
        tests.push(kvm(format!("cancelled_in_{phase}"), move |scene| cancelled(scene, phase)));
    }
    harness::main(tests)
}

fn kvm(name: impl Into<String>, run: impl FnOnce(&Scene) -> Result<()> + Send + 'static) -> libtest_mimic::Trial {
    harness::test(name, &[Need::Kvm], run)
}

fn sender(scene: &Scene, workload: &Workload, more: &[&str]) -> Result<Node> {
    Node::sender(scene, "source", None, workload, &[&MEMFD[..], more].concat())
}

fn receiver(scene: &Scene, name: &str, more: &[&str]) -> Result<Node> {
    Node::receiver(scene, name, None, &unix(scene, name), more)
}

fn unix(scene: &Scene, name: &str) -> String {
    format!("unix:{}", socket(scene, name).display())
}

fn socket(scene: &Scene, name: &str) -> PathBuf {
    scene.path().join(format!("{name}-move.sock"))
}

/// Fails unless memory was handed over: all of it, and nothing was sent.
fn ensure_handed_over(outcome: &Value, workload: &Workload) -> Result<()> {
    ensure!(outcome["handed_over_bytes"] == workload.pages() * 4096, "{outcome}");
    let pages: u64 = outcome["pages"].as_object().into_iter().flatten().filter_map(|(_, count)| count.as_u64()).sum();
    ensure!(pages == 0 && outcome["rounds"] == 0, "pages were sent: {outcome}");
    ensure!(outcome["wire_bytes"].as_u64().is_some_and(|bytes| bytes < 1 << 20), "{outcome}");
    Ok(())
}

/// What a live upgrade is for: the gap does not depend on how much memory there is. It is about 8 ms where nothing else wants the
/// processors; anything that grows with memory (unmapping it, say) takes many times as long as is allowed here. A busy host makes a gap
/// longer and never shorter: the shortest of a few counts.
fn the_gap_of_4_gib(scene: &Scene) -> Result<()> {
    const LONGEST_MS: f64 = 100.0;
    const MOVES: usize = 3;
    let mut gaps_ms = Vec::new();
    while gaps_ms.len() < MOVES && !gaps_ms.iter().any(|gap_ms| *gap_ms < LONGEST_MS) {
        gaps_ms.push(gap_of_4_gib_ms(scene, gaps_ms.len())?);
    }
    ensure!(gaps_ms.iter().any(|gap_ms| *gap_ms < LONGEST_MS), "gaps of {gaps_ms:?} ms");
    Ok(())
}

fn gap_of_4_gib_ms(scene: &Scene, number: usize) -> Result<f64> {
    const OWN_MEMORY_BYTES: u64 = 64 << 20;
    let workload = Workload { memory: "4G", fill: "3G", working_set: "240M", rate: "30000", ..WORKLOAD };
    let source = Node::sender(scene, &format!("source-{number}"), None, &workload, &MEMFD)?;
    let destination = receiver(scene, &format!("destination-{number}"), &[])?;
    let target = source.heartbeats(workload.vcpus)?;
    // Held before the switchover until the destination's heartbeat can be watched.
    let options = [&REQUIRE[..], &["--audit", "--pause-before-switchover"]].concat();
    let mut waited = 0;
    let measured = measure::measure(&source, &destination, target, None, &options, LIMIT, |answer| {
        if answer["status"] == "pre-switchover" {
            waited += 1;
            if waited == 50 {
                let _ = source.execute("migrate-continue", json!({ "state": "pre-switchover" }));
            }
        }
    })?;
    let own_bytes = anonymous_bytes(&destination)?;
    println!(
        "gap {:?}, own downtime {} ms, {} bytes on the wire, {} KiB of the destination's own memory",
        measured.gap,
        measured.downtime_ms,
        measured.outcome["wire_bytes"],
        own_bytes >> 10
    );
    println!("{}", measured.outcome["steps"]);
    ensure_handed_over(&measured.outcome, &workload)?;
    ensure!(own_bytes < OWN_MEMORY_BYTES, "the destination has {own_bytes} bytes of its own");
    ensure!(measured.gap.gap_ms > 0.0, "{:?}", measured.gap);
    destination.ensure_guest_unharmed(&workload)?;
    Ok(measured.gap.gap_ms)
}

/// Memory that a process shares with no other and with no file.
fn anonymous_bytes(node: &Node) -> Result<u64> {
    let status = fs::read_to_string(format!("/proc/{}/status", node.process.pid()))?;
    let line = status.lines().find_map(|line| line.strip_prefix("RssAnon:")).context("no RssAnon")?;
    let kib: u64 = line.trim().trim_end_matches(" kB").parse()?;
    Ok(kib << 10)
}

/// A → B → C → A': each process that takes the machine over can hand it on, and every page is checked each time.
fn onward_and_back(scene: &Scene) -> Result<()> {
    let mut at = sender(scene, &WORKLOAD, &[])?;
    for name in ["b", "c", "a-again"] {
        let next = receiver(scene, name, &[])?;
        let outcome = at.move_to(&next.uri()?, &REQUIRE, LIMIT)?.ensure_moved(&next, &WORKLOAD)?;
        ensure_handed_over(&outcome, &WORKLOAD).with_context(|| format!("to {name}"))?;
        let status = at.process.wait(LIMIT)?;
        ensure!(status.code() == Some(0), "the process that handed over to {name} ended with {status}");
        at = next;
    }
    // What was handed over can be sent like any other memory.
    let next = Node::receiver(scene, "elsewhere", None, "tcp://127.0.0.1:0", &[])?;
    let outcome = at.move_to(&next.uri()?, &[], LIMIT)?.ensure_moved(&next, &WORKLOAD)?;
    ensure!(outcome["handed_over_bytes"].is_null(), "{outcome}");
    Ok(())
}

fn a_paused_guest_arrives_paused(scene: &Scene) -> Result<()> {
    let source = sender(scene, &WORKLOAD, &[])?;
    let destination = receiver(scene, "destination", &[])?;
    source.command(&["pause"], &[], LIMIT)?.ensure_code(0)?;
    let outcome = source.move_to(&destination.uri()?, &REQUIRE, LIMIT)?.ensure_audited()?;
    ensure_handed_over(&outcome, &WORKLOAD)?;
    arrived_paused(&destination)
}

fn held_until_resume(scene: &Scene) -> Result<()> {
    let source = sender(scene, &WORKLOAD, &[])?;
    let destination = receiver(scene, "destination", &["--hold"])?;
    source.move_to(&destination.uri()?, &REQUIRE, LIMIT)?.ensure_audited()?;
    arrived_paused(&destination)
}

fn arrived_paused(destination: &Node) -> Result<()> {
    destination.ensure_guest_stands(WORKLOAD.vcpus)?;
    destination.ensure_guest_whole(&WORKLOAD)?;
    destination.command(&["resume"], &[], LIMIT)?.ensure_code(0)?;
    destination.ensure_guest_unharmed(&WORKLOAD)
}

fn waits_before_the_switchover(scene: &Scene) -> Result<()> {
    let source = sender(scene, &WORKLOAD, &[])?;
    let destination = receiver(scene, "destination", &[])?;
    let options = [&REQUIRE[..], &["--pause-before-switchover"]].concat();
    let mut command = source.start_move(&destination.uri()?, &options)?;
    source.wait_for_phase("pre-switchover", LIMIT)?;
    source.ensure_guest_runs(WORKLOAD.vcpus)?;
    source.command(&["continue"], &[], LIMIT)?.ensure_code(0)?;
    let outcome = Ended::wait(&mut command, LIMIT)?.ensure_moved(&destination, &WORKLOAD)?;
    ensure_handed_over(&outcome, &WORKLOAD)
}

fn a_dry_run_moves_nothing(scene: &Scene) -> Result<()> {
    let source = sender(scene, &WORKLOAD, &[])?;
    let destination = receiver(scene, "destination", &[])?;
    let options = [&REQUIRE[..], &["--dry-run"]].concat();
    source.move_to(&destination.uri()?, &options, LIMIT)?.ensure_code(0)?;
    source.ensure_guest_unharmed(&WORKLOAD)?;
    source.move_to(&destination.uri()?, &[], LIMIT)?.ensure_moved(&destination, &WORKLOAD).map(drop)
}

fn off_copies(scene: &Scene) -> Result<()> {
    let source = sender(scene, &WORKLOAD, &[])?;
    let destination = receiver(scene, "destination", &[])?;
    let options = ["--memory-handover", "off"];
    let outcome = source.move_to(&destination.uri()?, &options, LIMIT)?.ensure_moved(&destination, &WORKLOAD)?;
    ensure!(outcome["handed_over_bytes"].is_null() && outcome["pages"]["raw"].as_u64() > Some(0), "{outcome}");
    Ok(())
}

fn private_memory(scene: &Scene) -> Result<()> {
    const HOW: &str = "a machine started with --memory-backing memfd can hand it over";
    let source = Node::sender(scene, "source", None, &WORKLOAD, &[])?;
    let destination = receiver(scene, "destination", &[])?;
    let uri = destination.uri()?;
    source.move_to(&uri, &REQUIRE, LIMIT)?.ensure_code(3)?.ensure_says(&["refused: memory:", "private", HOW])?;
    source.ensure_guest_unharmed(&WORKLOAD)?;
    copied(&source, &destination, &uri, HOW)
}

/// A move that copies memory, and says why.
fn copied(source: &Node, destination: &Node, uri: &str, why: &str) -> Result<()> {
    let ended = source.move_to(uri, &[], LIMIT)?;
    let text = format!("{}{}", ended.stdout, ended.stderr);
    ensure!(text.contains("memory is copied, not handed over") && text.contains(why), "{ended}");
    let outcome = ended.ensure_moved(destination, &WORKLOAD)?;
    ensure!(outcome["handed_over_bytes"].is_null(), "{outcome}");
    Ok(())
}

fn another_transport_is_refused(scene: &Scene) -> Result<()> {
    let source = sender(scene, &WORKLOAD, &[])?;
    let destination = Node::receiver(scene, "destination", None, "tcp://127.0.0.1:0", &[])?;
    let uri = destination.uri()?;
    source.move_to(&uri, &REQUIRE, LIMIT)?.ensure_code(3)?.ensure_says(&["refused: memory:", "unix:/PATH"])?;
    source.ensure_guest_unharmed(&WORKLOAD)?;
    source.move_to(&uri, &[], LIMIT)?.ensure_moved(&destination, &WORKLOAD).map(drop)
}

/// Something between both ends passes bytes on, as a tunnel to another host does.
fn a_forwarded_socket(scene: &Scene) -> Result<()> {
    let source = sender(scene, &WORKLOAD, &[])?;
    let destination = receiver(scene, "destination", &[])?;
    let relay = socket(scene, "relay");
    forward(&relay, socket(scene, "destination"))?;
    let uri = format!("unix:{}", relay.display());
    source.move_to(&uri, &REQUIRE, LIMIT)?.ensure_code(3)?.ensure_says(&["refused: memory:", "no file descriptors"])?;
    source.ensure_guest_unharmed(&WORKLOAD)?;
    copied(&source, &destination, &uri, "no file descriptors")
}

fn forward(from: &Path, to: PathBuf) -> Result<()> {
    let listener = UnixListener::bind(from)?;
    thread::spawn(move || {
        for near in listener.incoming().flatten() {
            let Ok(far) = UnixStream::connect(&to) else { return };
            let (Ok(near_again), Ok(far_again)) = (near.try_clone(), far.try_clone()) else { return };
            thread::spawn(move || pass_on(near, far));
            thread::spawn(move || pass_on(far_again, near_again));
        }
    });
    Ok(())
}

fn pass_on(mut from: UnixStream, mut to: UnixStream) {
    let mut buffer = vec![0; 64 << 10];
    while let Ok(count @ 1..) = from.read(&mut buffer) {
        if to.write_all(&buffer[..count]).is_err() {
            return;
        }
    }
    // Fails only if the other direction has broken already.
    let _ = to.shutdown(std::net::Shutdown::Write);
}

/// A move that is held in `phase`.
fn hold(source: &Node, destination: &Node, phase: Phase) -> Result<Process> {
    let name = phase.to_string();
    let mut options = [&REQUIRE[..], &["--test-hold-at", &name]].concat();
    if phase == Phase::PreSwitchover {
        options.push("--pause-before-switchover");
    }
    let command = source.start_move(&destination.uri()?, &options)?;
    source.wait_for_phase(&name, LIMIT)?;
    Ok(command)
}

fn killed(scene: &Scene, phase: Phase) -> Result<()> {
    let source = sender(scene, &WORKLOAD, &[])?;
    let mut destination = receiver(scene, "destination", &[])?;
    let mut command = hold(&source, &destination, phase)?;
    destination.process.kill()?;
    source.execute("x-godwit-release-hold", json!({}))?;
    Ended::wait(&mut command, LIMIT)?.ensure_code(4)?;
    source.ensure_guest_unharmed(&WORKLOAD)?;
    again(scene, &source)
}

fn cancelled(scene: &Scene, phase: Phase) -> Result<()> {
    let source = sender(scene, &WORKLOAD, &[])?;
    let destination = receiver(scene, "destination", &[])?;
    let mut command = hold(&source, &destination, phase)?;
    source.command(&["cancel"], &[], LIMIT)?.ensure_code(0)?;
    Ended::wait(&mut command, LIMIT)?.ensure_code(5)?;
    source.ensure_guest_unharmed(&WORKLOAD)?;
    again(scene, &source)
}

/// A second try succeeds.
fn again(scene: &Scene, source: &Node) -> Result<()> {
    let second = receiver(scene, "second", &[])?;
    let outcome = source.move_to(&second.uri()?, &REQUIRE, LIMIT)?.ensure_moved(&second, &WORKLOAD)?;
    ensure_handed_over(&outcome, &WORKLOAD)
}

/// The destination has loaded state over the memory of a paused guest, and dies: not one byte is another than before.
fn lost_after_commit(scene: &Scene) -> Result<()> {
    let source = sender(scene, &WORKLOAD, &[])?;
    let mut destination = receiver(scene, "destination", &[])?;
    source.command(&["pause"], &[], LIMIT)?.ensure_code(0)?;
    let before = all_memory(&source)?;
    let mut command = hold(&source, &destination, Phase::Commit)?;
    destination.process.kill()?;
    source.execute("x-godwit-release-hold", json!({}))?;
    Ended::wait(&mut command, LIMIT)?.ensure_code(6)?;
    let differing = before.iter().zip(all_memory(&source)?).filter(|(before, now)| **before != *now).count();
    ensure!(differing == 0, "{differing} pages are not as they were");
    source.command(&["resume"], &["--force", "--yes"], LIMIT)?.ensure_code(0)?;
    source.ensure_guest_unharmed(&WORKLOAD)?;
    again(scene, &source)
}

/// Every page of the guest.
fn all_memory(node: &Node) -> Result<Vec<[u8; 4096]>> {
    let memory = node.memory()?;
    (0..WORKLOAD.pages()).map(|page| memory.page(page * 4096)).collect()
}

fn claimed_back(scene: &Scene) -> Result<()> {
    let claims = scene.path().join("machine.godwit");
    let claims = claims.to_str().context("the scene's path is no text")?;
    let directory = scene.path().to_str().context("the scene's path is no text")?;
    let source = sender(scene, &WORKLOAD, &["--ownership", claims, "--host-id", "one"])?;
    let mut destination = receiver(scene, "destination", &["--ownership", directory, "--host-id", "two"])?;
    let mut command = hold(&source, &destination, Phase::Commit)?;
    destination.process.kill()?;
    source.execute("x-godwit-release-hold", json!({}))?;
    Ended::wait(&mut command, LIMIT)?.ensure_code(4)?.ensure_says(&["claimed back, epoch 2"])?;
    source.ensure_guest_unharmed(&WORKLOAD)?;
    let second = receiver(scene, "second", &["--ownership", directory, "--host-id", "three"])?;
    let outcome = source.move_to(&second.uri()?, &REQUIRE, LIMIT)?.ensure_moved(&second, &WORKLOAD)?;
    ensure_handed_over(&outcome, &WORKLOAD)?;
    ensure!(outcome["handover"]["claim_ms"].as_f64().is_some(), "{outcome}");
    Ok(())
}
