//! Shared storage that misbehaves on demand: a folder seen through a FUSE mount, one mount per host.
//!
//! The file system passes calls on to a folder of this host. A test decides at any time what becomes of them: they
//! are slow, hang, are refused, or take effect without the caller hearing of it. Several mounts of one folder stand for the hosts
//! that share it; nothing is cached, so that each sees at once what the others do.
//!
//! Locks on files are each mount's own: one host does not see another's.
//!
//! The server of a mount is a process of its own (`fuse-store`). It unmounts and ends when its owner is dropped or dies.
//!
//! | module | what |
//! |---|---|
//! | [`mode`] | what becomes of calls, and of which |
//! | [`gate`] | makes, holds and refuses calls as the mode says |
//! | [`tree`] | the folder behind the mount |
//! | [`passthrough`] | the file system, as the kernel asks for it |

pub mod gate;
pub mod mode;
pub mod passthrough;
pub mod tree;

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use nix::mount::{MntFlags, umount2};
use nix::unistd::Pid;

use crate::harness::binary;
use crate::wait;
pub use mode::{Calls, Mode};

/// What the kernel calls such mounts.
pub const KIND: &str = "godwit-test";

/// A folder as one host sees it. Dropping it unmounts it, also when callers hang in it.
pub struct FuseStore {
    mountpoint: PathBuf,
    server: Mutex<Server>,
}

struct Server {
    process: Child,
    commands: ChildStdin,
    answers: BufReader<ChildStdout>,
}

impl FuseStore {
    /// Mounts `backing`, which exists, at `mountpoint`, which is made if it is not there. Calls behave normally.
    pub fn mount(backing: &Path, mountpoint: &Path) -> Result<Self> {
        fs::create_dir_all(mountpoint).with_context(|| format!("cannot make {}", mountpoint.display()))?;
        let mut process = Command::new(binary("fuse-store")?)
            .args([backing, mountpoint])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .context("cannot start fuse-store")?;
        let pipes = process.stdin.take().zip(process.stdout.take());
        let (commands, answers) = pipes.context("fuse-store has no pipes")?;
        let server = Server { process, commands, answers: BufReader::new(answers) };
        // From here on it is unmounted whatever happens.
        let store = Self { mountpoint: mountpoint.to_owned(), server: Mutex::new(server) };
        store.server().answer().with_context(|| format!("cannot mount {}", mountpoint.display()))?;
        Ok(store)
    }

    /// Where it is mounted.
    pub fn path(&self) -> &Path {
        &self.mountpoint
    }

    /// Has all calls behave as `mode` says from now on, those that are held included.
    pub fn set(&self, mode: Mode) -> Result<()> {
        self.set_for(Calls::All, mode)
    }

    /// Has `calls` behave as `mode` says from now on, those that are held included, and all others normally.
    pub fn set_for(&self, calls: Calls, mode: Mode) -> Result<()> {
        self.server().ask(&format!("{calls} {mode}")).map(drop)
    }

    /// How many callers hang in it now.
    pub fn held(&self) -> Result<usize> {
        let answer = self.server().ask("held")?;
        answer.parse().with_context(|| format!("fuse-store answered `{answer}`"))
    }

    /// Waits until somebody hangs in it.
    pub fn wait_until_held(&self, limit: Duration) -> Result<()> {
        let what = format!("a call hangs in {}", self.mountpoint.display());
        wait::until_true(&what, limit, || Ok(self.held()? > 0))
    }

    /// The server's process, to be stopped and continued. Commands to a stopped one wait.
    pub fn pid(&self) -> Pid {
        Pid::from_raw(self.server().process.id() as i32)
    }

    fn server(&self) -> std::sync::MutexGuard<'_, Server> {
        self.server.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Server {
    fn ask(&mut self, command: &str) -> Result<String> {
        writeln!(self.commands, "{command}").context("fuse-store is gone")?;
        self.answer().with_context(|| command.to_owned())
    }

    fn answer(&mut self) -> Result<String> {
        let mut line = String::new();
        self.answers.read_line(&mut line).context("fuse-store is gone")?;
        ensure!(!line.is_empty(), "fuse-store has ended");
        match line.trim_end_matches('\n').split_once(' ') {
            Some(("ok", rest)) => Ok(rest.to_owned()),
            Some(("error", why)) => bail!("{why}"),
            _ => bail!("fuse-store answered `{line}`"),
        }
    }
}

impl Drop for FuseStore {
    fn drop(&mut self) {
        // It may never have been mounted.
        let _ = detach(&self.mountpoint);
        let server = self.server.get_mut().unwrap_or_else(PoisonError::into_inner);
        // With its last server gone the kernel ends every call that hangs. Both fail only if it is gone already.
        let _ = server.process.kill();
        let _ = server.process.wait();
    }
}

/// Takes mounts out of the tree that lie in `folder`, whose maker is gone. Does not look at what is in them, which might hang.
pub(crate) fn detach_all_in(folder: &Path) {
    let mounts = fs::read_to_string("/proc/self/mounts").unwrap_or_default();
    for mountpoint in mounts.lines().filter_map(|line| line.split(' ').nth(1)).map(Path::new) {
        if mountpoint.starts_with(folder) {
            // Its server may have been faster.
            let _ = detach(mountpoint);
        }
    }
}

/// Takes the mount out of the tree, whether or not it is in use or answers.
fn detach(mountpoint: &Path) -> nix::Result<()> {
    umount2(mountpoint, MntFlags::MNT_DETACH)
}
