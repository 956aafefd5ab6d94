//! The machine `fw1` on the lab's hosts: the processes that keep it, and its moves from one to another.

use std::net::{Ipv4Addr, SocketAddr};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;

use crate::clock::{monotonic_ns, ms};
use crate::godwit::Ended;
use crate::lab::Lab;
use crate::lab::layout::{GUEST, GUEST_TAPS, Network};
use crate::lab::remote::{Host, Remote, quoted};
use crate::scenario::guest::{self, GuestClient};
use crate::wait;

/// Where `fw1` lies on the storage that both hosts share.
pub const DIRECTORY: &str = "/srv/godwit/fw1";
/// Its kernel.
pub const KERNEL: &str = "/srv/godwit/fw1/vmlinuz";
/// Its disk.
pub const DISK: &str = "/srv/godwit/fw1/disk.img";
/// Its claims, which lie beside the disk.
pub const CLAIMS: &str = "/srv/godwit/fw1/disk.img.godwit";
/// What comes out of its serial port, on the host where it runs.
const CONSOLE: &str = "/run/lab/fw1.console";
/// Where whoever keeps it is controlled.
const CONTROL: &str = "/run/godwit/fw1.sock";
/// The port at which hosts wait for a machine.
const MOVE_PORT: u16 = 7001;

/// How long an emulated host's guest may take from its power button to its prompt.
const BOOT_LIMIT: Duration = Duration::from_secs(300);
/// How long it may take to shut down.
const POWERDOWN_LIMIT: Duration = Duration::from_secs(150);
/// How long a process may take to be ready, or to end.
const PROCESS_LIMIT: Duration = Duration::from_secs(30);
/// How long a command that answers at once may take.
const COMMAND_LIMIT: Duration = Duration::from_secs(60);
/// How long a move may take. Encryption is slow where processors are emulated.
pub const MOVE_LIMIT: Duration = Duration::from_secs(240);
/// Between two looks at whether it has booted.
const BOOT_LOOK_PERIOD: Duration = Duration::from_secs(1);
/// Between two looks at what a move says: looking costs the emulated processors time.
const LOOK_PERIOD: Duration = Duration::from_millis(20);

/// What an emulated host can keep even while it is busy: there the fixed part of the pause alone may take 300 ms.
const MOVE_OPTIONS: &str = "--insecure --audit --downtime-limit 500ms --on-stall force --json";

/// A process that keeps `fw1`, or waits for it.
pub struct Keeper {
    /// Where it runs.
    pub host: Host,
    remote: Remote,
}

/// A move that has completed.
#[derive(Debug, Clone)]
pub struct Moved {
    /// When the command was given, by this machine's clock.
    pub begun_ns: u64,
    /// From the command until it was seen completed.
    pub total_ms: f64,
    /// What the mover itself says.
    pub downtime_ms: f64,
    /// Both directions, as the mover says.
    pub wire_bytes: u64,
}

/// The definition of `fw1`, the same on both hosts. `balloon`: whether it gives back the memory that it does not use.
pub fn definition(balloon: bool) -> String {
    let balloon = if balloon { "[balloon]\nfree_page_reporting = true\n\n" } else { "" };
    let mut text = format!(
        "name = \"fw1\"\nmemory = \"512M\"\nvcpus = 2\nkernel = \"{DIRECTORY}/vmlinuz\"\ninitrd = \"{DIRECTORY}/initrd.img\"\n\
         cmdline = \"root=/dev/vda rw console=ttyS0\"\nserial = \"file:{CONSOLE}\"\n\n\
         {balloon}[[disk]]\nid = \"root\"\npath = \"{DISK}\"\n"
    );
    for (tap, network) in GUEST_TAPS {
        let (id, mac) = (network.name(), network.link_address(GUEST));
        text += &format!("\n[[net]]\nid = \"{id}\"\ntap = \"{tap}\"\nmac = \"{mac}\"\n");
    }
    text
}

/// Where the program in `fw1` answers the public client.
pub fn guest_address() -> Result<Ipv4Addr> {
    Ok(Network::Public.address(GUEST).parse()?)
}

/// A connection to that program.
pub fn guest(lab: &Lab) -> Result<GuestClient> {
    GuestClient::connect(lab.public_client(), SocketAddr::from((guest_address()?, guest::PORT)))
}

