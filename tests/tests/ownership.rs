//! Claims on shared storage, with real processes and real guests: who may start a machine, and who has it when a handover is cut
//! short. Two hosts are played by two `--host-id`s over one directory.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use godwit_core::Phase;
use godwit_tests::godwit::{Ended, Node};
use godwit_tests::harness::{self, Need, Scene, binary};
use godwit_tests::netns::Hosts;
use godwit_tests::process::Process;
use godwit_tests::wait;
use godwit_tests::workload::Workload;
use nix::sys::signal::Signal;
use serde_json::Value;

const LIMIT: Duration = Duration::from_secs(60);

const LISTEN: &str = "tcp://127.0.0.1:0";

const WORKLOAD: Workload = Workload {
    memory: "128M",
    vcpus: 1,
    fill: "32M",
    working_set: "16M",
    rate: "10000",
    order: "random",
    write: "word",
    contents: "random",
    seed: 23,
};

fn main() {
    let kvm = &[Need::Kvm];
    harness::main(vec![
        harness::test("epochs_advance_there_and_back", kvm, epochs_advance_there_and_back),
        harness::test("a_second_start_is_refused_by_name", kvm, a_second_start_is_refused_by_name),
        harness::test("a_dead_owner_is_succeeded", kvm, a_dead_owner_is_succeeded),
        harness::test("a_receiver_that_sees_other_claims_refuses", kvm, a_receiver_that_sees_other_claims_refuses),
        harness::test("cancelling_in_the_pause_keeps_the_epoch", kvm, cancelling_in_the_pause_keeps_the_epoch),
        harness::test("a_receiver_killed_before_its_claim", kvm, a_receiver_killed_before_its_claim),
        harness::test("a_receiver_that_wakes_too_late_drops", kvm, a_receiver_that_wakes_too_late_drops),
        harness::test("running_lost_is_seen_in_the_claims", &[Need::Kvm, Need::Root], running_lost),
        harness::test("a_claim_without_a_sign_of_life_is_watched", kvm, a_claim_without_a_sign_of_life_is_watched),
        harness::test("a_machine_started_anew_elsewhere_ends_the_copy", kvm, started_anew_elsewhere),
        harness::test("a_store_that_is_away_in_the_handover", kvm, a_store_that_is_away_in_the_handover),
        harness::test("a_store_that_is_away_for_longer", kvm, a_store_that_is_away_for_longer),
    ])
}

/// One machine and a place for its claims.
struct Shared<'a> {
    scene: &'a Scene,
    claims: PathBuf,
}

impl<'a> Shared<'a> {
    fn new(scene: &'a Scene) -> Self {
        Self { scene, claims: scene.path().join("machine.godwit") }
    }

    fn claims(&self) -> Result<&str> {
        self.claims.to_str().context("the scene's path is no text")
    }

    fn sender(&self, host: &str) -> Result<Node> {
        let more = ["--ownership", self.claims()?, "--host-id", host];
        Node::sender(self.scene, host, None, &WORKLOAD, &more)
    }

    fn receiver(&self, name: &str, host: &str) -> Result<Node> {
        let scene = self.scene.path().to_str().context("the scene's path is no text")?;
        Node::receiver(self.scene, name, None, LISTEN, &["--ownership", scene, "--host-id", host])
    }

    /// Tries to start the machine and gives how that ended.
    fn refused_start(&self, name: &str, more: &[&str]) -> Result<Ended> {
        let mut command = Command::new(binary("godwit-sender")?);
        command.arg("run").args(WORKLOAD.arguments()).args(["--ownership", self.claims()?]).args(more);
        command.arg("--control").arg(self.scene.path().join(format!("{name}.sock")));
        Ended::wait(&mut Process::start(name, self.scene.path(), command, None)?, LIMIT)?.ensure_code(3)
    }

    /// What `ownership show` says of the newest claim.
    fn newest(&self) -> Result<Value> {
        let mut command = Command::new(binary("godwit-sender")?);
        command.args(["ownership", "show", self.claims()?, "--json"]);
        let ended =
            Ended::wait(&mut Process::start("show", self.scene.path(), command, None)?, LIMIT)?.ensure_code(0)?;
        let claims = ended.last_json()?["claims"].as_array().cloned().unwrap_or_default();
        claims.last().cloned().context("no claims")
    }

    fn ensure_newest(&self, epoch: u64, host: &str) -> Result<()> {
        let newest = self.newest()?;
        ensure!(newest["epoch"] == epoch && newest["claim"]["host"] == host, "epoch {epoch} of {host}? {newest}");
        Ok(())
    }

