//! Handovers over storage that is slow, unreachable or uncertain at either end, with real processes and real guests.
//!
//! Each host sees the claims through a mount of its own. Everything happens between *commit* and the end: the move is held at
//! *commit*, the storage is made to misbehave, and from there on the guest's heartbeat is watched at both ends. Who runs is
//! what the heartbeats say: exactly one end, from *commit* on, whatever the storage does.

use std::fs;
use std::path::PathBuf;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail, ensure};
use godwit_core::Phase;
use godwit_core::ownership::directory::DirectoryStore;
use godwit_core::ownership::store::{ClaimStore, Occupant, Reading};
use godwit_tests::fuse::{Calls, FuseStore, Mode};
use godwit_tests::godwit::{Ended, Node};
use godwit_tests::harness::{self, Need, Scene, binary};
use godwit_tests::process::Process;
use godwit_tests::sampler::Target;
use godwit_tests::wait;
use godwit_tests::workload::{self, Workload};
use nix::errno::Errno;
use nix::sys::signal::{self, Signal};

const LIMIT: Duration = Duration::from_secs(60);

const LISTEN: &str = "tcp://127.0.0.1:0";

/// A `--handover-timeout` that is longer than any test leaves the storage away.
const PATIENT: &str = "60s";

/// One that a store which is away outlasts.
const HASTY: &str = "1s";

const WORKLOAD: Workload = Workload {
    memory: "64M",
    vcpus: 1,
    fill: "16M",
    working_set: "8M",
    rate: "5000",
    order: "random",
    write: "word",
    contents: "random",
    seed: 29,
};

fn main() {
    let needs = &[Need::Kvm, Need::Fuse];
    harness::main(vec![
        harness::test("two_that_run_are_seen", needs, two_that_run_are_seen),
        harness::test("slow_at_either_end", needs, slow_at_either_end),
        harness::test("unreachable_at_the_destination_for_a_while", needs, unreachable_at_the_destination),
        harness::test("a_server_that_stands_still_at_the_destination", needs, a_server_that_stands_still),
        harness::test("unreachable_at_the_destination_for_longer", needs, unreachable_at_the_destination_for_longer),
        harness::test("a_late_claim_after_the_take_back", needs, a_late_claim_after_the_take_back),
        harness::test("unreachable_at_both_for_a_while", needs, unreachable_at_both),
        harness::test("unreachable_at_both_for_longer", needs, unreachable_at_both_for_longer),
        harness::test("unreachable_at_the_source_only", needs, unreachable_at_the_source_only),
        harness::test("a_claim_that_took_effect_and_says_it_failed", needs, a_claim_that_says_it_failed),
        harness::test("a_claim_that_failed_and_may_have_taken_effect", needs, a_claim_that_may_have_taken_effect),
        harness::test("a_claim_that_fails_for_longer", needs, a_claim_that_fails_for_longer),
        harness::test("a_claim_that_the_destination_never_hears_of", needs, a_claim_never_heard_of),
        harness::test("a_take_back_of_unknown_outcome", needs, a_take_back_of_unknown_outcome),
        harness::test("a_full_or_read_only_store_at_the_claim", needs, a_store_that_refuses_the_claim),
        harness::test("a_marker_that_cannot_be_made", needs, a_marker_that_cannot_be_made),
        harness::test("a_start_on_a_store_that_hangs", needs, a_start_on_a_store_that_hangs),
        harness::test("a_start_on_a_store_that_refuses", needs, a_start_on_a_store_that_refuses),
        harness::test("a_start_whose_claim_is_uncertain", needs, a_start_whose_claim_is_uncertain),
        harness::test("an_image_that_hangs_in_preflight", needs, an_image_that_hangs_in_preflight),
        harness::test("an_image_that_hangs_in_prepare", needs, an_image_that_hangs_in_prepare),
    ])
}

/// Claims that both hosts see, each through its own mount.
struct Shared<'a> {
    scene: &'a Scene,
    here: FuseStore,
    there: FuseStore,
}

impl<'a> Shared<'a> {
    fn new(scene: &'a Scene) -> Result<Self> {
        let backing = scene.path().join("backing");
        fs::create_dir(&backing)?;
        let mount = |name: &str| FuseStore::mount(&backing, &scene.path().join(name));
        Ok(Self { scene, here: mount("here")?, there: mount("there")? })
    }

