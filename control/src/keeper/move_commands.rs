//! The commands about moving the machine elsewhere.

use std::sync::Arc;

use godwit_core::{PAGE_SIZE, Phase};
use serde::Deserialize;
use serde_json::{Map, Value, json};

use super::commands::{NoArguments, failed};
use super::moves::{Move, status_of};
use super::state::Shared;
use crate::parameters::{CapabilityState, Parameters};
use crate::qmp::message::arguments;
use crate::qmp::{Answer, Arguments, QmpError};

/// QEMU's way: the options are those that were set before.
pub(super) fn migrate(shared: &Arc<Shared>, command: &str, given: Arguments) -> Answer {
    #[derive(Deserialize)]
    #[serde(deny_unknown_fields)]
    struct Migrate {
        uri: String,
        /// Every move is detached; clients give this out of habit.
        #[serde(default, rename = "detach")]
        _detach: bool,
        #[serde(default)]
        resume: bool,
    }
    let migrate: Migrate = arguments(command, given)?;
    if migrate.resume {
        return Err(QmpError::generic("a broken move cannot be resumed: start it again"));
    }
    let settings = shared.state().settings.clone();
    Move::start(shared, &migrate.uri, &settings, |_| ())?;
    Ok(json!({}))
}

/// Godwit's way: with options for this move alone.
pub(super) fn godwit_migrate(shared: &Arc<Shared>, command: &str, given: Arguments) -> Answer {
    #[derive(Deserialize)]
    #[serde(deny_unknown_fields, rename_all = "kebab-case")]
    struct Migrate {
        uri: String,
        #[serde(default)]
        parameters: Parameters,
        #[serde(default)]
        dry_run: bool,
        #[serde(default)]
        pause_before_switchover: bool,
        #[serde(default)]
        hold_at: Option<Phase>,
        /// `none`: only if the machine has no claims.
        #[serde(default)]
        ownership: Option<String>,
    }
    let migrate: Migrate = arguments(command, given)?;
    let mut settings = shared.state().settings.clone();
    settings.apply(&migrate.parameters).map_err(failed)?;
    if let Some(channels) = migrate.parameters.multifd_channels {
        settings.multifd = channels > 1;
    }
    let holding = shared.state().holding.clone();
    if let (Some(holding), Some(_)) = (&holding, &migrate.ownership) {
        return Err(QmpError::generic(format!(
            "--ownership none: the machine was started with claims, in {}, and moves with them",
            holding.directory().display()
        )));
    }
    let number = Move::start(shared, &migrate.uri, &settings, |options| {
        options.dry_run = migrate.dry_run;
        options.pause_before_switchover |= migrate.pause_before_switchover;
        options.hold_at = migrate.hold_at;
    })?;
    let ownership =
        holding.map(|holding| json!({ "directory": holding.directory(), "epoch": holding.claim().epoch.get() }));
    Ok(json!({ "move": number, "ownership": ownership }))
}

pub(super) fn cancel(shared: &Arc<Shared>, command: &str, given: Arguments) -> Answer {
    let NoArguments {} = arguments(command, given)?;
    // As in QEMU, cancelling when there is nothing to cancel is no error.
    if let Some(current) = active(shared) {
        current.cancel().map_err(failed)?;
    }
    Ok(json!({}))
}

pub(super) fn migrate_continue(shared: &Arc<Shared>, command: &str, given: Arguments) -> Answer {
    #[derive(Deserialize)]
    #[serde(deny_unknown_fields)]
    struct Continue {
        state: String,
    }
    let wanted: Continue = arguments(command, given)?;
    let Some(current) = active(shared) else { return Err(QmpError::generic("no move is running")) };
    let status = current.status();
    if wanted.state != "pre-switchover" || !current.engine.proceed() {
        return Err(QmpError::generic(format!(
            "the move is not waiting in `{}`: its status is `{status}`",
            wanted.state
        )));
    }
    Ok(json!({}))
}

/// QEMU's command: the guest goes on at the destination before all of its memory is there.
pub(super) fn start_postcopy(shared: &Arc<Shared>, command: &str, given: Arguments) -> Answer {
    let NoArguments {} = arguments(command, given)?;
    let Some(current) = active(shared) else { return Err(QmpError::generic("no move is running")) };
    current.engine.go_over_to_postcopy().map_err(failed)?;
    Ok(json!({}))
}

pub(super) fn release_hold(shared: &Arc<Shared>, command: &str, given: Arguments) -> Answer {
    let NoArguments {} = arguments(command, given)?;
    let Some(current) = active(shared) else { return Err(QmpError::generic("no move is running")) };
    current.engine.release_hold();
    Ok(json!({}))
}

pub(super) fn set_parameters(shared: &Arc<Shared>, command: &str, given: Arguments) -> Answer {
    let parameters: Parameters = arguments(command, given)?;
    let mut state = shared.state();
    if let Some(current) = state.active_move() {
        parameters.apply_in_flight(&current.engine).map_err(failed)?;
    }
    state.settings.apply(&parameters).map_err(failed)?;
    Ok(json!({}))
}

