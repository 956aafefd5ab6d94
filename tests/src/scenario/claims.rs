//! Who has `fw1`, by its claims on NFS: second starts are refused, and moves in whose course the NFS server goes away end
//! with exactly one host that runs it.

use std::net::SocketAddr;
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;

use crate::godwit::Ended;
use crate::lab::Lab;
use crate::lab::remote::{Host, Remote};
use crate::scenario::guest;
use crate::scenario::outage::{Manner, Outage, wait_until_served};
use crate::scenario::records::RecordsClient;
use crate::scenario::run::step;
use crate::scenario::stage::{self, CLAIMS, DISK, Keeper, MOVE_LIMIT};
use crate::wait;

/// For how long the server is away.
const AWAY: Duration = Duration::from_secs(6);
/// How long the guest may take to go on once its storage is back, and claims to show on both hosts.
const BACK_LIMIT: Duration = Duration::from_secs(120);
/// Until then the destination is not given up: the server is away for less.
const PATIENT: &str = "--handover-timeout 120s";
/// What a command ends with that preflight or the claims have refused.
const REFUSED: i32 = 3;

/// Plays the cases and gives the number of the last record that was confirmed meanwhile.
pub(crate) fn play(lab: &Lab, keeper: &mut Keeper) -> Result<u64> {
    let watch = Watch::start(lab)?;
    step("refused: fw1 is started a second time, here and on the other host");
    second_starts(&watch, keeper).context("case `second starts`")?;
    step("refused: qemu-img on the image of fw1, here and on the other host");
    image_in_use(&watch, keeper).context("case `qemu-img`")?;
    step("moved: the NFS server is away in the rounds");
    away_in_the_rounds(&watch, keeper).context("case `the NFS server is away in the rounds`")?;
    step("failed: the NFS server is away in the pause");
    away_in_the_pause(&watch, keeper).context("case `the NFS server is away in the pause`")?;
    for manner in [Manner::Stopped, Manner::Silent] {
        step(&format!("moved: the NFS server is away at the claim ({manner:?})"));
        away_at_the_claim(&watch, keeper, manner)
            .with_context(|| format!("case `the NFS server is away at the claim ({manner:?})`"))?;
    }
    step("failed: the destination dies while the NFS server is away");
    destination_dies(&watch, keeper).context("case `the destination dies while the NFS server is away`")?;
    step("refused: qemu-img, still");
    image_in_use(&watch, keeper).context("case `qemu-img after all that`")?;
    Ok(watch.records.confirmed().last())
}

/// Looks at the machine from everywhere.
struct Watch<'a> {
    lab: &'a Lab,
    boot_id: String,
    records: RecordsClient,
}

impl<'a> Watch<'a> {
    fn start(lab: &'a Lab) -> Result<Self> {
        let boot_id = stage::guest(lab)?.boot_id()?;
        let address = SocketAddr::from((stage::guest_address()?, guest::PORT));
        let records = wait::until("records are written", BACK_LIMIT, || {
            let records = RecordsClient::start(lab.public_client(), address)?;
            // The writer for an earlier client may not have noticed yet that it has gone.
            Ok(records.wait_for_progress(BACK_LIMIT).is_ok().then_some(records))
        })?;
        Ok(Self { lab, boot_id, records })
    }