    fn start_arguments(&self) -> Result<Vec<String>> {
        Ok(["--ownership", &claims(&self.here)?, "--host-id", "kvm1"].map(str::to_owned).into())
    }

    fn sender(&self) -> Result<Node> {
        let more = self.start_arguments()?;
        let more: Vec<&str> = more.iter().map(String::as_str).collect();
        Node::sender(self.scene, "kvm1", None, &WORKLOAD, &more)
    }

    fn receiver(&self) -> Result<Node> {
        let more = ["--ownership", &claims(&self.there)?, "--host-id", "kvm2"];
        Node::receiver(self.scene, "kvm2", None, LISTEN, &more)
    }

    /// A machine whose move to the other host is about to be committed.
    fn hold(&self, handover_timeout: &str) -> Result<Held<'_>> {
        let (source, destination) = (self.sender()?, self.receiver()?);
        let more = ["--test-hold-at", "commit", "--handover-timeout", handover_timeout];
        let command = source.start_move(&destination.uri()?, &more)?;
        source.wait_for_phase(&Phase::Commit.to_string(), LIMIT)?;
        // A machine that is coming in is not told of yet.
        let pid = destination.process.pid();
        let header = workload::find_header(pid).context("the destination has no memory yet")?;
        let ends = [source.heartbeats(WORKLOAD.vcpus)?, workload::heartbeats(pid, header, WORKLOAD.vcpus)];
        Ok(Held { shared: self, source, destination, command, watch: Watch::start(ends)? })
    }

    /// Starts the machine and gives how that ended.
    fn start(&self) -> Result<Process> {
        let mut command = Command::new(binary("godwit-sender")?);
        command.arg("run").args(WORKLOAD.arguments()).args(self.start_arguments()?);
        command.arg("--control").arg(self.scene.path().join("start.sock"));
        Process::start("start", self.scene.path(), command, None)
    }

    /// Epoch and host of the newest claim, as it lies in the folder behind the mounts.
    fn newest(&self) -> Result<Option<(u64, String)>> {
        match DirectoryStore::new(self.scene.path().join("backing/machine.godwit")).newest() {
            Reading::Newest(None) => Ok(None),
            Reading::Newest(Some(record)) => match record.occupant {
                Occupant::Claim(claim) => Ok(Some((record.epoch.get(), claim.claimant.host.to_string()))),
                Occupant::Foreign(what) => bail!("{what}"),
            },
            Reading::Unknown(why) => bail!("{why}"),
        }
    }

    fn ensure_newest(&self, epoch: u64, host: &str) -> Result<()> {
        let newest = self.newest()?;
        ensure!(newest == Some((epoch, host.to_owned())), "epoch {epoch} of {host}? {newest:?}");
        Ok(())
    }
}

/// Where a host sees the claims.
fn claims(mount: &FuseStore) -> Result<String> {
    let path: PathBuf = mount.path().join("machine.godwit");
    Ok(path.to_str().context("the scene's path is no text")?.to_owned())
}

/// Which end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum End {
    Source,
    Destination,
}

/// A move whose *commit* is about to be sent: everything has been sent and the guest stands at both ends.
struct Held<'a> {
    shared: &'a Shared<'a>,
    source: Node,
    destination: Node,
    command: Process,
    watch: Watch,
}

