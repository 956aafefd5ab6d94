//! The lab: two KVM hosts and a storage host, networks that reach them, and clients beside them.
//!
//! The hosts are virtual machines under QEMU with emulated AMD-V, so that stock kernels run in them and in *their* guests
//! wherever QEMU runs. Nothing is installed on this machine and its own network is not touched. docs/lab.md shows the
//! whole; the modules are its parts:
//!
//! | module | what |
//! |---|---|
//! | [`layout`] | hosts, networks and addresses |
//! | [`tree`], [`image`] | Debian trees and the guest's disk, kept between runs |
//! | [`cpio`], [`initramfs`] | what the hosts boot with |
//! | [`programs`] | Godwit's programs as the hosts get them |
//! | [`tsc`] | the rate of the hosts' time-stamp counters |
//! | [`network`], [`machine`] | bridges and clients; the hosts' processes |
//! | [`remote`] | commands on the hosts |
//! | [`state`] | what has to be removed, by whoever comes next if need be |

use std::fs::{self, File};
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use nix::fcntl::{Flock, FlockArg};
use sha2::{Digest, Sha256};

use crate::netns::Namespace;
use image::{GuestKernel, Image};
use initramfs::Kernel;
use layout::{HOSTS, Network, NfsVersion};
use machine::Boot;
use network::Wires;
use remote::Host;
use state::State;
use tree::Recipe;

pub mod cpio;
pub mod image;
pub mod initramfs;
pub mod layout;
pub mod machine;
pub mod network;
pub mod programs;
pub mod remote;
pub mod state;
pub mod tree;
pub mod tsc;

/// What the hosts have beside Debian's essential packages: servers, and what one looks around with.
const PACKAGES: [&str; 18] = [
    "linux-image-amd64",
    "busybox-static",
    "kmod",
    "nfs-kernel-server",
    "nfs-common",
    "rpcbind",
    "openssh-server",
    "openssh-client",
    "iproute2",
    "iputils-ping",
    "procps",
    "e2fsprogs",
    "tcpdump",
    "ethtool",
    "netcat-openbsd",
    "socat",
    "strace",
    "qemu-utils",
];

/// The size of storage's disk, as mke2fs takes it. It is sparse.
const STORAGE_SIZE: &str = "4G";
/// What a lab writes while it runs, in bytes.
const RUN_SPACE: u64 = 3 << 30;

/// How long all hosts together may take to be up.
const BOOT_LIMIT: Duration = Duration::from_secs(240);

/// How a lab is to be.
#[derive(Clone, Copy, Debug, Default)]
pub struct Options {
    /// How the KVM hosts mount from storage.
    pub nfs: NfsVersion,
    /// The guest's kernel.
    pub guest_kernel: GuestKernel,
    /// Whether the lab outlives this process. If not, it dies with the thread that brings it up, however that ends.
    pub kept: bool,
}

/// A lab that is up.
pub struct Lab {
    run: PathBuf,
    state: State,
    wires: Wires,
    hosts: Vec<Host>,
    kept: bool,
    /// While we have it, no other process brings a lab up or down here.
    _lock: Option<Flock<File>>,
}

impl Lab {
    /// Brings a lab up under `target`, with the programs in `programs` in its hosts.
    pub fn up(target: &Path, programs: &Path, options: Options) -> Result<Self> {
        let lab = directory(target);
        fs::create_dir_all(&lab).with_context(|| format!("cannot create {}", lab.display()))?;
        let lab = lab.canonicalize()?;
        let lock = lock(&lab)?;
        let run = lab.join("run");
        clear(&run)?;

        let packages = PACKAGES.to_vec();
        let tree = Recipe { name: "tree".into(), packages, hook: None }.kept(&lab, |_| Ok(()))?.join("tree");
        let image = Image::kept(&lab, options.guest_kernel)?;
        tree::require_space(&lab, RUN_SPACE)?;

        let instance = instance(&lab);
        let sockets = Path::new("/run").join(&instance);
        let namespaces = Wires::names(&instance).to_vec();
        let state = State { sockets: sockets.clone(), tree: tree.clone(), namespaces, processes: Vec::new() };
        // Written down before it is made.
        state.save(&run)?;
        fs::DirBuilder::new().mode(0o700).create(&sockets).with_context(|| sockets.display().to_string())?;
        let wires = Wires::create(&instance)?;
        let hosts = HOSTS.iter().map(|plan| Host::new(plan, &tree, &run, &sockets)).collect();
        let mut up = Self { run, state, wires, hosts, kept: false, _lock: Some(lock) };
        up.boot(&tree, programs, &image, options).context("the lab did not come up")?;
        up.kept = options.kept;
        Ok(up)
    }

