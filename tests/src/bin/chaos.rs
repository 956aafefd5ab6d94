//! `cargo xtask chaos`: moves one machine there and back, while faults strike. What it shows is decided in
//! [`godwit_tests::chaos`]; this is its command line and its display.

use std::io::IsTerminal;
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use anyhow::{Context, Result};
use clap::Parser;
use godwit_tests::chaos::kind::Kind;
use godwit_tests::chaos::tally::{Outcome, Tally};
use godwit_tests::chaos::{self, Options, Played};
use indicatif::{ProgressBar, ProgressStyle};
use serde_json::json;
use signal_hook::consts::{SIGINT, SIGTERM};

/// Moves a machine there and back between two hosts while random faults strike, and sees from outside who runs it.
#[derive(Parser)]
struct Arguments {
    /// For how long
    #[arg(long, default_value_t = 5.0)]
    minutes: f64,
    /// Decides kinds, moments and parameters of all faults [default: from the clock]
    #[arg(long)]
    seed: Option<u64>,
    /// At most so many moves
    #[arg(long)]
    moves: Option<u64>,
    /// The first episode to play: with --moves 1 that one again
    #[arg(long, default_value_t = 0)]
    episode: u64,
    /// One JSON object for each episode, and one with the totals as the last line of stdout
    #[arg(long)]
    json: bool,
    /// Print the kinds of faults and do nothing
    #[arg(long)]
    list: bool,
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    if arguments.list {
        for kind in Kind::all() {
            println!("{:<30} {}", kind.to_string(), kind.what());
        }
        return ExitCode::SUCCESS;
    }
    match run(&arguments) {
        Ok(tally) if tally.is_clean() => ExitCode::SUCCESS,
        Ok(_) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(arguments: &Arguments) -> Result<Tally> {
    let interrupted = Arc::new(AtomicBool::new(false));
    for signal in [SIGINT, SIGTERM] {
        signal_hook::flag::register(signal, Arc::clone(&interrupted)).context("cannot hear signals")?;
    }
    let seed = arguments.seed.unwrap_or_else(|| godwit_tests::clock::monotonic_ns() & 0xffff_ffff);
    let time = Duration::try_from_secs_f64(arguments.minutes * 60.0).context("--minutes")?;
    let options = Options { seed, first: arguments.episode, time: Some(time), episodes: arguments.moves };
    let mut display = Display::new(arguments.json);
    display.say(&format!("seed {seed}"));
    let tally = chaos::run(&options, &interrupted, |played| display.show(&played))?;
    if interrupted.load(Ordering::Relaxed) {
        display.say("interrupted");
    }
    display.end(&tally);
    Ok(tally)
}

/// Lines for people on stderr, above a line that changes; or JSON on stdout.
struct Display {
    json: bool,
    bar: ProgressBar,
}

impl Display {
    fn new(json: bool) -> Self {
        let bar =
            if json || !std::io::stderr().is_terminal() { ProgressBar::hidden() } else { ProgressBar::new_spinner() };
        bar.set_style(ProgressStyle::default_spinner());
        bar.enable_steady_tick(Duration::from_millis(200));
        Self { json, bar }
    }

    fn say(&self, line: &str) {
        self.bar.suspend(|| eprintln!("{line}"));
    }

    fn show(&mut self, played: &Played<'_>) {
        let Played { plan, result, from, took, logs, tally } = played;
        let (took, outcome) = (took.as_secs_f64(), result.outcome.to_string());
        if self.json {
            let struck: Vec<String> = result.struck.iter().map(|(kind, _)| kind.to_string()).collect();
            println!(
                "{}",
                json!({ "episode": plan.episode, "from": from, "plan": plan.to_string(), "outcome": outcome, "struck": struck, "said": result.said, "seconds": took })
            );
        } else {
            self.say(&format!("{:>4}  from {from:<5}  {outcome:<12} {took:>5.1} s  {plan}", plan.episode));
        }
        for violation in &result.violations {
            self.say(&format!(
                "VIOLATION in episode {}: {}: {}\n    {plan}",
                plan.episode, violation.crime, violation.text
            ));
        }
        if let Some(logs) = logs {
            self.say(&format!("    logs are kept in {}", logs.display()));
        }
        let state = if tally.is_clean() { "nothing wrong so far" } else { "VIOLATIONS" };
        let (moves, faults, within) = (tally.moves(), tally.faults(), tally.faults_in_handover());
        self.bar.set_message(format!("{moves} moves, {faults} faults, {within} of them in the handover; {state}"));
    }

    fn end(&self, tally: &Tally) {
        self.bar.finish_and_clear();
        if self.json {
            println!("{}", tally.json());
            return;
        }
        eprintln!("\n{:<30} {:>5}", "fault", "times");
        for &kind in Kind::all() {
            eprintln!("{:<30} {:>5}", kind.to_string(), tally.of_kind(kind));
        }
        eprintln!("{:<30} {:>5}, {} between the pause and running", "all", tally.faults(), tally.faults_in_handover());
        let outcomes = <Outcome as strum::VariantArray>::VARIANTS.iter();
        let outcomes: Vec<String> =
            outcomes.map(|&outcome| format!("{} {outcome}", tally.of_outcome(outcome))).collect();
        eprintln!("\n{} moves: {}", tally.moves(), outcomes.join(", "));
        eprintln!("{}", if tally.is_clean() { "nothing happened that must not" } else { "VIOLATIONS: see above" });
    }
}
