//! `cargo xtask simulate`: plays seeds, or one of them for a person to read, or looks for a planted fault.

use std::process::ExitCode;
use std::time::Instant;

use anyhow::{Result, bail};
use clap::Parser;
use godwit_simulator::campaign::{self, Totals};
use godwit_simulator::verdict::{self, Verdict};
use serde_json::json;

/// Plays moves in virtual time, with every fault that a seed draws.
#[derive(Parser)]
#[command(bin_name = "cargo xtask simulate")]
struct Arguments {
    /// How many seeds to play, from 0 on
    #[arg(long, default_value_t = 20_000)]
    seeds: u64,
    /// Plays this seed alone, and prints every step
    #[arg(long)]
    seed: Option<u64>,
    /// Plants this fault and plays seeds until it is found
    #[arg(long)]
    plant: Option<String>,
    /// Lists the faults that can be planted, and who finds them
    #[arg(long)]
    list_plants: bool,
    /// One JSON object as the last line of stdout
    #[arg(long)]
    json: bool,
}

fn main() -> Result<ExitCode> {
    let arguments = Arguments::parse();
    if arguments.list_plants || arguments.plant.is_some() {
        return plants(&arguments);
    }
    if let Some(seed) = arguments.seed {
        return Ok(replay(seed));
    }
    let began = Instant::now();
    let totals = campaign::run(0..arguments.seeds, false, || {});
    report(&totals, began, arguments.json);
    Ok(if totals.violations.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// Every step of one seed, for a person to read.
fn replay(seed: u64) -> ExitCode {
    let Verdict { outcome, violation, steps, hash } = verdict::play(seed, true);
    println!("seed {seed}: {outcome:?}, {steps} steps, hash {hash:016x}");
    match violation {
        None => ExitCode::SUCCESS,
        Some(what) => {
            println!("VIOLATION: {what}");
            ExitCode::FAILURE
        }
    }
}

#[cfg(not(feature = "plants"))]
fn plants(_: &Arguments) -> Result<ExitCode> {
    bail!("this was built without planted faults: use `cargo xtask simulate`");
}

#[cfg(feature = "plants")]
fn plants(arguments: &Arguments) -> Result<ExitCode> {
    use godwit_core::plants::{Plant, plant};

    let Some(name) = &arguments.plant else {
        for plant in Plant::all() {
            let finders = if plant.breaks_the_rules() { "model, simulator" } else { "simulator" };
            println!("{:<24} {finders:<17} {}", plant.to_string(), plant.describe());
        }
        return Ok(ExitCode::SUCCESS);
    };
    let Ok(wanted) = name.parse::<Plant>() else {
        bail!("there is no plant {name:?}: `cargo xtask simulate --list-plants` lists them");
    };
    if let Some(seed) = arguments.seed {
        plant(Some(wanted));
        return Ok(replay(seed));
    }
    let began = Instant::now();
    let totals = campaign::run(0..arguments.seeds, true, || plant(Some(wanted)));
    let found = totals.violations.first();
    match found {
        Some((seed, what)) => println!(
            "{name}: found after {} seeds ({:.1?}): {what}\n    replay: cargo xtask simulate --plant {name} --seed {seed}",
            totals.seeds,
            began.elapsed()
        ),
        None => println!("{name}: NOT FOUND in {} seeds ({:.1?})", totals.seeds, began.elapsed()),
    }
    if arguments.json {
        println!("{}", json!({"plant": name, "seeds": totals.seeds, "found": found.is_some()}));
    }
    Ok(if found.is_some() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn report(totals: &Totals, began: Instant, as_json: bool) {
    let Totals { seeds, steps, moved, stayed, person, violations } = totals;
    for (seed, what) in violations.iter().take(20) {
        println!("seed {seed}: {what}\n    replay: cargo xtask simulate --seed {seed}");
    }
    println!(
        "{seeds} seeds, {steps} steps in {:.1?}: {moved} moved, {stayed} stayed, {person} needed a person, {} violations",
        began.elapsed(),
        violations.len()
    );
    if as_json {
        let outcomes = json!({"moved": moved, "stayed": stayed, "person": person});
        println!("{}", json!({"seeds": seeds, "steps": steps, "outcomes": outcomes, "violations": violations.len()}));
    }
}