    /// The lab that another process has brought up under `target`.
    pub fn existing(target: &Path) -> Result<Self> {
        let run = directory(target).join("run");
        let state = State::load(&run)?.filter(State::is_up).context("no lab is up: `cargo xtask lab up`")?;
        let run = run.canonicalize()?;
        let wires = Wires::existing(&instance(&directory(target).canonicalize()?));
        let hosts = HOSTS.iter().map(|plan| Host::new(plan, &state.tree, &run, &state.sockets)).collect();
        Ok(Self { run, state, wires, hosts, kept: true, _lock: None })
    }

    /// Takes down the lab under `target`, if there is one. Says whether there was.
    pub fn remove(target: &Path) -> Result<bool> {
        let lab = directory(target);
        if !lab.exists() {
            return Ok(false);
        }
        let _lock = lock(&lab)?;
        let run = lab.join("run");
        match State::load(&run)? {
            Some(state) => state.remove(&run).map(|()| true),
            None => Ok(false),
        }
    }

    /// Takes it down. Dropping it does so, too, unless it is kept.
    pub fn down(mut self) -> Result<()> {
        self.kept = true;
        std::mem::take(&mut self.state).remove(&self.run)
    }

    /// A host.
    pub fn host(&self, name: &str) -> Result<&Host> {
        let names = || HOSTS.map(|host| host.name).join(", ");
        self.hosts.iter().find(|host| host.name() == name).with_context(|| format!("no host {name}: {}", names()))
    }

    /// The client in the public network, from which the guest's public side is seen.
    pub fn public_client(&self) -> &Namespace {
        &self.wires.public_client
    }

    /// The client in the private network, behind the guest.
    pub fn private_client(&self) -> &Namespace {
        &self.wires.private_client
    }

    /// The namespace with the bridges, which are called as their networks are.
    pub fn switch(&self) -> &Namespace {
        &self.wires.switch
    }

    /// Where logs lie.
    pub fn run_directory(&self) -> &Path {
        &self.run
    }

    /// The tree of Debian programs that the hosts share.
    pub fn tree(&self) -> &Path {
        &self.state.tree
    }

    fn boot(&mut self, tree: &Path, programs: &Path, image: &Image, options: Options) -> Result<()> {
        let start = Instant::now();
        let kernel = Kernel::of_tree(tree)?;
        let initramfs = self.run.join("initramfs");
        fs::write(&initramfs, initramfs::build(tree, &kernel)?).context("cannot write the initramfs")?;
        self.write_settings(options.nfs)?;
        let own_programs = self.run.join("bin");
        programs::copy(programs, &own_programs)?;
        let disk = self.make_disk(image, &own_programs)?;

        let boot = Boot {
            kernel: &kernel.image,
            initramfs: &initramfs,
            tree,
            programs: &own_programs,
            run: &self.run,
            tsc_khz: tsc::khz(),
        };
        let mut machines = Vec::new();
        for plan in &HOSTS {
            let disk = (plan.role == "storage").then_some(disk.as_path());
            let process = machine::start(plan, &boot, disk, &self.wires.switch, options.kept)?;
            self.state.processes.push(process.clone());
            self.state.save(&self.run)?;
            machines.push(process);
        }
        for (host, machine) in self.hosts.iter().zip(&machines) {
            let left = BOOT_LIMIT.saturating_sub(start.elapsed());
            let master = host.connect(machine, &self.wires.switch, options.kept, left)?;
            self.state.processes.push(master);
            self.state.save(&self.run)?;
        }
        for host in &self.hosts {
            let ended = "while ! [ -e /run/lab/ready ] && ! [ -e /run/lab/failed ]; do sleep 0.2; done";
            host.run_within(ended, BOOT_LIMIT.saturating_sub(start.elapsed()))?;
            host.check("! cat /run/lab/failed 2>/dev/null").with_context(|| host.describe())?;
        }
        Ok(())
    }