impl Held<'_> {
    fn release(&self) -> Result<()> {
        self.source.command(&["release"], &[], LIMIT)?.ensure_code(0).map(drop)
    }

    fn ended(&mut self) -> Result<Ended> {
        Ended::wait(&mut self.command, LIMIT)
    }

    fn ensure_none_runs(&self) -> Result<()> {
        thread::sleep(Duration::from_millis(300));
        let ran = self.watch.ran()?;
        ensure!(ran.is_empty(), "{ran:?} ran");
        Ok(())
    }

    /// The move ends as moved, the guest runs at the destination, is whole there, and has never run at the source again.
    fn ensure_moved(mut self) -> Result<()> {
        self.ended()?.ensure_moved(&self.destination, &WORKLOAD)?;
        self.ensure_has_moved()
    }

    /// The same, however the command has ended.
    fn ensure_has_moved(mut self) -> Result<()> {
        let code = exit_code(&mut self.source.process)?;
        ensure!(code == 0, "the source ended with {code}: {}", self.source.process.describe());
        self.destination.ensure_guest_unharmed(&WORKLOAD)?;
        self.shared.ensure_newest(2, "kvm2")?;
        self.watch.ensure_only(End::Destination)
    }

    /// The guest runs at the source and is whole there, the destination has dropped it, and it has never run there.
    fn ensure_taken_back(mut self) -> Result<()> {
        let code = exit_code(&mut self.destination.process)?;
        ensure!(code == 7, "the destination ended with {code}: {}", self.destination.process.describe());
        wait::until_true("the guest runs again", LIMIT, || Ok(self.source.ensure_guest_runs(WORKLOAD.vcpus).is_ok()))?;
        self.source.ensure_guest_unharmed(&WORKLOAD)?;
        self.shared.ensure_newest(2, "kvm1")?;
        self.watch.ensure_only(End::Source)
    }
}

fn exit_code(process: &mut Process) -> Result<i32> {
    process.wait(LIMIT)?.code().context("killed by a signal")
}

/// Watches the guest's heartbeat at both ends, from a moment at which it stands at both and nothing more is to be sent. Whichever
/// heartbeat changes after that is a guest that runs.
struct Watch {
    stop: Arc<AtomicBool>,
    ran: Arc<[AtomicBool; 2]>,
    thread: Option<JoinHandle<()>>,
}

impl Watch {
    const PERIOD: Duration = Duration::from_millis(1);

    fn start(ends: [Target; 2]) -> Result<Self> {
        let read = |end: &Target| {
            let mut values = Vec::new();
            end.read(&mut values).map(|()| values)
        };
        let first = [read(&ends[0]), read(&ends[1])];
        let first = first.map(|values| values.context("no heartbeat"));
        let [source, destination] = first;
        let first = [source?, destination?];
        ensure!(first[0] == first[1], "the destination has another heartbeat than the source: {first:?}");
        let (stop, ran) =
            (Arc::new(AtomicBool::new(false)), Arc::new([AtomicBool::new(false), AtomicBool::new(false)]));
        let thread = thread::spawn({
            let (stop, ran) = (Arc::clone(&stop), Arc::clone(&ran));
            move || {
                while !stop.load(Ordering::Relaxed) {
                    for end in 0..2 {
                        // A process that has ended runs nothing.
                        if read(&ends[end]).is_some_and(|values| values != first[end]) {
                            ran[end].store(true, Ordering::Relaxed);
                        }
                    }
                    thread::sleep(Self::PERIOD);
                }
            }
        });
        Ok(Self { stop, ran, thread: Some(thread) })
    }

    /// Where the guest has run since.
    fn ran(&self) -> Result<Vec<End>> {
        ensure!(self.thread.as_ref().is_some_and(|thread| !thread.is_finished()), "nobody watches");
        let ends = [End::Source, End::Destination].into_iter().zip(self.ran.iter());
        Ok(ends.filter(|(_, ran)| ran.load(Ordering::Relaxed)).map(|(end, _)| end).collect())
    }

    fn ensure_only(&self, end: End) -> Result<()> {
        // Whoever runs has been seen by others; the watch may be a moment late.
        wait::until_true(&format!("{end:?} is seen to run"), LIMIT, || Ok(self.ran()?.contains(&end)))?;
        let ran = self.ran()?;
        ensure!(ran == [end], "the guest ran at {ran:?}");
        Ok(())
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        let ended = self.thread.take().map(JoinHandle::join);
        if let Some(Err(_)) = ended {
            eprintln!("{}", anyhow!("the thread that watches the heartbeats panicked"));
        }
    }
}

