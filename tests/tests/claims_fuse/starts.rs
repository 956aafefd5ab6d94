//! A machine that is to be started while its storage hangs, refuses or is uncertain.

use std::time::Instant;

use anyhow::{Context, Result, ensure};
use godwit_tests::fuse::{Calls, Mode};
use godwit_tests::godwit::Ended;
use godwit_tests::harness::Scene;
use nix::errno::Errno;

use crate::stage::{LIMIT, Shared};

pub(crate) fn a_start_on_a_store_that_hangs(scene: &Scene) -> Result<()> {
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

pub(crate) fn a_start_on_a_store_that_refuses(scene: &Scene) -> Result<()> {
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

pub(crate) fn a_start_whose_claim_is_uncertain(scene: &Scene) -> Result<()> {
    let shared = Shared::new(scene)?;
    shared.here.set_for(Calls::Links, Mode::Unsure(Errno::EIO))?;
    let mut first = shared.sender()?;
    shared.ensure_newest(1, "kvm1")?;
    shared.here.set(Mode::Normal)?;
    first.command(&["quit"], &[], LIMIT)?.ensure_code(0)?;
    ensure!(first.process.exit_code(LIMIT)? == 0);
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
