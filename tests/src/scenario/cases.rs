//! What must not happen, case by case: moves that are refused before anything is sent, a destination that dies, and what is
//! missing if nobody announces the machine.

use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};

use crate::clock::{monotonic_ns, ms};
use crate::godwit::Ended;
use crate::lab::Lab;
use crate::lab::layout::{GUEST, Network};
use crate::lab::programs::VLAN_TESTS;
use crate::lab::remote::Host;
use crate::scenario::gap::Window;
use crate::scenario::ping::Pinger;
use crate::scenario::run::step;
use crate::scenario::stage::{self, Keeper, MOVE_LIMIT, ensure_refused};
use crate::scenario::verdict::GAP_ALLOWANCE_MS;
use crate::wait;

/// How long a guest that is not told of may stay unheard of, to be sure that it is for want of being announced.
const SILENCE: Duration = Duration::from_secs(8);

/// How long replies may take to come back.
const REPLY_LIMIT: Duration = Duration::from_secs(30);

/// How long the tests in VLANs may take on an emulated processor.
const VLAN_TESTS_LIMIT: Duration = Duration::from_secs(120);

/// A destination at which something is missing.
struct Refusal {
    name: &'static str,
    /// Done on the host before, and undone after.
    missing: &'static str,
    restored: &'static str,
    /// Done in the receiver's own mount namespace.
    preparation: &'static str,
    /// Given to the receiver.
    options: &'static str,
    /// Part of the reason that preflight gives.
    reason: &'static str,
}

const PLAIN: Refusal =
    Refusal { name: "", missing: "true", restored: "true", preparation: "", options: "", reason: "" };

const REFUSALS: [Refusal; 5] = [
    Refusal {
        name: "the share is not mounted",
        preparation: "umount /srv/godwit",
        reason: "is the share mounted here?",
        ..PLAIN
    },
    Refusal {
        name: "a local copy of the disk in place of the mount",
        preparation: "mkdir -p /tmp/copy/fw1; head -c 16M /srv/godwit/fw1/disk.img >/tmp/copy/fw1/disk.img; \
                      truncate -r /srv/godwit/fw1/disk.img /tmp/copy/fw1/disk.img; umount /srv/godwit; \
                      mount --bind /tmp/copy /srv/godwit",
        reason: "disk root: ",
        ..PLAIN
    },
    Refusal {
        name: "no tap",
        missing: "ip link del fw1-priv",
        restored: "ip tuntap add fw1-priv mode tap vnet_hdr; ip link set fw1-priv master br-private up",
        reason: "net private: ",
        ..PLAIN
    },
    Refusal {
        name: "a tap in no bridge",
        missing: "ip link set fw1-pub nomaster",
        restored: "ip link set fw1-pub master br-public",
        reason: "fw1-pub is in no bridge here",
        ..PLAIN
    },
    Refusal {
        name: "a CPU without a feature that the guest was shown",
        options: "--test-without-cpu avx2",
        reason: "avx2",
        ..PLAIN
    },
];

/// The cases in which the machine stays where it is.
pub(crate) fn before_moves(lab: &Lab, keeper: &mut Keeper) -> Result<()> {
    let boot_id = stage::guest(lab)?.boot_id()?;
    let destination = lab.host("kvm2")?;
    for refusal in &REFUSALS {
        step(&format!("refused: {}", refusal.name));
        refused(keeper, destination, refusal).with_context(|| format!("case `{}`", refusal.name))?;
        untouched(lab, keeper, &boot_id).with_context(|| format!("after the case `{}`", refusal.name))?;
    }
    step("refused: a disk through the page cache on one side only");
    unsafe_cache(lab.host("kvm1")?, destination).context("case `unsafe cache`")?;
    step("announced in VLANs: tests that need a stock kernel");
    vlan_tests(destination).context("case `announced in VLANs`")?;
    step("failed: the destination dies in the middle");
    destination_dies(keeper, destination).context("case `the destination dies`")?;
    untouched(lab, keeper, &boot_id).context("after the case `the destination dies`")
}

/// The case that needs a move of its own. The machine is on kvm2 afterwards.
pub(crate) fn after_moves(lab: &Lab, keeper: &mut Keeper) -> Result<()> {
    step("unannounced: the client's gap grows until the machine is announced");
    unannounced(lab, keeper).context("case `unannounced`")
}

fn refused(keeper: &Keeper, destination: &Host, refusal: &Refusal) -> Result<()> {
    destination.check(refusal.missing)?;
    let tried = try_move(keeper, destination, refusal);
    destination.check(refusal.restored)?;
    ensure_refused(tried?, refusal.reason)
}

fn try_move(keeper: &Keeper, destination: &Host, refusal: &Refusal) -> Result<Ended> {
    let mut receiver = Keeper::receive_in(destination, "tcp", refusal.preparation, refusal.options)?;
    let ended = Keeper::end_of_move(keeper.start_move(&mut receiver, "")?);
    receiver.kill()?;
    ended
}