impl Keeper {
    /// Boots `fw1` on `host` and waits until it is at rest.
    pub fn boot(lab: &Lab, host: &Host) -> Result<Self> {
        Self::boot_as(lab, host, &definition(true))
    }

    /// The same with this definition.
    pub fn boot_as(lab: &Lab, host: &Host, definition: &str) -> Result<Self> {
        let file = format!("{DIRECTORY}/fw1.toml");
        // What was said before an earlier power-off.
        host.check(&format!("rm -f {CONSOLE}"))?;
        let put = host.run_with_input(&format!("cat >{file}"), definition.as_bytes(), COMMAND_LIMIT)?;
        ensure!(put.code == 0, "cannot write {file}: {}", put.stderr);
        let remote = host.spawn("fw1", &format!("godwit-sender run {file} --insecure --control {CONTROL}"))?;
        let mut keeper = Self { host: host.clone(), remote };
        keeper.wait_for_control()?;
        // The shell on its serial port is the last thing that it starts.
        let prompt = format!("grep -q root@fw1 {CONSOLE}");
        keeper.remote.process().wait_while_running("fw1 boots", BOOT_LIMIT, |_| {
            thread::sleep(BOOT_LOOK_PERIOD);
            Ok((host.run(&prompt)?.code == 0).then_some(()))
        })?;
        wait::until("the program in fw1 answers", PROCESS_LIMIT, || Ok(guest(lab).ok())).map(drop)?;
        Ok(keeper)
    }

    /// Has `host` wait for `fw1` over `transport`, with the taps and the disk that it needs.
    pub fn receive(host: &Host, transport: &str, more: &str) -> Result<Self> {
        Self::receive_in(host, transport, "", more)
    }

    /// The same after `preparation`, a line of shell for a mount namespace of the receiver's own.
    pub fn receive_in(host: &Host, transport: &str, preparation: &str, more: &str) -> Result<Self> {
        let taps: String = GUEST_TAPS.iter().map(|(tap, _)| format!(" --allow-tap {tap}")).collect();
        let line = format!(
            "godwit-receiver --listen {transport}://{}:{MOVE_PORT} --insecure --disk-dir /srv/godwit --boot-dir /srv/godwit \
             {taps} --serial file:{CONSOLE} --control {CONTROL} {more}",
            host.address(Network::Storage)
        );
        let line = match preparation {
            "" => line,
            preparation => format!("unshare --mount sh -c {}", quoted(&format!("{preparation}; exec {line}"))),
        };
        let mut keeper = Self { host: host.clone(), remote: host.spawn("receiver", &line)? };
        keeper.uri()?;
        Ok(keeper)
    }

    /// Where it waits for a machine, once it does.
    pub fn uri(&mut self) -> Result<String> {
        self.remote.process().wait_while_running("a receiver listens", PROCESS_LIMIT, |process| {
            let stdout = process.stdout();
            Ok(stdout.lines().find_map(|line| line.strip_prefix("LISTENING ")).map(str::to_owned))
        })
    }

    /// Begins to move the machine to where `destination` waits.
    pub fn start_move(&self, destination: &mut Keeper, more: &str) -> Result<Remote> {
        let to = quoted(&destination.uri()?);
        self.host
            .spawn("migrate", &format!("godwit-sender migrate --control {CONTROL} --to {to} {MOVE_OPTIONS} {more}"))
    }

    /// Gives the move's command its time to end.
    pub fn end_of_move(mut migrate: Remote) -> Result<Ended> {
        Ended::wait(migrate.process(), MOVE_LIMIT)
    }

