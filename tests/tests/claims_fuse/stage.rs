//! One machine, two hosts, and storage that both see, each through a mount of its own.

use std::fs;
use std::path::PathBuf;
use std::process::Command;
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use godwit_core::Phase;
use godwit_core::ownership::directory::DirectoryStore;
use godwit_core::ownership::store::{ClaimStore, Occupant, Reading};
use godwit_tests::fuse::FuseStore;
use godwit_tests::godwit::{Ended, Node};
use godwit_tests::harness::{Scene, binary};
use godwit_tests::process::Process;
use godwit_tests::wait;
use godwit_tests::workload::{self, Workload};

use crate::watch::{End, Watch};

pub(crate) const LIMIT: Duration = Duration::from_secs(60);

pub(crate) const LISTEN: &str = "tcp://127.0.0.1:0";

pub(crate) const WORKLOAD: Workload = Workload {
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

/// Claims that both hosts see, each through its own mount.
pub(crate) struct Shared<'a> {
    pub(crate) scene: &'a Scene,
    pub(crate) here: FuseStore,
    pub(crate) there: FuseStore,
}

impl<'a> Shared<'a> {
    pub(crate) fn new(scene: &'a Scene) -> Result<Self> {
        let backing = scene.path().join("backing");
        fs::create_dir(&backing)?;
        let mount = |name: &str| FuseStore::mount(&backing, &scene.path().join(name));
        Ok(Self { scene, here: mount("here")?, there: mount("there")? })
    }

    pub(crate) fn start_arguments(&self) -> Result<Vec<String>> {
        Ok(["--ownership", &claims(&self.here)?, "--host-id", "kvm1"].map(str::to_owned).into())
    }

    pub(crate) fn sender(&self) -> Result<Node> {
        let more = self.start_arguments()?;
        let more: Vec<&str> = more.iter().map(String::as_str).collect();
        Node::sender(self.scene, "kvm1", None, &WORKLOAD, &more)
    }

    pub(crate) fn receiver(&self) -> Result<Node> {
        let more = ["--ownership", &claims(&self.there)?, "--host-id", "kvm2"];
        Node::receiver(self.scene, "kvm2", None, LISTEN, &more)
    }

    /// A machine whose move to the other host is about to be committed.
    pub(crate) fn hold(&self, handover_timeout: &str) -> Result<Held<'_>> {
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
    pub(crate) fn start(&self) -> Result<Process> {
        let mut command = Command::new(binary("godwit-sender")?);
        command.arg("run").args(WORKLOAD.arguments()).args(self.start_arguments()?);
        command.arg("--control").arg(self.scene.path().join("start.sock"));
        Process::start("start", self.scene.path(), command, None)
    }

    /// Epoch and host of the newest claim, as it lies in the folder behind the mounts.
    pub(crate) fn newest(&self) -> Result<Option<(u64, String)>> {
        match DirectoryStore::new(self.scene.path().join("backing/machine.godwit")).newest() {
            Reading::Newest(None) => Ok(None),
            Reading::Newest(Some(record)) => match record.occupant {
                Occupant::Claim(claim) => Ok(Some((record.epoch.get(), claim.claimant.host.to_string()))),
                Occupant::Foreign(what) => bail!("{what}"),
            },
            Reading::Unknown(why) => bail!("{why}"),
        }
    }

    pub(crate) fn ensure_newest(&self, epoch: u64, host: &str) -> Result<()> {
        let newest = self.newest()?;
        ensure!(newest == Some((epoch, host.to_owned())), "epoch {epoch} of {host}? {newest:?}");
        Ok(())
    }
}

/// Where a host sees the claims.
pub(crate) fn claims(mount: &FuseStore) -> Result<String> {
    let path: PathBuf = mount.path().join("machine.godwit");
    Ok(path.to_str().context("the scene's path is no text")?.to_owned())
}

/// A move whose *commit* is about to be sent: everything has been sent and the guest stands at both ends.
pub(crate) struct Held<'a> {
    shared: &'a Shared<'a>,
    pub(crate) source: Node,
    pub(crate) destination: Node,
    command: Process,
    pub(crate) watch: Watch,
}

impl Held<'_> {
    pub(crate) fn release(&self) -> Result<()> {
        self.source.command(&["release"], &[], LIMIT)?.ensure_code(0).map(drop)
    }

    pub(crate) fn ended(&mut self) -> Result<Ended> {
        Ended::wait(&mut self.command, LIMIT)
    }

    pub(crate) fn ensure_none_runs(&self) -> Result<()> {
        thread::sleep(Duration::from_millis(300));
        let ran = self.watch.ran()?;
        ensure!(ran.is_empty(), "{ran:?} ran");
        Ok(())
    }

    /// The move ends as moved, the guest runs at the destination, is whole there, and has never run at the source again.
    pub(crate) fn ensure_moved(mut self) -> Result<()> {
        self.ended()?.ensure_moved(&self.destination, &WORKLOAD)?;
        self.ensure_has_moved()
    }

    /// The same, however the command has ended.
    pub(crate) fn ensure_has_moved(mut self) -> Result<()> {
        let code = self.source.process.exit_code(LIMIT)?;
        ensure!(code == 0, "the source ended with {code}: {}", self.source.process.describe());
        self.destination.ensure_guest_unharmed(&WORKLOAD)?;
        self.shared.ensure_newest(2, "kvm2")?;
        self.watch.ensure_only(End::Destination)
    }

    /// The guest runs at the source and is whole there, the destination has dropped it, and it has never run there.
    pub(crate) fn ensure_taken_back(mut self) -> Result<()> {
        let code = self.destination.process.exit_code(LIMIT)?;
        ensure!(code == 7, "the destination ended with {code}: {}", self.destination.process.describe());
        wait::until_true("the guest runs again", LIMIT, || Ok(self.source.ensure_guest_runs(WORKLOAD.vcpus).is_ok()))?;
        self.source.ensure_guest_unharmed(&WORKLOAD)?;
        self.shared.ensure_newest(2, "kvm1")?;
        self.watch.ensure_only(End::Source)
    }
}
