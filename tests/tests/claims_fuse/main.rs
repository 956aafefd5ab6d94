//! Handovers over storage that is slow, unreachable or uncertain at either end, with real processes and real guests.
//!
//! Each host sees the claims through a mount of its own. Everything happens between *commit* and the end: the move is held at
//! *commit*, the storage is made to misbehave, and from there on the guest's heartbeat is watched at both ends. Who runs is
//! what the heartbeats say: exactly one end, from *commit* on, whatever the storage does.

mod images;
mod stage;
mod starts;
mod watch;

use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use godwit_tests::fuse::{Calls, FuseStore, Mode};
use godwit_tests::harness::{self, Need, Scene};
use godwit_tests::wait;
use nix::errno::Errno;
use nix::sys::signal::{self, Signal};

use crate::images::{an_image_that_hangs_in_preflight, an_image_that_hangs_in_prepare};
use crate::stage::{LIMIT, Shared, WORKLOAD};
use crate::starts::{a_start_on_a_store_that_hangs, a_start_on_a_store_that_refuses, a_start_whose_claim_is_uncertain};
use crate::watch::End;

/// A `--handover-timeout` that the storage is never away for.
const PATIENT: &str = "60s";

/// One that a store which is away outlasts.
const HASTY: &str = "1s";

fn main() {
    let needs = &[Need::Kvm, Need::Fuse];
    harness::main(vec![
        harness::test("two_that_run_are_seen", needs, two_that_run_are_seen),
        harness::test("slow_at_either_end", needs, slow_at_either_end),
        harness::test("unreachable_at_the_destination_for_a_while", needs, unreachable_at_the_destination),
        harness::test("a_server_that_stands_still_at_the_destination", needs, a_server_that_stands_still),
        harness::test("unreachable_at_the_destination_for_longer", needs, unreachable_at_the_destination_for_longer),
        harness::test("a_waiting_destination_is_abandoned", needs, a_waiting_destination_is_abandoned),
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
            ensure!(source.process.exit_code(LIMIT)? == 0);
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

/// A person says that the copy at the destination is never to run, while nobody knows whose it is. `status` says what is waited for.
fn a_waiting_destination_is_abandoned(scene: &Scene) -> Result<()> {
    let shared = Shared::new(scene)?;
    let mut held = shared.hold(HASTY)?;
    held.destination.command(&["abandon"], &["--yes"], LIMIT)?.ensure_code(3)?.ensure_says(&["coming in"])?;
    shared.there.set(Mode::Unreachable)?;
    held.release()?;
    wait::until_true("the destination says what it waits for", LIMIT, || {
        Ok(held.destination.command(&["status"], &["--json"], LIMIT)?.stdout.contains("it is not known yet"))
    })?;
    held.destination.command(&["abandon"], &[], LIMIT)?.ensure_code(3)?.ensure_says(&["RISK", "--yes"])?;
    ensure!(held.destination.process.is_running()?, "nothing was said that counts");
    held.destination.command(&["abandon"], &["--yes"], LIMIT)?.ensure_code(0)?;
    shared.there.set(Mode::Normal)?;
    held.ended()?.ensure_code(4)?;
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
