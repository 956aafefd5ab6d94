//! Claims on shared storage, with real processes and real guests: who may start a machine, and who has it when a handover is cut
//! short. Two hosts are played by two `--host-id`s over one directory.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use godwit_core::Phase;
use godwit_tests::godwit::{Ended, Node, refused_start};
use godwit_tests::harness::{self, Need, Scene, binary};
use godwit_tests::netns::Hosts;
use godwit_tests::process::Process;
use godwit_tests::wait;
use godwit_tests::workload::Workload;
use nix::sys::signal::Signal;
use serde_json::{Value, json};

const LIMIT: Duration = Duration::from_secs(60);

const LISTEN: &str = "tcp://127.0.0.1:0";

const WORKLOAD: Workload = Workload::SMALL;

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
        harness::test("the_handover_costs_less_than_a_millisecond", kvm, the_handover_costs_less_than_a_millisecond),
        harness::test("resume_force_says_what_it_risks_and_claims_first", kvm, resume_force),
        harness::test("nothing_is_forced_while_the_claims_cannot_be_asked", kvm, force_without_a_store),
        harness::test("abandon_ends_the_copy_and_frees_nothing", kvm, abandon),
        harness::test("the_words_of_a_person_without_claims", kvm, words_without_claims),
        harness::test("no_word_is_asked_for_where_nothing_is_in_doubt", kvm, nothing_in_doubt),
        harness::test("taking_over_says_what_it_risks_and_asks", kvm, taking_over_asks),
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
        refused_start(self.scene, name, &WORKLOAD, &[&["--ownership", self.claims()?], more].concat())
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

fn epochs_advance_there_and_back(scene: &Scene) -> Result<()> {
    let shared = Shared::new(scene);
    let (mut first, mut second) = (shared.sender("kvm1")?, shared.receiver("kvm2", "kvm2")?);
    shared.ensure_newest(1, "kvm1")?;
    let ended = first.move_to(&second.uri()?, &[], LIMIT)?.ensure_says(&["handover", "claim", "marker", "locks"])?;
    ended.ensure_moved(&second, &WORKLOAD)?;
    ensure!(first.process.exit_code(LIMIT)? == 0, "the source ends once its machine has moved");
    shared.ensure_newest(2, "kvm2")?;
    wait::until_true("the marker is there", LIMIT, || Ok(shared.newest()?["running"] == true))?;

    let third = shared.receiver("back", "kvm1")?;
    second.move_to(&third.uri()?, &[], LIMIT)?.ensure_moved(&third, &WORKLOAD)?;
    ensure!(second.process.exit_code(LIMIT)? == 0, "the receiver ends once its machine has moved on");
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
    // The claims are told of before the control socket, which a second start of the same machine finds in use.
    let control = scene.path().join("kvm1.sock").display().to_string();
    for host in ["kvm1", "kvm2"] {
        shared
            .refused_start(&format!("same-socket-{host}"), &["--host-id", host, "--control", &control])?
            .ensure_says(&["host kvm1", "epoch 1"])?;
    }
    shared.refused_start("other-name", &["--name", "other"])?.ensure_says(&["another machine's"])?;
    first.ensure_guest_unharmed(&WORKLOAD)?;
    first.command(&["quit"], &[], LIMIT)?.ensure_code(0)?;
    ensure!(first.process.exit_code(LIMIT)? == 0);
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
    let more = ["--ownership", shared.claims()?, "--host-id", "kvm2", "--take-ownership=2"];
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
        held.source.process.exit_code(LIMIT)?;
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
    ensure!(held.destination.process.exit_code(LIMIT)? == 7, "{}", held.destination.process.stderr());
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
    ensure!(source.process.exit_code(LIMIT)? == 0, "the source ends: its machine has moved");
    shared.ensure_newest(2, "kvm2")
}

/// The destination died between its claim and its marker, as far as anybody can tell.
fn a_claim_without_a_sign_of_life_is_watched(scene: &Scene) -> Result<()> {
    let shared = Shared::new(scene);
    let mut held = Held::at(&shared, Phase::Commit, &["--handover-timeout", "1s"])?;
    shared.claim_by_another(2)?;
    held.release()?;
    ensure!(held.destination.process.exit_code(LIMIT)? == 7, "who loses the claim drops the machine");
    Ended::wait(&mut held.command, LIMIT)?.ensure_code(6)?.ensure_says(&["epoch 2", "kvm9", "ownership show"])?;
    held.source.ensure_guest_stands(WORKLOAD.vcpus)?;
    let refused = held.source.command(&["resume"], &[], LIMIT)?.ensure_says(&["resume --force", "abandon"])?;
    ensure!(refused.code != 0, "a plain resume of a guest that may run elsewhere: {refused}");
    let status = held.source.command(&["status"], &[], LIMIT)?.ensure_code(0)?;
    ensure!(status.stdout.contains("waits: epoch 2 of machine is host kvm9's"), "what it waits for: {status}");
    held.source.ensure_guest_stands(WORKLOAD.vcpus)?;
    shared.mark("2.running")?;
    ensure!(held.source.process.exit_code(LIMIT)? == 0, "the marker says that it has moved");
    Ok(())
}

