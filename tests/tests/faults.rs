//! What happens when a move is called off, its receiver dies, or its link breaks: in every phase, which are taken from
//! the engine's own list, so that a new one is tested as soon as it exists.
//!
//! Up to *commit* the guest runs on at the source, whole, and a second try to another receiver succeeds. A link that breaks while
//! memory is being sent is made anew, unless that takes too long. From *commit* on the source never resumes by itself.

use std::thread;
use std::time::Duration;

use anyhow::{Result, ensure};
use godwit_core::Phase;
use godwit_tests::godwit::{Ended, Node};
use godwit_tests::harness::{self, Need, Scene};
use godwit_tests::netns::Hosts;
use godwit_tests::process::Process;
use godwit_tests::wait;
use godwit_tests::workload::Workload;
use nix::sys::signal::Signal;
use serde_json::json;

/// Longer than every limit that ends a broken move.
const LIMIT: Duration = Duration::from_secs(60);

const WORKLOAD: Workload = Workload {
    memory: "256M",
    vcpus: 1,
    fill: "96M",
    working_set: "48M",
    rate: "20000",
    order: "random",
    write: "word",
    contents: "random",
    seed: 11,
};

/// So slow, as far as the engine can know, that there must be rounds after the first pass.
const OPTIONS: [&str; 4] = ["--max-bandwidth", "2Gbit", "--switchover-bandwidth", "500Mbit"];

/// What a slow link carries in rounds that shrink.
const CALM: Workload = Workload { working_set: "8M", rate: "500", ..WORKLOAD };
/// A first pass of some seconds.
const CAPPED: [&str; 2] = ["--max-bandwidth", "150Mbit"];
/// Longer than a silence is taken for slowness.
const NOTICED: Duration = Duration::from_secs(12);

fn main() {
    let mut tests = Vec::new();
    for &phase in Phase::all().iter().filter(|phase| phase.before_commit()) {
        let kvm_and_root = [Need::Kvm, Need::Root];
        tests.push(harness::test(format!("receiver_killed_in_{phase}"), &[Need::Kvm], move |scene| {
            receiver_killed(scene, phase)
        }));
        tests.push(harness::test(format!("link_cut_in_{phase}"), &kvm_and_root, move |scene| link_cut(scene, phase)));
        tests.push(harness::test(format!("cancelled_in_{phase}"), &[Need::Kvm], move |scene| cancelled(scene, phase)));
    }
    tests.extend([
        harness::test("no_phase_is_left_out", &[], |_| no_phase_is_left_out()),
        harness::test("receiver_killed_after_commit", &[Need::Kvm], receiver_killed_after_commit),
        harness::test("running_lost_after_commit", &[Need::Kvm, Need::Root], running_lost_after_commit),
        harness::test("cancelling_after_commit_is_refused", &[Need::Kvm], cancelling_after_commit_is_refused),
        harness::test("an_interrupt_of_the_client_cancels", &[Need::Kvm], an_interrupt_of_the_client_cancels),
        harness::test("a_receiver_outlives_its_sender", &[Need::Kvm], a_receiver_outlives_its_sender),
        harness::test("link_lost_and_found_in_rounds", &[Need::Kvm, Need::Root], link_lost_and_found_in_rounds),
        harness::test("link_cut_for_5_seconds", &[Need::Kvm, Need::Root], |scene| {
            Cut::new(scene, "tcp", &[])?.survives(&[Duration::from_secs(5)], 0)
        }),
        harness::test("link_cut_until_it_is_noticed", &[Need::Kvm, Need::Root], |scene| {
            Cut::new(scene, "tcp", &["--channels", "2"])?.survives(&[NOTICED], 1)
        }),
        harness::test("link_cut_until_it_is_noticed_quic", &[Need::Kvm, Need::Root], |scene| {
            Cut::new(scene, "quic", &[])?.survives(&[NOTICED], 1)
        }),
        harness::test("link_cut_twice", &[Need::Kvm, Need::Root], |scene| {
            Cut::new(scene, "tcp", &[])?.survives(&[NOTICED, NOTICED], 2)
        }),
        harness::test("link_cut_in_the_pause", &[Need::Kvm, Need::Root], link_cut_in_the_pause),
        harness::test("cancelled_while_reconnecting", &[Need::Kvm, Need::Root], cancelled_while_reconnecting),
    ]);
    harness::main(tests)
}

/// Two receivers, on hosts of their own where links are cut.
struct Try {
    source: Node,
    first: Node,
    second: Node,
}

