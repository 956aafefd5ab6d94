//! The program `godwit-receiver`: waits for a machine, takes it in, and keeps it until it ends or is sent onward.

mod cli;
mod reception;

use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;
use std::thread;

use clap::Parser;
use godwit_control::console::{
    CONTROL_DIRECTORY, EXIT_INTERNAL, EXIT_LOST, EXIT_USAGE, events_to_stdout, host_name, say,
};
use godwit_control::keeper::{End, Keeper};
use godwit_control::parameters::Settings;
use godwit_control::qmp::Hub;
use godwit_control::qmp::socket::ControlSocket;
use godwit_core::destination::DestinationOptions;
use godwit_core::ownership::Host;
use godwit_core::ownership::host::INSTANCES;
use godwit_transport::TransportError;
use godwit_vmm::config::SerialTarget;

use crate::cli::Cli;
use crate::reception::Reception;

/// The program: reads the command line, does what it says, and tells by the exit code what came of it.
pub fn main() -> ExitCode {
    // Wrong usage ends the process here, with exit code 2.
    let cli = Cli::parse();
    if cli.json && cli.serial == SerialTarget::Stdio {
        say("error: --json and --serial stdio both want stdout: choose one");
        return ExitCode::from(EXIT_USAGE);
    }
    match run(&cli) {
        Ok(end) => tell(&end),
        Err(error) => {
            say(format_args!("error: {}", godwit_control::error_chain(error.as_ref())));
            // Clear text where it is not allowed is a matter of the command line.
            match error.downcast_ref() {
                Some(TransportError::ClearText { .. }) => ExitCode::from(EXIT_USAGE),
                _ => ExitCode::from(EXIT_INTERNAL),
            }
        }
    }
}

fn run(cli: &Cli) -> anyhow::Result<End> {
    cli.log.start()?;
    let hub = Hub::new();
    if cli.json {
        events_to_stdout(&hub)?;
    }
    let name = format!("receiver-{}", std::process::id());
    let control = cli.control.clone().unwrap_or_else(|| Path::new(CONTROL_DIRECTORY).join(format!("{name}.sock")));
    let settings = Settings { insecure: cli.insecure, ..Settings::default() };
    let keeper = Keeper::start(ControlSocket::bind(&control)?, &name, settings, hub)?;
    let listener = godwit_transport::listen(
        &cli.listen,
        godwit_transport::Options { insecure: cli.insecure, ..Default::default() },
    )?;
    let host_name = cli.host_id.as_ref().map_or_else(host_name, ToString::to_string);
    let claims = match Host::register(cli.host_id.clone(), Path::new(INSTANCES)) {
        Ok(host) => Some(cli.claim_options(host)),
        Err(error) => {
            tracing::warn!("machines with claims cannot be taken in: {error}");
            None
        }
    };
    let reception = Arc::new(Reception {
        listener,
        keeper: keeper.handle(),
        host: cli.host_options(),
        options: DestinationOptions { hold: cli.hold, host_name, claims, ..DestinationOptions::default() },
        json: cli.json,
    });
    say(format_args!("control socket {}", control.display()));
    reception.say_listening();
    thread::Builder::new().name("reception".into()).spawn(move || {
        if let Err(error) = reception.run() {
            say(format_args!("no machine can come in any more: {error}"));
        }
    })?;
    Ok(keeper.run())
}

fn tell(end: &End) -> ExitCode {
    let (line, code) = match end {
        End::Moved(uri) => (format!("the machine has moved on to {uri}"), ExitCode::SUCCESS),
        End::PoweredOff(why) => (format!("the guest has powered off: {why}"), ExitCode::SUCCESS),
        End::Abandoned => ("the machine was abandoned: the copy here is gone for good".into(), ExitCode::SUCCESS),
        End::Stopped(cause) => (cause.to_string(), ExitCode::SUCCESS),
        End::Lost(why) => (format!("the machine is not this host's and was dropped: {why}"), ExitCode::from(EXIT_LOST)),
        End::Faulted(text) => (format!("the guest cannot be run on: {text}"), ExitCode::from(EXIT_INTERNAL)),
    };
    say(line);
    code
}