/// What all the others rely on: were there two that run, it would be seen. After preflight the destination is given a copy of the claims.
fn two_that_run_are_seen(scene: &Scene) -> Result<()> {
    let shared = Shared::new(scene)?;
    let mut held = shared.hold(HASTY)?;
    let copied = Command::new("cp").arg("-a").args(["backing", "copy"]).current_dir(scene.path()).status()?;
    ensure!(copied.success(), "cp: {copied}");
    let _over_it = FuseStore::mount(&scene.path().join("copy"), shared.there.path())?;
    held.destination.process.signal(Signal::SIGSTOP)?;
    held.release()?;
    held.ended()?.ensure_code(4)?;
    held.destination.process.signal(Signal::SIGCONT)?;
    let both = [End::Source, End::Destination];
    wait::until_true("the guest is seen to run at both ends", LIMIT, || Ok(held.watch.ran()? == both))
}

fn slow_at_either_end(_: &Scene) -> Result<()> {
    const DELAY: Duration = Duration::from_millis(50);
    for end in [End::Source, End::Destination] {
        let scene = &Scene::new()?;
        let play = || -> Result<()> {
            let shared = Shared::new(scene)?;
            let slow = if end == End::Source { &shared.here } else { &shared.there };
            slow.set(Mode::Slow(DELAY))?;
            let (mut source, destination) = (shared.sender()?, shared.receiver()?);
            let ended = source.move_to(&destination.uri()?, &[], LIMIT)?;
            let outcome = ended.ensure_moved(&destination, &WORKLOAD)?;
            ensure!(exit_code(&mut source.process)? == 0);
            shared.ensure_newest(2, "kvm2")?;
            let downtime_ms = outcome["downtime_ms"].as_f64().context("no downtime")?;
            let waited = end == End::Source || downtime_ms >= DELAY.as_secs_f64() * 1e3;
            ensure!(waited, "the claim is slow, and the pause took {downtime_ms} ms");
            Ok(())
        };
        play().with_context(|| format!("{end:?}\n{}", scene.logs()))?;
    }
    Ok(())
}

fn unreachable_at_the_destination(scene: &Scene) -> Result<()> {
    let shared = Shared::new(scene)?;
    let held = shared.hold(PATIENT)?;
    shared.there.set(Mode::Unreachable)?;
    held.release()?;
    shared.there.wait_until_held(LIMIT)?;
    held.ensure_none_runs()?;
    shared.there.set(Mode::Normal)?;
    held.ensure_moved()
}

fn a_server_that_stands_still(scene: &Scene) -> Result<()> {
    let shared = Shared::new(scene)?;
    let held = shared.hold(PATIENT)?;
    signal::kill(shared.there.pid(), Signal::SIGSTOP)?;
    held.release()?;
    held.ensure_none_runs()?;
    signal::kill(shared.there.pid(), Signal::SIGCONT)?;
    held.ensure_moved()
}

fn unreachable_at_the_destination_for_longer(scene: &Scene) -> Result<()> {
    let shared = Shared::new(scene)?;
    let mut held = shared.hold(HASTY)?;
    shared.there.set(Mode::Unreachable)?;
    held.release()?;
    // The source sees the storage, and that nobody has claimed.
    held.ended()?.ensure_code(4)?.ensure_says(&["claimed back, epoch 2"])?;
    held.source.ensure_guest_runs(WORKLOAD.vcpus)?;
    ensure!(held.destination.process.is_running()?, "it cannot know yet that it has lost");
    shared.there.set(Mode::Normal)?;
    held.ensure_taken_back()
}

/// Only the claim hangs: it reaches the storage as soon as that answers, after the source's.
fn a_late_claim_after_the_take_back(scene: &Scene) -> Result<()> {
    let shared = Shared::new(scene)?;
    let mut held = shared.hold(HASTY)?;
    shared.there.set_for(Calls::Links, Mode::Unreachable)?;
    held.release()?;
    shared.there.wait_until_held(LIMIT)?;
    held.ended()?.ensure_code(4)?.ensure_says(&["claimed back, epoch 2"])?;
    shared.there.set(Mode::Normal)?;
    held.ensure_taken_back()
}

fn unreachable_at_both(scene: &Scene) -> Result<()> {
    let shared = Shared::new(scene)?;
    let held = shared.hold(PATIENT)?;
    shared.here.set(Mode::Unreachable)?;
    shared.there.set(Mode::Unreachable)?;
    held.release()?;
    shared.there.wait_until_held(LIMIT)?;
    held.ensure_none_runs()?;
    shared.here.set(Mode::Normal)?;
    shared.there.set(Mode::Normal)?;
    held.ensure_moved()
}

