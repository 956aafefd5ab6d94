//! `cargo xtask chaos`: builds the programs and plays chaos with them (tests/src/bin/chaos.rs).

use std::path::Path;
use std::process::ExitCode;

use anyhow::{Result, bail};
use clap::Args;

use crate::{Build, deps, measure};

/// What is asked for.
#[derive(Args)]
pub(crate) struct Chaos {
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
    #[arg(long)]
    episode: Option<u64>,
    /// One JSON object for each episode, and one with the totals as the last line of stdout
    #[arg(long)]
    json: bool,
    /// Print the kinds of faults and do nothing
    #[arg(long)]
    list: bool,
}

pub(crate) fn run(chaos: &Chaos) -> Result<ExitCode> {
    if chaos.list {
        return measure("chaos", Build::Dev, &["--list".into()], false);
    }
    if !Path::new("/dev/kvm").exists() || !Path::new("/dev/fuse").exists() {
        bail!("chaos moves real guests over storage that misbehaves: it needs /dev/kvm and /dev/fuse");
    }
    if !deps::is_root() {
        bail!("chaos needs root, for network namespaces and mounts: sudo env \"PATH=$PATH\" cargo xtask chaos");
    }
    deps::require(&["ip", "tc"])?;
    measure("chaos", Build::Dev, &chaos.arguments(), chaos.json)
}

impl Chaos {
    fn arguments(&self) -> Vec<String> {
        let numbers = [("--seed", self.seed), ("--moves", self.moves), ("--episode", self.episode)];
        let numbers = numbers.into_iter().filter_map(|(name, value)| Some(format!("{name}={}", value?)));
        std::iter::once(format!("--minutes={}", self.minutes)).chain(numbers).collect()
    }
}
