//! `cargo xtask lab`: builds what the lab needs, and runs its program (tests/src/bin/lab.rs).

use std::fs;
use std::path::PathBuf;
use std::process::{Command as Process, ExitCode};

use anyhow::{Context, Result};
use clap::{Args, Subcommand};
use serde_json::Value;

use crate::{deps, shell};

/// The unit tests of godwit-vmm with those that need VLANs of the kernel's own, as tests/src/lab/programs.rs calls them.
const VLAN_TESTS: &str = "vlan-tests";

const TOOLS: [&str; 6] = ["qemu-system-x86_64", "mmdebstrap", "ip", "mke2fs", "unshare", "strip"];

/// What the lab's program is asked for.
#[derive(Subcommand)]
pub(crate) enum Command {
    /// Brings the hosts up, with programs just built, and leaves them running (see `lab up --help` for options)
    #[command(disable_help_flag = true)]
    Up {
        /// Options for the lab's program
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        options: Vec<String>,
    },
    /// Runs a command on kvm1, kvm2 or storage, or at a client (public, private): `lab exec HOST -- CMD`
    #[command(disable_help_flag = true)]
    Exec {
        /// A host, and a command
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        words: Vec<String>,
    },
    /// Takes the hosts down
    Down,
}

/// What is played if nothing else is asked for.
#[derive(Args)]
pub(crate) struct Scenario {
    /// One JSON object as the last line of stdout
    #[arg(long)]
    json: bool,
    /// Plays the cases of refused and failed moves, and a reboot, too
    #[arg(long)]
    cases: bool,
    /// Plays the cases of who has the machine while the NFS server comes and goes, too
    #[arg(long)]
    claims: bool,
    /// Moves the machine after it has used memory and freed it, with a balloon and without, too
    #[arg(long)]
    free_pages: bool,
    /// The version of NFS by which the KVM hosts mount: 3 or 4.2
    #[arg(long)]
    nfs: Option<String>,
    /// The kernel of the guest: cloud or generic
    #[arg(long)]
    guest_kernel: Option<String>,
}

/// Runs the lab's program: the scenario, if nothing else is asked for.
pub(crate) fn run(scenario: Scenario, command: Option<Command>) -> Result<ExitCode> {
    let Some(command) = command else {
        prepare()?;
        return start(scenario.options());
    };
    match command {
        Command::Up { options } => {
            prepare()?;
            start(after("up", options))
        }
        Command::Exec { words } => start(after("exec", words)),
        Command::Down => start(after("down", Vec::new())),
    }
}

impl Scenario {
    fn options(self) -> Vec<String> {
        let flags = [
            ("--json", self.json),
            ("--cases", self.cases),
            ("--claims", self.claims),
            ("--free-pages", self.free_pages),
        ];
        let flags = flags.into_iter().filter(|(_, given)| *given).map(|(flag, _)| flag.to_owned());
        let values = [("--nfs", self.nfs), ("--guest-kernel", self.guest_kernel)];
        flags.chain(values.into_iter().filter_map(|(name, value)| Some(format!("{name}={}", value?)))).collect()
    }
}

fn after(action: &str, words: Vec<String>) -> Vec<String> {
    [vec![action.to_owned()], words].concat()
}

fn prepare() -> Result<()> {
    deps::require(&TOOLS)?;
    build()
}

/// Work with a lab that is up waits for no build.
fn start(words: Vec<String>) -> Result<ExitCode> {
    let program = program("lab")?;
    if !program.is_file() {
        build()?;
    }
    shell::exit_code(Process::new(program).args(words))
}

fn build() -> Result<()> {
    shell::check(shell::cargo().args(["build", "--quiet", "--workspace", "--bins"]))?;
    let tests = ["test", "--quiet", "--package", "godwit-vmm", "--lib", "--features", "vlan-tests", "--no-run"];
    let told = shell::output(shell::cargo().args(tests).args(["--message-format", "json-render-diagnostics"]))?;
    let built = told.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok());
    let built = built.filter_map(|artifact| artifact["executable"].as_str().map(PathBuf::from)).next_back();
    let built = built.context("cargo does not say where it has put the tests of godwit-vmm")?;
    fs::copy(&built, program(VLAN_TESTS)?).with_context(|| format!("cannot copy {}", built.display()))?;
    Ok(())
}

/// A program of the lab's, which lies where cargo has put this one.
fn program(name: &str) -> Result<PathBuf> {
    let own = std::env::current_exe().context("cannot tell where this program lies")?;
    Ok(own.with_file_name(name))
}
