//! `cargo xtask convergence`: moves are predicted, made, and compared.

use std::fs;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use clap::Parser;
use godwit_control::console::{out, say};
use godwit_control::forecast::{rounds_text, table_text};
use godwit_control::report::{self, ReportError, SuiteReport, Tile};
use godwit_core::predict::{Forecast, Row};
use godwit_tests::convergence::policy::{Policy, PolicyMove};
use godwit_tests::convergence::running::{Ledger, Record, run};
use godwit_tests::convergence::score::Score;
use godwit_tests::convergence::{own_machine, point};
use godwit_tests::interrupt;
use godwit_tests::netns::Hosts;
use serde_json::{Value, json};

/// Moves of a short run, and of a whole one.
const QUICK_MOVES: usize = 46;
const MOVES: usize = 132;
/// A run in which more moves than this share failed, for whatever reason, says nothing.
const MOST_FAILED_SHARE: f64 = 0.05;

/// Predicts moves, makes them, and compares.
#[derive(Parser)]
struct Arguments {
    /// Fewer moves: under 20 minutes
    #[arg(long)]
    quick: bool,
    /// Which points are drawn
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// So many moves instead
    #[arg(long, value_name = "N")]
    moves: Option<usize>,
    /// Only these points of the seed
    #[arg(long, value_name = "NUMBER", value_delimiter = ',')]
    only: Vec<usize>,
    /// What is tried with every guest that does not converge, instead of one policy after the other
    #[arg(long, value_enum)]
    policy: Option<Policy>,
    /// Where predictions (written down before each move) and results go
    #[arg(long, value_name = "DIR", default_value = "target/convergence")]
    out: PathBuf,
    /// Write a report: one HTML page with every move
    #[arg(long, value_name = "FILE.html")]
    report: Option<PathBuf>,
    /// Instead of guests of its own: the machine behind this control socket
    #[arg(long, value_name = "PATH")]
    control: Option<PathBuf>,
    /// Move that machine there, once its move has been predicted
    #[arg(long, value_name = "URI", requires = "control")]
    to: Option<String>,
    /// One JSON object as the last line of stdout
    #[arg(long)]
    json: bool,
    /// With --control: options of `godwit-sender migrate`, each with its value
    #[arg(last = true, requires = "control")]
    options: Vec<String>,
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let done = match &arguments.control {
        Some(control) => own(control, &arguments),
        None => suite(&arguments),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn suite(arguments: &Arguments) -> Result<()> {
    interrupt::listen()?;
    let moves = arguments.moves.unwrap_or(if arguments.quick { QUICK_MOVES } else { MOVES });
    let mut points = point::draw(arguments.seed, moves);
    points.retain(|point| arguments.only.is_empty() || arguments.only.contains(&point.number));
    let file = |name: &str| arguments.out.join(format!("{name}-seed-{}", arguments.seed));
    fs::create_dir_all(&arguments.out).with_context(|| format!("cannot create {}", arguments.out.display()))?;
    let mut ledger = Ledger::create(&file("predictions").with_extension("jsonl"))?;

    let (began, hosts) = (Instant::now(), Hosts::new(2)?);
    let (mut records, mut failed) = (Vec::<Record>::new(), 0usize);
    for point in &points {
        interrupt::check()?;
        say(format_args!("{:>3} {}", point.number, point.line()));
        let by_policy = records.iter().filter(|record| record.policy.is_some()).count();
        let policy = arguments.policy.unwrap_or(Policy::ALL[by_policy % Policy::ALL.len()]);
        match run(point, policy, &hosts, &mut ledger) {
            Ok(record) => {
                say(format_args!("    {}", record.line()));
                if let Some(by_policy) = &record.policy {
                    say(format_args!("    {}", by_policy.line()));
                }
                records.push(record);
            }
            Err(error) => {
                failed += 1;
                say(format_args!("    FAILED: {error:#}"));
            }
        }
    }
    ensure!(!records.is_empty(), "all {failed} moves failed");

    let score = Score::of(&records.iter().map(Record::case).collect::<Vec<_>>());
    let results = json!({ "seed": arguments.seed, "score": score, "failed": failed, "records": records });
    let path = file("results").with_extension("json");
    fs::write(&path, results.to_string()).with_context(|| format!("cannot write {}", path.display()))?;
    say(format_args!(
        "\n{} moves in {:.0} s, {failed} failed; {} did not converge, {} near the border; verdict right {:.1} %; \
         error of the total {:.1} % on average, 90 % within {:.1} %; of the pause {:.1} %\n{}",
        score.moves,
        began.elapsed().as_secs_f64(),
        score.not_converging,
        score.border,
        100.0 * score.converge_verdict_right,
        score.total_error_mean_pct,
        score.total_error_p90_pct,
        score.downtime_error_mean_pct,
        path.display(),
    ));
    let by_policy: Vec<&PolicyMove> = records.iter().filter_map(|record| record.policy.as_ref()).collect();
    for policy in Policy::ALL {
        let of_it = || by_policy.iter().filter(|one| one.policy == policy);
        let kept = of_it().filter(|one| one.broken.is_empty()).count();
        say(format_args!("--on-stall {}: {kept} of {} moves as promised", policy.name(), of_it().count()));
    }
    if let Some(path) = &arguments.report {
        report::write(path, &page(arguments.seed, &score, &records)?)?;
        say(path.display());
    }
    if arguments.json {
        out(serde_json::to_string(&score)?);
    }
    // At the very end: what was measured is there to be looked at all the same.
    ensure!(failed as f64 <= MOST_FAILED_SHARE * points.len() as f64, "{failed} of {} moves failed", points.len());
    Ok(())
}

/// The report of a suite.
fn page(seed: u64, score: &Score, records: &[Record]) -> Result<String, ReportError> {
    let percent = |share: f64| format!("{share:.1} %");
    let tiles = vec![
        Tile::new("moves", score.moves.to_string()),
        Tile::new("did not converge", score.not_converging.to_string()),
        Tile::new("near the border", score.border.to_string()),
        Tile::new("verdict right", percent(100.0 * score.converge_verdict_right)),
        Tile::new("error of the total, mean", percent(score.total_error_mean_pct)),
        Tile::new("error of the total, 90 % within", percent(score.total_error_p90_pct)),
        Tile::new("error of the pause, mean", percent(score.downtime_error_mean_pct)),
    ];
    let titles: Vec<String> =
        records.iter().map(|record| format!("{}: {}", record.point.number, record.point.line())).collect();
    let moves = records.iter().zip(&titles).flat_map(|(record, title)| record.reports(title)).collect();
    report::suite_page(&SuiteReport { title: &format!("Convergence suite, seed {seed}"), tiles, moves })
}

/// A machine that somebody runs.
fn own(control: &std::path::Path, arguments: &Arguments) -> Result<()> {
    let answer = own_machine::estimate(control, &arguments.options)?;
    let forecast: Option<Forecast> = serde_json::from_value(answer["forecast"].clone()).context("no forecast")?;
    let rows: Vec<Row> = serde_json::from_value(answer["table"].clone()).context("no table")?;
    if let Some(forecast) = &forecast {
        say(rounds_text(&forecast.rounds));
    }
    say(table_text(&rows));
    let outcome = match &arguments.to {
        Some(uri) => own_machine::migrate(control, uri, &arguments.options)?,
        None => Value::Null,
    };
    if let (Some(forecast), Some(total_ms)) = (&forecast, outcome["total_ms"].as_f64()) {
        say(format_args!(
            "predicted {:.2} s and a pause of {:.0} ms, measured {:.2} s and {}",
            forecast.total_s.likely,
            forecast.pause_ms.likely,
            total_ms / 1e3,
            outcome["downtime_ms"].as_f64().map_or("none".to_owned(), |ms| format!("{ms:.0} ms")),
        ));
    }
    if arguments.json {
        out(json!({ "predicted": forecast, "table": rows, "outcome": outcome }));
    }
    Ok(())
}
