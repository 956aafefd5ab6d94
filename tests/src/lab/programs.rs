//! Godwit's programs as the hosts get them: copies, so that a build beside a lab that is up changes nothing in it, and
//! without debugging information, which takes long to read where processors are emulated.

use std::fs;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, bail};

/// The program that works in the guest. On the hosts it tells the time.
pub const GUEST_PROGRAM: &str = "lab-guest";

/// The unit tests of godwit-vmm, with those that need VLANs of the kernel's own.
pub const VLAN_TESTS: &str = "vlan-tests";

const PROGRAMS: [&str; 4] = ["godwit-sender", "godwit-receiver", GUEST_PROGRAM, VLAN_TESTS];

/// Copies the programs from the directory `from` to the directory `to`.
pub fn copy(from: &Path, to: &Path) -> Result<()> {
    fs::create_dir_all(to).with_context(|| format!("cannot create {}", to.display()))?;
    for name in PROGRAMS {
        // Names of functions stay, for backtraces.
        let mut command = Command::new("strip");
        command.arg("--strip-debug").arg("-o").arg(to.join(name)).arg(from.join(name));
        let output = command.output().context("cannot run strip")?;
        if !output.status.success() {
            bail!("{name} cannot be copied: {}", String::from_utf8_lossy(&output.stderr).trim());
        }
    }
    Ok(())
}
