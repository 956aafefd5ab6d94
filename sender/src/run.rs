//! `run`: boots a machine and keeps it until it has ended or moved.

use std::fs;
use std::path::Path;
use std::process::ExitCode;

use anyhow::Context;
use godwit_control::console::{EXIT_INTERNAL, EXIT_LOST, LogArgs, default_control_path, events_to_stdout, out, say};
use godwit_control::keeper::{End, Keeper};
use godwit_control::parameters::Settings;
use godwit_control::qmp::Hub;
use godwit_control::qmp::socket::ControlSocket;
use godwit_vmm::config::{GuestKind, SerialTarget};
use godwit_vmm::{BootOptions, Machine, MachineConfig, VmmError, workload};
use serde_json::json;

use crate::cli::RunArgs;
use crate::{Failure, ownership};

/// Boots the machine and keeps it.
pub(crate) fn run(args: &RunArgs, log: &LogArgs, json: bool) -> Result<ExitCode, Failure> {
    let config = config(args)?;
    if let Some(path) = &args.export_elf {
        return export_elf(&config, path);
    }
    let serial_on_stdout = config.serial == SerialTarget::Stdio;
    if json && serial_on_stdout {
        return Err(Failure::Usage("--json and --serial stdio both want stdout: choose one".into()));
    }
    log.start()?;
    let control = args.control.clone().unwrap_or_else(|| default_control_path(&config.name));
    let hub = Hub::new();
    if json {
        events_to_stdout(&hub)?;
    }
    // The claims come first: of a machine that is running already they say more than its control socket does.
    let holding = ownership::claim(&args.claims, &config)?;
    let booted = boot(&config, args.paused, &control);
    if let (Err(_), Some(holding)) = (&booted, &holding) {
        // Nothing has run: whoever can boot it may.
        ownership::free(holding);
    }
    let (socket, machine) = booted?;
    let mut settings = Settings { insecure: args.insecure, ..Settings::default() };
    if let Some(name) = &args.claims.host_id {
        settings.options.host_name = name.to_string();
    }
    let keeper = Keeper::start(socket, &config.name, settings, hub.clone())?;
    if let Some(holding) = holding {
        keeper.handle().hold(holding);
    }
    keeper.handle().adopt(machine, false)?;
    let control = control.display();
    hub.publish(
        "GODWIT_RUNNING",
        json!({ "name": config.name, "control": control.to_string(), "pid": std::process::id() }),
    );
    let state = if args.paused { "is ready, paused" } else { "runs" };
    let line = format!("machine `{}` {state}; control socket {control}", config.name);
    if json || serial_on_stdout {
        say(line)
    } else {
        out(line)
    }
    Ok(tell(&keeper.run()))
}

/// A second machine of the same name ends at the control socket, before it runs.
fn boot(config: &MachineConfig, start_paused: bool, control: &Path) -> Result<(ControlSocket, Machine), Failure> {
    let socket = ControlSocket::bind(control)?;
    let machine = Machine::boot(config, &BootOptions { start_paused });
    Ok((socket, machine.map_err(|error| cannot_boot(&config.name, error))?))
}

fn cannot_boot(name: &str, error: VmmError) -> Failure {
    match error {
        VmmError::ImageInUse { .. } => Failure::Refused(format!("the machine `{name}` is not booted: {error}")),
        error => Failure::Internal(anyhow::Error::new(error).context(format!("cannot boot the machine `{name}`"))),
    }
}

/// The file with the options laid over it.
fn config(args: &RunArgs) -> Result<MachineConfig, Failure> {
    let usage = |error: &dyn std::error::Error| Failure::Usage(godwit_control::error_chain(error));
    let mut config = match &args.file {
        Some(path) => MachineConfig::from_file(path).map_err(|error| usage(&error))?,
        None => MachineConfig::default(),
    };
    args.machine.apply(&mut config);
    config.validate().map_err(|error| usage(&error))?;
    Ok(config)
}

fn export_elf(config: &MachineConfig, path: &Path) -> Result<ExitCode, Failure> {
    if config.guest != Some(GuestKind::Writer) {
        return Err(Failure::Usage("--export-elf writes the workload guest: give --guest writer too".into()));
    }
    let writer = config.writer.clone().unwrap_or_default();
    fs::write(path, workload::elf(&writer)).with_context(|| format!("cannot write {}", path.display()))?;
    say(format_args!("wrote the workload guest to {}", path.display()));
    Ok(ExitCode::SUCCESS)
}

fn tell(end: &End) -> ExitCode {
    let (line, code) = match end {
        End::Moved(uri) => (format!("the machine has moved to {uri}"), ExitCode::SUCCESS),
        End::PoweredOff(why) => (format!("the guest has powered off: {why}"), ExitCode::SUCCESS),
        End::Abandoned => ("the machine was abandoned: the copy here is gone for good".into(), ExitCode::SUCCESS),
        End::Stopped(cause) => (format!("the machine was {cause}"), ExitCode::SUCCESS),
        End::Lost(why) => (format!("the machine is not this host's and was dropped: {why}"), ExitCode::from(EXIT_LOST)),
        End::Faulted(text) => (format!("the guest cannot be run on: {text}"), ExitCode::from(EXIT_INTERNAL)),
    };
    say(line);
    code
}