impl Try {
    fn here(scene: &Scene) -> Result<Self> {
        let listen = "tcp://127.0.0.1:0";
        Ok(Self {
            source: Node::sender(scene, "source", None, &WORKLOAD, &[])?,
            first: Node::receiver(scene, "first", None, listen, &["--host-id", "the-first-host"])?,
            second: Node::receiver(scene, "second", None, listen, &[])?,
        })
    }

    fn on(scene: &Scene, hosts: &Hosts) -> Result<Self> {
        let receiver = |host: usize, name: &str| {
            let listen = format!("tcp://{}:0", hosts.address(host, 0));
            Node::receiver(scene, name, Some(hosts.host(host)), &listen, &["--insecure"])
        };
        Ok(Self {
            source: Node::sender(scene, "source", Some(hosts.host(0)), &WORKLOAD, &[])?,
            first: receiver(1, "first")?,
            second: receiver(2, "second")?,
        })
    }

    /// Starts the first move and waits until it is held in `phase`.
    fn hold_at(&self, phase: Phase, more: &[&str]) -> Result<Process> {
        let name = phase.to_string();
        let mut options = [&OPTIONS[..], &["--test-hold-at", &name], more].concat();
        if phase == Phase::PreSwitchover {
            options.push("--pause-before-switchover");
        }
        let command = self.source.start_move(&self.first.uri()?, &options)?;
        self.source.wait_for_phase(&name, LIMIT)?;
        if phase.before_commit() && !phase.guest_paused() {
            self.source.ensure_guest_runs(WORKLOAD.vcpus)?;
        }
        Ok(command)
    }

    fn release(&self) -> Result<()> {
        self.source.command(&["release"], &[], LIMIT)?.ensure_code(0).map(drop)
    }

    /// The guest works at the source and is whole, and moves to the second receiver as if nothing had been.
    fn ensure_second_try_succeeds(&self) -> Result<()> {
        self.source.ensure_guest_unharmed(&WORKLOAD)?;
        self.source.move_to(&self.second.uri()?, &OPTIONS, LIMIT)?.ensure_moved(&self.second, &WORKLOAD).map(drop)
    }
}

/// A phase that is added without a place in the order would escape the loops above.
fn no_phase_is_left_out() -> Result<()> {
    let before = Phase::all().iter().filter(|phase| phase.before_commit()).count();
    let after = [Phase::Commit, Phase::PostCopy, Phase::PostCopyPaused, Phase::Completed];
    ensure!(before == Phase::all().len() - after.len(), "all phases but {after:?} come before commit");
    ensure!(Phase::all().is_sorted());
    Ok(())
}

fn receiver_killed(scene: &Scene, phase: Phase) -> Result<()> {
    let mut set = Try::here(scene)?;
    let mut command = set.hold_at(phase, &[])?;
    set.first.process.kill()?;
    set.release()?;
    let ended = Ended::wait(&mut command, LIMIT)?.ensure_code(4)?;
    if memory_is_sent(phase) {
        ensure!(ended.stdout.contains("is gone"), "it has not failed at once: {ended}");
    }
    set.ensure_second_try_succeeds()
}

/// From the first page until state is loaded: a link that breaks is made anew.
fn memory_is_sent(phase: Phase) -> bool {
    (Phase::FirstPass..=Phase::State).contains(&phase)
}

/// The link stays cut for longer than it is waited for.
fn link_cut(scene: &Scene, phase: Phase) -> Result<()> {
    let hosts = Hosts::new(3)?;
    let set = Try::on(scene, &hosts)?;
    let mut command = set.hold_at(phase, &["--reconnect-timeout", "3s"])?;
    hosts.take_down(0, 1)?;
    set.release()?;
    let ended = Ended::wait(&mut command, LIMIT)?.ensure_code(4)?;
    if memory_is_sent(phase) {
        ensure!(ended.stdout.contains("--reconnect-timeout"), "{ended}");
    }
    set.ensure_second_try_succeeds()
}

fn cancelled(scene: &Scene, phase: Phase) -> Result<()> {
    let set = Try::here(scene)?;
    let mut command = set.hold_at(phase, &[])?;
    set.source.command(&["cancel"], &[], LIMIT)?.ensure_code(0)?;
    Ended::wait(&mut command, LIMIT)?.ensure_code(5)?;
    set.source.ensure_guest_unharmed(&WORKLOAD)?;
    // The same receiver listens again: *it* was not harmed either.
    wait::until_true("the receiver listens again", LIMIT, || {
        let log = set.first.process.stderr();
        Ok(log.matches(" connects").count() == log.matches("listening again").count())
    })?;
    set.source.move_to(&set.first.uri()?, &OPTIONS, LIMIT)?.ensure_moved(&set.first, &WORKLOAD).map(drop)
}