fn started_anew_elsewhere(scene: &Scene) -> Result<()> {
    let shared = Shared::new(scene);
    let mut held = Held::at(&shared, Phase::Commit, &["--handover-timeout", "1s"])?;
    shared.claim_by_another(2)?;
    held.release()?;
    Ended::wait(&mut held.command, LIMIT)?.ensure_code(6)?;
    shared.claim_by_another(3)?;
    ensure!(held.source.process.exit_code(LIMIT)? == 7, "a copy that is out of date is not called moved");
    ensure!(held.source.process.stderr().contains("started anew elsewhere"), "{}", held.source.process.stderr());
    Ok(())
}

fn a_store_that_is_away_in_the_handover(scene: &Scene) -> Result<()> {
    let shared = Shared::new(scene);
    let mut held = Held::at(&shared, Phase::Commit, &[])?;
    let away = scene.path().join("away");
    fs::rename(&shared.claims, &away)?;
    held.release()?;
    ensure!(held.destination.process.exit_code(LIMIT)? == 7, "nothing is in doubt, and it cannot claim");
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

/// What passing ownership costs in the pause, over as many moves as make a median.
fn the_handover_costs_less_than_a_millisecond(scene: &Scene) -> Result<()> {
    const MOVES: usize = 9;
    let shared = Shared::new(scene);
    let (mut at, mut costs_ms) = (shared.sender("kvm0")?, Vec::new());
    for number in 1..=MOVES {
        let name = format!("kvm{number}");
        let next = shared.receiver(&name, &name)?;
        let outcome = at.move_to(&next.uri()?, &[], LIMIT)?.ensure_moved(&next, &WORKLOAD)?;
        let cost = &outcome["handover"];
        ensure!(cost["marker_ms"] == 0.0 && cost["locks_ms"] == 0.0, "nothing but the claim is waited for: {cost}");
        costs_ms.push(cost["total_ms"].as_f64().with_context(|| format!("no cost of the handover: {outcome}"))?);
        at = next;
    }
    costs_ms.sort_by(f64::total_cmp);
    eprintln!("the handover's cost in the pause, ms: {costs_ms:.3?}");
    let median_ms = costs_ms[MOVES / 2];
    ensure!(median_ms < 1.0, "the handover cost {median_ms} ms of the pause on a local file system: {costs_ms:?}");
    Ok(())
}

/// The destination has claimed, as far as anybody can tell, and died before it ran the guest.
fn in_doubt<'a>(shared: &Shared<'a>) -> Result<Held> {
    let mut held = Held::at(shared, Phase::Commit, &["--handover-timeout", "1s"])?;
    shared.claim_by_another(2)?;
    held.release()?;
    Ended::wait(&mut held.command, LIMIT)?.ensure_code(6)?.ensure_says(&["resume --force", "abandon"])?;
    held.source.ensure_guest_stands(WORKLOAD.vcpus)?;
    Ok(held)
}

fn resume_force(scene: &Scene) -> Result<()> {
    let shared = Shared::new(scene);
    let held = in_doubt(&shared)?;
    let risk =
        ["RISK", "host kvm9's", "nothing shows that the guest has run there", "claims epoch 3", "--take-ownership=2"];
    let asked = held.source.command(&["resume"], &["--force"], LIMIT)?.ensure_code(3)?.ensure_says(&risk)?;
    asked.ensure_says(&["nothing was done", "--yes"])?;
    held.source.ensure_guest_stands(WORKLOAD.vcpus)?;
    shared.ensure_newest(2, "kvm9")?;
    let done = held.source.command(&["resume"], &["--force", "--yes", "--json"], LIMIT)?.ensure_code(0)?;
    ensure!(done.last_json()?["epoch"] == 3, "{done}");
    done.ensure_says(&risk)?.ensure_says(&["claimed epoch 3"])?;
    held.source.ensure_guest_unharmed(&WORKLOAD)?;
    shared.ensure_newest(3, "kvm1")?;
    // It is as good a machine as any: it can be sent on.
    let next = shared.receiver("next", "kvm3")?;
    held.source.move_to(&next.uri()?, &[], LIMIT)?.ensure_moved(&next, &WORKLOAD)?;
    shared.ensure_newest(4, "kvm3")
}

fn force_without_a_store(scene: &Scene) -> Result<()> {
    let shared = Shared::new(scene);
    let held = in_doubt(&shared)?;
    let away = scene.path().join("away");
    fs::rename(&shared.claims, &away)?;
    let refused = held.source.command(&["resume"], &["--force", "--yes"], LIMIT)?.ensure_code(3)?;
    refused.ensure_says(&["none can be made now", "keeps asking"])?;
    let refused = held.source.execute("x-godwit-resume-force", json!({ "epoch": 2 }));
    ensure!(refused.is_err(), "whoever asks, there is no running without a claim: {refused:?}");
    held.source.ensure_guest_stands(WORKLOAD.vcpus)?;
    fs::rename(&away, &shared.claims)?;
    held.source.ensure_guest_stands(WORKLOAD.vcpus)?;
    shared.ensure_newest(2, "kvm9")
}