    /// Moves the machine to where `destination` waits. Its own process then ends with 0.
    pub fn move_to(&mut self, destination: &mut Keeper) -> Result<Moved> {
        let begun_ns = monotonic_ns();
        let mut migrate = self.start_move(destination, "")?;
        migrate.process().wait_while_running("the move completes", MOVE_LIMIT, |process| {
            thread::sleep(LOOK_PERIOD);
            let ended = process.stdout();
            let is_end = |line: &&str| line.contains(r#""GODWIT_OUTCOME""#) || line.contains(r#""status":"completed""#);
            Ok(ended.lines().rev().find(is_end).map(drop))
        })?;
        let total_ms = ms(monotonic_ns() - begun_ns);
        let outcome = self.ensure_moved(migrate)?;
        let downtime_ms = outcome["downtime_ms"].as_f64().context("the outcome has no downtime_ms")?;
        let wire_bytes = outcome["wire_bytes"].as_u64().context("the outcome has no wire_bytes")?;
        Ok(Moved { begun_ns, total_ms, downtime_ms, wire_bytes })
    }

    /// Waits for the end of a move that must succeed, its audit too, and of the process here. Gives what was told of it.
    pub fn ensure_moved(&mut self, migrate: Remote) -> Result<Value> {
        let outcome = Self::end_of_move(migrate)?.ensure_code(0)?.outcome()?;
        ensure!(outcome["outcome"] == "moved", "{outcome}");
        ensure!(outcome["audit"].as_str().is_some_and(|audit| audit.starts_with("ok")), "audit: {}", outcome["audit"]);
        let status = self.remote.process().wait(PROCESS_LIMIT)?;
        ensure!(status.success(), "the source's process ended with {status}: {}", self.describe());
        Ok(outcome)
    }

    /// Gives the machine a command that is answered at once.
    pub fn command(&self, verb: &str) -> Result<()> {
        self.host.check(&format!("godwit-sender {verb} --control {CONTROL}")).map(drop)
    }

    /// Whether the machine runs, as its keeper says.
    pub fn is_running(&self) -> Result<bool> {
        let said = self.host.check(&format!("godwit-sender status --control {CONTROL} --json"))?;
        let said: Value = serde_json::from_str(said.trim()).with_context(|| format!("not JSON: {said}"))?;
        Ok(said["status"] == "running")
    }

    /// Has the machine reboot, and gives how long it took until it answered again.
    pub fn reboot(&mut self, lab: &Lab) -> Result<f64> {
        let begun_ns = monotonic_ns();
        let mut before = guest(lab)?;
        let boot_id = before.boot_id()?;
        before.reboot()?;
        self.remote.process().wait_while_running("the program in fw1 answers again", BOOT_LIMIT, |_| {
            let now = guest(lab).and_then(|mut guest| guest.boot_id());
            Ok(now.is_ok_and(|now| now != boot_id).then_some(()))
        })?;
        ensure!(self.is_running()?, "fw1 does not run");
        Ok(ms(monotonic_ns() - begun_ns))
    }

    /// Presses the machine's power button; the keeper ends with 0 once the guest has shut down.
    pub fn power_down(&mut self) -> Result<()> {
        self.command("powerdown")?;
        let status = self.remote.process().wait(POWERDOWN_LIMIT)?;
        ensure!(status.success(), "the keeper of fw1 ended with {status}: {}", self.describe());
        Ok(())
    }

    /// Ends it at once, as when a host dies.
    pub fn kill(&mut self) -> Result<()> {
        self.strike()?;
        self.bury()
    }

    /// Sends it the signal that ends it. While its storage is away that takes no effect on a process with locks there.
    pub fn strike(&self) -> Result<()> {
        self.remote.signal("KILL")
    }

    /// Waits for the end of what was struck.
    pub fn bury(&mut self) -> Result<()> {
        self.remote.process().wait(PROCESS_LIMIT)?;
        // What a killed process leaves.
        self.host.check(&format!("rm -f {CONTROL}")).map(drop)
    }

    /// What it and its machine have said last.
    pub fn describe(&mut self) -> String {
        let said = self.remote.process().describe();
        let console = self.host.run(&format!("tail -n 30 {CONSOLE}"));
        let console = console.map_or_else(|error| format!("{error:#}"), |output| output.stdout);
        format!("{said}the end of fw1's console on {}:\n{console}", self.host.name())
    }

    fn wait_for_control(&mut self) -> Result<()> {
        let ready = format!("test -S {CONTROL}");
        let host = self.host.clone();
        self.remote.process().wait_while_running("the keeper of fw1 is ready", PROCESS_LIMIT, |_| {
            Ok((host.run(&ready)?.code == 0).then_some(()))
        })
    }
}

/// Fails unless a move that was not to be was refused for `reason`, and nothing of it was made.
pub fn ensure_refused(ended: Ended, reason: &str) -> Result<()> {
    let ended = ended.ensure_code(3)?;
    let outcome = ended.outcome()?;
    let reasons = outcome["reasons"].as_array().cloned().unwrap_or_default();
    if !reasons.iter().any(|said| said.as_str().is_some_and(|said| said.contains(reason))) {
        bail!("`{reason}` is not among the reasons: {outcome}");
    }
    Ok(())
}