/// Nobody can claim; the command gives up, the two processes do not. The storage comes back at one end first, or at the other.
fn unreachable_at_both_for_longer(_: &Scene) -> Result<()> {
    for first in [End::Source, End::Destination] {
        let scene = &Scene::new()?;
        let play = || -> Result<()> {
            let shared = Shared::new(scene)?;
            let mut held = shared.hold(HASTY)?;
            shared.here.set(Mode::Unreachable)?;
            shared.there.set(Mode::Unreachable)?;
            held.release()?;
            held.ended()?.ensure_code(6)?.ensure_says(&["paused", "ownership show"])?;
            held.ensure_none_runs()?;
            let heal = |end| if end == End::Source { &shared.here } else { &shared.there }.set(Mode::Normal);
            heal(first)?;
            wait::until_true("the end that sees the storage claims", LIMIT, || {
                Ok(shared.newest()?.is_some_and(|(epoch, _)| epoch == 2))
            })?;
            match first {
                End::Source => heal(End::Destination)?,
                End::Destination => heal(End::Source)?,
            }
            match first {
                End::Source => held.ensure_taken_back(),
                End::Destination => held.ensure_has_moved(),
            }
        };
        play().with_context(|| format!("{first:?} first\n{}", scene.logs()))?;
    }
    Ok(())
}

/// The source does not need its storage while the destination answers.
fn unreachable_at_the_source_only(scene: &Scene) -> Result<()> {
    let shared = Shared::new(scene)?;
    let held = shared.hold(PATIENT)?;
    shared.here.set(Mode::Unreachable)?;
    held.release()?;
    held.ensure_moved()
}

fn a_claim_that_says_it_failed(scene: &Scene) -> Result<()> {
    let shared = Shared::new(scene)?;
    let held = shared.hold(PATIENT)?;
    shared.there.set_for(Calls::Links, Mode::Unsure(Errno::EIO))?;
    held.release()?;
    held.ensure_moved()
}

/// Nothing was done, and nobody can know that: the destination asks until it knows.
fn a_claim_that_may_have_taken_effect(scene: &Scene) -> Result<()> {
    let shared = Shared::new(scene)?;
    let held = shared.hold(PATIENT)?;
    shared.there.set_for(Calls::Links, Mode::Refusing(Errno::EIO))?;
    held.release()?;
    let what = "the destination says that the outcome is unknown";
    wait::until_true(what, LIMIT, || Ok(held.destination.process.stderr().contains("it is not known yet")))?;
    held.ensure_none_runs()?;
    shared.there.set(Mode::Normal)?;
    held.ensure_moved()
}

fn a_claim_that_fails_for_longer(scene: &Scene) -> Result<()> {
    let shared = Shared::new(scene)?;
    let mut held = shared.hold(HASTY)?;
    shared.there.set_for(Calls::Links, Mode::Refusing(Errno::EIO))?;
    held.release()?;
    held.ended()?.ensure_code(4)?.ensure_says(&["claimed back, epoch 2"])?;
    held.source.ensure_guest_runs(WORKLOAD.vcpus)?;
    shared.there.set(Mode::Normal)?;
    held.ensure_taken_back()
}

/// The claim is the destination's, and it is not told: neither end may run the guest until it is.
fn a_claim_never_heard_of(scene: &Scene) -> Result<()> {
    let shared = Shared::new(scene)?;
    let mut held = shared.hold(HASTY)?;
    shared.there.set_for(Calls::Links, Mode::Mute)?;
    held.release()?;
    held.ended()?.ensure_code(6)?.ensure_says(&["kvm2", "epoch 2"])?;
    held.ensure_none_runs()?;
    shared.ensure_newest(2, "kvm2")?;
    shared.there.set(Mode::Normal)?;
    held.ensure_has_moved()
}