fn abandon(scene: &Scene) -> Result<()> {
    let shared = Shared::new(scene);
    let mut held = in_doubt(&shared)?;
    // Nothing but a person's word ends what may be the only copy.
    held.source.command(&["quit"], &[], LIMIT)?.ensure_says(&["`abandon`"])?;
    for _ in 0..2 {
        held.source.process.signal(Signal::SIGTERM)?;
        wait::until_true("the signal is heard", LIMIT, || {
            Ok(held.source.process.stderr().contains("nobody knows yet who has the machine"))
        })?;
    }
    let risk = ["RISK", "host kvm9's", "gone for good"];
    held.source.command(&["abandon"], &[], LIMIT)?.ensure_code(3)?.ensure_says(&risk)?.ensure_says(&["--yes"])?;
    ensure!(held.source.process.is_running()?);
    let done = held.source.command(&["abandon"], &["--yes", "--json"], LIMIT)?.ensure_code(0)?;
    ensure!(done.last_json()?["done"] == "abandon", "{done}");
    done.ensure_says(&risk)?.ensure_says(&["kvm9 has it", "--take-ownership=2"])?;
    ensure!(held.source.process.exit_code(LIMIT)? == 0, "the end that was asked for");
    let newest = shared.newest()?;
    ensure!(newest["epoch"] == 2 && newest["free"] == false, "what may run elsewhere is not freed: {newest}");
    shared.refused_start("anybody", &["--host-id", "kvm1"])?.ensure_says(&["host kvm9"]).map(drop)
}

fn words_without_claims(scene: &Scene) -> Result<()> {
    for verb in ["resume", "abandon"] {
        let mut source = Node::sender(scene, &format!("{verb}-source"), None, &WORKLOAD, &[])?;
        let mut destination = Node::receiver(scene, &format!("{verb}-destination"), None, LISTEN, &[])?;
        let mut command =
            source.start_move(&destination.uri()?, &["--test-hold-at", "commit", "--handover-timeout", "1s"])?;
        source.wait_for_phase("commit", LIMIT)?;
        destination.process.kill()?;
        source.command(&["release"], &[], LIMIT)?.ensure_code(0)?;
        Ended::wait(&mut command, LIMIT)?.ensure_code(6)?;
        let (options, risk): (&[&str], _) = match verb {
            "resume" => (&["--force"], ["RISK", "it has no claims", "two of it"]),
            _ => (&[], ["RISK", "it has no claims", "gone for good"]),
        };
        source.command(&[verb], options, LIMIT)?.ensure_code(3)?.ensure_says(&risk)?.ensure_says(&["--yes"])?;
        source.ensure_guest_stands(WORKLOAD.vcpus)?;
        source.command(&[verb], &[options, &["--yes"]].concat(), LIMIT)?.ensure_code(0)?.ensure_says(&risk)?;
        match verb {
            "resume" => source.ensure_guest_unharmed(&WORKLOAD)?,
            _ => ensure!(source.process.exit_code(LIMIT)? == 0, "the end that was asked for"),
        }
    }
    Ok(())
}

fn nothing_in_doubt(scene: &Scene) -> Result<()> {
    let shared = Shared::new(scene);
    let (source, destination) = (shared.sender("kvm1")?, shared.receiver("kvm2", "kvm2")?);
    for (verb, options) in [("resume", &["--force", "--yes"][..]), ("abandon", &["--yes"])] {
        for (node, says) in [(&source, "this process's"), (&destination, "there is none here")] {
            node.command(&[verb], options, LIMIT)?.ensure_code(3)?.ensure_says(&["in doubt", says])?;
        }
    }
    source.ensure_guest_unharmed(&WORKLOAD)?;
    shared.ensure_newest(1, "kvm1")
}

fn taking_over_asks(scene: &Scene) -> Result<()> {
    let shared = Shared::new(scene);
    let mut first = shared.sender("kvm1")?;
    first.process.kill()?;
    let risk = ["host kvm1's", "claims epoch 2", "RISK", "two guests"];
    let asked = shared.refused_start("asked", &["--host-id", "kvm2", "--take-ownership"])?;
    asked.ensure_says(&risk)?.ensure_says(&["--yes"])?;
    shared.ensure_newest(1, "kvm1")?;
    let more = ["--ownership", shared.claims()?, "--host-id", "kvm2", "--take-ownership", "--yes"];
    let second = Node::sender(scene, "second", None, &WORKLOAD, &more)?;
    for text in risk {
        ensure!(second.process.stderr().contains(text), "does not say `{text}`: {}", second.process.stderr());
    }
    shared.ensure_newest(2, "kvm2")
}
