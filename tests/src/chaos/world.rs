//! Two hosts, one machine and its claims: what is there between episodes.

use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, ensure};

use super::ledger::Id;
use super::stores::Stores;
use super::watch::Watch;
use crate::godwit::{Ended, Node};
use crate::harness::{Scene, binary};
use crate::netns::Hosts;
use crate::process::Process;
use crate::workload::Workload;

/// The names of the hosts in claims.
pub const HOSTS: [&str; 2] = ["left", "right"];

/// So small that a move takes a fraction of a second.
pub const WORKLOAD: Workload = Workload {
    memory: "64M",
    vcpus: 1,
    fill: "24M",
    working_set: "8M",
    rate: "10000",
    order: "random",
    write: "word",
    contents: "random",
    seed: 5,
};

/// How long a process may take to end that has no reason to stay.
pub const END_LIMIT: Duration = Duration::from_secs(15);

/// How long a start may take to be refused.
const REFUSAL_LIMIT: Duration = Duration::from_secs(30);

/// A process that has the machine, or waits for it.
pub struct Member {
    /// The process.
    pub node: Node,
    /// Where it runs: an index into [`HOSTS`].
    pub host: usize,
    /// Under which its heartbeat is watched.
    pub id: Id,
    /// It was killed.
    pub killed: bool,
    transport: &'static str,
}

/// All of it.
pub struct World<'a> {
    // Before the stores: what runs on them ends first.
    /// Who has the machine.
    pub owner: Member,
    /// A receiver on the other host.
    pub peer: Option<Member>,
    leaving: Vec<Member>,
    /// Watches all of them.
    pub watch: Watch,
    /// The claim store, as each host sees it.
    pub stores: Stores,
    /// The hosts.
    pub hosts: Hosts,
    scene: &'a Scene,
    started: u32,
}

impl<'a> World<'a> {
    /// Two hosts, and the machine on the first.
    pub fn new(scene: &'a Scene) -> Result<Self> {
        let hosts = Hosts::new(HOSTS.len())?;
        let stores = Stores::new(scene)?;
        let watch = Watch::start();
        let owner = boot(scene, &hosts, &stores, &watch, "0", 0, &[])?;
        Ok(Self { owner, peer: None, leaving: Vec::new(), watch, stores, hosts, scene, started: 1 })
    }

    /// Sees to it that a receiver listens for `transport` on the other host.
    pub fn prepare(&mut self, transport: &'static str) -> Result<&Member> {
        let host = 1 - self.owner.host;
        let usable = |peer: &mut Member| {
            Ok::<_, anyhow::Error>(peer.host == host && peer.transport == transport && peer.node.process.is_running()?)
        };
        let reusable = self.peer.as_mut().map(usable).transpose()?.unwrap_or(false);
        if !reusable {
            self.dismiss_peer();
            let name = self.name(host, "receiver");
            let listen = format!("{transport}://{}:0", self.hosts.address(host, self.owner.host));
            let disk = self.stores.disk_of_receiver(host);
            let more = ["--insecure", "--host-id", HOSTS[host], "--map-disk", &disk];
            let node = Node::receiver(self.scene, &name, Some(self.hosts.host(host)), &listen, &more)?;
            let id = self.watch.add(&name, node.process.pid(), Some(self.owner.id));
            self.peer = Some(Member { node, host, id, killed: false, transport });
        }
        let peer = self.peer.as_ref().context("no receiver")?;
        self.watch.set_origin(peer.id, self.owner.id);
        Ok(peer)
    }

    /// The machine is the receiver's now. Its former owner is to end by itself.
    pub fn moved(&mut self) {
        if let Some(peer) = self.peer.take() {
            self.leaving.push(std::mem::replace(&mut self.owner, peer));
        }
    }

    /// Ends the receiver, if there is one.
    pub fn dismiss_peer(&mut self) {
        if let Some(peer) = self.peer.take() {
            self.watch.remove(peer.id);
        }
    }

    /// Boots the machine anew on `host`, and gives who had it before.
    pub fn boot(&mut self, host: usize, more: &[&str]) -> Result<Member> {
        let name = self.name(host, "run");
        let owner = boot(self.scene, &self.hosts, &self.stores, &self.watch, &name, host, more)?;
        Ok(std::mem::replace(&mut self.owner, owner))
    }

    /// Tries to start the machine on `host`, which has to be refused.
    pub fn ensure_start_refused(&mut self, host: usize) -> Result<()> {
        let name = self.name(host, "refused");
        let mut command = Command::new(binary("godwit-sender")?);
        command.arg("run").args(WORKLOAD.arguments()).args(machine_options(&self.stores, host));
        command.arg("--control").arg(self.scene.path().join(format!("{name}.sock")));
        let mut process = Process::start(&name, self.scene.path(), command, Some(self.hosts.host(host)))?;
        Ended::wait(&mut process, REFUSAL_LIMIT)?.ensure_code(3).map(drop)
    }

    /// Sees those off whose machine has moved, without waiting unless `patiently`. Each has to end by itself, with success.
    pub fn see_off(&mut self, patiently: bool) -> Result<()> {
        let mut staying = Vec::new();
        for mut member in self.leaving.drain(..) {
            if !patiently && member.node.process.is_running()? {
                staying.push(member);
                continue;
            }
            let status = member.node.process.wait(END_LIMIT)?;
            self.watch.remove(member.id);
            ensure!(
                member.killed || status.success(),
                "the machine has moved away, and its process ended with {status}: {}",
                member.node.process.describe()
            );
        }
        self.leaving = staying;
        Ok(())
    }

    fn name(&mut self, host: usize, role: &str) -> String {
        self.started += 1;
        format!("{:03}-{}-{role}", self.started, HOSTS[host])
    }
}

impl Member {
    /// Its host's name in claims.
    pub fn host_name(&self) -> &'static str {
        HOSTS[self.host]
    }
}

fn boot(
    scene: &Scene,
    hosts: &Hosts,
    stores: &Stores,
    watch: &Watch,
    name: &str,
    host: usize,
    more: &[&str],
) -> Result<Member> {
    let options = machine_options(stores, host);
    let options: Vec<&str> = options.iter().map(String::as_str).chain(more.iter().copied()).collect();
    let node = Node::sender(scene, name, Some(hosts.host(host)), &WORKLOAD, &options)?;
    let id = watch.add(name, node.process.pid(), None);
    Ok(Member { node, host, id, killed: false, transport: "" })
}

fn machine_options(stores: &Stores, host: usize) -> [String; 5] {
    ["--insecure", "--host-id", HOSTS[host], "--disk", &stores.disk_of_sender(host)].map(str::to_owned)
}