    /// A claim of `epoch` that somebody else makes.
    fn claim_by_another(&self, epoch: u64) -> Result<()> {
        let text = format!("godwit1 machine=machine n={epoch} host=kvm9 boot=b instance=i nonce=00000000000000aa");
        Ok(symlink(text, self.claims.join(epoch.to_string()))?)
    }

    fn mark(&self, marker: &str) -> Result<()> {
        Ok(symlink(marker, self.claims.join(marker))?)
    }
}

/// A move whose *commit* is about to be sent.
struct Held {
    source: Node,
    destination: Node,
    command: Process,
}

impl Held {
    fn at(shared: &Shared<'_>, phase: Phase, more: &[&str]) -> Result<Self> {
        let (source, destination) = (shared.sender("kvm1")?, shared.receiver("kvm2", "kvm2")?);
        let phase = phase.to_string();
        let command = source.start_move(&destination.uri()?, &[&["--test-hold-at", &phase], more].concat())?;
        source.wait_for_phase(&phase, LIMIT)?;
        Ok(Self { source, destination, command })
    }

    fn release(&self) -> Result<()> {
        self.source.command(&["release"], &[], LIMIT)?.ensure_code(0).map(drop)
    }
}

fn exit_code(process: &mut Process) -> Result<i32> {
    process.wait(LIMIT)?.code().context("killed by a signal")
}

fn epochs_advance_there_and_back(scene: &Scene) -> Result<()> {
    let shared = Shared::new(scene);
    let (mut first, mut second) = (shared.sender("kvm1")?, shared.receiver("kvm2", "kvm2")?);
    shared.ensure_newest(1, "kvm1")?;
    let outcome = first.move_to(&second.uri()?, &[], LIMIT)?.ensure_moved(&second, &WORKLOAD)?;
    let steps = outcome["steps"].as_array().cloned().unwrap_or_default();
    let claim = steps.iter().find(|step| step["name"] == "claim" && step["end"] == "destination");
    let claim_ms = claim.and_then(|step| step["duration_ms"].as_f64()).context("the claim has no line of its own")?;
    ensure!(claim_ms < 50.0, "the claim took {claim_ms} ms of the pause on a local file system");
    eprintln!("the claim took {claim_ms:.3} ms of the pause");
    ensure!(exit_code(&mut first.process)? == 0, "the source ends once its machine has moved");
    shared.ensure_newest(2, "kvm2")?;
    wait::until_true("the marker is there", LIMIT, || Ok(shared.newest()?["running"] == true))?;

    let third = shared.receiver("back", "kvm1")?;
    second.move_to(&third.uri()?, &[], LIMIT)?.ensure_moved(&third, &WORKLOAD)?;
    ensure!(exit_code(&mut second.process)? == 0, "the receiver ends once its machine has moved on");
    shared.ensure_newest(3, "kvm1")?;
    third.command(&["quit"], &[], LIMIT)?.ensure_code(0)?;
    wait::until_true("it is free", LIMIT, || Ok(shared.newest()?["free"] == true))
}

fn a_second_start_is_refused_by_name(scene: &Scene) -> Result<()> {
    let shared = Shared::new(scene);
    let mut first = shared.sender("kvm1")?;
    shared.refused_start("same-host", &["--host-id", "kvm1"])?.ensure_says(&["a process of this host", "epoch 1"])?;
    shared.refused_start("other-host", &["--host-id", "kvm2"])?.ensure_says(&[
        "host kvm1",
        "epoch 1",
        "ago",
        "--take-ownership=1",
    ])?;
    shared.refused_start("other-name", &["--name", "other"])?.ensure_says(&["another machine's"])?;
    first.ensure_guest_unharmed(&WORKLOAD)?;
    first.command(&["quit"], &[], LIMIT)?.ensure_code(0)?;
    ensure!(exit_code(&mut first.process)? == 0);
    ensure!(shared.newest()?["free"] == true, "a machine that was stopped is free");
    let second = shared.sender("kvm2")?;
    shared.ensure_newest(2, "kvm2")?;
    second.ensure_guest_unharmed(&WORKLOAD)
}

