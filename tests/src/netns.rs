//! Network namespaces that stand for hosts, each pair joined by a link of its own.
//!
//! Nothing touches the machine's own network: links run from namespace to namespace. Addresses can therefore be the
//! same in every set. Needs root.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread;

use anyhow::{Context, Result, anyhow, bail};
use nix::sched::{CloneFlags, setns};

use crate::counters::Interface;
use crate::process;

/// Where `ip netns` keeps namespaces.
const NAMESPACES: &str = "/run/netns";

/// Nobody has this link-layer address.
const NOBODY: &str = "02:00:00:00:00:01";

static SETS_MADE: AtomicU32 = AtomicU32::new(0);

/// A network namespace. Dropping it removes it with its links, unless it is kept.
pub struct Namespace {
    name: String,
    kept: bool,
}

/// A set of hosts, numbered from 0, every one linked to every other.
pub struct Hosts {
    hosts: Vec<Namespace>,
}

impl Namespace {
    fn create(name: String) -> Result<Self> {
        ip(&["netns", "add", &name])?;
        // From here on it is removed whatever happens.
        let namespace = Self { name, kept: false };
        namespace.ip(&["link", "set", "lo", "up"])?;
        Ok(namespace)
    }

    /// Makes one that stays until [`Namespace::remove`], also after this process.
    pub fn create_kept(name: &str) -> Result<Self> {
        ip(&["netns", "add", name])?;
        let namespace = Self::existing(name.to_owned());
        namespace.ip(&["link", "set", "lo", "up"])?;
        Ok(namespace)
    }

    /// One that was made before, and stays.
    pub fn existing(name: String) -> Self {
        Self { name, kept: true }
    }

    /// Removes it.
    pub fn remove(&self) -> Result<()> {
        ip(&["netns", "delete", &self.name])
    }

    /// Its name for `ip netns`.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Opens it, to be entered.
    pub fn open(&self) -> Result<File> {
        let path = self.path();
        File::open(&path).with_context(|| format!("cannot open {}", path.display()))
    }

    /// Runs `ip` on it.
    pub fn ip(&self, arguments: &[&str]) -> Result<()> {
        ip(&[&["-n", &self.name], arguments].concat())
    }

    /// Runs `tc` on it.
    pub fn tc(&self, arguments: &[&str]) -> Result<()> {
        run("tc", &[&["-n", &self.name], arguments].concat())
    }

    /// The counters of one of its interfaces.
    pub fn interface(&self, name: &str) -> Result<Interface> {
        let namespace = self.open()?;
        // The table shows the namespace of the thread that opens it, for as long as it is open.
        let open_inside = thread::spawn(move || -> Result<File> {
            setns(&namespace, CloneFlags::CLONE_NEWNET).context("cannot enter the namespace")?;
            File::open("/proc/thread-self/net/dev").context("cannot open the interfaces' counters")
        });
        let table = open_inside.join().map_err(|_| anyhow!("the thread that opens counters panicked"))??;
        Ok(Interface::new(table, name))
    }

    /// The file that stands for it.
    pub fn path(&self) -> PathBuf {
        Path::new(NAMESPACES).join(&self.name)
    }
}

impl Drop for Namespace {
    fn drop(&mut self) {
        if self.kept {
            return;
        }
        if let Err(error) = self.remove() {
            eprintln!("namespace {} is left behind: {error:#}", self.name);
        }
    }
}

impl Hosts {
    /// Makes `count` hosts with links between them that are up.
    pub fn new(count: usize) -> Result<Self> {
        remove_abandoned();
        let set = SETS_MADE.fetch_add(1, Ordering::Relaxed);
        let name = |host| process::own_name(&format!("{set}-{host}"));
        let hosts = (0..count).map(|host| Namespace::create(name(host))).collect::<Result<Vec<_>>>()?;
        let hosts = Self { hosts };
        for first in 0..count {
            for second in first + 1..count {
                hosts.join(first, second)?;
            }
        }
        Ok(hosts)
    }

    /// A host.
    pub fn host(&self, host: usize) -> &Namespace {
        &self.hosts[host]
    }

    /// The address at which `host` is reached from `from`.
    pub fn address(&self, host: usize, from: usize) -> String {
        let (low, high) = (host.min(from), host.max(from));
        format!("10.{low}.{high}.{}", if host < from { 1 } else { 2 })
    }

    /// The counters of `host`'s end of its link to `to`.
    pub fn counters(&self, host: usize, to: usize) -> Result<Interface> {
        self.hosts[host].interface(&link_name(to))
    }