/// Fails unless the guest runs where it was, in the same boot.
fn untouched(lab: &Lab, keeper: &Keeper, boot_id: &str) -> Result<()> {
    ensure!(keeper.is_running()?, "the guest does not run at its source");
    ensure!(stage::guest(lab)?.boot_id()? == boot_id, "the guest has rebooted");
    Ok(())
}

/// A machine of its own whose disk goes through the page cache: refused by a receiver that was not told to do the same;
/// taken, with a warning, by one that was.
fn unsafe_cache(source: &Host, destination: &Host) -> Result<()> {
    let (control, disk) = ("/run/godwit/cached.sock", "/srv/godwit/cached.img");
    source.check(&format!("truncate -s 16M {disk}"))?;
    let mut machine = source.spawn(
        "cached",
        &format!(
            "godwit-sender run --name cached --paused --memory 128M --kernel {}/vmlinuz --disk id=root,path={disk} --unsafe-cache",
            stage::DIRECTORY
        ),
    )?;
    machine.process().wait_while_running("a machine is ready", REPLY_LIMIT, |process| {
        Ok(process.stdout().contains("is ready, paused").then_some(()))
    })?;
    let dry_run = |options: &str| -> Result<Ended> {
        let mut receiver = Keeper::receive(destination, "tcp", options)?;
        let to = receiver.uri()?;
        let line = format!("godwit-sender migrate --control {control} --to {to} --insecure --dry-run --json");
        let ended = Ended::wait(source.spawn("dry-run", &line)?.process(), MOVE_LIMIT);
        receiver.kill()?;
        ended
    };
    ensure_refused(dry_run("")?, "--unsafe-cache")?;
    dry_run("--unsafe-cache")?.ensure_code(0)?.ensure_says(&["disks go through the page cache"])?;
    machine.signal("KILL")?;
    source.check(&format!("rm -rf {control} {disk} {disk}.godwit")).map(drop)
}

/// In network namespaces of their own, so they disturb nothing.
fn vlan_tests(host: &Host) -> Result<()> {
    let line = format!("/opt/godwit/bin/{VLAN_TESTS} kernel_vlans --test-threads 1");
    let output = host.run_within(&line, VLAN_TESTS_LIMIT)?;
    ensure!(output.stdout.contains("test result: ok. 2 passed"), "{}{}", output.stdout, output.stderr);
    Ok(())
}

fn destination_dies(keeper: &Keeper, destination: &Host) -> Result<()> {
    let mut receiver = Keeper::receive(destination, "tcp", "")?;
    // Slow enough to be in the middle for a while.
    let mut migrate = keeper.start_move(&mut receiver, "--max-bandwidth 20Mbit")?;
    migrate.process().wait_while_running("pages are being sent", MOVE_LIMIT, |process| {
        Ok(process.stdout().contains(r#""phase":"first-pass""#).then_some(()))
    })?;
    thread::sleep(Duration::from_secs(2));
    receiver.kill()?;
    let ended = Keeper::end_of_move(migrate)?.ensure_code(4)?;
    ensure!(ended.outcome()?["outcome"] == "failed", "{ended}");
    Ok(())
}

/// With nobody talking to the guest but a client that knows its address by heart, frames go on to where the guest was: until
/// it is announced. The client is silent during the move: an answer that the guest still has to send would announce it, too.
fn unannounced(lab: &Lab, keeper: &mut Keeper) -> Result<()> {
    let client = lab.public_client();
    let (address, link_address) = (Network::Public.address(GUEST), Network::Public.link_address(GUEST));
    client.ip(&["neigh", "replace", &address, "lladdr", &link_address, "nud", "permanent", "dev", "eth0"])?;
    let pinger = Pinger::start(client, stage::guest_address()?)?;
    wait::until_true("replies before the move", REPLY_LIMIT, || Ok(pinger.exchange().replies() > 0))?;
    drop(pinger);
    thread::sleep(SILENCE);
    let mut destination = Keeper::receive(lab.host("kvm2")?, "tcp", "--no-announce")?;
    let moved = keeper.move_to(&mut destination)?;
    drop(std::mem::replace(keeper, destination));

    let pinger = Pinger::start(client, stage::guest_address()?)?;
    let from_ns = monotonic_ns();
    thread::sleep(SILENCE);
    let window = Window { from_ns, to_ns: monotonic_ns() };
    let gap_ms = pinger.exchange().longest_gap_ns(window).map(ms).context("nobody pinged")?;
    let announced_ms = moved.downtime_ms + GAP_ALLOWANCE_MS;
    ensure!(gap_ms > announced_ms, "the gap is {gap_ms:.0} ms although nothing was announced");

    let replies = pinger.exchange().replies();
    let begun = Instant::now();
    keeper.command("announce")?;
    wait::until_true("replies after announcing", REPLY_LIMIT, || Ok(pinger.exchange().replies() > replies))?;
    step(&format!(
        "unannounced, the client's gap was {gap_ms:.0} ms and growing; replies came {:.0} ms after the announcement",
        begun.elapsed().as_secs_f64() * 1000.0
    ));
    client.ip(&["neigh", "del", &address, "dev", "eth0"])
}
