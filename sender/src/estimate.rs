//! `estimate`: has the running machine measured, and says how its move would go.

use std::process::ExitCode;
use std::time::Duration;

use anyhow::Context;
use godwit_control::console::{out, say};
use godwit_control::forecast::{rounds_text, table_text, verdict_text};
use godwit_control::parameters::Parameters;
use godwit_control::qmp::Client;
use godwit_control::qmp::client::given;
use godwit_control::units::{approximate_bytes, approximate_ms, approximate_rate};
use godwit_core::estimate::Measured;
use godwit_core::predict::{Forecast, Row};
use godwit_vmm::config::ByteSize;
use serde::Deserialize;
use serde_json::json;

use crate::Failure;
use crate::cli::EstimateArgs;
use crate::migrate::{or_zero, whole_ms};

/// Beside measuring.
const ANSWER_LIMIT: Duration = Duration::from_secs(30);

/// What is answered, apart from what follows from the rest.
#[derive(Deserialize)]
struct Answer {
    running: bool,
    bandwidth_bytes_per_s: Option<f64>,
    downtime_limit_ms: f64,
    dirty_bytes_per_s: f64,
    forecast: Option<Forecast>,
    table: Vec<Row>,
    measured: Measured,
}

/// Measures and predicts; nothing is moved.
pub(crate) fn estimate(args: &EstimateArgs, json: bool) -> Result<ExitCode, Failure> {
    let parameters = Parameters {
        avail_switchover_bandwidth: args.switchover_bandwidth.map(or_zero),
        downtime_limit: args.downtime_limit.map(whole_ms),
        timeout: args.timeout.map(|timeout| timeout.0.map_or(0, whole_ms)),
        max_rounds: args.max_rounds,
        compress: args.compress.clone(),
        xbzrle_cache_size: args.delta_cache.map(ByteSize::bytes),
        ..Parameters::default()
    };
    let request = given([
        ("bandwidth", args.bandwidth.map(|bandwidth| json!(bandwidth.bytes_per_s))),
        ("time", Some(json!(whole_ms(args.time)))),
        ("parameters", Some(json!(parameters))),
    ]);
    let mut client = Client::connect(&args.control.path())?;
    say(format_args!("measuring for {} …", args.time));
    let answer = client.execute_within("x-godwit-estimate", request, args.time.0 + ANSWER_LIMIT)?;
    if json {
        out(answer);
        return Ok(ExitCode::SUCCESS);
    }
    tell(&serde_json::from_value(answer).context("the answer is not an estimate")?);
    Ok(ExitCode::SUCCESS)
}

fn tell(answer: &Answer) {
    let Answer { running, bandwidth_bytes_per_s, downtime_limit_ms, dirty_bytes_per_s, forecast, table, measured } =
        answer;
    if !running {
        out("The guest is paused: it writes nothing now.");
    }
    out(measured_text(measured));
    out("");
    if let (Some(forecast), Some(bandwidth)) = (forecast, bandwidth_bytes_per_s) {
        out(format_args!("At {}:", approximate_rate(*bandwidth)));
        out(rounds_text(&forecast.rounds));
        out("");
        out(verdict_text(forecast, *downtime_limit_ms, *dirty_bytes_per_s));
        out("");
    }
    out(table_text(table));
}

fn measured_text(measured: &Measured) -> String {
    let percent = |share: f64| format!("{:.0} %", share * 100.0);
    let mut lines = vec![format!(
        "memory {}, touched {}; of touched pages {} zero, of the others {} compressible",
        approximate_bytes(measured.memory_bytes as f64),
        approximate_bytes(measured.touched_bytes as f64),
        percent(measured.zero_share),
        percent(measured.compressible_share),
    )];
    let windows: Vec<String> = measured
        .windows
        .iter()
        .map(|count| format!("{} in {}", approximate_bytes(count.pages * 4096.0), approximate_ms(count.window_ms)))
        .collect();
    lines.push(format!("dirtied: {}", windows.join(", ")));
    lines.push(format!(
        "of pages written again {} differ little, {} not at all; counts over {} intervals differ by {}",
        percent(measured.delta_share),
        percent(measured.same_share),
        measured.intervals,
        percent(measured.spread),
    ));
    if measured.sampled_share < 1.0 {
        lines.push(format!(
            "only {:.2} % of memory was looked at, the rest taken to be like it",
            measured.sampled_share * 100.0
        ));
    }
    lines.push(format!(
        "the guest was paused twice for {} to see what a pause takes",
        approximate_ms(measured.pause_ms)
    ));
    lines.join("\n")
}