fn a_take_back_of_unknown_outcome(_: &Scene) -> Result<()> {
    // It took effect and says that it failed; it did not; it took effect and is not answered for a while; it hangs.
    for mode in [Mode::Unsure(Errno::EIO), Mode::Refusing(Errno::EIO), Mode::Mute, Mode::Unreachable] {
        let scene = &Scene::new()?;
        let play = || -> Result<()> {
            let shared = Shared::new(scene)?;
            let mut held = shared.hold(PATIENT)?;
            held.destination.process.kill()?;
            shared.here.set_for(Calls::Links, mode)?;
            held.release()?;
            if !matches!(mode, Mode::Unsure(_)) {
                held.ensure_none_runs()?;
                shared.here.set(Mode::Normal)?;
            }
            held.ended()?.ensure_code(4)?.ensure_says(&["claimed back, epoch 2"])?;
            held.source.ensure_guest_unharmed(&WORKLOAD)?;
            shared.ensure_newest(2, "kvm1")?;
            held.watch.ensure_only(End::Source)
        };
        play().with_context(|| format!("{mode}\n{}", scene.logs()))?;
    }
    Ok(())
}

fn a_store_that_refuses_the_claim(_: &Scene) -> Result<()> {
    for refusal in [Errno::ENOSPC, Errno::EROFS] {
        let scene = &Scene::new()?;
        let play = || -> Result<()> {
            let shared = Shared::new(scene)?;
            let mut held = shared.hold(PATIENT)?;
            shared.there.set_for(Calls::Changes, Mode::Refusing(refusal))?;
            held.release()?;
            held.ended()?.ensure_code(4)?.ensure_says(&["claimed back, epoch 2"])?;
            held.ensure_taken_back()
        };
        play().with_context(|| format!("{refusal}\n{}", scene.logs()))?;
    }
    Ok(())
}

/// The guest runs at the destination, and the storage cannot be told: it is told later.
fn a_marker_that_cannot_be_made(scene: &Scene) -> Result<()> {
    let shared = Shared::new(scene)?;
    let mut held = shared.hold(PATIENT)?;
    shared.there.set_for(Calls::Links, Mode::Mute)?;
    held.release()?;
    wait::until_true("the claim is made", LIMIT, || Ok(shared.newest()? == Some((2, "kvm2".into()))))?;
    // The claim is answered now, and what follows it is refused.
    shared.there.set_for(Calls::Links, Mode::Refusing(Errno::EIO))?;
    held.ended()?.ensure_moved(&held.destination, &WORKLOAD)?;
    let marker = scene.path().join("backing/machine.godwit/2.running");
    ensure!(!marker.is_symlink(), "the marker was made although it was refused");
    shared.there.set(Mode::Normal)?;
    wait::until_true("the marker is made", LIMIT, || Ok(marker.is_symlink()))?;
    held.ensure_has_moved()
}

fn a_start_on_a_store_that_hangs(scene: &Scene) -> Result<()> {
    let shared = Shared::new(scene)?;
    shared.here.set(Mode::Unreachable)?;
    let began = Instant::now();
    let ended = Ended::wait(&mut shared.start()?, LIMIT)?;
    ensure!(ended.code == 1, "{ended}");
    ended.ensure_says(&["did not answer", "machine.godwit"])?;
    ensure!(began.elapsed() < LIMIT / 2);
    shared.here.set(Mode::Normal)?;
    Ok(())
}

fn a_start_on_a_store_that_refuses(scene: &Scene) -> Result<()> {
    let shared = Shared::new(scene)?;
    for (calls, refusal) in [(Calls::Changes, Errno::EROFS), (Calls::Changes, Errno::ENOSPC), (Calls::All, Errno::EIO)]
    {
        shared.here.set_for(calls, Mode::Refusing(refusal))?;
        let ended = Ended::wait(&mut shared.start()?, LIMIT)?;
        ensure!(ended.code == 1, "{refusal}: {ended}");
        ended.ensure_says(&["machine.godwit", "--ownership"]).context(refusal)?;
    }
    shared.here.set(Mode::Normal)?;
    ensure!(!scene.path().join("backing/machine.godwit").exists(), "a refused start has left something behind");
    shared.sender().map(drop)
}