    /// Limits what `host` sends to `to`, as a slow link does. What it lets through at once is worth 1 ms, within what suits buffers:
    /// no wire lets a pause of a few pages through at once.
    pub fn shape(&self, host: usize, to: usize, megabits_per_s: u32) -> Result<()> {
        let (link, rate) = (link_name(to), format!("{megabits_per_s}mbit"));
        let burst = format!("{}kb", (megabits_per_s / 8).clamp(16, 128));
        self.hosts[host]
            .tc(&["qdisc", "replace", "dev", &link, "root", "tbf", "rate", &rate, "burst", &burst, "latency", "50ms"])
    }

    /// Takes the link between two hosts down: its ends see that.
    pub fn take_down(&self, first: usize, second: usize) -> Result<()> {
        self.hosts[first].ip(&["link", "set", &link_name(second), "down"])
    }

    /// Brings the link back up.
    pub fn bring_up(&self, first: usize, second: usize) -> Result<()> {
        self.hosts[first].ip(&["link", "set", &link_name(second), "up"])
    }

    /// Loses every packet from `host` to `to`, while the link looks well: they go to an address that nobody has.
    pub fn lose(&self, host: usize, to: usize) -> Result<()> {
        let (address, link) = (self.address(to, host), link_name(to));
        self.hosts[host].ip(&["neigh", "replace", &address, "lladdr", NOBODY, "nud", "permanent", "dev", &link])
    }

    /// Ends [`Hosts::lose`].
    pub fn find(&self, host: usize, to: usize) -> Result<()> {
        self.hosts[host].ip(&["neigh", "del", &self.address(to, host), "dev", &link_name(to)])
    }

    /// Loses so many of 1000 packets from `host` to `to`, at random, on arrival: nobody is told.
    pub fn lose_some(&self, host: usize, to: usize, per_mille: u32) -> Result<()> {
        let (link, program) = (link_name(host), drop_at_random(per_mille));
        self.hosts[to].tc(&["qdisc", "add", "dev", &link, "clsact"])?;
        self.hosts[to].tc(&["filter", "add", "dev", &link, "ingress", "bpf", "da", "bytecode", &program])
    }

    /// Ends [`Hosts::lose_some`].
    pub fn lose_none(&self, host: usize, to: usize) -> Result<()> {
        self.hosts[to].tc(&["qdisc", "del", "dev", &link_name(host), "clsact"])
    }

    /// Loses every packet in both directions.
    pub fn cut(&self, first: usize, second: usize) -> Result<()> {
        self.lose(first, second)?;
        self.lose(second, first)
    }

    /// Ends [`Hosts::cut`].
    pub fn mend(&self, first: usize, second: usize) -> Result<()> {
        self.find(first, second)?;
        self.find(second, first)
    }

    fn join(&self, first: usize, second: usize) -> Result<()> {
        let (one, other) = (&self.hosts[first], &self.hosts[second]);
        let (one_link, other_link) = (link_name(second), link_name(first));
        ip(&[
            "link",
            "add",
            &one_link,
            "netns",
            &one.name,
            "type",
            "veth",
            "peer",
            "name",
            &other_link,
            "netns",
            &other.name,
        ])?;
        for (host, link, address) in
            [(one, one_link, self.address(first, second)), (other, other_link, self.address(second, first))]
        {
            host.ip(&["address", "add", &format!("{address}/24"), "dev", &link])?;
            host.ip(&["link", "set", &link, "up"])?;
        }
        Ok(())
    }
}

/// A classic BPF program, as `tc` takes it, that drops so many of 1000 packets. Not every kernel has netem.
fn drop_at_random(per_mille: u32) -> String {
    const LOAD_RANDOM: &str = "32 0 0 4294963256";
    const PASS: &str = "6 0 0 4294967295";
    const DROP: &str = "6 0 0 2";
    let limit = u64::from(u32::MAX) * u64::from(per_mille.min(1000)) / 1000;
    // Not less than the limit: on to the next instruction. Less: past it.
    format!("4,{LOAD_RANDOM},53 0 1 {limit},{PASS},{DROP}")
}

/// The name of a host's end of its link to `to`.
fn link_name(to: usize) -> String {
    format!("to-{to}")
}

/// Removes namespaces whose maker was killed before it could.
fn remove_abandoned() {
    for entry in fs::read_dir(NAMESPACES).into_iter().flatten().flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        if process::is_abandoned(&name) {
            // Somebody else may have been faster.
            let _ = ip(&["netns", "delete", &name]);
        }
    }
}

fn ip(arguments: &[&str]) -> Result<()> {
    run("ip", arguments)
}

fn run(program: &str, arguments: &[&str]) -> Result<()> {
    let output = Command::new(program).args(arguments).output().with_context(|| format!("cannot run {program}"))?;
    if !output.status.success() {
        bail!("{program} {}: {}", arguments.join(" "), String::from_utf8_lossy(&output.stderr).trim());
    }
    Ok(())
}
