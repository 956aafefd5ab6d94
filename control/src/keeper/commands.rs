//! The commands of the control socket: which there are, and those about the machine. (docs/control.md)

use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use godwit_core::SourceMachine;
use godwit_vmm::Announced;
use serde::Deserialize;
use serde_json::{Value, json};

use super::state::{Shared, Wake};
use super::{doubt, estimate, guest_commands, move_commands};
use crate::qmp::message::{arguments, version};
use crate::qmp::{Answer, Arguments, Caller, Handler, QmpError};

/// How long `stop` may take.
pub(super) const PAUSE_LIMIT: Duration = Duration::from_secs(10);

/// Bytes that `pmemsave` writes at a time.
const SAVE_BUFFER_BYTES: usize = 1 << 20;

type Execute = fn(&Arc<Shared>, &str, Arguments) -> Answer;

/// Every command, by name.
const COMMANDS: &[(&str, Execute)] = &[
    ("announce-self", announce_self),
    ("cont", cont),
    ("migrate", move_commands::migrate),
    ("migrate-continue", move_commands::migrate_continue),
    ("migrate-set-capabilities", move_commands::set_capabilities),
    ("migrate-set-parameters", move_commands::set_parameters),
    ("migrate-start-postcopy", move_commands::start_postcopy),
    ("migrate_cancel", move_commands::cancel),
    ("pmemsave", pmemsave),
    ("query-block", query_block),
    ("query-commands", query_commands),
    ("query-cpus-fast", query_cpus_fast),
    ("query-guest-ram", query_guest_ram),
    ("query-migrate", move_commands::query_migrate),
    ("query-migrate-capabilities", move_commands::query_capabilities),
    ("query-migrate-parameters", move_commands::query_parameters),
    ("query-name", query_name),
    ("query-status", query_status),
    ("query-uuid", query_uuid),
    ("query-version", query_version),
    ("quit", quit),
    ("stop", stop),
    ("system_powerdown", system_powerdown),
    ("system_reset", system_reset),
    ("x-godwit-abandon", doubt::abandon),
    ("x-godwit-guest", guest_commands::guest),
    ("x-godwit-guest-check", guest_commands::check),
    ("x-godwit-machine-definition", machine_definition),
    ("x-godwit-migrate", move_commands::godwit_migrate),
    ("x-godwit-query-migrate", move_commands::godwit_query_migrate),
    ("x-godwit-query-ownership", doubt::query),
    ("x-godwit-release-hold", move_commands::release_hold),
    ("x-godwit-resume-force", doubt::resume_force),
];

/// Executes clients' commands on what the keeper keeps.
pub(super) struct Commands(pub(super) Arc<Shared>);

/// The one command that takes seconds, and ends when its caller is gone.
const ESTIMATE: &str = "x-godwit-estimate";

impl Handler for Commands {
    fn execute(&self, caller: &Caller, command: &str, arguments: Arguments) -> Answer {
        match COMMANDS.iter().find(|(name, _)| *name == command) {
            Some((_, execute)) => execute(&self.0, command, arguments),
            None if command == ESTIMATE => estimate::estimate(&self.0, caller, command, arguments),
            None => Err(QmpError::command_not_found(command)),
        }
    }
}

/// The arguments of a command that takes none.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct NoArguments {}

fn query_commands(_: &Arc<Shared>, command: &str, given: Arguments) -> Answer {
    let NoArguments {} = arguments(command, given)?;
    let own = COMMANDS.iter().map(|(name, _)| *name);
    Ok(own.chain([ESTIMATE, "qmp_capabilities"]).map(|name| json!({ "name": name })).collect())
}

fn query_version(_: &Arc<Shared>, command: &str, given: Arguments) -> Answer {
    let NoArguments {} = arguments(command, given)?;
    Ok(version())
}

fn query_status(shared: &Arc<Shared>, command: &str, given: Arguments) -> Answer {
    let NoArguments {} = arguments(command, given)?;
    let status = shared.state().run_state();
    Ok(json!({ "status": status, "running": status == "running", "singlestep": false }))
}

fn query_name(shared: &Arc<Shared>, command: &str, given: Arguments) -> Answer {
    let NoArguments {} = arguments(command, given)?;
    Ok(json!({ "name": shared.state().name }))
}

fn query_uuid(_: &Arc<Shared>, command: &str, given: Arguments) -> Answer {
    let NoArguments {} = arguments(command, given)?;
    // What QEMU answers for a machine that was given none.
    Ok(json!({ "UUID": "00000000-0000-0000-0000-000000000000" }))
}

fn query_cpus_fast(shared: &Arc<Shared>, command: &str, given: Arguments) -> Answer {
    let NoArguments {} = arguments(command, given)?;
    let cpus = shared.machine()?.cpus();
    Ok(cpus
        .iter()
        .map(|cpu| {
            json!({
                "cpu-index": cpu.index,
                "thread-id": cpu.thread_id,
                "qom-path": format!("/machine/vcpu/{}", cpu.index),
                "target": "x86_64",
            })
        })
        .collect())
}

fn query_block(_: &Arc<Shared>, command: &str, given: Arguments) -> Answer {
    let NoArguments {} = arguments(command, given)?;
    Ok(json!([]))
}