    fn other(&self, host: &Host) -> Result<&'a Host> {
        self.lab.host(if host.name() == "kvm1" { "kvm2" } else { "kvm1" })
    }

    /// The newest claim, as `host` sees it: its epoch, and the host that it names.
    fn newest(&self, host: &Host) -> Result<(u64, String)> {
        let said = host.check(&format!("godwit-sender ownership show {CLAIMS} --json"))?;
        let said: Value = serde_json::from_str(said.trim()).with_context(|| format!("not JSON: {said}"))?;
        let newest = said["claims"].as_array().and_then(|claims| claims.last()).context("no claims")?;
        let owner = newest["claim"]["host"].as_str().context("a claim that names no host")?;
        Ok((newest["epoch"].as_u64().context("a claim without epoch")?, owner.to_owned()))
    }

    fn epoch(&self, keeper: &Keeper) -> Result<u64> {
        Ok(self.newest(&keeper.host)?.0)
    }

    /// Fails unless the machine runs at `keeper` and nowhere else, unharmed, and both hosts see that by claim `epoch` it is
    /// that host's.
    fn ensure_only_at(&self, keeper: &Keeper, epoch: u64) -> Result<()> {
        let (here, other) = (&keeper.host, self.other(&keeper.host)?);
        self.records.wait_for_progress(BACK_LIMIT)?;
        ensure!(keeper.is_running()?, "fw1 does not run at {}", here.name());
        let boot_id = stage::guest(self.lab)?.boot_id()?;
        ensure!(boot_id == self.boot_id, "the guest has rebooted");
        // A receiver has time to end that has lost the claim.
        let none = "! pgrep -l '^godwit-(sender|receiver)$'";
        other.wait_for("nobody keeps a machine", none, BACK_LIMIT)?;
        let expected = (epoch, here.check("cat /etc/machine-id")?.trim().to_owned());
        for host in [here, other] {
            let seen = self.newest(host)?;
            ensure!(seen == expected, "{} sees {seen:?} as the newest claim, not {expected:?}", host.name());
        }
        Ok(())
    }
}

fn second_starts(watch: &Watch<'_>, keeper: &Keeper) -> Result<()> {
    let (here, other) = (&keeper.host, watch.other(&keeper.host)?);
    let (epoch, owner) = watch.newest(here)?;
    let start = format!("godwit-sender run {}/fw1.toml --control /run/lab/second.sock", stage::DIRECTORY);
    let refused = |host: &Host, says: &[&str]| -> Result<()> {
        let output = host.run(&start)?;
        let ended = Ended { code: output.code, stdout: output.stdout, stderr: output.stderr };
        ended.ensure_code(REFUSED)?.ensure_says(says).map(drop)
    };
    let (whose, take) = (format!("epoch {epoch} of fw1 is host {owner}'s"), format!("--take-ownership={epoch}"));
    refused(here, &[&whose, "a process of this host has the machine"])?;
    refused(other, &[&whose, "not this host's to start", &take])?;
    watch.ensure_only_at(keeper, epoch)
}

/// QEMU's tools see the locks of whoever runs the image, through the share as well; through NFSv3 only on the same host, once
/// the machine has moved (docs/handover.md).
fn image_in_use(watch: &Watch<'_>, keeper: &Keeper) -> Result<()> {
    // To the size that it has: this would do no harm.
    let resize = format!("qemu-img resize -f raw {DISK} $(stat -c %s {DISK})");
    let file_system = keeper.host.check("findmnt --noheadings --output FSTYPE /srv/godwit")?;
    let other = watch.other(&keeper.host)?;
    for host in [Some(&keeper.host), (file_system.trim() == "nfs4").then_some(other)].into_iter().flatten() {
        let output = host.run(&resize)?;
        let refused = output.code != 0 && output.stderr.contains("Failed to get");
        ensure!(refused, "qemu-img on {}: {} {}{}", host.name(), output.code, output.stdout, output.stderr);
    }
    Ok(())
}

/// The server is away from the first pass on. The switchover waits until it is back.
fn away_in_the_rounds(watch: &Watch<'_>, keeper: &mut Keeper) -> Result<()> {
    let (epoch, mut destination) = (watch.epoch(keeper)?, receive(watch, keeper)?);
    let mut migrate = keeper.start_move(&mut destination, "--pause-before-switchover")?;
    wait_for_phase(&mut migrate, "first-pass")?;
    let outage = Outage::begin(watch.lab, Manner::Stopped)?;
    thread::sleep(AWAY);
    outage.end()?;
    wait_until_served(&keeper.host)?;
    wait_for_phase(&mut migrate, "pre-switchover")?;
    keeper.command("continue")?;
    moved(keeper, destination, migrate)?;
    watch.ensure_only_at(keeper, epoch + 1)
}