fn a_dead_owner_is_succeeded(scene: &Scene) -> Result<()> {
    let shared = Shared::new(scene);
    let mut first = shared.sender("kvm1")?;
    first.process.kill()?;
    shared.refused_start("other-host", &["--host-id", "kvm2"])?.ensure_says(&["host kvm1"])?;
    let mut second = shared.sender("kvm1")?;
    shared.ensure_newest(2, "kvm1")?;
    second.process.kill()?;
    // The person's word is about the owner that was looked at.
    shared
        .refused_start("stale-word", &["--host-id", "kvm2", "--take-ownership=1"])?
        .ensure_says(&["not the one that was looked at", "epoch 2"])?;
    let more = ["--ownership", shared.claims()?, "--host-id", "kvm2", "--take-ownership"];
    let third = Node::sender(scene, "third", None, &WORKLOAD, &more)?;
    shared.ensure_newest(3, "kvm2")?;
    third.ensure_guest_runs(WORKLOAD.vcpus)?;
    // An empty directory may be one whose share is not mounted.
    fs::create_dir(scene.path().join("empty"))?;
    let empty = Shared { scene, claims: scene.path().join("empty") };
    empty.refused_start("empty", &[])?.ensure_says(&["no claims", "mounted"]).map(drop)
}

fn a_receiver_that_sees_other_claims_refuses(scene: &Scene) -> Result<()> {
    let shared = Shared::new(scene);
    let source = shared.sender("kvm1")?;
    let refused = |name: &str, more: &[&str], says: &[&str]| -> Result<()> {
        let receiver = Node::receiver(scene, name, None, LISTEN, more)?;
        source.move_to(&receiver.uri()?, &[], LIMIT)?.ensure_code(3)?.ensure_says(says)?;
        source.ensure_guest_runs(WORKLOAD.vcpus)
    };
    refused("not-allowed", &[], &["ownership:", "--ownership DIR"])?;
    let copy = scene.path().join("copy");
    fs::create_dir(&copy)?;
    let text = "godwit1 machine=machine n=1 host=kvm1 boot=b instance=i nonce=00000000000000aa";
    symlink(text, copy.join("1"))?;
    let copy = copy.to_str().context("not text")?;
    refused("a-copy", &["--ownership", copy], &["ownership:", "another directory"])?;
    let none = source.move_to("unix:/nowhere", &["--ownership", "none"], LIMIT)?;
    none.ensure_code(3)?.ensure_says(&["started with claims"])?;
    shared.ensure_newest(1, "kvm1")
}

fn cancelling_in_the_pause_keeps_the_epoch(scene: &Scene) -> Result<()> {
    let shared = Shared::new(scene);
    for phase in [Phase::FinalPages, Phase::State] {
        let mut held = Held::at(&shared, phase, &[])?;
        held.source.command(&["cancel"], &[], LIMIT)?.ensure_code(0)?;
        Ended::wait(&mut held.command, LIMIT)?.ensure_code(5)?;
        held.source.ensure_guest_unharmed(&WORKLOAD)?;
        ensure!(shared.newest()?["claim"]["host"] == "kvm1");
        held.source.command(&["quit"], &[], LIMIT)?.ensure_code(0)?;
        exit_code(&mut held.source.process)?;
    }
    shared.ensure_newest(2, "kvm1")
}

fn a_receiver_killed_before_its_claim(scene: &Scene) -> Result<()> {
    let shared = Shared::new(scene);
    let mut held = Held::at(&shared, Phase::Commit, &[])?;
    held.destination.process.kill()?;
    held.release()?;
    Ended::wait(&mut held.command, LIMIT)?.ensure_code(4)?.ensure_says(&["claimed back, epoch 2"])?;
    held.source.ensure_guest_unharmed(&WORKLOAD)?;
    shared.ensure_newest(2, "kvm1")?;
    let next = shared.receiver("next", "kvm3")?;
    held.source.move_to(&next.uri()?, &[], LIMIT)?.ensure_moved(&next, &WORKLOAD)?;
    shared.ensure_newest(3, "kvm3")
}

/// *Commit* has arrived and waits in a stopped process; the source has long gone on.
fn a_receiver_that_wakes_too_late_drops(scene: &Scene) -> Result<()> {
    let shared = Shared::new(scene);
    let mut held = Held::at(&shared, Phase::Commit, &["--handover-timeout", "1s"])?;
    held.destination.process.signal(Signal::SIGSTOP)?;
    held.release()?;
    Ended::wait(&mut held.command, LIMIT)?.ensure_code(4)?.ensure_says(&["claimed back, epoch 2"])?;
    held.source.ensure_guest_runs(WORKLOAD.vcpus)?;
    held.destination.process.signal(Signal::SIGCONT)?;
    ensure!(exit_code(&mut held.destination.process)? == 7, "{}", held.destination.process.stderr());
    ensure!(held.destination.process.stderr().contains("host kvm1"), "it does not say who has the machine");
    held.source.ensure_guest_unharmed(&WORKLOAD)?;
    shared.ensure_newest(2, "kvm1")
}