    /// What each host reads when it boots, and the keys by which it is reached.
    fn write_settings(&self, nfs: NfsVersion) -> Result<()> {
        self.make_key(&self.run.join(remote::KEY))?;
        let mut known_hosts = String::new();
        for host in &HOSTS {
            let settings = machine::settings(&self.run, host.name)?;
            let host_key = settings.join("host_key");
            self.make_key(&host_key)?;
            let public = fs::read_to_string(host_key.with_extension("pub"))?;
            known_hosts += &format!("{} {public}", Network::Management.address(host.number));
            fs::copy(self.run.join(remote::KEY).with_extension("pub"), settings.join("authorized_keys"))?;
            fs::write(settings.join("boot"), include_str!("files/host-boot.sh"))?;
            fs::write(settings.join("sshd_config"), include_str!("files/sshd_config"))?;
            fs::write(settings.join("hosts"), layout::hosts_file())?;
            fs::write(settings.join("machine-id"), machine_id()?)?;
            fs::write(settings.join("settings"), host.settings(nfs))?;
        }
        fs::write(self.run.join("known_hosts"), known_hosts).context("cannot write the known hosts")
    }

    fn make_key(&self, path: &Path) -> Result<()> {
        let mut command = remote::tree_program(&self.state.tree, "ssh-keygen");
        let output = command.args(["-q", "-t", "ed25519", "-N", "", "-C", "lab", "-f"]).arg(path).output()?;
        if !output.status.success() {
            bail!("ssh-keygen: {}", String::from_utf8_lossy(&output.stderr).trim());
        }
        Ok(())
    }

    /// Makes storage's disk, with the guest on it.
    fn make_disk(&self, image: &Image, programs: &Path) -> Result<PathBuf> {
        // As storage exports it: the disk is the root that NFSv4's clients see.
        let export = self.run.join("disk");
        image.copy_to(&export.join("srv/godwit/fw1"), programs)?;
        let disk = self.run.join("storage.img");
        image::make_ext4(&disk, STORAGE_SIZE, &export)?;
        fs::remove_dir_all(&export).context("cannot remove what the disk was made of")?;
        Ok(disk)
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        if self.kept {
            return;
        }
        if let Err(error) = std::mem::take(&mut self.state).remove(&self.run) {
            eprintln!("the lab is left behind: {error:#}; `cargo xtask lab down` removes it");
        }
    }
}

/// A command of the tree's, such as ping or tcpdump, to be run in a network namespace. It sees the tree as its root,
/// read only.
pub fn client_command(lab: &Lab, client: &Namespace, words: &[String]) -> Command {
    const SCRIPT: &str = r#"set -e
mount --bind "$0" "$0"
mount -o remount,ro,bind "$0"
for directory in dev proc sys tmp; do mount --bind "/$directory" "$0/$directory"; done
exec chroot "$0" "$@""#;
    let mut command = Command::new("ip");
    command.args(["netns", "exec", client.name(), "unshare", "--mount", "sh", "-c", SCRIPT]);
    command.arg(lab.tree()).args(words).env("PATH", "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin");
    command
}

/// Where everything of the lab lies.
fn directory(target: &Path) -> PathBuf {
    target.join("lab")
}

/// One process at a time. Who waits for a lab that is up is told instead.
fn lock(lab: &Path) -> Result<Flock<File>> {
    let path = lab.join("lock");
    let file = File::create(&path).with_context(|| format!("cannot create {}", path.display()))?;
    match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
        Ok(lock) => Ok(lock),
        Err(_) => bail!("another process uses the lab in {}", lab.display()),
    }
}

/// Makes `run` empty. Removes a lab whose process has gone; one that is up stays, and is an error.
fn clear(run: &Path) -> Result<()> {
    match State::load(run)? {
        Some(state) if state.is_up() => bail!("a lab is up already: `cargo xtask lab down` takes it down"),
        Some(state) => state.remove(run)?,
        None => {}
    }
    if run.exists() {
        fs::remove_dir_all(run).with_context(|| format!("cannot remove {}", run.display()))?;
    }
    fs::DirBuilder::new().mode(0o700).create(run).with_context(|| format!("cannot create {}", run.display()))
}

/// A name that no other lab on this machine has: one per directory.
fn instance(lab: &Path) -> String {
    let hash = Sha256::digest(lab.as_os_str().as_encoded_bytes());
    format!("godwit-lab-{}", hash.iter().take(3).map(|byte| format!("{byte:02x}")).collect::<String>())
}

/// A machine id as systemd writes them.
fn machine_id() -> Result<String> {
    let random = fs::read_to_string("/proc/sys/kernel/random/uuid").context("no random machine id")?;
    Ok(random.replace('-', ""))
}