/// With `--ownership none` only a person can know that the destination is dead.
fn receiver_killed_after_commit(scene: &Scene) -> Result<()> {
    let mut set = Try::here(scene)?;
    let mut command = set.hold_at(Phase::Commit, &["--handover-timeout", "2s"])?;
    set.first.process.kill()?;
    set.release()?;
    Ended::wait(&mut command, LIMIT)?.ensure_code(6)?;
    set.source.ensure_guest_stands(WORKLOAD.vcpus)?;
    ensure!(set.source.process.is_running()?, "the source process must stay");
    let refused = set.source.command(&["resume"], &[], LIMIT)?;
    ensure!(refused.code != 0, "a plain resume of a guest that may run elsewhere must be refused: {refused}");
    set.source.ensure_guest_stands(WORKLOAD.vcpus)?;
    set.source.command(&["resume"], &["--force", "--yes"], LIMIT)?.ensure_code(0)?;
    set.ensure_second_try_succeeds()
}

/// *commit* arrives, *running* does not: the destination runs the guest, and the source must not.
fn running_lost_after_commit(scene: &Scene) -> Result<()> {
    let hosts = Hosts::new(3)?;
    let mut set = Try::on(scene, &hosts)?;
    let mut command = set.hold_at(Phase::Commit, &["--handover-timeout", "3s"])?;
    hosts.lose(1, 0)?;
    set.release()?;
    Ended::wait(&mut command, LIMIT)?.ensure_code(6)?;
    set.first.ensure_guest_unharmed(&WORKLOAD)?;
    set.source.ensure_guest_stands(WORKLOAD.vcpus)?;
    ensure!(set.source.process.is_running()?);
    hosts.find(1, 0)?;
    set.source.ensure_guest_stands(WORKLOAD.vcpus)?;
    set.first.ensure_guest_runs(WORKLOAD.vcpus)
}

fn cancelling_after_commit_is_refused(scene: &Scene) -> Result<()> {
    let set = Try::here(scene)?;
    let mut command = set.hold_at(Phase::Commit, &[])?;
    let refused = set.source.qmp()?.execute("migrate_cancel", json!({}));
    let error = refused.err().map(|error| error.to_string()).unwrap_or_default();
    ensure!(error.contains("too late"), "cancelling after commit: `{error}`");
    ensure!(error.contains("handed over to the-first-host"), "it does not say who has the guest: `{error}`");
    set.release()?;
    Ended::wait(&mut command, LIMIT)?.ensure_moved(&set.first, &WORKLOAD).map(drop)
}

fn an_interrupt_of_the_client_cancels(scene: &Scene) -> Result<()> {
    let set = Try::here(scene)?;
    let slow = ["--max-bandwidth", "50Mbit", "--downtime-limit", "1ms"];
    let mut client = set.source.start_move(&set.first.uri()?, &slow)?;
    set.source.wait_for_phase("first-pass", LIMIT)?;
    client.signal(Signal::SIGINT)?;
    Ended::wait(&mut client, LIMIT)?.ensure_code(5)?;
    set.ensure_second_try_succeeds()
}

/// The guest dies with its sender; the receiver drops the half it has and takes the next machine in.
fn a_receiver_outlives_its_sender(scene: &Scene) -> Result<()> {
    let mut set = Try::here(scene)?;
    let _command = set.hold_at(Phase::Rounds, &["--reconnect-timeout", "2s"])?;
    set.source.process.kill()?;
    wait::until_true("the receiver listens again", LIMIT, || {
        Ok(set.first.process.stderr().contains("listening again"))
    })?;
    let next = Node::sender(scene, "next", None, &WORKLOAD, &[])?;
    next.move_to(&set.first.uri()?, &OPTIONS, LIMIT)?.ensure_moved(&set.first, &WORKLOAD).map(drop)
}

/// A short break heals by itself: TCP sends again what was lost.
fn link_lost_and_found_in_rounds(scene: &Scene) -> Result<()> {
    let hosts = Hosts::new(3)?;
    let set = Try::on(scene, &hosts)?;
    let slow = ["--max-bandwidth", "500Mbit"];
    let mut command = set.source.start_move(&set.first.uri()?, &slow)?;
    set.source.wait_for_phase("first-pass", LIMIT)?;
    hosts.cut(0, 1)?;
    set.source.ensure_guest_runs(WORKLOAD.vcpus)?;
    hosts.mend(0, 1)?;
    Ended::wait(&mut command, LIMIT)?.ensure_moved(&set.first, &WORKLOAD).map(drop)
}

