//! A machine whose disk image lies on storage that hangs, before anything is handed over.

use std::fs;

use anyhow::{Context, Result, ensure};
use godwit_core::Phase;
use godwit_tests::fuse::{FuseStore, Mode};
use godwit_tests::godwit::{Ended, Node};
use godwit_tests::harness::Scene;
use godwit_tests::wait;

use crate::stage::{LIMIT, LISTEN, Shared, WORKLOAD};
use crate::watch::End;

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
    ensure!(source.process.exit_code(LIMIT)? == 0);
    Ok(())
}

pub(crate) fn an_image_that_hangs_in_preflight(_: &Scene) -> Result<()> {
    for end in [End::Source, End::Destination] {
        let scene = &Scene::new()?;
        let play = || -> Result<()> {
            let shared = Shared::new(scene)?;
            let (source, destination) = with_a_disk(&shared)?;
            let away = if end == End::Source { &shared.here } else { &shared.there };
            away.set(Mode::Unreachable)?;
            let ended = source.move_to(&destination.uri()?, &[], LIMIT)?;
            // The source's own waits can add up to the limit of the whole phase, which then ends the move.
            ensure!([3, 4].contains(&ended.code), "{ended}");
            ended.ensure_says(&["did not answer", "the guest is still here, running"])?;
            ensure_can_be_moved(&shared, source, &destination)
        };
        play().with_context(|| format!("{end:?}\n{}", scene.logs()))?;
    }
    Ok(())
}

/// Preflight was well; when the destination opens the image for the machine, its storage is away.
pub(crate) fn an_image_that_hangs_in_prepare(scene: &Scene) -> Result<()> {
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
