//! `migrate`: asks the process that keeps a machine to send it away, and follows the move.

use std::path::Path;
use std::process::ExitCode;

use godwit_control::console::{out, say};
use godwit_control::outcome::{Outcome, OutcomeKind};
use godwit_control::parameters::{Parameters, parse_compression};
use godwit_control::qmp::{Client, ClientError};
use godwit_control::report::{self, MoveReport, ReportError};
use godwit_control::units::{Bandwidth, OrNone, Span};
use godwit_transport::Uri;
use godwit_vmm::config::ByteSize;
use serde_json::{Value, json};

use crate::Failure;
use crate::cli::{MemoryHandoverArg, MigrateArgs, OnStallArg, Switch};
use crate::follow::{Followed, OnInterrupt, follow};
use crate::interrupt::Interrupts;

/// What that means.
const OWNERSHIP_NONE: &str = "ownership none (the machine has no claims on shared storage): should the network break during the \
                              handover, a person decides which host has the machine";

/// Moves the machine, or only looks whether it could be moved.
pub(crate) fn migrate(args: &MigrateArgs, json: bool) -> Result<ExitCode, Failure> {
    let uri = checked_uri(args)?;
    let parameters = parameters(args)?;
    let mut client = Client::connect(&args.control.path())?;
    let mut request = json!({
        "uri": uri,
        "parameters": parameters,
        "dry-run": args.dry_run,
        "pause-before-switchover": args.pause_before_switchover,
    });
    if let Some(ownership) = &args.ownership {
        request["ownership"] = json!(ownership);
    }
    if let Some(phase) = args.test_hold_at {
        request["hold-at"] = json!(phase);
    }
    // Before the move begins: from then on Ctrl-C has to call it off.
    let interrupts = Interrupts::count()?;
    let started = match client.execute("x-godwit-migrate", request) {
        Ok(started) => started,
        Err(ClientError::Command(error)) => return Ok(refused(&error.to_string(), json)),
        Err(error) => return Err(error.into()),
    };
    let number = started.get("move").and_then(Value::as_u64).unwrap_or(0);
    match (started["ownership"]["directory"].as_str(), &started["ownership"]["epoch"]) {
        (Some(directory), epoch) => say(format_args!("ownership: claims in {directory}, now epoch {epoch}")),
        (None, _) => say(OWNERSHIP_NONE),
    }
    if args.detach {
        say(format_args!("move {number} to {uri} is running; `godwit-sender status --watch` joins it"));
        if json {
            out(json!({ "move": number, "uri": uri }));
        }
        return Ok(ExitCode::SUCCESS);
    }
    let followed = follow(&mut client, number, json, &interrupts, OnInterrupt::Cancel)?;
    if let (Some(path), Followed::Ended(outcome)) = (&args.report, &followed) {
        // The move has ended as it has, whether or not its report can be written.
        match write_report(args, outcome, path) {
            Ok(()) => say(format_args!("report: {}", path.display())),
            Err(error) => say(error),
        }
    }
    Ok(followed.exit_code())
}

fn write_report(args: &MigrateArgs, outcome: &Outcome, path: &Path) -> Result<(), ReportError> {
    let page = report::move_page(&MoveReport {
        title: &format!("Move to {}", outcome.uri),
        outcome,
        forecast: None,
        bandwidth_bytes_per_s: args.max_bandwidth.and_then(|cap| cap.0).map(|cap| cap.bytes_per_s as f64),
        downtime_limit_ms: args.downtime_limit.map(|limit| limit.0.as_secs_f64() * 1e3),
        gap_ms: None,
        writes: &[],
    })?;
    report::write(path, &page)
}

/// The URI in its full form. What can be told to be wrong without asking anybody is a mistake in the command line.
fn checked_uri(args: &MigrateArgs) -> Result<String, Failure> {
    let usage = |error: &dyn std::error::Error| Failure::Usage(format!("--to: {error}"));
    let uri: Uri = args.to.parse().map_err(|error| usage(&error))?;
    let options = godwit_transport::Options { insecure: args.insecure, zero_copy: args.zero_copy };
    godwit_transport::connect(&uri, options).map_err(|error| usage(&error))?;
    Ok(uri.to_string())
}

fn parameters(args: &MigrateArgs) -> Result<Parameters, Failure> {
    let on_stall = match args.on_stall {
        None => None,
        Some(OnStallArg::Abort) => Some("abort"),
        Some(OnStallArg::Force) => Some("force"),
        Some(OnStallArg::Throttle) => Some("throttle"),
        Some(OnStallArg::Postcopy) => Some("postcopy"),
    };
    if let (Some(OnStallArg::Throttle), Some(Switch::Off)) = (args.on_stall, args.stall_detection) {
        let why =
            "--stall-detection off: --on-stall throttle holds the guest to a rate that follows from what is predicted";
        return Err(Failure::Usage(why.into()));
    }
    if let Some(compress) = &args.compress {
        parse_compression(compress).map_err(|error| Failure::Usage(format!("--{error}")))?;
    }
    Ok(Parameters {
        max_bandwidth: args.max_bandwidth.map(or_zero),
        avail_switchover_bandwidth: args.switchover_bandwidth.map(or_zero),
        downtime_limit: args.downtime_limit.map(whole_ms),
        multifd_channels: args.channels,
        compress: args.compress.clone(),
        memory_handover: args.memory_handover.map(memory_handover),
        xbzrle_cache_size: args.delta_cache.map(ByteSize::bytes),
        pause_timeout: args.pause_timeout.map(whole_ms),
        handover_timeout: args.handover_timeout.map(whole_ms),
        reconnect_timeout: args.reconnect_timeout.map(whole_ms),
        timeout: args.timeout.map(|timeout| timeout.0.map_or(0, whole_ms)),
        max_rounds: args.max_rounds,
        on_stall: on_stall.map(str::to_owned),
        stall_detection: args.stall_detection.map(|detection| detection == Switch::On),
        verify: args.verify.map(|verify| verify == Switch::On),
        audit: args.audit.then_some(true),
        insecure: args.insecure.then_some(true),
        zero_copy_send: args.zero_copy.then_some(true),
        ..Parameters::default()
    })
}

fn memory_handover(when: MemoryHandoverArg) -> String {
    match when {
        MemoryHandoverArg::Auto => "auto",
        MemoryHandoverArg::Require => "require",
        MemoryHandoverArg::Off => "off",
    }
    .into()
}

pub(crate) fn or_zero(bandwidth: OrNone<Bandwidth>) -> u64 {
    bandwidth.0.map_or(0, |bandwidth| bandwidth.bytes_per_s)
}

/// Rounded up: a time that is not zero must not become "none".
pub(crate) fn whole_ms(span: Span) -> u64 {
    u64::try_from(span.0.as_nanos().div_ceil(1_000_000)).unwrap_or(u64::MAX)
}

/// The move was not even begun.
fn refused(why: &str, json: bool) -> ExitCode {
    say(format_args!("refused: {why}"));
    say("refused before anything was sent: the guest is as it was");
    if json {
        out(json!({ "outcome": OutcomeKind::Refused, "reasons": [why] }));
    }
    OutcomeKind::Refused.exit_code()
}