/// *Running* does not come through, the marker on the storage does.
fn running_lost(scene: &Scene) -> Result<()> {
    let shared = Shared::new(scene);
    let hosts = Hosts::new(2)?;
    let more = ["--ownership", shared.claims()?, "--host-id", "kvm1"];
    let mut source = Node::sender(scene, "kvm1", Some(hosts.host(0)), &WORKLOAD, &more)?;
    let more = ["--ownership", shared.claims()?, "--host-id", "kvm2", "--insecure"];
    let listen = format!("tcp://{}:0", hosts.address(1, 0));
    let destination = Node::receiver(scene, "kvm2", Some(hosts.host(1)), &listen, &more)?;
    let mut command =
        source.start_move(&destination.uri()?, &["--test-hold-at", "commit", "--handover-timeout", "3s"])?;
    source.wait_for_phase("commit", LIMIT)?;
    hosts.lose(1, 0)?;
    source.command(&["release"], &[], LIMIT)?.ensure_code(0)?;
    Ended::wait(&mut command, LIMIT)?.ensure_moved(&destination, &WORKLOAD)?;
    ensure!(exit_code(&mut source.process)? == 0, "the source ends: its machine has moved");
    shared.ensure_newest(2, "kvm2")
}

/// The destination died between its claim and its marker, as far as anybody can tell.
fn a_claim_without_a_sign_of_life_is_watched(scene: &Scene) -> Result<()> {
    let shared = Shared::new(scene);
    let mut held = Held::at(&shared, Phase::Commit, &["--handover-timeout", "1s"])?;
    shared.claim_by_another(2)?;
    held.release()?;
    ensure!(exit_code(&mut held.destination.process)? == 7, "who loses the claim drops the machine");
    Ended::wait(&mut held.command, LIMIT)?.ensure_code(6)?.ensure_says(&["epoch 2", "kvm9", "ownership show"])?;
    held.source.ensure_guest_stands(WORKLOAD.vcpus)?;
    for word in [&[][..], &["--take-ownership"]] {
        let refused = held.source.command(&["resume"], word, LIMIT)?;
        ensure!(refused.code != 0, "what the claims decide no word decides: {refused}");
    }
    held.source.ensure_guest_stands(WORKLOAD.vcpus)?;
    shared.mark("2.running")?;
    ensure!(exit_code(&mut held.source.process)? == 0, "the marker says that it has moved");
    Ok(())
}

fn started_anew_elsewhere(scene: &Scene) -> Result<()> {
    let shared = Shared::new(scene);
    let mut held = Held::at(&shared, Phase::Commit, &["--handover-timeout", "1s"])?;
    shared.claim_by_another(2)?;
    held.release()?;
    Ended::wait(&mut held.command, LIMIT)?.ensure_code(6)?;
    shared.claim_by_another(3)?;
    ensure!(exit_code(&mut held.source.process)? == 7, "a copy that is out of date is not called moved");
    ensure!(held.source.process.stderr().contains("started anew elsewhere"), "{}", held.source.process.stderr());
    Ok(())
}

fn a_store_that_is_away_in_the_handover(scene: &Scene) -> Result<()> {
    let shared = Shared::new(scene);
    let mut held = Held::at(&shared, Phase::Commit, &[])?;
    let away = scene.path().join("away");
    fs::rename(&shared.claims, &away)?;
    held.release()?;
    ensure!(exit_code(&mut held.destination.process)? == 7, "nothing is in doubt, and it cannot claim");
    held.source.ensure_guest_stands(WORKLOAD.vcpus)?;
    fs::rename(&away, &shared.claims)?;
    Ended::wait(&mut held.command, LIMIT)?.ensure_code(4)?;
    held.source.ensure_guest_unharmed(&WORKLOAD)?;
    shared.ensure_newest(2, "kvm1")
}

fn a_store_that_is_away_for_longer(scene: &Scene) -> Result<()> {
    let shared = Shared::new(scene);
    let mut held = Held::at(&shared, Phase::Commit, &["--handover-timeout", "1s"])?;
    let away = scene.path().join("away");
    fs::rename(&shared.claims, &away)?;
    held.release()?;
    Ended::wait(&mut held.command, LIMIT)?.ensure_code(6)?.ensure_says(&["tried again"])?;
    held.source.ensure_guest_stands(WORKLOAD.vcpus)?;
    fs::rename(&away, &shared.claims)?;
    // Nobody has to say so: the process has gone on asking.
    wait::until_true("the guest runs again", LIMIT, || Ok(held.source.ensure_guest_runs(WORKLOAD.vcpus).is_ok()))?;
    held.source.ensure_guest_unharmed(&WORKLOAD)?;
    shared.ensure_newest(2, "kvm1")
}
