//! `cargo xtask versus-qemu`: the same guests moved by Godwit and by QEMU in turn, with QEMU at its best. Or by Cloud Hypervisor, where
//! a person has it.

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Result, bail};
use clap::{Parser, ValueEnum};
use godwit_tests::cloud_hypervisor;
use godwit_tests::interrupt;
use godwit_tests::versus::settings::{self, Mover};
use godwit_tests::versus::{case, compare, limits, moving};
use serde_json::json;

/// Numbers of connections that Cloud Hypervisor is tried with.
const CONNECTIONS: [u32; 2] = [1, 2];

/// Moves the same guests with Godwit and with QEMU in turn.
#[derive(Parser)]
struct Arguments {
    /// Who Godwit is compared with
    #[arg(long, value_enum, default_value_t = Peer::Qemu)]
    peer: Peer,
    /// Cloud Hypervisor's program
    #[arg(long, required_if_eq("peer", "cloud-hypervisor"))]
    peer_binary: Option<PathBuf>,
    /// Pairs of moves in each case
    #[arg(long, default_value_t = 5)]
    pairs: u32,
    /// Only these cases: by name, or by a part of the name that is no case's whole name
    #[arg(long, value_delimiter = ',')]
    case: Vec<String>,
    /// Settings of the other program to try, by name, instead of all
    #[arg(long, value_delimiter = ',')]
    settings: Vec<String>,
    /// Draw rates and sizes at random near each case's
    #[arg(long)]
    seed: Option<u64>,
    /// The longest pause that both aim for, in ms
    #[arg(long, default_value_t = 300)]
    downtime_limit_ms: u64,
    /// One JSON object as the last line of stdout
    #[arg(long)]
    json: bool,
}

/// A program to be compared with.
#[derive(Clone, Copy, ValueEnum, strum::Display)]
#[strum(serialize_all = "kebab-case")]
enum Peer {
    /// qemu-system-x86_64, from the distribution
    Qemu,
    /// Cloud Hypervisor: only cases without a cap, which it does not know
    CloudHypervisor,
}

fn main() -> ExitCode {
    match run(&Arguments::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(arguments: &Arguments) -> Result<()> {
    interrupt::listen()?;
    let mut cases = case::all(arguments.seed);
    let names: Vec<&str> = cases.iter().map(|case| case.name).collect();
    let is_wanted = |name: &str, wanted: &String| match names.contains(&wanted.as_str()) {
        true => name == wanted,
        false => name.contains(wanted.as_str()),
    };
    cases.retain(|case| arguments.case.is_empty() || arguments.case.iter().any(|wanted| is_wanted(case.name, wanted)));
    let Some(first) = cases.first() else { bail!("no case has a name like that; there are {}", names.join(", ")) };
    let all = movers(arguments)?;
    let names: Vec<String> = all.iter().map(Mover::settings).collect();
    if let Some(name) = arguments.settings.iter().find(|name| !names.contains(name)) {
        bail!("{} has no settings {name} here; there are {}", arguments.peer, names.join(", "));
    }
    let mut candidates = all;
    candidates.retain(|mover| arguments.settings.is_empty() || arguments.settings.contains(&mover.settings()));
    let guest_sha256 = moving::guest_sha256(first)?;
    eprintln!("what this machine allows …");
    let limits = limits::measure()?;
    let gb = |bytes_per_s: f64| bytes_per_s / 1e9;
    eprintln!(
        "memcpy {:.1} GB/s, loopback TCP into fresh memory {:.2} and into populated memory {:.2} GB/s, quinn {:.2} GB/s",
        gb(limits.memcpy_bytes_per_s),
        gb(limits.tcp_fresh_bytes_per_s),
        gb(limits.tcp_populated_bytes_per_s),
        gb(limits.quinn_bytes_per_s)
    );
    let mut compared = Vec::new();
    for case in cases {
        eprintln!("\n{}: {}", case.name, case.workload.arguments().join(" "));
        let candidates: Vec<_> = candidates.iter().filter(|mover| mover.can(&case)).cloned().collect();
        if candidates.is_empty() {
            eprintln!("  left out: {} cannot do it with these settings", arguments.peer);
            continue;
        }
        compared.push(compare::compare(
            case,
            &candidates,
            arguments.pairs,
            arguments.downtime_limit_ms,
            |who, moved| {
                eprintln!(
                    "  {who:<16} {:>8.0} ms, gap {:>7}, {:>6.0} MB, CPU {:.2} s, guest at {}{}",
                    moved.total_ms,
                    moved.gap_ms.map_or("-".into(), |gap| format!("{gap:.1} ms")),
                    moved.wire_bytes as f64 / 1e6,
                    moved.cpu_s,
                    moved.guest_rate_share.map_or("-".into(), |share| format!("{:.0} %", share * 100.0)),
                    moved.cut.as_ref().map_or(String::new(), |why| format!("  CUT: {why}")),
                );
            },
        )?);
    }
    let peer = arguments.peer.to_string();
    eprintln!("\n{}", compare::Compared::header(&peer));
    compared.iter().for_each(|compared| eprintln!("{}", compared.line()));
    if arguments.json {
        let cases: Vec<_> = compared.iter().map(|compared| compared.json(&peer)).collect();
        println!("{}", json!({ "cases": cases, "limits": limits, "guest_sha256": guest_sha256 }));
    }
    Ok(())
}

/// All that is tried of the other program.
fn movers(arguments: &Arguments) -> Result<Vec<Mover>> {
    Ok(match (arguments.peer, &arguments.peer_binary) {
        (Peer::CloudHypervisor, Some(binary)) => {
            cloud_hypervisor::check_binary(binary)?;
            let with = |connections| Mover::CloudHypervisor { binary: binary.clone(), connections };
            CONNECTIONS.map(with).to_vec()
        }
        _ => settings::ALL.iter().map(Mover::Qemu).collect(),
    })
}