fn query_guest_ram(shared: &Arc<Shared>, command: &str, given: Arguments) -> Answer {
    let NoArguments {} = arguments(command, given)?;
    let regions = shared.machine()?.ram();
    Ok(regions
        .iter()
        .map(|region| {
            json!({
                "guest-address": region.guest_address,
                "size": region.size_bytes,
                "host-address": region.host_address,
                "kind": region.kind,
            })
        })
        .collect())
}

fn machine_definition(shared: &Arc<Shared>, command: &str, given: Arguments) -> Answer {
    let NoArguments {} = arguments(command, given)?;
    let toml = shared.machine()?.config().to_toml().map_err(failed)?;
    Ok(json!({ "toml": toml }))
}

fn stop(shared: &Arc<Shared>, command: &str, given: Arguments) -> Answer {
    let NoArguments {} = arguments(command, given)?;
    let _operation = shared.operation();
    let machine = shared.machine_at_rest()?;
    if machine.is_running() {
        machine.pause(PAUSE_LIMIT).map_err(failed)?;
        shared.hub.publish("STOP", Value::Null);
    }
    Ok(json!({}))
}

fn cont(shared: &Arc<Shared>, command: &str, given: Arguments) -> Answer {
    let NoArguments {} = arguments(command, given)?;
    let _operation = shared.operation();
    resume(shared)
}

pub(super) fn resume(shared: &Arc<Shared>) -> Answer {
    let machine = shared.machine_at_rest()?;
    if !machine.is_running() {
        machine.resume().map_err(failed)?;
        shared.hub.publish("RESUME", Value::Null);
    }
    Ok(json!({}))
}

fn system_powerdown(shared: &Arc<Shared>, command: &str, given: Arguments) -> Answer {
    let NoArguments {} = arguments(command, given)?;
    let _operation = shared.operation();
    if !shared.machine_at_rest()?.powerdown().map_err(failed)? {
        return Err(QmpError::generic(
            "the guest does not listen to its power button (it has no ACPI driver for it, or is still starting): power off \
             from inside it, or `quit`",
        ));
    }
    shared.hub.publish("POWERDOWN", Value::Null);
    Ok(json!({}))
}

fn system_reset(shared: &Arc<Shared>, command: &str, given: Arguments) -> Answer {
    let NoArguments {} = arguments(command, given)?;
    let _operation = shared.operation();
    // The machine itself tells of the reset.
    shared.machine_at_rest()?.reset().map_err(failed)?;
    Ok(json!({}))
}

fn announce_self(shared: &Arc<Shared>, command: &str, given: Arguments) -> Answer {
    // QEMU's timing is taken and not used: the rounds are fixed.
    #[derive(Deserialize)]
    #[serde(deny_unknown_fields)]
    struct Announce {
        #[serde(default, rename = "initial")]
        _initial: u64,
        #[serde(default, rename = "max")]
        _max: u64,
        #[serde(default, rename = "rounds")]
        _rounds: u64,
        #[serde(default, rename = "step")]
        _step: u64,
    }
    let _: Announce = arguments(command, given)?;
    let _operation = shared.operation();
    let announced = shared.machine_at_rest()?.announce().map_err(failed)?;
    let frames = |interface: &Announced| json!({ "id": interface.id, "frames": interface.frames });
    Ok(json!({ "x-godwit-first-round": announced.iter().map(frames).collect::<Vec<_>>() }))
}

fn quit(shared: &Arc<Shared>, command: &str, given: Arguments) -> Answer {
    let NoArguments {} = arguments(command, given)?;
    if shared.state().is_in_doubt() {
        return Err(QmpError::generic(
            "nobody knows yet who has the machine, and its memory may be here alone: `abandon` (x-godwit-abandon) says that this copy is \
             never to run, and ends it",
        ));
    }
    let _ = shared.wake.send(Wake::Quit);
    Ok(json!({}))
}

fn pmemsave(shared: &Arc<Shared>, command: &str, given: Arguments) -> Answer {
    #[derive(Deserialize)]
    #[serde(deny_unknown_fields)]
    struct Save {
        val: u64,
        size: u64,
        filename: PathBuf,
    }
    let save: Save = arguments(command, given)?;
    let machine = shared.machine()?;
    let path = save.filename.display();
    let file =
        File::create(&save.filename).map_err(|error| QmpError::generic(format!("cannot create {path}: {error}")))?;
    let mut writer = BufWriter::with_capacity(SAVE_BUFFER_BYTES, file);
    machine.write_memory_to(save.val, save.size, &mut writer).map_err(failed)?;
    writer.flush().map_err(|error| QmpError::generic(format!("cannot write {path}: {error}")))?;
    Ok(json!({}))
}

/// An error with everything that caused it.
pub(super) fn failed(error: impl std::error::Error + 'static) -> QmpError {
    QmpError::generic(crate::error_chain(&error))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn commands_are_in_order_and_documented() {
        assert!(COMMANDS.is_sorted_by_key(|(name, _)| *name));
        let document = include_str!("../../../docs/control.md");
        for name in COMMANDS.iter().map(|(name, _)| *name).chain([ESTIMATE]) {
            assert!(document.contains(&format!("`{name}`")), "docs/control.md does not mention {name}");
        }
    }
}