pub(super) fn query_parameters(shared: &Arc<Shared>, command: &str, given: Arguments) -> Answer {
    let NoArguments {} = arguments(command, given)?;
    let state = shared.state();
    let mut parameters = state.settings.parameters();
    if let Some(progress) = state.active_move().map(|current| current.engine.progress()) {
        parameters.max_bandwidth = Some(progress.max_bandwidth_bytes_per_s.unwrap_or(0));
        parameters.downtime_limit = Some(whole(progress.downtime_limit_ms));
    }
    Ok(json!(parameters))
}

pub(super) fn set_capabilities(shared: &Arc<Shared>, command: &str, given: Arguments) -> Answer {
    #[derive(Deserialize)]
    #[serde(deny_unknown_fields)]
    struct Set {
        capabilities: Vec<CapabilityState>,
    }
    let set: Set = arguments(command, given)?;
    let mut state = shared.state();
    if state.active_move().is_some() {
        return Err(QmpError::generic("a move is running: capabilities cannot be changed"));
    }
    state.settings.set_capabilities(&set.capabilities).map_err(QmpError::generic)?;
    Ok(json!({}))
}

pub(super) fn query_capabilities(shared: &Arc<Shared>, command: &str, given: Arguments) -> Answer {
    let NoArguments {} = arguments(command, given)?;
    Ok(shared.state().settings.capabilities())
}

pub(super) fn query_migrate(shared: &Arc<Shared>, command: &str, given: Arguments) -> Answer {
    let NoArguments {} = arguments(command, given)?;
    let state = shared.state();
    if let Some(last) = &state.last_move {
        return Ok(migration_info(last));
    }
    // Nothing was sent from here: what came in, if anything.
    let incoming = state.incoming.as_ref().map(|incoming| incoming.phase.map_or("setup", status_of));
    let filling = state.filling.then_some("postcopy-active");
    match incoming.or(filling).or(state.arrived.then_some("completed")) {
        Some(status) => Ok(json!({ "status": status })),
        None => Ok(json!({})),
    }
}

/// The move as QEMU tells of it.
fn migration_info(last: &Move) -> Value {
    let progress = last.engine.progress();
    let outcome = last.outcome();
    let mut info = Map::new();
    let mut put = |name: &str, value: Value| info.insert(name.to_owned(), value);
    put("status", json!(last.status()));
    if last.dry_run {
        return Value::Object(info);
    }
    put("total-time", json!(whole(outcome.map_or(progress.elapsed_ms, |outcome| outcome.total_ms))));
    put("setup-time", json!(whole(progress.setup_ms)));
    match outcome.map_or(progress.downtime_ms, |outcome| outcome.downtime_ms) {
        Some(downtime_ms) => put("downtime", json!(whole(downtime_ms))),
        None => {
            put("expected-downtime", json!(whole(progress.predicted_pause_ms.unwrap_or(progress.downtime_limit_ms))))
        }
    };
    if let Some(reason) = outcome.map(|outcome| outcome.reasons.join("; ")).filter(|reasons| !reasons.is_empty()) {
        put("error-desc", json!(reason));
    }
    let pages = progress.pages;
    let normal = pages.raw + pages.zstd;
    let page_bytes = PAGE_SIZE as u64;
    put(
        "ram",
        json!({
            "transferred": progress.wire_bytes,
            "remaining": progress.remaining_bytes,
            "total": progress.total_bytes,
            "duplicate": pages.zero,
            "normal": normal,
            "normal-bytes": normal.saturating_mul(page_bytes),
            "dirty-pages-rate": whole(progress.dirty_pages_per_s),
            "mbps": progress.rate_bytes_per_s * 8.0 / 1e6,
            "dirty-sync-count": progress.round + 1,
            "page-size": page_bytes,
            "pages-per-second": whole(progress.rate_bytes_per_s / PAGE_SIZE as f64),
            "precopy-bytes": progress.wire_bytes.saturating_sub(progress.postcopy.wire_bytes),
            "downtime-bytes": 0,
            "postcopy-bytes": progress.postcopy.wire_bytes,
            "postcopy-requests": progress.postcopy.by_fault,
        }),
    );
    Value::Object(info)
}

/// The move as Godwit tells of it.
pub(super) fn godwit_query_migrate(shared: &Arc<Shared>, command: &str, given: Arguments) -> Answer {
    let NoArguments {} = arguments(command, given)?;
    let state = shared.state();
    let Some(last) = &state.last_move else { return Ok(json!({ "active": false })) };
    Ok(json!({
        "active": last.outcome().is_none(),
        "move": last.number,
        "uri": last.uri,
        "dry-run": last.dry_run,
        "status": last.status(),
        "progress": last.engine.progress(),
        "outcome": last.outcome(),
    }))
}

fn active(shared: &Shared) -> Option<Arc<Move>> {
    shared.state().active_move().cloned()
}

fn whole(value: f64) -> u64 {
    // Saturates; what is not a number becomes 0.
    value.round() as u64
}
