//! The commands about the workload guest.

use std::sync::Arc;

use godwit_core::SourceMachine;
use godwit_vmm::Machine;
use godwit_vmm::workload::{self, CheckError, Header, Rate};
use serde::Deserialize;
use serde_json::{Value, json};

use super::commands::{NoArguments, PAUSE_LIMIT, failed};
use super::state::Shared;
use crate::qmp::message::arguments;
use crate::qmp::{Answer, Arguments, QmpError};

/// Sets the workload guest's rate, if one is given; tells how it is doing.
pub(super) fn guest(shared: &Arc<Shared>, command: &str, given: Arguments) -> Answer {
    #[derive(Deserialize)]
    #[serde(deny_unknown_fields)]
    struct Guest {
        rate: Option<Rate>,
    }
    let wanted: Guest = arguments(command, given)?;
    let memory = shared.machine()?.memory();
    let header = Header::new(&memory).map_err(failed)?;
    if let Some(rate) = wanted.rate {
        // What is written once the last pages are on their way would not arrive.
        if shared.state().active_move().is_some_and(|current| current.has_paused_guest()) {
            return Err(QmpError::generic("the guest is being handed over: set its rate at the destination"));
        }
        header.set_rate(rate).map_err(failed)?;
    }
    let page = header.snapshot().map_err(failed)?;
    Ok(json!({
        "status": page.status().to_string(),
        "rate": page.rate(),
        "vcpus": page.vcpus(),
        "heartbeats": page.heartbeats(),
        "writes": page.writes(),
    }))
}

/// Checks every page of the workload guest, which is paused meanwhile.
pub(super) fn check(shared: &Arc<Shared>, command: &str, given: Arguments) -> Answer {
    let NoArguments {} = arguments(command, given)?;
    let _operation = shared.operation();
    let machine = shared.machine()?;
    if let Some(current) = shared.state().active_move() {
        let text = format!("the guest is being moved to {}: it cannot be paused for a check", current.uri);
        return Err(QmpError::generic(text));
    }
    if !machine.is_running() {
        return verdict(&machine);
    }
    machine.pause(PAUSE_LIMIT).map_err(failed)?;
    shared.hub.publish("STOP", Value::Null);
    let verdict = verdict(&machine);
    machine.resume().map_err(failed)?;
    shared.hub.publish("RESUME", Value::Null);
    verdict
}

fn verdict(machine: &Machine) -> Answer {
    match workload::check(&machine.memory()) {
        Ok(report) => {
            let mut answer = json!(report);
            answer["ok"] = json!(true);
            Ok(answer)
        }
        Err(CheckError::Mismatch(mismatches)) => {
            let mut answer = json!(mismatches.report);
            answer["ok"] = json!(false);
            answer["pages_wrong"] = json!(mismatches.pages);
            answer["wrong"] = mismatches.described.iter().map(|mismatch| json!(mismatch.to_string())).collect();
            Ok(answer)
        }
        Err(error) => Err(failed(error)),
    }
}
