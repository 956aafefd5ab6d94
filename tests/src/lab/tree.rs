//! Debian trees made by mmdebstrap, kept between runs.
//!
//! What is kept lies in a directory named after a hash of its recipe, so that a changed recipe makes a new one. It is
//! built under another name and renamed when it is complete: half of one is never used.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Instant;

use anyhow::{Context, Result, bail};
use nix::sys::statvfs::statvfs;
use sha2::{Digest, Sha256};

use crate::process;

const SUITE: &str = "bookworm";

/// Changes when the same recipe is to give something else.
const FORMAT: u32 = 1;

/// What a tree may need on the disk while it is built, in bytes.
const SPACE: u64 = 3 << 30;

/// What a tree is made of.
pub struct Recipe {
    /// What it is, as part of a file name.
    pub name: String,
    /// Debian packages beside the essential ones.
    pub packages: Vec<&'static str>,
    /// A program that is given the tree to finish it.
    pub hook: Option<&'static str>,
}

impl Recipe {
    /// Where the result is kept under `lab`; builds it there, if it is not. `finish` turns the directory that holds
    /// the tree as `tree` into what is to be kept.
    pub fn kept(&self, lab: &Path, finish: impl FnOnce(&Path) -> Result<()>) -> Result<PathBuf> {
        let kept = lab.join(format!("{}-{}", self.name, self.hash()));
        if !kept.exists() {
            self.build(lab, &kept, finish).with_context(|| format!("cannot build {}", kept.display()))?;
            self.remove_outdated(lab, &kept);
        }
        Ok(kept)
    }

    fn build(&self, lab: &Path, kept: &Path, finish: impl FnOnce(&Path) -> Result<()>) -> Result<()> {
        let start = Instant::now();
        require_space(lab, SPACE)?;
        eprintln!("building {} from Debian packages; it is kept for the next time", kept.display());
        let part = tempfile::Builder::new().prefix(&format!("{}.part-", self.name)).tempdir_in(lab)?;
        // Made for its owner alone; the tree's programs run as others too.
        fs::set_permissions(part.path(), fs::Permissions::from_mode(0o755))?;
        let log = lab.join(format!("{}.log", self.name));
        let mut command = Command::new("mmdebstrap");
        command.args(["--variant=minbase", "--format=directory"]);
        command.arg(format!("--include={}", self.packages.join(",")));
        let hook = part.path().join("hook");
        if let Some(text) = self.hook {
            fs::write(&hook, text)?;
            fs::set_permissions(&hook, fs::Permissions::from_mode(0o755))?;
            command.arg(format!("--customize-hook={}", hook.display()));
        }
        command.arg(SUITE).arg(part.path().join("tree"));
        let output = fs::File::create(&log).with_context(|| format!("cannot create {}", log.display()))?;
        let status = command.stdout(output.try_clone()?).stderr(output).status().context("cannot run mmdebstrap")?;
        if !status.success() {
            let text = fs::read(&log).unwrap_or_default();
            let tail = process::tail(&String::from_utf8_lossy(&text));
            bail!("mmdebstrap ended with {status}; the end of {}:\n{tail}", log.display());
        }
        finish(part.path())?;
        fs::rename(part.keep(), kept)?;
        eprintln!("built {} in {:.0} s", kept.display(), start.elapsed().as_secs_f64());
        Ok(())
    }

    /// Removes results of earlier recipes and what was left half built.
    fn remove_outdated(&self, lab: &Path, kept: &Path) {
        for entry in fs::read_dir(lab).into_iter().flatten().flatten() {
            let name = entry.file_name().to_string_lossy().into_owned();
            let ours = name.strip_prefix(&self.name).is_some_and(|rest| rest.starts_with(['-', '.']));
            if ours && entry.path() != kept && entry.path().is_dir() {
                // The disk may fill, nothing worse.
                let _ = fs::remove_dir_all(entry.path());
            }
        }
    }

    fn hash(&self) -> String {
        let text = format!("{FORMAT}\n{SUITE}\n{}\n{}", self.packages.join(" "), self.hook.unwrap_or_default());
        Sha256::digest(text).iter().take(6).map(|byte| format!("{byte:02x}")).collect()
    }
}

/// Fails if fewer than `bytes` are free where `path` lies.
pub fn require_space(path: &Path, bytes: u64) -> Result<()> {
    let disk = statvfs(path).with_context(|| format!("cannot tell what is free at {}", path.display()))?;
    let free = disk.blocks_available() * disk.fragment_size();
    if free < bytes {
        let gib = |bytes: u64| bytes as f64 / f64::from(1 << 30);
        bail!("{:.1} GiB are free at {}; the lab needs {:.1} GiB", gib(free), path.display(), gib(bytes));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn recipe(packages: &[&'static str], hook: Option<&'static str>) -> Recipe {
        Recipe { name: "root".into(), packages: packages.to_vec(), hook }
    }

    #[test]
    fn another_recipe_is_kept_elsewhere() {
        let first = recipe(&["kmod"], None).hash();
        assert_eq!(first, recipe(&["kmod"], None).hash());
        assert_ne!(first, recipe(&["kmod", "tini"], None).hash());
        assert_ne!(first, recipe(&["kmod"], Some("true")).hash());
    }

    #[test]
    fn what_is_outdated_goes_and_the_rest_stays() {
        let lab = tempfile::tempdir().unwrap();
        for name in ["root-old", "root.part-x", "root-new", "rootless", "run"] {
            fs::create_dir(lab.path().join(name)).unwrap();
        }
        recipe(&[], None).remove_outdated(lab.path(), &lab.path().join("root-new"));
        let left =
            ["root-old", "root.part-x", "root-new", "rootless", "run"].map(|name| lab.path().join(name).exists());
        assert_eq!(left, [false, false, true, true, true]);
    }

    #[test]
    fn too_little_space_is_said() {
        let error = require_space(Path::new("/"), u64::MAX).unwrap_err();
        assert!(error.to_string().contains("the lab needs"), "{error}");
    }
}
