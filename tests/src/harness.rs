//! Tests that say at run time why they cannot run here.
//!
//! A test that lacks something is listed as ignored, with the reason in its name; `cargo xtask test` counts and names
//! it. A test that fails shows what every process of its scene wrote.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::{env, fs};

use anyhow::{Context, Result};
use libtest_mimic::{Arguments, Failed, Trial};
use tempfile::TempDir;

use crate::{fuse, process};

/// What a test needs that not every machine has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Need {
    /// /dev/kvm, usable.
    Kvm,
    /// Root, for network namespaces.
    Root,
    /// /dev/fuse, and the right to mount.
    Fuse,
    /// QEMU.
    Qemu,
    /// QEMU's program for disk images.
    QemuImg,
    /// GNU as and ld.
    Assembler,
}

impl Need {
    /// What is missing, if it is.
    fn missing(self) -> Option<&'static str> {
        let there = match self {
            Need::Kvm => fs::File::options().read(true).write(true).open("/dev/kvm").is_ok(),
            Need::Root => nix::unistd::geteuid().is_root(),
            Need::Fuse => nix::unistd::geteuid().is_root() && Path::new("/dev/fuse").exists(),
            Need::Qemu => Command::new("qemu-system-x86_64").arg("--version").output().is_ok(),
            Need::QemuImg => Command::new("qemu-img").arg("--version").output().is_ok(),
            Need::Assembler => ["as", "ld"].iter().all(|tool| Command::new(tool).arg("--version").output().is_ok()),
        };
        let name = match self {
            Need::Kvm => "/dev/kvm",
            Need::Root => "root",
            Need::Fuse => "/dev/fuse and root",
            Need::Qemu => "qemu-system-x86_64",
            Need::QemuImg => "qemu-img",
            Need::Assembler => "binutils",
        };
        (!there).then_some(name)
    }
}

/// Where a test runs: a directory for its sockets and logs, removed with it.
pub struct Scene {
    directory: TempDir,
}

impl Scene {
    /// An empty one.
    pub fn new() -> Result<Self> {
        remove_abandoned();
        let prefix = process::own_name("");
        let directory = tempfile::Builder::new().prefix(&prefix).tempdir().context("cannot make a directory")?;
        Ok(Self { directory })
    }

    /// The directory.
    pub fn path(&self) -> &Path {
        self.directory.path()
    }

    /// The end of every log in it.
    pub fn logs(&self) -> String {
        let mut logs: Vec<PathBuf> =
            fs::read_dir(self.path()).into_iter().flatten().flatten().map(|entry| entry.path()).collect();
        logs.retain(|path| path.extension().is_some_and(|extension| extension == "log" || extension == "out"));
        logs.sort();
        let show = |path: &PathBuf| {
            let text = fs::read(path).unwrap_or_default();
            format!("{}:\n{}", path.display(), process::tail(&String::from_utf8_lossy(&text)))
        };
        logs.iter().map(show).collect()
    }
}

/// Removes directories whose maker was killed before it could.
fn remove_abandoned() {
    for entry in fs::read_dir(env::temp_dir()).into_iter().flatten().flatten() {
        if process::is_abandoned(&entry.file_name().to_string_lossy()) {
            fuse::detach_all_in(&entry.path());
            // Somebody else may have been faster.
            let _ = fs::remove_dir_all(entry.path());
        }
    }
}

/// A test that needs `needs` and fails if `run` gives an error.
pub fn test(name: impl Into<String>, needs: &[Need], run: impl FnOnce(&Scene) -> Result<()> + Send + 'static) -> Trial {
    let name = name.into();
    let missing: Vec<_> = needs.iter().filter_map(|need| need.missing()).collect();
    if !missing.is_empty() {
        return Trial::test(format!("{name} (needs {})", missing.join(", ")), || Ok(())).with_ignored_flag(true);
    }
    Trial::test(name, move || {
        let scene = Scene::new().map_err(|error| format!("{error:#}"))?;
        run(&scene).map_err(|error| Failed::from(format!("{error:#}\n\n{}", scene.logs())))
    })
}

/// Runs the tests of one binary as its arguments say.
pub fn main(tests: Vec<Trial>) -> ! {
    libtest_mimic::run(&Arguments::from_args(), tests).exit()
}

/// Where cargo put the binaries that were built with this one.
pub fn binary(name: &str) -> Result<PathBuf> {
    let own = env::current_exe().context("cannot tell where this program lies")?;
    let near = own.ancestors().skip(1).take(2).map(|directory| directory.join(name));
    near.into_iter()
        .find(|path| path.is_file())
        .with_context(|| format!("{name} is not built: `cargo build --workspace --bins` (cargo xtask test does it)"))
}