/// A move over a link that is cut and mended.
struct Cut {
    hosts: Hosts,
    source: Node,
    destination: Node,
    options: Vec<&'static str>,
}

impl Cut {
    fn new(scene: &Scene, scheme: &str, more: &[&'static str]) -> Result<Self> {
        let hosts = Hosts::new(2)?;
        let listen = format!("{scheme}://{}:0", hosts.address(1, 0));
        Ok(Self {
            source: Node::sender(scene, "source", Some(hosts.host(0)), &CALM, &[])?,
            destination: Node::receiver(scene, "destination", Some(hosts.host(1)), &listen, &["--insecure"])?,
            options: [&CAPPED, more].concat(),
            hosts,
        })
    }

    fn start(&self, more: &[&str]) -> Result<Process> {
        self.source.start_move(&self.destination.uri()?, &[&self.options[..], more].concat())
    }

    /// Cut in the first pass, and again once it has recovered, for so long each time: the move completes, and has sent again no more
    /// than it had to.
    fn survives(&self, cuts: &[Duration], breaks: usize) -> Result<()> {
        let mut command = self.start(&[])?;
        self.source.wait_for_phase("first-pass", LIMIT)?;
        for cut in cuts {
            thread::sleep(Duration::from_secs(1));
            self.hosts.cut(0, 1)?;
            thread::sleep(*cut);
            self.source.ensure_guest_runs(CALM.vcpus)?;
            self.hosts.mend(0, 1)?;
            wait::until_true("connected again", LIMIT, || {
                Ok(self.source.migration()?["progress"]["reconnecting"].is_null())
            })?;
        }
        let outcome = Ended::wait(&mut command, LIMIT)?.ensure_moved(&self.destination, &CALM)?;
        ensure_sent_again_little(&outcome)?;
        let broke = outcome["reconnections"].as_array().map_or(0, Vec::len);
        ensure!(broke >= breaks, "{broke} breaks where {breaks} were made: {outcome}");
        Ok(())
    }
}

/// At most what was not acknowledged when the link broke, what the guest wrote meanwhile, and 10 % of their sum.
fn ensure_sent_again_little(outcome: &serde_json::Value) -> Result<()> {
    let sum = |field: &str| {
        let each = outcome["reconnections"].as_array().into_iter().flatten();
        each.map(|reconnection| reconnection[field].as_f64().unwrap_or(f64::NAN)).sum::<f64>()
    };
    let again = outcome["resent_bytes"].as_f64().unwrap_or(f64::NAN);
    let allowed = 1.1 * (sum("unacknowledged_bytes") + sum("dirtied_bytes"));
    ensure!(again <= allowed, "{again} bytes were sent again, {allowed} would do: {outcome}");
    Ok(())
}

/// The guest has stopped and its last pages are on their way: it goes on at the source at once, and moves later.
fn link_cut_in_the_pause(scene: &Scene) -> Result<()> {
    let cut = Cut::new(scene, "tcp", &[])?;
    let mut command = cut.start(&["--test-hold-at", "final-pages"])?;
    cut.source.wait_for_phase("final-pages", LIMIT)?;
    cut.hosts.cut(0, 1)?;
    thread::sleep(NOTICED);
    cut.source.ensure_guest_stands(CALM.vcpus)?;
    cut.source.command(&["release"], &[], LIMIT)?.ensure_code(0)?;
    cut.source.ensure_guest_runs(CALM.vcpus)?;
    cut.hosts.mend(0, 1)?;
    let outcome = Ended::wait(&mut command, LIMIT)?.ensure_moved(&cut.destination, &CALM)?;
    let broken = &outcome["reconnections"][0];
    ensure!(broken["phase"] == "final-pages" && broken["paused_ms"].is_f64(), "{outcome}");
    ensure_sent_again_little(&outcome)
}

fn cancelled_while_reconnecting(scene: &Scene) -> Result<()> {
    let cut = Cut::new(scene, "tcp", &[])?;
    let mut command = cut.start(&[])?;
    cut.source.wait_for_phase("first-pass", LIMIT)?;
    cut.hosts.take_down(0, 1)?;
    wait::until_true("it is reconnecting", LIMIT, || {
        Ok(cut.source.migration()?["progress"]["reconnecting"]["attempts"].as_u64() > Some(1))
    })?;
    cut.source.command(&["cancel"], &[], LIMIT)?.ensure_code(0)?;
    Ended::wait(&mut command, LIMIT)?.ensure_code(5)?;
    cut.source.ensure_guest_unharmed(&CALM)
}