fn a_start_whose_claim_is_uncertain(scene: &Scene) -> Result<()> {
    let shared = Shared::new(scene)?;
    shared.here.set_for(Calls::Links, Mode::Unsure(Errno::EIO))?;
    let mut first = shared.sender()?;
    shared.ensure_newest(1, "kvm1")?;
    shared.here.set(Mode::Normal)?;
    first.command(&["quit"], &[], LIMIT)?.ensure_code(0)?;
    ensure!(exit_code(&mut first.process)? == 0);
    // Nothing runs until it is known that the claim is ours.
    shared.here.set_for(Calls::Links, Mode::Refusing(Errno::EIO))?;
    let mut second = shared.start()?;
    second.wait_while_running("it says what it waits for", LIMIT, |process| {
        Ok(process.stderr().contains("cannot start yet").then_some(()))
    })?;
    ensure!(!second.stderr().contains("runs"), "{}", second.stderr());
    shared.here.set(Mode::Normal)?;
    second.wait_while_running("it runs", LIMIT, |process| Ok(process.stdout().contains("runs").then_some(())))?;
    shared.ensure_newest(2, "kvm1")
}

/// A machine whose whole folder lies on the mounts, image and claims.
fn with_a_disk(shared: &Shared<'_>) -> Result<(Node, Node)> {
    fs::write(shared.scene.path().join("backing/disk.img"), vec![0; 1 << 20])?;
    let image = |mount: &FuseStore| mount.path().join("disk.img").display().to_string();
    let disk = format!("id=root,path={}", image(&shared.here));
    let source = Node::sender(shared.scene, "kvm1", None, &WORKLOAD, &["--disk", &disk, "--host-id", "kvm1"])?;
    // The claims lie beside the image.
    let more = ["--map-disk", &format!("root={}", image(&shared.there)), "--host-id", "kvm2"];
    Ok((source, Node::receiver(shared.scene, "kvm2", None, LISTEN, &more)?))
}

/// The guest is whole at the source, and a move succeeds now.
fn ensure_can_be_moved(shared: &Shared<'_>, mut source: Node, destination: &Node) -> Result<()> {
    source.ensure_guest_unharmed(&WORKLOAD)?;
    for mount in [&shared.here, &shared.there] {
        mount.set(Mode::Normal)?;
        wait::until_true("nobody hangs any more", LIMIT, || Ok(mount.held()? == 0))?;
    }
    source.move_to(&destination.uri()?, &[], LIMIT)?.ensure_moved(destination, &WORKLOAD)?;
    ensure!(exit_code(&mut source.process)? == 0);
    Ok(())
}

fn an_image_that_hangs_in_preflight(_: &Scene) -> Result<()> {
    for end in [End::Source, End::Destination] {
        let scene = &Scene::new()?;
        let play = || -> Result<()> {
            let shared = Shared::new(scene)?;
            let (source, destination) = with_a_disk(&shared)?;
            let away = if end == End::Source { &shared.here } else { &shared.there };
            away.set(Mode::Unreachable)?;
            let ended = source.move_to(&destination.uri()?, &[], LIMIT)?;
            ended.ensure_code(3)?.ensure_says(&["did not answer within", "the guest is still here, running"])?;
            ensure_can_be_moved(&shared, source, &destination)
        };
        play().with_context(|| format!("{end:?}\n{}", scene.logs()))?;
    }
    Ok(())
}

/// Preflight was well; when the destination opens the image for the machine, its storage is away.
fn an_image_that_hangs_in_prepare(scene: &Scene) -> Result<()> {
    let shared = Shared::new(scene)?;
    let (source, destination) = with_a_disk(&shared)?;
    let phase = Phase::Prepare.to_string();
    let mut command = source.start_move(&destination.uri()?, &["--test-hold-at", &phase])?;
    source.wait_for_phase(&phase, LIMIT)?;
    shared.there.set(Mode::Unreachable)?;
    source.command(&["release"], &[], LIMIT)?.ensure_code(0)?;
    shared.there.wait_until_held(LIMIT)?;
    source.ensure_guest_runs(WORKLOAD.vcpus)?;
    let ended = Ended::wait(&mut command, 2 * LIMIT)?.ensure_code(4)?;
    ended.ensure_says(&["the guest is still here, running"])?;
    shared.there.set(Mode::Normal)?;
    wait::until_true("the destination listens again", LIMIT, || Ok(destination.times_listening() == 2))?;
    ensure_can_be_moved(&shared, source, &destination)
}
