//! `cargo xtask lab`: builds what the lab needs, and runs its program (tests/src/bin/lab.rs).

use std::path::PathBuf;
use std::process::{Command as Process, ExitCode};

use anyhow::{Context, Result};
use clap::Subcommand;

use crate::{deps, shell};

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

/// Runs the lab's program.
pub(crate) fn run(command: Command) -> Result<ExitCode> {
    match command {
        Command::Up { options } => {
            deps::require(&TOOLS)?;
            build()?;
            start("up", &options)
        }
        Command::Exec { words } => start("exec", &words),
        Command::Down => start("down", &[]),
    }
}

/// Work with a lab that is up waits for no build.
fn start(action: &str, words: &[String]) -> Result<ExitCode> {
    let program = program()?;
    if !program.is_file() {
        build()?;
    }
    shell::exit_code(Process::new(program).arg(action).args(words))
}

fn build() -> Result<()> {
    shell::check(shell::cargo().args(["build", "--quiet", "--workspace", "--bins"]))
}

/// The lab's program, which cargo puts where it has put this one.
fn program() -> Result<PathBuf> {
    let own = std::env::current_exe().context("cannot tell where this program lies")?;
    Ok(own.with_file_name("lab"))
}
