//! The storage that both hosts share, as each of them sees it: through a mount of its own, which can be put into trouble alone.

use std::fs::{self, File};
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result};
use nix::errno::Errno;

use super::world::HOSTS;
use crate::fuse::{Calls, FuseStore, Mode};
use crate::harness::Scene;

/// The machine's disk, which the guest leaves alone. Its claims lie beside it.
const DISK: &str = "machine.img";
const DISK_BYTES: u64 = 4 << 20;

/// What a store suffers from, at one host.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Trouble {
    /// Calls hang.
    Unreachable,
    /// Claims are made, their answers do not come.
    Mute,
    /// Claims are made, and answered with an error.
    Unsure,
    /// Every call takes so long.
    Slow(Duration),
    /// There is no space for anything new.
    Full,
}

/// One directory, seen by both.
pub struct Stores {
    mounts: Vec<FuseStore>,
    backing: PathBuf,
}

impl Stores {
    /// Only the machine's disk is in it.
    pub fn new(scene: &Scene) -> Result<Self> {
        let backing = scene.path().join("storage");
        let disk = backing.join(DISK);
        let make = || fs::create_dir(&backing).and_then(|()| File::create(&disk)?.set_len(DISK_BYTES));
        make().with_context(|| format!("cannot make {}", disk.display()))?;
        let mount = |host: &&str| FuseStore::mount(&backing, &scene.path().join(format!("storage-of-{host}")));
        let mounts = HOSTS.iter().map(mount).collect::<Result<_>>()?;
        Ok(Self { mounts, backing })
    }

    /// What a sender's `--disk` says on `host`.
    pub fn disk_of_sender(&self, host: usize) -> String {
        format!("id=data,path={}", self.path(host).join(DISK).display())
    }

    /// What a receiver's `--map-disk` says on `host`.
    pub fn disk_of_receiver(&self, host: usize) -> String {
        format!("data={}", self.path(host).join(DISK).display())
    }

    /// What `host` suffers from, from now on.
    pub fn trouble(&self, host: usize, trouble: Option<Trouble>) -> Result<()> {
        let (calls, mode) = match trouble {
            None => (Calls::All, Mode::Normal),
            Some(Trouble::Unreachable) => (Calls::All, Mode::Unreachable),
            Some(Trouble::Mute) => (Calls::Links, Mode::Mute),
            Some(Trouble::Unsure) => (Calls::Links, Mode::Unsure(Errno::EIO)),
            Some(Trouble::Slow(delay)) => (Calls::All, Mode::Slow(delay)),
            Some(Trouble::Full) => (Calls::Changes, Mode::Refusing(Errno::ENOSPC)),
        };
        self.mounts[host].set_for(calls, mode)
    }

    /// Where the claims really are: nothing troubles whoever looks there.
    pub fn claims(&self) -> PathBuf {
        self.backing.join(format!("{DISK}.godwit"))
    }

    fn path(&self, host: usize) -> &std::path::Path {
        self.mounts[host].path()
    }
}
