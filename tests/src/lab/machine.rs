//! A host of the lab: a virtual machine whose processors, AMD-V included, are emulated by QEMU.

use std::fs::{self, File};
use std::io;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result};
use nix::sched::{CloneFlags, setns};
use nix::sys::prctl;
use nix::sys::signal::Signal;
use nix::unistd::setsid;

use super::layout::HostPlan;
use super::state::Recorded;
use crate::netns::Namespace;

/// What all hosts boot from.
pub struct Boot<'a> {
    /// The kernel's image.
    pub kernel: &'a Path,
    /// The initramfs.
    pub initramfs: &'a Path,
    /// The root that all hosts share.
    pub tree: &'a Path,
    /// Godwit's programs.
    pub programs: &'a Path,
    /// Where logs and the hosts' settings lie.
    pub run: &'a Path,
    /// What all hosts take for the rate of their time-stamp counters.
    pub tsc_khz: u64,
}

/// The kernel's command line. Mitigations cost much and protect nothing where every instruction is emulated; the kernel finds the
/// time-stamp counter unstable after a while, and would measure its rate anew until then.
const COMMAND_LINE: &str = "console=ttyS0 loglevel=5 net.ifnames=0 mitigations=off panic=1 tsc=unstable";

/// With event indices, QEMU before 9.1 can miss that the host has given it buffers again after they had run out, and then waits
/// for ever: hosts that get little processor time were deaf for many seconds.
const NIC_OPTIONS: &str = "romfile=,event_idx=off";

/// Starts `host`, with its NICs in the namespace `switch`. It outlives us if `kept`.
pub fn start(
    host: &HostPlan,
    boot: &Boot<'_>,
    disk: Option<&Path>,
    switch: &Namespace,
    kept: bool,
) -> Result<Recorded> {
    let log = program_log(boot.run, host.name);
    let mut command = qemu(host, boot, disk);
    command.stdin(Stdio::null()).stdout(Stdio::null());
    command.stderr(File::create(&log).with_context(|| format!("cannot create {}", log.display()))?);
    start_in(&mut command, switch, kept, host.name)
}

/// Starts a process of the lab in a namespace, in a session of its own so that Ctrl-C is not for it.
pub fn start_in(command: &mut Command, namespace: &Namespace, kept: bool, name: &str) -> Result<Recorded> {
    let namespace = namespace.open()?;
    let setup = move || -> io::Result<()> {
        setsid()?;
        if !kept {
            prctl::set_pdeathsig(Signal::SIGKILL)?;
        }
        setns(&namespace, CloneFlags::CLONE_NEWNET)?;
        Ok(())
    };
    // SAFETY: between fork and exec the closure makes three system calls and allocates nothing.
    unsafe { command.pre_exec(setup) };
    let child = command.spawn().with_context(|| format!("cannot start {:?}", command.get_program()))?;
    Recorded::new(name, child.id())
}

/// Where a host's console is written.
pub fn console_log(run: &Path, host: &str) -> PathBuf {
    run.join(format!("{host}.console.log"))
}

/// Where what a host's QEMU says is written.
pub fn program_log(run: &Path, host: &str) -> PathBuf {
    run.join(format!("{host}.qemu.log"))
}

/// Where a host's settings lie, which it sees at `/opt/godwit/host`.
pub fn settings(run: &Path, host: &str) -> Result<PathBuf> {
    let path = run.join(host);
    fs::create_dir_all(&path).with_context(|| format!("cannot create {}", path.display()))?;
    Ok(path)
}

fn qemu(host: &HostPlan, boot: &Boot<'_>, disk: Option<&Path>) -> Command {
    let mut command = Command::new("qemu-system-x86_64");
    command
        .args(["-name", host.name, "-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"])
        .args(["-machine", "q35", "-accel", "tcg,thread=multi", "-cpu", "max,+svm"])
        .args(["-smp", &host.cpus.to_string(), "-m", &format!("{}M", host.memory_mib)])
        .args(["-append", &format!("{COMMAND_LINE} tsc_early_khz={}", boot.tsc_khz), "-device", "virtio-rng-pci"])
        .arg("-kernel")
        .arg(boot.kernel)
        .arg("-initrd")
        .arg(boot.initramfs)
        .arg("-serial")
        .arg(format!("file:{}", option_value(&console_log(boot.run, host.name))));
    for (tag, path) in [("tree", boot.tree), ("bin", boot.programs), ("host", &boot.run.join(host.name))] {
        command.arg("-virtfs").arg(format!(
            "local,id={tag},mount_tag={tag},path={},security_model=none,readonly=on,multidevs=remap",
            option_value(path)
        ));
    }
    for (index, network) in host.networks.iter().enumerate() {
        let tap = host.tap(*network);
        command.args(["-netdev", &format!("tap,id=net{index},ifname={tap},script=no,downscript=no")]);
        let mac = network.link_address(host.number);
        command.args(["-device", &format!("virtio-net-pci,netdev=net{index},mac={mac},{NIC_OPTIONS}")]);
    }
    if let Some(disk) = disk {
        let file = option_value(disk);
        command.args(["-drive", &format!("file={file},format=raw,if=virtio,cache=unsafe")]);
    }
    command
}

/// A path as a value among QEMU's options, where commas separate.
fn option_value(path: &Path) -> String {
    path.to_string_lossy().replace(',', ",,")
}