/// What the guest writes can be neither drained nor flushed: the pause ends at its limit, and the guest is where it was.
fn away_in_the_pause(watch: &Watch<'_>, keeper: &mut Keeper) -> Result<()> {
    let (epoch, mut destination) = (watch.epoch(keeper)?, receive(watch, keeper)?);
    let mut migrate = keeper.start_move(&mut destination, "--pause-before-switchover")?;
    wait_for_phase(&mut migrate, "pre-switchover")?;
    let outage = Outage::begin(watch.lab, Manner::Silent)?;
    keeper.command("continue")?;
    let ended = Keeper::end_of_move(migrate)?.ensure_code(4)?;
    ensure!(ended.outcome()?["outcome"] == "failed", "{ended}");
    outage.end()?;
    wait_until_served(&keeper.host)?;
    destination.kill()?;
    watch.ensure_only_at(keeper, epoch)
}

/// *Commit* is sent while the server is away: the destination's claim is made when it is back, or found to have been made.
fn away_at_the_claim(watch: &Watch<'_>, keeper: &mut Keeper, manner: Manner) -> Result<()> {
    let (epoch, mut destination) = (watch.epoch(keeper)?, receive(watch, keeper)?);
    let migrate = hold_at_commit(keeper, &mut destination)?;
    let outage = Outage::begin(watch.lab, manner)?;
    keeper.command("release")?;
    thread::sleep(AWAY);
    ensure!(!keeper.is_running()? && !destination.is_running()?, "fw1 runs although nobody can have claimed it");
    outage.end()?;
    moved(keeper, destination, migrate)?;
    watch.ensure_only_at(keeper, epoch + 1)
}

/// The source claims the machine back, once it can.
fn destination_dies(watch: &Watch<'_>, keeper: &mut Keeper) -> Result<()> {
    let (epoch, mut destination) = (watch.epoch(keeper)?, receive(watch, keeper)?);
    let migrate = hold_at_commit(keeper, &mut destination)?;
    let outage = Outage::begin(watch.lab, Manner::Stopped)?;
    destination.strike()?;
    keeper.command("release")?;
    thread::sleep(AWAY);
    ensure!(!keeper.is_running()?, "fw1 runs although nobody can have claimed it");
    outage.end()?;
    let ended = Keeper::end_of_move(migrate)?.ensure_code(4)?;
    ended.ensure_says(&[&format!("claimed back, epoch {}", epoch + 1)])?;
    destination.bury()?;
    watch.ensure_only_at(keeper, epoch + 1)
}

/// The other host waits for the machine, once it can lock its image.
fn receive(watch: &Watch<'_>, keeper: &Keeper) -> Result<Keeper> {
    wait_until_served(watch.other(&keeper.host)?)?;
    Keeper::receive(watch.other(&keeper.host)?, "tcp", "")
}

fn hold_at_commit(keeper: &Keeper, destination: &mut Keeper) -> Result<Remote> {
    let mut migrate = keeper.start_move(destination, &format!("--test-hold-at commit {PATIENT}"))?;
    wait_for_phase(&mut migrate, "commit")?;
    Ok(migrate)
}

fn wait_for_phase(migrate: &mut Remote, phase: &str) -> Result<()> {
    let (reached, end) = (format!(r#""phase":"{phase}""#), r#""GODWIT_OUTCOME""#);
    migrate.process().wait_while_running(&format!("the move is in phase {phase}"), MOVE_LIMIT, |process| {
        let said = process.stdout();
        if said.contains(end) {
            bail!("the move ended before phase {phase}: {}", process.describe());
        }
        Ok(said.contains(&reached).then_some(()))
    })
}

/// The move has been made, and `destination` keeps the machine from now on.
fn moved(keeper: &mut Keeper, destination: Keeper, migrate: Remote) -> Result<()> {
    keeper.ensure_moved(migrate)?;
    *keeper = destination;
    Ok(())
}
