//! `cargo xtask lab`: the scenario, from bringing the lab up to taking it down. `lab up | exec | down`: its hosts, to work
//! with by hand.

use std::env;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::time::{Duration, Instant};
use std::{process, thread};

use anyhow::{Context, Result, bail};
use clap::{Args, Parser, Subcommand};
use godwit_tests::lab::image::GuestKernel;
use godwit_tests::lab::layout::NfsVersion;
use godwit_tests::lab::remote::quoted;
use godwit_tests::lab::state::State;
use godwit_tests::lab::{Lab, Options, client_command};
use godwit_tests::scenario::run::{More, play, step};

/// After this the lab is taken down whatever happens. The trees may have to be built first.
const HARD_LIMIT: Duration = Duration::from_secs(40 * 60);

/// Two KVM hosts and a storage host in virtual machines, with networks and clients.
#[derive(Parser)]
#[command(bin_name = "cargo xtask lab", args_conflicts_with_subcommands = true)]
struct Arguments {
    #[command(flatten)]
    scenario: Scenario,
    #[command(subcommand)]
    command: Option<Action>,
}

/// What is played if nothing else is asked for.
#[derive(Args)]
struct Scenario {
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
    #[command(flatten)]
    kind: Kind,
}

/// What kind of lab.
#[derive(Args)]
struct Kind {
    /// The version of NFS by which the KVM hosts mount
    #[arg(long, value_enum, default_value = "4.2")]
    nfs: NfsVersion,
    /// The kernel of the guest fw1
    #[arg(long, value_enum, default_value = "cloud")]
    guest_kernel: GuestKernel,
}

#[derive(Subcommand)]
enum Action {
    /// Brings the hosts up and leaves them running
    Up {
        #[command(flatten)]
        kind: Kind,
    },
    /// Runs a command on a host and ends as it does
    Exec {
        /// kvm1, kvm2, storage, or a client: public, private
        host: String,
        /// With a terminal
        #[arg(short, long)]
        terminal: bool,
        /// The command; a single word is a line of shell
        #[arg(required = true, trailing_var_arg = true)]
        command: Vec<String>,
    },
    /// Takes the hosts down
    Down,
}

fn main() -> ExitCode {
    match run(Arguments::parse()) {
        Ok(code) => code,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(arguments: Arguments) -> Result<ExitCode> {
    if !nix::unistd::geteuid().is_root() {
        bail!("the lab needs root, for network namespaces of its own: sudo env \"PATH=$PATH\" cargo xtask lab ...");
    }
    let programs = programs()?;
    let target = programs.parent().context("this program lies in no target directory")?;
    let Some(action) = arguments.command else { return scenario(target, &programs, &arguments.scenario) };
    match action {
        Action::Up { kind } => up(target, &programs, kind.options(true)),
        Action::Exec { host, terminal, command } => exec(&Lab::existing(target)?, &host, terminal, &command),
        Action::Down => {
            let was = if Lab::remove(target)? { "the lab is down" } else { "no lab was up" };
            println!("{was}");
            Ok(ExitCode::SUCCESS)
        }
    }
}

impl Scenario {
    fn more(&self) -> More {
        More { cases: self.cases, claims: self.claims, free_pages: self.free_pages }
    }
}

impl Kind {
    fn options(&self, kept: bool) -> Options {
        Options { nfs: self.nfs, guest_kernel: self.guest_kernel, kept }
    }
}

/// Brings a lab up, plays the scenario in it and takes it down.
fn scenario(target: &Path, programs: &Path, wanted: &Scenario) -> Result<ExitCode> {
    let start = Instant::now();
    take_down_at_limit(target.join("lab/run"));
    step("the hosts come up");
    let lab = Lab::up(target, programs, wanted.kind.options(false))?;
    let played = play(&lab, wanted.more());
    lab.down()?;
    let seen = played?;
    eprint!("{}", seen.table());
    eprintln!("the lab is down again after {:.0} s", start.elapsed().as_secs_f64());
    if wanted.json {
        println!("{}", seen.json());
    }
    Ok(if seen.faults().is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// Every wait has a limit of its own; this is for what nobody has thought of.
fn take_down_at_limit(run: PathBuf) {
    thread::spawn(move || {
        thread::sleep(HARD_LIMIT);
        eprintln!("error: not done after {HARD_LIMIT:?}");
        if let Some(Err(error)) = State::load(&run).ok().flatten().map(|state| state.remove(&run)) {
            eprintln!("the lab is left behind: {error:#}; `cargo xtask lab down` removes it");
        }
        process::exit(1)
    });
}

fn up(target: &Path, programs: &Path, options: Options) -> Result<ExitCode> {
    let start = Instant::now();
    let lab = Lab::up(target, programs, options)?;
    println!("the lab is up after {:.0} s", start.elapsed().as_secs_f64());
    println!(
        "  cargo xtask lab exec HOST -- CMD   on kvm1, kvm2 or storage; or on a client: public, private\n\
         \x20 cargo xtask lab down               takes it down\n\
         On kvm1 and kvm2, /opt/godwit/bin holds the programs just built, /srv/godwit storage's directory with the\n\
         guest fw1, and fw1-pub and fw1-priv are its taps. Consoles and logs: {}",
        lab.run_directory().display()
    );
    Ok(ExitCode::SUCCESS)
}

fn exec(lab: &Lab, host: &str, terminal: bool, words: &[String]) -> Result<ExitCode> {
    let mut command = match host {
        "public" => client_command(lab, lab.public_client(), &in_shell(words)),
        "private" => client_command(lab, lab.private_client(), &in_shell(words)),
        name => lab.host(name)?.command(&line(words), terminal),
    };
    let status = command.status().with_context(|| format!("cannot run {}", describe(&command)))?;
    Ok(status.code().and_then(|code| u8::try_from(code).ok()).map_or(ExitCode::FAILURE, ExitCode::from))
}

/// One word is a line of shell as it stands; several are a command and its arguments.
fn line(words: &[String]) -> String {
    match words {
        [line] => line.clone(),
        words => words.iter().map(|word| quoted(word)).collect::<Vec<_>>().join(" "),
    }
}

fn in_shell(words: &[String]) -> Vec<String> {
    ["sh", "-c", &line(words)].map(str::to_owned).to_vec()
}

fn describe(command: &Command) -> String {
    command.get_program().to_string_lossy().into_owned()
}

/// Where cargo has put this program and those that are shared with the hosts.
fn programs() -> Result<PathBuf> {
    let own = env::current_exe().context("cannot tell where this program lies")?;
    Ok(own.parent().context("this program lies nowhere")?.to_owned())
}
