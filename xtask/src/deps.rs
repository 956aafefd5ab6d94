//! The tools that the project's commands use: which are missing, and how to get them.

use std::process::{Command, ExitCode, Stdio};

use anyhow::{Result, bail};

use crate::shell;

/// A program that is not part of a Rust toolchain's minimum.
struct Tool {
    name: &'static str,
    /// Arguments that make it say its version.
    probe: &'static [&'static str],
    source: Source,
    needed_for: &'static str,
}

enum Source {
    /// A Debian package.
    Apt(&'static str),
    /// A crate with a program.
    Cargo(&'static str),
    /// A component of the toolchain.
    Rustup(&'static str),
}

const TOOLS: &[Tool] = &[
    Tool { name: "cc", probe: &["--version"], source: Source::Apt("gcc"), needed_for: "building" },
    Tool { name: "as", probe: &["--version"], source: Source::Apt("binutils"), needed_for: "tests with other guests" },
    Tool { name: "ip", probe: &["-V"], source: Source::Apt("iproute2"), needed_for: "demo, tests over networks" },
    Tool { name: "tc", probe: &["-V"], source: Source::Apt("iproute2"), needed_for: "tests over slow links" },
    Tool {
        name: "qemu-system-x86_64",
        probe: &["--version"],
        source: Source::Apt("qemu-system-x86"),
        needed_for: "the lab, the test that the workload guest boots elsewhere, comparisons",
    },
    Tool {
        name: "qemu-img",
        probe: &["--version"],
        source: Source::Apt("qemu-utils"),
        needed_for: "tests of the locks on disk images",
    },
    Tool { name: "mmdebstrap", probe: &["--version"], source: Source::Apt("mmdebstrap"), needed_for: "the lab" },
    Tool { name: "iasl", probe: &["-v"], source: Source::Apt("acpica-tools"), needed_for: "tests of the ACPI tables" },
    Tool { name: "mke2fs", probe: &["-V"], source: Source::Apt("e2fsprogs"), needed_for: "the lab" },
    Tool { name: "strip", probe: &["--version"], source: Source::Apt("binutils"), needed_for: "the lab" },
    Tool { name: "unshare", probe: &["--version"], source: Source::Apt("util-linux"), needed_for: "the lab" },
    Tool { name: "cargo-fmt", probe: &["--version"], source: Source::Rustup("rustfmt"), needed_for: ".ci/run" },
    Tool { name: "cargo-clippy", probe: &["--version"], source: Source::Rustup("clippy"), needed_for: ".ci/run" },
    Tool {
        name: "cargo-nextest",
        probe: &["nextest", "--version"],
        source: Source::Cargo("cargo-nextest"),
        needed_for: "cargo xtask test",
    },
    Tool {
        name: "cargo-deny",
        probe: &["--version"],
        source: Source::Cargo("cargo-deny"),
        needed_for: ".ci/run, cargo xtask audit",
    },
];

/// Names what is missing and, if asked, installs it.
pub(crate) fn run(install: bool) -> Result<ExitCode> {
    let missing: Vec<&Tool> = TOOLS.iter().filter(|tool| !tool.is_there()).collect();
    for tool in &missing {
        println!("missing: {} (for {}); {}", tool.name, tool.needed_for, tool.source.command());
    }
    if missing.is_empty() {
        println!("all tools are there");
        return Ok(ExitCode::SUCCESS);
    }
    if !install {
        println!("`cargo xtask deps --install` installs them");
        return Ok(ExitCode::FAILURE);
    }
    install_all(&missing)?;
    match missing.iter().find(|tool| !tool.is_there()) {
        Some(tool) => bail!("{} is still missing after installing it", tool.name),
        None => Ok(ExitCode::SUCCESS),
    }
}

/// Fails, saying how to get it, if one of these tools is missing.
pub(crate) fn require(names: &[&str]) -> Result<()> {
    match TOOLS.iter().find(|tool| names.contains(&tool.name) && !tool.is_there()) {
        Some(tool) => bail!("{} is missing: {} (or `cargo xtask deps --install`)", tool.name, tool.source.command()),
        None => Ok(()),
    }
}

fn install_all(missing: &[&Tool]) -> Result<()> {
    let mut packages: Vec<&str> = missing.iter().filter_map(|tool| tool.source.apt_package()).collect();
    packages.dedup();
    if !packages.is_empty() {
        if !is_root() {
            bail!("not root; run `sudo {}` and come back", apt_command(&packages));
        }
        shell::check(Command::new("apt-get").args(["update", "--quiet"]))?;
        shell::check(
            Command::new("apt-get")
                .args(["install", "--yes", "--quiet", "--no-install-recommends"])
                .args(&packages)
                .env("DEBIAN_FRONTEND", "noninteractive"),
        )?;
    }
    for tool in missing {
        match tool.source {
            Source::Apt(_) => {}
            Source::Cargo(name) => shell::check(shell::cargo().args(["install", "--locked", name]))?,
            Source::Rustup(name) => shell::check(Command::new("rustup").args(["component", "add", name]))?,
        }
    }
    Ok(())
}

impl Tool {
    fn is_there(&self) -> bool {
        Command::new(self.name)
            .args(self.probe)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .status()
            .is_ok_and(|status| status.success())
    }
}

impl Source {
    fn apt_package(&self) -> Option<&'static str> {
        match self {
            Source::Apt(name) => Some(name),
            Source::Cargo(_) | Source::Rustup(_) => None,
        }
    }

    fn command(&self) -> String {
        match self {
            Source::Apt(name) => apt_command(&[name]),
            Source::Cargo(name) => format!("cargo install --locked {name}"),
            Source::Rustup(name) => format!("rustup component add {name}"),
        }
    }
}

fn apt_command(packages: &[&str]) -> String {
    format!("apt-get install {}", packages.join(" "))
}

/// Whether we may install packages and make namespaces.
pub(crate) fn is_root() -> bool {
    // The owner of /proc/self is the effective user.
    use std::os::unix::fs::MetadataExt;
    std::fs::metadata("/proc/self").is_ok_and(|metadata| metadata.uid() == 0)
}
