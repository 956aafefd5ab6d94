//! The project's own commands: `cargo xtask …`.

use std::path::Path;
use std::process::ExitCode;

use anyhow::{Result, bail};
use clap::{Parser, Subcommand};

mod chaos;
mod deps;
mod lab;
mod shell;
mod simulate;
mod test;
mod totals;
mod whatif;

/// Godwit's own commands.
#[derive(Parser)]
#[command(bin_name = "cargo xtask")]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Names the tools that are missing on this machine
    Deps {
        /// Install them (apt-get as root, cargo, rustup)
        #[arg(long)]
        install: bool,
    },
    /// Runs all tests, or those whose names contain one of NAMES; the last line says how many passed, failed and were
    /// skipped
    Test {
        /// Parts of test names
        names: Vec<String>,
    },
    /// Moves a working guest over TCP and onward over QUIC, and shows what it cost
    Demo {
        /// One JSON object as the last line of stdout
        #[arg(long)]
        json: bool,
    },
    /// Moves a stock Linux machine between two KVM hosts that share NFS, in virtual machines of their own, and shows what
    /// its clients saw
    #[command(args_conflicts_with_subcommands = true)]
    Lab {
        #[command(flatten)]
        scenario: lab::Scenario,
        #[command(subcommand)]
        command: Option<lab::Command>,
    },
    /// Moves a machine there and back while random faults strike its processes, network and storage, and sees from outside who
    /// runs it
    Chaos(chaos::Chaos),
    /// Plays moves in virtual time with every fault that a seed draws, and checks that nobody runs twice and nothing is lost (see
    /// `simulate --help` for options)
    #[command(disable_help_flag = true)]
    Simulate {
        /// Options for the simulator
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        options: Vec<String>,
    },
    /// Checks dependencies against the advisory database (needs the network)
    Audit,
    /// Predicts the move of a machine that a few numbers describe: converges or not, rounds, time, bytes, pause (see `whatif --help`
    /// for options)
    #[command(disable_help_flag = true)]
    Whatif {
        /// Options for the predictor
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        options: Vec<String>,
    },
    /// Predicts moves before they begin, makes them, and shows how right that was (see `convergence --help` for options)
    #[command(disable_help_flag = true)]
    Convergence {
        /// Options for the suite
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        options: Vec<String>,
    },
    /// Moves the same guests with Godwit and with QEMU (or Cloud Hypervisor) at its best in turn, and shows both
    VersusQemu {
        /// Options for the comparison
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        options: Vec<String>,
    },
}

fn main() -> ExitCode {
    match run(Arguments::parse().command) {
        Ok(code) => code,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(command: Command) -> Result<ExitCode> {
    match command {
        Command::Deps { install } => deps::run(install),
        Command::Test { names } => test::run(&names),
        Command::Demo { json } => demo(json),
        Command::Lab { scenario, command } => lab::run(scenario, command),
        Command::Chaos(chaos) => chaos::run(&chaos),
        Command::Simulate { options } => simulate::run(&options),
        Command::Whatif { options } => whatif::run(&options),
        Command::Audit => audit(),
        Command::Convergence { options } => {
            deps::require(&["ip", "tc"])?;
            measure("convergence", Build::Release, &options, false)
        }
        Command::VersusQemu { options } => {
            deps::require(&["qemu-system-x86_64", "ip", "tc"])?;
            measure("versus-qemu", Build::Release, &options, false)
        }
    }
}

fn demo(json: bool) -> Result<ExitCode> {
    if !Path::new("/dev/kvm").exists() {
        bail!(
            "this machine has no /dev/kvm: load its module (modprobe kvm_intel or kvm_amd), switch virtualisation on in \
             the firmware, or run the demo on another machine"
        );
    }
    if !deps::is_root() {
        bail!("the demo needs root, for network namespaces of its own: sudo env \"PATH=$PATH\" cargo xtask demo");
    }
    deps::require(&["ip"])?;
    measure("demo", Build::Dev, &[], json)
}

fn audit() -> Result<ExitCode> {
    deps::require(&["cargo-deny"])?;
    shell::exit_code(shell::cargo().args(["deny", "check", "advisories", "bans", "licenses", "sources"]))
}

/// How what is measured is built.
#[derive(Clone, Copy)]
pub(crate) enum Build {
    /// As for tests: most of it is there already.
    Dev,
    /// As it is installed: what is compared with other programs is compared at its best.
    Release,
}

/// Builds the binaries and runs the measuring program `name` of the test package beside them.
fn measure(name: &str, build: Build, arguments: &[String], json: bool) -> Result<ExitCode> {
    let profile = match build {
        Build::Dev => "dev",
        Build::Release => "release",
    };
    shell::check(shell::cargo().args(["build", "--workspace", "--bins", "--profile", profile]))?;
    let mut command = shell::cargo();
    command.args(["run", "--quiet", "--package", "godwit-tests", "--profile", profile, "--bin", name, "--"]);
    command.args(arguments);
    if json {
        command.arg("--json");
    }
    shell::exit_code(&mut command)
}
